"""TokenAdapt: agreement with a plain forward under the released names, shapes, gradients, files, its objective."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from seitpp.augment import Keys, apply_geometry, random_geometry
from seitpp.models import ModelError, TokenAdapt, load_tokenadapt
from seitpp.models.tokenadapt import tokenadapt_from_release, tokenadapt_to_release
from seitpp.objectives.adapt import (
    MEASURES,
    adapt_loss,
    augment_directly,
    augment_in_every_way,
    compare,
    token_accuracy,
    tokenizer_pair,
)
from seitpp.tokenizers import PatchKMeans, TokenizerError, TokenizerSpec
from seitpp.tokens.codebook import embed
from seitpp.tokens.photographs import PhotographWindows

UNTOUCHED = {"flip": 0.0, "affine": 0.0, "scale": None}


def small_model(**changes) -> TokenAdapt:
    settings = {
        "grid": (4, 4),
        "crop": (3, 3),
        "num_codes": 11,
        "code_dim": 6,
        "width": 32,
        "heads": 2,
        "mlp": 40,
    }
    torch.manual_seed(0)
    return TokenAdapt(**{**settings, **changes})


def released_state(grid: int, crop: int, codes: int, dim: int, width: int, heads: int, mlp: int) -> dict:
    """Random tensors under every released name."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / 8

    def transformer(prefix: str) -> dict:
        block = f"{prefix}.layers.0"
        norms = {
            f"{norm}.{part}": draw(width) + (part == "weight")
            for norm in (f"{block}.0.norm", f"{block}.1.norm", f"{prefix}.norm")
            for part in ("weight", "bias")
        }
        return norms | {
            f"{block}.0.fn.to_qkv.weight": draw(3 * heads * 64, width),
            f"{block}.0.fn.to_out.weight": draw(width, heads * 64),
            f"{block}.0.fn.to_out.bias": draw(width),
            f"{block}.1.fn.net.0.weight": draw(mlp, width),
            f"{block}.1.fn.net.0.bias": draw(mlp),
            f"{block}.1.fn.net.2.weight": draw(width, mlp),
            f"{block}.1.fn.net.2.bias": draw(width),
        }

    return {
        "conversion_function.0.weight": draw(width, dim),
        "conversion_function.0.bias": draw(width),
        "conversion_function.1.de_pos_embedding": draw(1, grid * grid, width),
        **transformer("conversion_function.1.transformer"),
        "conversion_function.1.to_pixel.1.weight": draw(width, dim, 2, 2),
        "conversion_function.1.to_pixel.1.bias": draw(dim),
        "reverse_transform.0.en_pos_embedding": draw(1, crop * crop, width),
        "reverse_transform.0.to_patch_embedding.0.weight": draw(width, dim, 2, 2),
        "reverse_transform.0.to_patch_embedding.0.bias": draw(width),
        **transformer("reverse_transform.0.transformer"),
        "reverse_transform.1.weight": draw(codes, width),
        "reverse_transform.1.bias": draw(codes),
    }


def plain_transformer(tokens: Tensor, state: dict, prefix: str) -> Tensor:
    """One pre-norm block of heads of 64 and a LayerNorm, matrix by matrix."""

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(dim=-1, keepdim=True)
        scaled = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
        return scaled * state[f"{prefix}.{name}.weight"] + state[f"{prefix}.{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{prefix}.{name}.weight"].T + state.get(f"{prefix}.{name}.bias", 0)

    queries, keys, values = linear(norm(tokens, "layers.0.0.norm"), "layers.0.0.fn.to_qkv").chunk(3, dim=-1)
    heads = []
    for q, k, v in zip(*(part.split(64, dim=-1) for part in (queries, keys, values)), strict=True):
        heads.append((q @ k.transpose(1, 2) / 8).softmax(dim=-1) @ v)
    tokens = tokens + linear(torch.cat(heads, dim=-1), "layers.0.0.fn.to_out")
    hidden = linear(norm(tokens, "layers.0.1.norm"), "layers.0.1.fn.net.0").tanh()
    return norm(tokens + linear(hidden, "layers.0.1.fn.net.2"), "norm")


def plain_convert(maps: Tensor, state: dict) -> Tensor:
    """f, token by token."""
    name = "conversion_function"
    batch, _, height, width = maps.shape
    tokens = maps.permute(0, 2, 3, 1).reshape(batch, height * width, -1)
    tokens = tokens @ state[f"{name}.0.weight"].T + state[f"{name}.0.bias"] + state[f"{name}.1.de_pos_embedding"]
    tokens = plain_transformer(tokens, state, f"{name}.1.transformer")
    patches = torch.einsum("bnc,cdpq->bndpq", tokens, state[f"{name}.1.to_pixel.1.weight"])
    out = torch.zeros(batch, patches.shape[2], 2 * height, 2 * width)
    for at in range(height * width):
        row, column = divmod(at, width)
        out[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = patches[:, at]
    return out + state[f"{name}.1.to_pixel.1.bias"].view(-1, 1, 1)


def plain_invert(maps: Tensor, state: dict) -> Tensor:
    """g, token by token."""
    name = "reverse_transform"
    weight, tokens = state[f"{name}.0.to_patch_embedding.0.weight"], []
    for row in range(0, maps.shape[2], 2):
        for column in range(0, maps.shape[3], 2):
            patch = maps[:, :, row : row + 2, column : column + 2]
            tokens.append(torch.einsum("bdpq,cdpq->bc", patch, weight))
    tokens = torch.stack(tokens, dim=1) + state[f"{name}.0.to_patch_embedding.0.bias"]
    tokens = plain_transformer(tokens + state[f"{name}.0.en_pos_embedding"], state, f"{name}.0.transformer")
    logits = tokens @ state[f"{name}.1.weight"].T + state[f"{name}.1.bias"]
    return logits.transpose(1, 2).reshape(len(maps), -1, maps.shape[2] // 2, maps.shape[3] // 2)


def test_a_released_state_gives_the_plain_forward() -> None:
    state = released_state(grid=5, crop=3, codes=13, dim=6, width=48, heads=2, mlp=40)
    model = tokenadapt_from_release(state)
    assert not model.training and model.settings == {
        "grid": (5, 5),
        "crop": (3, 3),
        "num_codes": 13,
        "code_dim": 6,
        "width": 48,
        "heads": 2,
        "mlp": 40,
    }
    whole, augmented = torch.randn(2, 6, 5, 5), torch.randn(2, 6, 6, 6)
    space, logits = model.convert(whole), model.invert(augmented)
    assert space.shape == (2, 6, 10, 10) and logits.shape == (2, 13, 3, 3)
    torch.testing.assert_close(space, plain_convert(whole, state), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits, plain_invert(augmented, state), atol=1e-5, rtol=1e-5)
    back = tokenadapt_to_release(model)
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)


def test_other_states_are_refused() -> None:
    state = released_state(grid=4, crop=3, codes=7, dim=4, width=32, heads=1, mlp=16)
    name = "reverse_transform.0.transformer.norm.bias"
    with pytest.raises(ModelError, match=rf"{name} is missing, expected \(32,\)$"):
        tokenadapt_from_release({key: tensor for key, tensor in state.items() if key != name})
    with pytest.raises(ModelError, match=rf"TokenAdapt: {name} is \(31,\), expected \(32,\)"):
        tokenadapt_from_release({**state, name: torch.zeros(31)})
    with pytest.raises(ModelError, match=r"conversion_function\.0\.weight, .*missing"):
        tokenadapt_from_release({})
    with pytest.warns(UserWarning, match="does not use other.weight"):
        tokenadapt_from_release({**state, "other.weight": torch.zeros(1)})


def test_published_size() -> None:
    model = TokenAdapt()
    assert sum(p.numel() for p in model.parameters()) == 3_810_087
    assert model.convert(torch.randn(1, 32, 32, 32)).shape == (1, 32, 64, 64)
    assert model.invert(torch.randn(1, 32, 56, 56)).shape == (1, 391, 28, 28)


@pytest.mark.parametrize(("grid", "crop"), [((4, 4), (4, 4)), ((6, 4), (5, 3))])
def test_any_grid(grid: tuple[int, int], crop: tuple[int, int]) -> None:
    model = small_model(grid=grid, crop=crop)
    assert model.convert(torch.randn(2, 6, *grid)).shape == (2, 6, 2 * grid[0], 2 * grid[1])
    assert model.invert(torch.randn(2, 6, 2 * crop[0], 2 * crop[1])).shape == (2, 11, *crop)


def batch() -> tuple[Tensor, Tensor, tuple]:
    generator = torch.Generator().manual_seed(2)
    maps = torch.randn(8, 6, 4, 4, generator=generator)
    ids = torch.randint(11, (8, 3, 3), generator=generator)
    return maps, ids, random_geometry(Keys(0, 0, torch.arange(8)), 4, 3)


def test_forward_is_convert_augment_invert() -> None:
    model, (maps, ids, geometry) = small_model(), batch()
    torch.nn.init.normal_(model.head.weight)
    expected = model.invert(apply_geometry(model.convert(maps), geometry))
    assert torch.equal(model(maps, geometry), expected)
    assert adapt_loss(expected, ids).item() == pytest.approx(
        -expected.log_softmax(dim=1).gather(1, ids.unsqueeze(1)).mean().item(), rel=1e-5
    )


def test_first_loss_is_ln_k_and_every_parameter_learns() -> None:
    model, (maps, ids, geometry) = small_model(), batch()
    loss = adapt_loss(model(maps, geometry), ids)
    assert loss.item() == pytest.approx(math.log(11), rel=1e-6)
    torch.nn.init.normal_(model.head.weight, std=0.02)  # from zero, it is the only one that moves at first
    adapt_loss(model(maps, geometry), ids).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_half_precision_moves_nothing() -> None:
    """Autocast leaves the geometry alone: coordinates of 8 bits would be cells apart."""
    model, (maps, _, geometry) = small_model().eval(), batch()
    torch.nn.init.normal_(model.head.weight)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(maps, geometry)
    assert F.cosine_similarity(logits.float().flatten(1), model(maps, geometry).flatten(1)).min() > 0.999


def test_save_and_load(tmp_path) -> None:
    model, (maps, _, geometry) = small_model(), batch()
    torch.nn.init.normal_(model.head.weight)
    model.save(tmp_path / "model.safetensors", codebook="abc")
    loaded, codebook = load_tokenadapt(tmp_path / "model.safetensors")
    assert codebook == "abc" and torch.equal(loaded(maps, geometry), model(maps, geometry))
    with pytest.raises(ModelError, match=r"no model file at .*tokenadapt_train"):
        load_tokenadapt(tmp_path / "none.safetensors")


# ---------------------------------------------------------------------------------------------- its objective


def exact_tokenizer() -> PatchKMeans:
    """Codes are the eight colours with channels 0 or 1, in patches of 6 x 6 pixels."""
    tokenizer = PatchKMeans(TokenizerSpec("patch_kmeans", (24, 24), 6, 8, 4))
    colours = torch.tensor([[n >> 2 & 1, n >> 1 & 1, n & 1] for n in range(8)]).float()
    tokenizer.components.copy_(torch.eye(3).repeat_interleave(36, dim=1) / 36)
    tokenizer.mean.fill_(0.5)
    tokenizer.codebook.copy_(torch.cat([colours - 0.5, torch.full((8, 1), 3**0.5)], dim=1))
    return tokenizer.eval()


def test_direct_augmentation_of_flat_patches_is_exact_where_nothing_is_resampled() -> None:
    tokenizer = exact_tokenizer()
    ids = torch.randint(8, (4, 4, 4), generator=torch.Generator().manual_seed(3))
    keys = Keys(0, 0, torch.arange(4))
    mirror = random_geometry(keys, 4, 2, **{**UNTOUCHED, "flip": 1.0})
    assert torch.equal(augment_directly(ids, mirror, tokenizer), ids.flip(2)[:, 1:3, 1:3])


def test_every_way_and_its_figures() -> None:
    tokenizer = exact_tokenizer()
    pair = tokenizer_pair(tokenizer, 24, 2)
    assert (pair.whole.spec.grid, pair.augmented.spec.grid) == ((4, 4), (2, 2))
    assert tokenizer.spec.image_size == (24, 24)
    ids = torch.arange(16).view(1, 4, 4) % 8
    images = embed(ids, torch.tensor([[n >> 2 & 1, n >> 1 & 1, n & 1] for n in range(8)]).float())
    images = images.repeat_interleave(6, dim=2).repeat_interleave(6, dim=3)
    model = small_model(grid=(4, 4), crop=(2, 2), num_codes=8, code_dim=4)
    model.head.bias.data[5] = 1  # says 5 everywhere
    mirror = random_geometry(Keys(0, 0, torch.arange(1)), 4, 2, **{**UNTOUCHED, "flip": 1.0})
    made = augment_in_every_way(model, pair, images, mirror)
    assert torch.equal(made.images, images.flip(3)[:, :, 6:18, 6:18])
    assert made.ids.tolist() == made.direct.tolist() == [[[6, 5], [2, 1]]]
    assert made.tokenadapt.tolist() == [[[5, 5], [5, 5]]] and made.unchanged.tolist() == [[[5, 6], [1, 2]]]
    found = dict(zip(MEASURES, compare(made, pair.augmented)[0].tolist(), strict=True))
    assert found["accuracy_tokenadapt"] == 25 and found["accuracy_unchanged"] == 0
    assert found["accuracy_direct"] == 100 and found["psnr_direct"] == found["psnr_true_tokens"]
    assert found["psnr_tokenadapt"] < found["psnr_direct"]
    assert token_accuracy(made.tokenadapt, made.ids).tolist() == [0.25]


def test_pairs_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="a crop of 5 tokens is 30 pixels of images of 24"):
        tokenizer_pair(exact_tokenizer(), 24, 5)
    with pytest.raises(TokenizerError, match="not a multiple of patch 6"):
        tokenizer_pair(exact_tokenizer(), 25, 2)


def test_photographs_are_held_out_by_place() -> None:
    train, validation = PhotographWindows(96, "train"), PhotographWindows(96, "validation")
    assert (len(train), len(validation)) == (966, 84)
    images, labels = validation.__getitems__([0, 83])[1:]
    assert images.shape == (2, 3, 96, 96) and images.dtype == torch.uint8 and labels.tolist() == [0, 1]
    assert torch.equal(images[0], train.images[0, :, :96, 256:352])
    assert all(left + 96 <= 256 or left >= 368 for _, _, left in train.places)
    assert all(left >= 256 and left + 96 <= 368 for _, _, left in validation.places)
