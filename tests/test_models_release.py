"""Released checkpoints against a reference of their own: plain tensors under the released names."""

import argparse
import os
import warnings
from functools import partial

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from seitpp.augment import Keys
from seitpp.models import (
    MTM,
    ModelError,
    from_release,
    load_classifier,
    load_mtm,
    save_classifier,
    save_release,
    to_release,
)
from seitpp.models.tokenadapt import TokenAdapt
from seitpp.objectives import mask_plan, masked_token_loss

WIDTH, DEPTH, DIM, CODES, CLASSES, PATCHES = 128, 2, 6, 17, 5, 16
DECODER_WIDTH, DECODER_DEPTH = 64, 1
Weights = dict[str, Tensor]


# The reference: what the papers and the release define, tensor by tensor.


def affine(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def norm(w: Weights, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


def attention(w: Weights, name: str, x: Tensor, heads: int) -> Tensor:
    parts = affine(w, f"{name}.qkv", x).chunk(3, dim=-1)
    outputs = []
    for q, k, v in zip(*(part.chunk(heads, dim=-1) for part in parts), strict=True):
        weights = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)
        outputs.append(weights @ v)
    return affine(w, f"{name}.proj", torch.cat(outputs, -1))


def transformer(w: Weights, blocks: str, x: Tensor, depth: int, heads: int) -> Tensor:
    for i in range(depth):
        x = x + attention(w, f"{blocks}.{i}.attn", norm(w, f"{blocks}.{i}.norm1", x), heads)
        hidden = gelu(affine(w, f"{blocks}.{i}.mlp.fc1", norm(w, f"{blocks}.{i}.norm2", x)))
        x = x + affine(w, f"{blocks}.{i}.mlp.fc2", hidden)
    return x


def stem(w: Weights, maps: Tensor, stride: int, padding: int) -> Tensor:
    weight, bias = w["patch_embed.proj.weight"], w["patch_embed.proj.bias"]
    windows = torch.nn.functional.unfold(maps, weight.shape[-1], padding=padding, stride=stride)
    return (weight.flatten(1) @ windows).transpose(1, 2) + bias


def classify(w: Weights, patches: Tensor) -> Tensor:
    x = torch.cat([w["cls_token"].expand(len(patches), -1, -1), patches], 1) + w["pos_embed"]
    x = transformer(w, "blocks", x, DEPTH, WIDTH // 64)
    return affine(w, "head", norm(w, "norm", x[:, 1:].mean(1)))


def seit_logits(w: Weights, maps: Tensor, stride: int, padding: int) -> Tensor:
    return classify(w, stem(w, maps, stride, padding))


def id_patches(w: Weights, ids: Tensor) -> Tensor:
    vectors = norm(w, "token_emb.LayerNorm", w["token_emb.word_embeddings.weight"][ids])
    return stem(w, vectors.permute(0, 3, 1, 2), 2, 0)


def seitpp_logits(w: Weights, ids: Tensor) -> Tensor:
    return classify(w, id_patches(w, ids))


def mtm_logits(w: Weights, ids: Tensor, kept: Tensor, hidden: Tensor) -> Tensor:
    """Logits (B, L, 4, K) of the tokens of every patch: image by image, patch by patch."""
    return torch.stack([mtm_image(w, *image) for image in zip(id_patches(w, ids), kept, hidden, strict=True)])


def mtm_image(w: Weights, patches: Tensor, kept: Tensor, hidden: Tensor) -> Tensor:
    positions, cls = w["pos_embed"][0], w["cls_token"][0, 0]
    inputs = [cls + positions[0]]
    for place in kept.tolist():
        content = w["mask_token_label"].flatten() if hidden[place] else patches[place]
        inputs.append(content + positions[1 + place])
    encoded = transformer(w, "blocks", torch.stack(inputs)[None], DEPTH, WIDTH // 64)
    encoded = affine(w, "decoder_embed", norm(w, "norm", encoded))[0]
    seen = {place: vector for place, vector in zip(kept.tolist(), encoded[1:], strict=True) if not hidden[place]}
    decoder_in = torch.stack([encoded[0], *(seen.get(place, encoded[0]) for place in range(PATCHES))])
    decoder_in = decoder_in[None] + w["decoder_pos_embed_learned"]
    decoded = transformer(w, "decoder_blocks", decoder_in, DECODER_DEPTH, DECODER_WIDTH // 32)
    tokens = affine(w, "mlm_layer.fc", norm(w, "decoder_norm", decoded)[0, 1:]).view(PATCHES, 4, DIM)
    tokens = norm(w, "mlm_layer.ln", gelu(tokens))
    return tokens @ w["token_emb.word_embeddings.weight"].T + w["mlm_layer.bias"].flatten()


def mtm_loss(logits: Tensor, ids: Tensor, hidden: Tensor) -> Tensor:
    """Cross-entropy per token, averaged over the tokens of a patch, then over the hidden patches of the batch."""
    losses = []
    for image, grid, mask in zip(logits, ids, hidden, strict=True):
        for place in mask.nonzero().flatten().tolist():
            row, column = 2 * (place // 4), 2 * (place % 4)
            targets = grid[row : row + 2, column : column + 2].flatten()
            losses.append(-image[place].log_softmax(-1)[range(4), targets].mean())
    return torch.stack(losses).mean()


# Random checkpoints in the released layout.


def shapes_of_blocks(blocks: str, width: int, depth: int) -> dict[str, tuple[int, ...]]:
    parts = {"norm1": (width,), "norm2": (width,), "attn.qkv": (3 * width, width), "attn.proj": (width, width)}
    parts |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    return {f"{blocks}.{i}.{part}": shape for i in range(depth) for part, shape in parts.items()}


def weights(layers: dict[str, tuple[int, ...]], bare: dict[str, tuple[int, ...]]) -> Weights:
    generator = torch.Generator().manual_seed(0)
    state = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in bare.items()}
    for name, shape in layers.items():
        scale = 0.3 if len(shape) == 1 else 1.0 / torch.tensor(shape[1:]).prod().item() ** 0.5
        state[f"{name}.weight"] = (len(shape) == 1) + scale * torch.randn(shape, generator=generator)
        state[f"{name}.bias"] = 0.3 * torch.randn(shape[0], generator=generator)
    return state


ENCODER = {**shapes_of_blocks("blocks", WIDTH, DEPTH), "norm": (WIDTH,)}
TOKENS = {"cls_token": (1, 1, WIDTH), "pos_embed": (1, 1 + PATCHES, WIDTH)}


def seit_state(kernel: int = 4) -> Weights:
    stem_shape = (WIDTH, DIM, kernel, kernel)
    return weights({**ENCODER, "patch_embed.proj": stem_shape, "head": (CLASSES, WIDTH)}, TOKENS)


IDS_LAYERS = {**ENCODER, "patch_embed.proj": (WIDTH, DIM, 2, 2), "token_emb.LayerNorm": (DIM,)}
IDS_BARE = {**TOKENS, "token_emb.word_embeddings.weight": (CODES, DIM)}


def seitpp_state() -> Weights:
    return weights({**IDS_LAYERS, "head": (CLASSES, WIDTH)}, IDS_BARE)


def mtm_state() -> Weights:
    layers = {
        **IDS_LAYERS,
        **shapes_of_blocks("decoder_blocks", DECODER_WIDTH, DECODER_DEPTH),
        "decoder_embed": (DECODER_WIDTH, WIDTH),
        "decoder_norm": (DECODER_WIDTH,),
        "mlm_layer.fc": (4 * DIM, DECODER_WIDTH),
        "mlm_layer.ln": (DIM,),
    }
    bare = {
        **IDS_BARE,
        "mask_token_label": (1, 1, WIDTH),
        "decoder_pos_embed_learned": (1, 1 + PATCHES, DECODER_WIDTH),
        "mlm_layer.bias": (1, 1, CODES),
    }
    return weights(layers, bare)


def some_ids() -> Tensor:
    return torch.randint(CODES, (3, 8, 8), generator=torch.Generator().manual_seed(1))


def some_maps(side: int = 8) -> Tensor:
    return torch.randn(3, DIM, side, side, generator=torch.Generator().manual_seed(1))


def load(tmp_path, state: Weights) -> torch.nn.Module:
    """Through a file, all of whose tensors must be used."""
    torch.save({"model": state}, tmp_path / "released.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return from_release(tmp_path / "released.pth")


close = partial(torch.testing.assert_close, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "kernel", "stride", "padding"), [("linear", 1, 1, 0), ("conv2", 2, 2, 0), ("conv4", 4, 2, 1)]
)
def test_seit_classifier(tmp_path, name: str, kernel: int, stride: int, padding: int) -> None:
    state, maps = seit_state(kernel), some_maps(4 * stride)
    model = load(tmp_path, state)
    assert model.patch_embed.stem == name and not model.training
    close(model(maps), seit_logits(state, maps, stride, padding))


def test_seitpp_classifier(tmp_path) -> None:
    state = seitpp_state()
    model = load(tmp_path, state)
    close(model(some_ids()), seitpp_logits(state, some_ids()))
    assert not model.training


def test_mtm_logits_and_loss(tmp_path) -> None:
    state, ids = mtm_state(), some_ids()
    plan = mask_plan(Keys(0, 0, torch.arange(3)).uniform("mask", PATCHES), 5, 9)
    model = load(tmp_path, state)
    logits, expected = model(ids, plan), mtm_logits(state, ids, plan.kept, plan.hidden)
    # (B, L, 4, K) -> (B, K, H, W), a patch being two tokens high and two wide
    grid = expected.view(3, 4, 4, 2, 2, CODES).permute(0, 5, 1, 3, 2, 4).reshape(3, CODES, 8, 8)
    close(logits, grid)
    close(masked_token_loss(logits, ids, plan), mtm_loss(expected, ids, plan.hidden))
    assert not model.training and not model.encoder.pos_embed.requires_grad


@pytest.mark.parametrize("state", [seit_state(), seitpp_state()], ids=["seit", "seitpp"])
def test_the_norm_after_the_mean_may_be_called_fc_norm(tmp_path, state: Weights) -> None:
    other = {
        name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: t for name, t in state.items()
    }
    assert set(other) != set(state)
    assert_same(load(tmp_path, other), load(tmp_path, state))


def assert_same(one: torch.nn.Module, two: torch.nn.Module) -> None:
    assert all(torch.equal(t, two.state_dict()[name]) for name, t in one.state_dict().items())


@pytest.mark.parametrize("layout", ["deit", "bare", "ddp", "safetensors"])
def test_layouts_of_files(tmp_path, layout: str) -> None:
    state, path = seit_state(), tmp_path / f"released.{'safetensors' if layout == 'safetensors' else 'pth'}"
    if layout == "safetensors":
        save_file(state, path)
    elif layout == "deit":
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]).state_dict()
        arguments = argparse.Namespace(lr=0.1, model="deit_small_token_32", betas=(0.9, 0.95), resume=None)
        zeros = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        content = {"model": state, "model_ema": zeros, "args": arguments, "optimizer": optimizer, "epoch": 299}
        torch.save(content, path)
    else:
        prefix = "module." if layout == "ddp" else ""
        torch.save({prefix + name: tensor for name, tensor in state.items()}, path)
    close(from_release(path)(some_maps()), seit_logits(state, some_maps(), 2, 1))


def test_what_is_not_used_is_named_in_one_warning(tmp_path) -> None:
    state = {**mtm_state(), "decoder_pos_embed": torch.zeros(1, 17, 64), "spare.weight": torch.zeros(3)}
    torch.save({"model": state}, tmp_path / "mtm.pth")
    with pytest.warns(UserWarning) as caught:
        from_release(tmp_path / "mtm.pth")
    assert [str(w.message) for w in caught] == [
        f"{tmp_path / 'mtm.pth'}: not used, 2 tensors: decoder_pos_embed, spare.weight"
    ]
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.1.mlp.fc2.bias": None}, "released.pth: tensor blocks.1.mlp.fc2.bias is missing"),
        ({"cls_token": None}, "released.pth: tensor cls_token is missing"),
        ({"head.weight": torch.zeros(5, 3)}, r"head.weight has shape \(5, 3\), expected \(5, 128\)"),
        ({"cls_token": torch.zeros(1, 1, 100)}, "width 100, expected a multiple of 64"),
        ({"pos_embed": torch.zeros(1, 16, 128)}, "15 positions and one of cls, expected a square grid"),
        ({"patch_embed.proj.weight": torch.zeros(128, 6, 3, 3)}, "stem of kernel 3, expected one of"),
        ({"patch_embed.proj.weight": None}, "are of no released model"),
        ({"head.weight": "text"}, "holds no state dict"),
    ],
)
def test_bad_states_are_refused(tmp_path, change: dict, message: str) -> None:
    state = {name: tensor for name, tensor in {**seit_state(), **change}.items() if tensor is not None}
    with pytest.raises(ModelError, match=message):
        load(tmp_path, state)


class Payload:
    """Whoever unpickles this makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_that_would_run_code_is_refused(tmp_path) -> None:
    path, mark = tmp_path / "hostile.pth", tmp_path / "mark"
    torch.save({"model": seit_state(), "args": Payload(mark)}, path)
    with pytest.raises(ModelError, match=rf"{path} cannot be read as plain tensors, and is not unpickled"):
        from_release(path)
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists()  # the payload was a real one


def test_files_that_are_not_there_or_damaged(tmp_path) -> None:
    with pytest.raises(ModelError, match=f"no checkpoint at {tmp_path / 'none.pth'}"):
        from_release(tmp_path / "none.pth")
    for name in ("damaged.pth", "damaged.safetensors"):
        (tmp_path / name).write_bytes(b"\x80\x02 nothing of the kind")
        with pytest.raises(ModelError, match=f"{name} cannot be read"):
            from_release(tmp_path / name)
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(ModelError, match="holds no state dict"):
        from_release(tmp_path / "tensor.pth")


@pytest.mark.parametrize("state", [seit_state(), seitpp_state(), mtm_state()], ids=["seit", "seitpp", "mtm"])
def test_out_again(tmp_path, state: Weights) -> None:
    model = load(tmp_path, state)
    written = to_release(model)
    assert set(written) == set(state)
    assert all(torch.equal(written[name].flatten(), tensor.flatten()) for name, tensor in state.items())
    save_release(model, tmp_path / "again.pth")
    assert_same(from_release(tmp_path / "again.pth"), model)
    assert torch.load(tmp_path / "again.pth", weights_only=True).keys() == {"model"}


def test_published_widths_have_their_names(tmp_path) -> None:
    save_release(timm.create_model("seit_vit_tiny", in_chans=4, num_classes=3, img_size=8), tmp_path / "tiny.pth")
    model = from_release(tmp_path / "tiny.pth")
    assert model.pretrained_cfg["architecture"] == "seit_vit_tiny"
    assert (len(model.blocks), model.blocks[0].attn.num_heads, model.patch_embed.img_size) == (12, 3, (8, 8))


def test_a_model_read_in_can_be_saved_as_ours(tmp_path) -> None:
    model = load(tmp_path, seitpp_state())
    save_classifier(tmp_path / "ours", model, "abc", None)
    assert_same(load_classifier(tmp_path / "ours").model, model)
    mtm = load(tmp_path, mtm_state())
    mtm.save(tmp_path / "mtm", "abc")
    assert_same(load_mtm(tmp_path / "mtm")[0], mtm)


def test_models_without_a_place_in_the_layout_are_not_written() -> None:
    sizes = {"embed_dim": 64, "depth": 1, "num_heads": 1}
    with pytest.raises(ModelError, match="heads of 32 channels"):
        to_release(timm.create_model("seit_vit_nano"))
    with pytest.raises(ModelError, match="got a TokenResNet"):
        to_release(timm.create_model("seit_resnet18"))
    with pytest.raises(ModelError, match="expected avg and a head"):
        to_release(timm.create_model("mtm_vit_base", num_classes=0, **sizes))
    with pytest.raises(ModelError, match="square grids only"):
        to_release(timm.create_model("mtm_vit_base", img_size=(8, 12), **sizes))
    with pytest.raises(ModelError, match="heads of 16 channels"):
        to_release(
            MTM("mtm_vit_base", (8, 8), decoder_width=64, decoder_depth=1, decoder_heads=4, encoder_size=sizes)
        )


def test_tokenadapt(tmp_path) -> None:
    torch.manual_seed(0)
    adapt = TokenAdapt((4, 4), (2, 2), num_codes=5, code_dim=6, width=64, heads=1, mlp=32)
    state, path = to_release(adapt), tmp_path / "adapt.pth"
    assert {name.split(".")[0] for name in state} == {"conversion_function", "reverse_transform"}
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, path)
    assert_same(from_release(path), adapt)
    save_release(adapt, path)
    assert_same(from_release(path), adapt)
    del state["conversion_function.0.weight"]
    torch.save(state, path)
    with pytest.raises(ModelError, match=rf"{path}: .*conversion_function\.0\.weight"):
        from_release(path)
