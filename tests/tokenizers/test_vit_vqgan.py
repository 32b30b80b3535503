"""ViT-VQGAN against an independent forward written from the checkpoint facts, and its files."""

import math
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from support.checkpoints import lightning_file
from torch import Tensor

from seitpp import tokenizers
from seitpp.tokenizers import TokenizerError, TokenizerSpec, ViTVQGAN
from seitpp.tokenizers.transformer import TransformerShape

ENCODER, DECODER = TransformerShape(64, 2, 2, 96), TransformerShape(128, 1, 2, 80)
SPEC = TokenizerSpec("vit_vqgan", (32, 32), patch=8, num_codes=50, code_dim=6)


@pytest.fixture
def tokenizer() -> ViTVQGAN:
    torch.manual_seed(0)
    built = ViTVQGAN(SPEC, ENCODER, DECODER).eval()
    with torch.no_grad():  # no bias and no norm at its initial value, so that none can be left out
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.03)
        built.encoder.to_patch_embedding[0].weight.mul_(10)  # else all patches get the same id
    return built


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


# --- an independent forward: one token and one head at a time, softmax written out


def plain_positions(side: int, width: int) -> Tensor:
    table = torch.zeros(side * side, width)
    quarter = width // 4
    for row in range(side):
        for column in range(side):
            for start, value in ((0, column), (width // 2, row)):
                for band in range(quarter):
                    angle = value / 10000 ** (band / quarter)
                    table[row * side + column, start + band] = math.sin(angle)
                    table[row * side + column, start + quarter + band] = math.cos(angle)
    return table


def plain_norm(x: Tensor, state: dict, name: str) -> Tensor:
    centerd = x - x.mean(dim=-1, keepdim=True)
    scaled = centerd / (centerd.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def plain_transformer(x: Tensor, state: dict, name: str, depth: int, heads: int) -> Tensor:
    for i in range(depth):
        layer = f"{name}.layers.{i}"
        qkv = plain_norm(x, state, f"{layer}.0.norm") @ state[f"{layer}.0.fn.to_qkv.weight"].T
        q, k, v = qkv.chunk(3, dim=-1)
        parts = []
        for head in range(heads):
            at = slice(64 * head, 64 * head + 64)
            weights = (q[..., at] @ k[..., at].transpose(1, 2) / 8).softmax(dim=-1)
            parts.append(weights @ v[..., at])
        attended = torch.cat(parts, dim=-1)
        x = x + attended @ state[f"{layer}.0.fn.to_out.weight"].T + state[f"{layer}.0.fn.to_out.bias"]
        hidden = plain_norm(x, state, f"{layer}.1.norm")
        hidden = torch.tanh(hidden @ state[f"{layer}.1.fn.net.0.weight"].T + state[f"{layer}.1.fn.net.0.bias"])
        x = x + hidden @ state[f"{layer}.1.fn.net.2.weight"].T + state[f"{layer}.1.fn.net.2.bias"]
    return plain_norm(x, state, f"{name}.norm")


def plain_ids(images: Tensor, state: dict) -> Tensor:
    patches = images.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    kernel = state["encoder.to_patch_embedding.0.weight"].flatten(1)
    x = patches @ kernel.T + state["encoder.to_patch_embedding.0.bias"] + plain_positions(4, 64)
    x = plain_transformer(x, state, "encoder.transformer", 2, 2)
    z = x @ state["pre_quant.weight"].T + state["pre_quant.bias"]
    rows = state["quantizer.embedding.weight"]
    z, rows = z / z.norm(dim=-1, keepdim=True), rows / rows.norm(dim=-1, keepdim=True)
    return (z.unsqueeze(2) - rows).square().sum(dim=-1).argmin(dim=-1).view(-1, 4, 4)


def plain_images(ids: Tensor, state: dict) -> Tensor:
    rows = state["quantizer.embedding.weight"]
    rows = (rows / rows.norm(dim=-1, keepdim=True))[ids.flatten(1)]
    x = rows @ state["post_quant.weight"].T + state["post_quant.bias"] + plain_positions(4, 128)
    x = plain_transformer(x, state, "decoder.transformer", 1, 2)
    result = torch.zeros(len(ids), 3, 32, 32)
    for token in range(16):
        top, left = token // 4 * 8, token % 4 * 8
        patch = torch.einsum("bc,cdpq->bdpq", x[:, token], state["decoder.to_pixel.1.weight"])
        result[:, :, top : top + 8, left : left + 8] = patch + state["decoder.to_pixel.1.bias"].view(-1, 1, 1)
    return result.clamp(0, 1)


def test_it_is_the_plain_forward(tokenizer, images) -> None:
    state = tokenizer.state_dict()
    ids = tokenizer.encode(images)
    assert ids.dtype == torch.int64 and len(ids.unique()) > 5
    assert torch.equal(ids, plain_ids(images, state))
    expected = plain_images(ids, state)
    assert ((expected > 0) & (expected < 1)).float().mean() > 0.2  # not all of it clamped
    torch.testing.assert_close(tokenizer.decode(ids), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(tokenizer.encoder.en_pos_embedding[0], plain_positions(4, 64))


def test_published_sizes_have_the_published_tensors() -> None:
    with torch.device("meta"):
        small, base = ViTVQGAN.new("small"), ViTVQGAN.new("base")
    totals = [sum(t.numel() for t in model.state_dict().values()) / 1e6 for model in (small, base)]
    assert [round(total, 2) for total in totals] == [51.96, 172.24]
    state = base.state_dict()
    assert len(state) == 279 and base.spec.grid == (32, 32)
    assert state["encoder.transformer.layers.11.0.fn.to_qkv.weight"].shape == (2304, 768)
    assert state["decoder.transformer.layers.11.1.fn.net.2.weight"].shape == (768, 3072)
    assert state["encoder.en_pos_embedding"].shape == state["decoder.de_pos_embedding"].shape == (1, 1024, 768)
    assert state["decoder.to_pixel.1.weight"].shape == (768, 3, 8, 8)
    assert state["quantizer.embedding.weight"].shape == (8192, 32)


@pytest.mark.parametrize("layout", ["lightning", "bare", "half", "safetensors", "saved"])
def test_every_layout_loads_as_it_was(tokenizer, images, tmp_path, layout) -> None:
    path = tmp_path / "tokenizer.file"
    if layout == "lightning":
        lightning_file(tokenizer, path)
    elif layout == "saved":
        tokenizer.save(path)
    elif layout == "safetensors":
        save_file(tokenizer.state_dict(), path)
    else:
        tokenizer = tokenizer.half().float() if layout == "half" else tokenizer
        torch.save({k: v.half() if layout == "half" else v for k, v in tokenizer.state_dict().items()}, path)
    loaded = tokenizers.load(path)
    path.unlink()
    assert isinstance(loaded, ViTVQGAN) and not loaded.training
    assert loaded.fingerprint == tokenizer.fingerprint and loaded.spec == tokenizer.spec
    assert torch.equal(loaded.encode(images), tokenizer.encode(images))
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_what_does_not_fit_is_named(tokenizer, tmp_path) -> None:
    state = tokenizer.state_dict()
    qkv, bias = "encoder.transformer.layers.1.0.fn.to_qkv.weight", "post_quant.bias"
    cases = {
        f"{bias} is missing": {k: v for k, v in state.items() if k != bias},
        "decoder.extra is unexpected": {**state, "decoder.extra": torch.zeros(1)},
        r"post_quant.bias is \(3,\), expected \(128,\)": {**state, bias: torch.zeros(3)},
        r"to_qkv.weight is \(9, 64\), expected \(384, 64\)": {**state, qkv: torch.zeros(9, 64)},
        "no ViT-VQGAN: missing or of another rank: .*to_patch_embedding": {"weight": torch.zeros(2)},
    }
    for message, tensors in cases.items():
        torch.save({"state_dict": tensors}, tmp_path / "bad.ckpt")
        with pytest.raises(TokenizerError, match=f"bad.ckpt.*{message}"):
            ViTVQGAN.from_checkpoint(tmp_path / "bad.ckpt")


class Payload:
    """What a hostile pickle does: it names a function to call while it is read."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_nothing_is_unpickled(tokenizer, tmp_path) -> None:
    ran = tmp_path / "ran"
    path = tmp_path / "hostile.ckpt"
    torch.save({"state_dict": tokenizer.state_dict(), "callbacks": Payload(ran)}, path)
    for open_file in (ViTVQGAN.from_checkpoint, tokenizers.load):
        with pytest.raises(TokenizerError, match=r"hostile.ckpt.*not unpickled"):
            open_file(path)
    assert not ran.exists()
    torch.load(path, weights_only=False)
    assert ran.exists()  # so the file was a payload


def test_damaged_checkpoints_are_named(tokenizer, tmp_path) -> None:
    whole = lightning_file(tokenizer, tmp_path / "whole.ckpt").read_bytes()
    for kept in (2, 100, len(whole) // 2, len(whole) - 10):
        (tmp_path / "cut.ckpt").write_bytes(whole[:kept])
        with pytest.raises(TokenizerError, match=r"cut.ckpt cannot be read"):
            tokenizers.load(tmp_path / "cut.ckpt")
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(TokenizerError, match=r"list.ckpt: got a list"):
        tokenizers.load(tmp_path / "list.ckpt")


def test_another_image_size_only_when_asked(tokenizer, tmp_path) -> None:
    images = torch.rand(2, 3, 48, 64)
    with pytest.raises(TokenizerError, match=r"expected \(B, 3, 32, 32\)"):
        tokenizer.encode(images)
    before = tokenizer.encoder.en_pos_embedding.clone()
    tokenizer.set_image_size(32)
    assert torch.equal(tokenizer.encoder.en_pos_embedding, before)
    tokenizer.set_image_size((48, 64))
    expected = F.interpolate(before.view(1, 4, 4, 64).permute(0, 3, 1, 2), (6, 8), mode="bicubic")
    torch.testing.assert_close(tokenizer.encoder.en_pos_embedding, expected.flatten(2).transpose(1, 2))
    ids = tokenizer.encode(images)
    assert ids.shape == (2, 6, 8) and tokenizer.decode(ids).shape == images.shape
    with pytest.raises(TokenizerError, match=r"expected \(B, 6, 8\)"):
        tokenizer.decode(ids.transpose(1, 2))
    with pytest.raises(TokenizerError, match="not a multiple of patch 8"):
        tokenizer.set_image_size(50)
    tokenizer.save(tmp_path / "wide.safetensors")
    assert torch.equal(tokenizers.load(tmp_path / "wide.safetensors").encode(images), ids)


def test_training_sees_a_loss_on_both_sides_and_reaches_every_parameter(tokenizer, images) -> None:
    output = tokenizer(images)
    assert torch.equal(output.ids, tokenizer.encode(images))
    rows = F.normalize(tokenizer.codebook, dim=1)[output.ids].permute(0, 3, 1, 2)
    gap = (rows - output.vectors).square().mean()
    torch.testing.assert_close(output.loss, gap * 1.25)
    torch.testing.assert_close(output.images.clamp(0, 1), tokenizer.decode(output.ids), atol=1e-5, rtol=0)
    (F.mse_loss(output.images, images) + output.loss).backward()
    for name, parameter in tokenizer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_the_reconstruction_alone_trains_the_encoder_and_not_the_codebook(tokenizer, images) -> None:
    F.mse_loss(tokenizer(images).images, images).backward()
    assert tokenizer.pre_quant.weight.grad.abs().sum() > 0
    assert tokenizer.codebook.grad is None


def test_a_compact_copy_saves_and_loads(tokenizer, images, tmp_path) -> None:
    ids = tokenizer.encode(images)
    compact = tokenizer.compact(tokenizers.code_counts(ids, 50))
    assert compact.spec.num_codes == len(ids.unique()) < 50 and tokenizer.spec.num_codes == 50
    compact.save(tmp_path / "compact")
    loaded = tokenizers.load(tmp_path / "compact")
    assert loaded.fingerprint == compact.fingerprint != tokenizer.fingerprint
    torch.testing.assert_close(loaded.decode(loaded.encode(images)), tokenizer.decode(ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("size", "patch"), [((8, 8), 8), (16, 8), (7, 1), ((24, 40), 8)])
def test_any_channels_and_grid(size, patch, tmp_path) -> None:
    torch.manual_seed(0)
    spec = TokenizerSpec.unscaled("vit_vqgan", size, patch, num_codes=50, code_dim=6, channels=13)
    tokenizer = ViTVQGAN(spec, ENCODER, DECODER).eval()
    images = torch.rand(2, 13, *spec.image_size)
    ids = tokenizer.encode(images)
    assert ids.shape == (2, *spec.grid) and tokenizer(images).images.shape == images.shape
    tokenizer.save(tmp_path / "bands.safetensors")
    loaded = tokenizers.load(tmp_path / "bands.safetensors")
    assert loaded.spec == spec and torch.equal(loaded.encode(images), ids)
    if spec.grid[0] == spec.grid[1]:
        save_file(tokenizer.state_dict(), tmp_path / "bare.safetensors")
        assert tokenizers.load(tmp_path / "bare.safetensors").spec == spec
    with pytest.raises(TokenizerError, match="images of 3 channels given to the vit_vqgan tokenizer, expected 13"):
        tokenizer.encode(images[:, :3])
