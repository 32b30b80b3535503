"""VQGAN checkpoints of taming-transformers, LlamaGen and MAGE, against diffusers and against plain functions."""

import os
import re
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from support.vqgans import llamagen_tensors, mage_tensors, taming_tensors
from torch import Tensor, nn

from seitpp import tokenizers
from seitpp.tokenizers import VQGAN, TokenizerError, code_counts

SIZE = 32


def vq_model(**options) -> nn.Module:
    """A VQModel of three levels with attention on the lowest, codes near the features of random images."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.VQModel(
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(32, 32, 64),
        layers_per_block=2,
        latent_channels=8,
        num_vq_embeddings=30,
        vq_embed_dim=4,
        **options,
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # no norm and no bias at its initial value
            parameter.add_(torch.randn_like(parameter) * 0.03)
        latents = model.encode(torch.rand(4, 3, SIZE, SIZE) * 2 - 1).latents.permute(0, 2, 3, 1).flatten(0, 2)
        model.quantize.embedding.weight.copy_(latents[:: len(latents) // 30][:30] * 1.1)
    return model


def at_size(path: Path, size: int = SIZE) -> VQGAN:
    tokenizer = tokenizers.load(path)
    assert isinstance(tokenizer, VQGAN) and not tokenizer.training and tokenizer.spec.image_size == (256, 256)
    tokenizer.set_image_size(size)
    return tokenizer


@torch.no_grad()
def test_taming_is_the_network_of_diffusers(images, tmp_path) -> None:
    model = vq_model()
    extra = {"loss.discriminator.main.0.weight": torch.zeros(2), "loss.logvar": torch.zeros(())}
    torch.save({"epoch": 3, "state_dict": {**taming_tensors(model), **extra}}, tmp_path / "last.ckpt")
    tokenizer = at_size(tmp_path / "last.ckpt")
    assert (tokenizer.spec.kind, tokenizer.spec.patch, tokenizer.spec.lookup) == ("taming", 4, "euclidean")
    latents = model.encode(images * 2 - 1).latents
    torch.testing.assert_close(tokenizer.features(images), latents, atol=1e-4, rtol=1e-4)
    ids = tokenizer.encode(images)
    assert torch.equal(ids.flatten(), model.quantize(latents)[2][2]) and len(ids.unique()) > 5
    theirs = model.decode(latents).sample
    torch.testing.assert_close(tokenizer.decode(ids), (theirs / 2 + 0.5).clamp(0, 1), atol=1e-4, rtol=0)


@torch.no_grad()
def test_llamagen_is_the_same_network_with_a_cosine_lookup(images, tmp_path) -> None:
    model = vq_model()
    arguments = Namespace(vq_model="VQ-16", lr=1e-4)
    torch.save({"model": llamagen_tensors(model), "steps": 3, "args": arguments}, tmp_path / "vq_ds4.pt")
    tokenizer = at_size(tmp_path / "vq_ds4.pt")
    assert (tokenizer.spec.kind, tokenizer.spec.patch, tokenizer.spec.lookup) == ("llamagen", 4, "cosine")
    vectors = F.normalize(model.encode(images * 2 - 1).latents, dim=1).permute(0, 2, 3, 1)
    rows = F.normalize(model.quantize.embedding.weight, dim=1)
    ids = tokenizer.encode(images)
    assert torch.equal(ids, (vectors @ rows.T).argmax(dim=-1)) and len(ids.unique()) > 5
    theirs = model.decode(rows[ids].permute(0, 3, 1, 2), force_not_quantize=True).sample
    torch.testing.assert_close(tokenizer.decode(ids), (theirs / 2 + 0.5).clamp(0, 1), atol=1e-4, rtol=0)
    averaged = {"model": {}, "ema": llamagen_tensors(model)}  # as after training with averaged weights
    torch.save(averaged, tmp_path / "ema.pt")
    assert at_size(tmp_path / "ema.pt").fingerprint == tokenizer.fingerprint


# --- MAGE, written as plain functions


def plain_norm(x: Tensor, state: dict, name: str) -> Tensor:
    groups = x.reshape(len(x), 32, -1)
    mean, variance = groups.mean(dim=2, keepdim=True), groups.var(dim=2, keepdim=True, unbiased=False)
    x = ((groups - mean) / (variance + 1e-6).sqrt()).view(x.shape)
    return x * state[f"{name}.weight"].view(-1, 1, 1) + state[f"{name}.bias"].view(-1, 1, 1)


def plain_swish(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def plain_convolution(x: Tensor, state: dict, name: str, padding: int = 1) -> Tensor:
    return F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), padding=padding)


def plain_residual(x: Tensor, state: dict, name: str) -> Tensor:
    h = plain_convolution(plain_swish(plain_norm(x, state, f"{name}.norm1")), state, f"{name}.conv1")
    h = plain_convolution(plain_swish(plain_norm(h, state, f"{name}.norm2")), state, f"{name}.conv2")
    if f"{name}.nin_shortcut.weight" in state:
        x = plain_convolution(h, state, f"{name}.nin_shortcut", 0)  # of h, not of x
    return x + h


def plain_features(x: Tensor, state: dict) -> Tensor:
    x = plain_convolution(x, state, "encoder.conv_in")
    for level in range(3):
        for block in range(2):
            x = plain_residual(x, state, f"encoder.down.{level}.block.{block}")
        if level < 2:
            x = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
    x = plain_residual(plain_residual(x, state, "encoder.mid.block_1"), state, "encoder.mid.block_2")
    return plain_convolution(plain_swish(plain_norm(x, state, "encoder.norm_out")), state, "encoder.conv_out", 0)


def plain_images(x: Tensor, state: dict) -> Tensor:
    x = plain_convolution(x, state, "decoder.conv_in")
    x = plain_residual(plain_residual(x, state, "decoder.mid.block_1"), state, "decoder.mid.block_2")
    for level in (2, 1, 0):
        for block in range(2):
            x = plain_residual(x, state, f"decoder.up.{level}.block.{block}")
        if level:
            x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            x = plain_convolution(x, state, f"decoder.up.{level}.upsample.conv")
    return plain_convolution(plain_swish(plain_norm(x, state, "decoder.norm_out")), state, "decoder.conv_out")


def test_mage_is_the_plain_forward(images, tmp_path) -> None:
    state = mage_tensors()
    torch.save({"state_dict": state}, tmp_path / "vqgan_jax_strongaug.ckpt")
    tokenizer = at_size(tmp_path / "vqgan_jax_strongaug.ckpt")
    assert (tokenizer.spec.kind, tokenizer.spec.patch, tokenizer.spec.mean) == ("mage", 4, (0.0, 0.0, 0.0))
    features = plain_features(images, state)  # of images in [0, 1]
    torch.testing.assert_close(tokenizer.features(images), features, atol=1e-4, rtol=1e-4)
    rows, ids = state["quantize.embedding.weight"], tokenizer.encode(images)
    assert torch.equal(ids, torch.cdist(features.permute(0, 2, 3, 1), rows).argmin(dim=-1))
    assert len(ids.unique()) > 5
    expected = plain_images(rows[ids].permute(0, 3, 1, 2), state)
    assert ((expected > 0) & (expected < 1)).float().mean() > 0.1
    torch.testing.assert_close(tokenizer.decode(ids), expected.clamp(0, 1), atol=1e-4, rtol=0)


# --- files


@pytest.mark.parametrize("layout", ["nested", "half", "safetensors", "saved"])
def test_every_layout_loads_as_it_was(images, tmp_path, layout) -> None:
    tensors, path = mage_tensors(), tmp_path / "vqgan.file"
    torch.save(tensors, tmp_path / "bare.ckpt")
    tokenizer = at_size(tmp_path / "bare.ckpt")
    if layout == "nested":
        other = {f"cond_stage_model.{name}": tensor + 1 for name, tensor in tensors.items()}
        tensors = {f"first_stage_model.{name}": tensor for name, tensor in tensors.items()}
        torch.save({"state_dict": {"transformer.head.weight": torch.zeros(2), **other, **tensors}}, path)
    elif layout == "half":
        tokenizer = tokenizer.half().float()
        torch.save({name: tensor.half() for name, tensor in tensors.items()}, path)
    elif layout == "safetensors":
        save_file(tensors, path)
    else:
        tokenizer.save(path)
    loaded = tokenizers.load(path)
    path.unlink()
    loaded.set_image_size(SIZE)
    assert loaded.fingerprint == tokenizer.fingerprint and loaded.spec == tokenizer.spec
    assert torch.equal(loaded.encode(images), tokenizer.encode(images))


@torch.no_grad()
def test_a_compact_copy_saves_and_loads(images, tmp_path) -> None:
    torch.save({"model": llamagen_tensors(vq_model())}, tmp_path / "vq.pt")
    tokenizer = at_size(tmp_path / "vq.pt")
    ids = tokenizer.encode(images)
    compact = tokenizer.compact(code_counts(ids, 30))
    compact.save(tmp_path / "compact.safetensors")
    loaded = tokenizers.load(tmp_path / "compact.safetensors", kind="llamagen")
    assert loaded.fingerprint == compact.fingerprint and loaded.spec == compact.spec
    assert loaded.spec.num_codes == len(ids.unique()) < 30
    torch.testing.assert_close(loaded.decode(loaded.encode(images)), tokenizer.decode(ids), atol=1e-5, rtol=0)


class Callback:
    """A class of Lightning as old checkpoints name it: as the key of a callback's state."""


Callback.__module__, Callback.__qualname__ = "pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"


def lightning_pickle(content: dict, path: Path, monkeypatch) -> None:
    """Save with Callback under the name of Lightning's class, as if it were installed."""
    import sys
    from types import ModuleType

    module = ModuleType(Callback.__module__)
    module.ModelCheckpoint = Callback
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", Callback.__module__):
        monkeypatch.setitem(sys.modules, name, module)
    torch.save(content, path)
    monkeypatch.undo()


def test_a_checkpoint_of_old_lightning_is_read_without_it(images, tmp_path, monkeypatch) -> None:
    callbacks = {Callback: {"best_model_score": torch.tensor(1.0), "best_model_path": "last.ckpt"}}
    content = {"state_dict": mage_tensors(), "callbacks": callbacks}
    lightning_pickle(content, tmp_path / "last.ckpt", monkeypatch)
    assert at_size(tmp_path / "last.ckpt").encode(images).shape == (2, 8, 8)


class Payload:
    """What a hostile pickle does: it names a function to call while it is read."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_nothing_is_unpickled(tmp_path) -> None:
    torch.save({"state_dict": mage_tensors(), "args": Payload(tmp_path / "ran")}, tmp_path / "hostile.ckpt")
    for kind in (None, "mage", "taming"):
        with pytest.raises(TokenizerError, match=r"hostile.ckpt.*not unpickled"):
            tokenizers.load(tmp_path / "hostile.ckpt", kind)
    assert not (tmp_path / "ran").exists()


def test_what_does_not_fit_is_named(tmp_path) -> None:
    state, path = mage_tensors(), tmp_path / "bad.ckpt"
    convolution, shortcut = "decoder.conv_in.weight", "encoder.down.1.block.0.nin_shortcut.weight"
    cases = {
        "encoder.norm_out.bias is missing": {k: v for k, v in state.items() if k != "encoder.norm_out.bias"},
        f"{shortcut} is missing": {k: v for k, v in state.items() if k != shortcut},
        "decoder.extra is unexpected": {**state, "decoder.extra": torch.zeros(1)},
        "not a complete mage VQGAN: its layers do not fit together": {
            **state,
            convolution: torch.zeros(64, 9, 3, 3),
        },
        "codes of dimension 9": {**state, "quantize.embedding.weight": torch.zeros(20, 9)},
        "expected one of patch_kmeans, .*cosmos": {"head.weight": torch.zeros(2)},
    }
    for message, tensors in cases.items():
        torch.save({"state_dict": tensors}, path)
        with pytest.raises(TokenizerError, match=re.escape(str(path)) + f".*{message}") as error:
            tokenizers.load(path)
        assert "\n" not in str(error.value)
    torch.save(state, path)
    with pytest.raises(TokenizerError, match="expected one of llamagen"):
        tokenizers.load(path, "llamagen")
    with pytest.raises(TokenizerError, match=r"unknown kind of tokenizer 'tamming': .*did you mean taming"):
        tokenizers.load(path, "tamming")
