"""Tokenizers by path: folders that diffusers, transformers and Cosmos write, and what is no tokenizer."""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.paths import GOLDEN
from support.vqgans import VQVAES, small_vq_model, small_vqvae
from torch import Tensor, nn

from seitpp import tokenizers
from seitpp.tokenizers import PatchKMeans, TokenizerError, TokenizerSpec, code_counts
from seitpp.tokenizers.adapters import ChameleonVQ, DiffusersVQ, Emu3VQ, JanusVQ

SIZE = 32
ADAPTERS = {"ChameleonVQVAE": ChameleonVQ, "Emu3VQVAE": Emu3VQ, "JanusVQVAE": JanusVQ}


def same(loaded: tokenizers.Tokenizer, expected: tokenizers.Tokenizer, images: Tensor) -> None:
    """Both have the same kind of tokenizer: equal ids, equal images."""
    assert type(loaded) is type(expected) and not loaded.training
    loaded.set_image_size(SIZE)
    expected.set_image_size(SIZE)
    assert loaded.fingerprint == expected.fingerprint
    ids = loaded.encode(images)
    assert torch.equal(ids, expected.encode(images)) and ids.shape == (2, 16, 16)


@pytest.mark.parametrize("layout", ["folder", "pipeline", "file", "bin", "half"])
def test_a_vqmodel_of_diffusers(images, tmp_path, layout) -> None:
    model, folder = small_vq_model(), tmp_path / "model"
    if layout == "half":
        model.half().save_pretrained(folder, variant="fp16")
        path = folder
    elif layout == "pipeline":
        (folder / "scheduler").mkdir(parents=True)
        (folder / "scheduler" / "scheduler_config.json").write_text("{}")
        (folder / "model_index.json").write_text('{"_class_name": "AmusedPipeline"}')
        model.save_pretrained(folder / "vqvae")
        path = folder
    else:
        model.save_pretrained(folder, safe_serialization=layout != "bin")
        path = folder / "diffusion_pytorch_model.safetensors" if layout == "file" else folder
    loaded = tokenizers.load(path)
    same(loaded, DiffusersVQ(model.float()), images)
    assert loaded.dtype == torch.float32
    shutil.rmtree(folder)
    assert loaded.decode(loaded.encode(images)).shape == images.shape


@pytest.mark.parametrize("name", VQVAES)
def test_a_vqvae_of_transformers(images, tmp_path, name) -> None:
    model, kind = small_vqvae(name), name.removesuffix("VQVAE").lower()
    model.bfloat16().save_pretrained(tmp_path / "model")
    expected = ADAPTERS[name](model.float())
    for path, given in ((tmp_path / "model", None), (tmp_path / "model" / "model.safetensors", kind)):
        loaded = tokenizers.load(path, given)
        assert loaded.spec.kind == f"{kind}_vq" and loaded.dtype == torch.float32
        same(loaded, expected, images)
    with pytest.raises(TokenizerError, match=r"no config.json of a diffusers VQModel"):
        tokenizers.load(tmp_path / "model", "diffusers")
    # The same within a language model, whose other weights are not read.
    whole = tmp_path / "whole"
    whole.mkdir()
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (whole / "config.json").write_text(json.dumps({"model_type": kind, "vq_config": config}))
    tensors = {f"model.vqmodel.{part}": value.contiguous() for part, value in model.state_dict().items()}
    names = list(tensors)
    save_file({part: tensors[part] for part in names[::2]}, whole / "model-00001-of-00002.safetensors")
    rest = {part: tensors[part] for part in names[1::2]}
    save_file({**rest, "lm_head.weight": torch.zeros(4, 4)}, whole / "model-00002-of-00002.safetensors")
    same(tokenizers.load(whole), expected, images)
    (whole / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(TokenizerError, match=f"whole is not a complete {name}: .* is missing"):
        tokenizers.load(whole)


@pytest.mark.parametrize("name", ["VQModel", *VQVAES])
def test_a_compact_copy_saves_and_loads(images, tmp_path, name) -> None:
    tokenizer = DiffusersVQ(small_vq_model()) if name == "VQModel" else ADAPTERS[name](small_vqvae(name))
    tokenizer.set_image_size(SIZE)
    counts = code_counts(tokenizer.encode(images), 20)
    counts[7] += 1
    compact = tokenizer.compact(counts)
    compact.save(tmp_path / "compact.safetensors")
    loaded = tokenizers.load(tmp_path / "compact.safetensors")
    assert type(loaded) is type(tokenizer) and loaded.fingerprint == compact.fingerprint
    assert loaded.spec == compact.spec and loaded.spec.num_codes < 20
    assert torch.equal(loaded.encode(images), compact.encode(images))
    loaded.spec = tokenizer.spec
    loaded.save(tmp_path / "lies.safetensors")
    with pytest.raises(TokenizerError, match=r"lies.safetensors is not a complete .*: its codes do not fit"):
        tokenizers.load(tmp_path / "lies.safetensors")


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 1, 8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv(x)[:, 0] * 1000).abs().int()


class Decoder(nn.Module):
    def forward(self, ids: Tensor) -> Tensor:
        wide = (ids.float() / 3000 - 0.5).unsqueeze(1).repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
        return wide.expand(-1, 3, -1, -1)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_cosmos_only_if_it_is_named(images, tmp_path) -> None:
    torch.manual_seed(0)
    encoder, decoder = Encoder().eval(), Decoder()
    for name, module in (("encoder", encoder), ("decoder", decoder)):
        torch.jit.script(module).save(tmp_path / f"{name}.jit")
    for path in (tmp_path, tmp_path / "encoder.jit"):
        with pytest.raises(TokenizerError, match=r"is TorchScript, which is code: .*--tokenizer-kind cosmos"):
            tokenizers.load(path)
        tokenizer = tokenizers.load(path, "cosmos")
        assert tokenizer.spec.patch == 8 and tokenizer.spec.num_codes == 64000
        tokenizer.set_image_size(SIZE)
        ids = tokenizer.encode(images)
        assert torch.equal(ids, encoder(images * 2 - 1).long())
        torch.testing.assert_close(tokenizer.decode(ids), decoder(ids) / 2 + 0.5)
    with pytest.raises(TokenizerError, match="cannot be saved, since its network is code"):
        tokenizer.save(tmp_path / "cosmos.safetensors")
    (tmp_path / "decoder.jit").unlink()
    with pytest.raises(TokenizerError, match="cannot be loaded") as error:
        tokenizers.load(tmp_path, "cosmos")
    assert "\n" not in str(error.value)


def test_what_is_no_tokenizer_is_one_line(tmp_path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    kinds = r"expected one of patch_kmeans, .*, cosmos"
    cases: list[tuple[Path, str | None, str]] = [
        (folder, None, f"holds no known tokenizer, {kinds}"),
        (folder, "taming", "is a folder: expected the file of a taming tokenizer"),
        (folder, "janus", "expected the config.json of a transformers JanusVQVAE"),
        (folder, "diffusers", "no config.json of a diffusers VQModel"),
        (folder, "cosmos", "cannot be loaded"),
        (tmp_path / "none", None, "no tokenizer file at"),
    ]
    for path, kind, message in cases:
        with pytest.raises(TokenizerError, match=message) as error:
            tokenizers.load(path, kind)
        assert "\n" not in str(error.value) and str(path) in str(error.value)
    (folder / "config.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"config.json cannot be read as JSON"):
        tokenizers.load(folder)
    small_vq_model().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_vq_embeddings": 21}))
    with pytest.raises(TokenizerError, match=r"folder (cannot be loaded|is not a complete)") as error:
        tokenizers.load(folder)
    assert "\n" not in str(error.value)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(TokenizerError, match="no weights named diffusion_pytorch_model"):
        tokenizers.load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(tmp_path, value: float) -> None:
    tokenizer = PatchKMeans.fit(torch.rand(4, 3, 16, 16), image_size=16, patch=4, num_codes=8, code_dim=4)
    tokenizer.codebook[3, 1] = value
    tokenizer.save(tmp_path / "t.safetensors")
    with pytest.raises(TokenizerError, match=r"t.safetensors: a codebook with values that are not finite"):
        tokenizers.load(tmp_path / "t.safetensors")
    spec = tokenizer.spec.to_json()
    for wrong in ({"std": [1, 0, 1]}, {"std": [1, value, 1]}, {"mean": [0, value, 0]}, {"mean": [0, "x", 0]}):
        with pytest.raises(TokenizerError, match="expected finite numbers, the deviations more than 0"):
            TokenizerSpec.from_json({**spec, **wrong})


@pytest.mark.parametrize("size", [0x10280, 0x4B50])
def test_a_file_whose_header_has_the_size_that_marks_a_pickle_or_an_archive(size: int, tmp_path: Path) -> None:
    """The size comes first in a safetensors file: these begin with the bytes 80 02 and with "PK"."""
    data, path = (GOLDEN / "files_v1/patch_kmeans.safetensors").read_bytes(), tmp_path / "t.safetensors"
    (before,) = struct.unpack_from("<Q", data)
    path.write_bytes(struct.pack("<Q", size) + data[8 : 8 + before].ljust(size) + data[8 + before :])
    assert path.read_bytes()[:2] in (b"\x80\x02", b"PK")
    assert isinstance(tokenizers.load(path), PatchKMeans)
