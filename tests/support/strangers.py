"""Small whole files of every kind that may come from a stranger, how they are read, and how they are sealed.

`KINDS` is asked by the fuzzer tests/long/headers.py, which damages them.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch
import torch.nn.functional as F
from support import finegrained, release_reference
from support.models import tiny_mtm
from support.pictures import as_arrow, as_parquet, make_tar, photograph_crops, write
from support.vqgans import mage_tensors, small_vq_model, small_vqvae, taming_tensors
from torch import nn

from downstream.finegrained.sets import read_set
from downstream.segmentation.backbone import TokenViT
from downstream.segmentation.model import build_segmenter, load_segmenter, save_segmenter
from seitpp import StoreWriter, TokenStore, tokenizers
from seitpp.books import Books
from seitpp.engine import checkpoint
from seitpp.engine.config import TrainConfig, load_config
from seitpp.engine.distributed import OptimizerState
from seitpp.engine.folder import choose_folder, planned_lengths
from seitpp.engine.inputs import reading_of_run
from seitpp.engine.metrics import MetricsLog
from seitpp.images.class_lists import read_classes
from seitpp.images.decode import ImageError
from seitpp.images.labels import LabelRules, read_label_file
from seitpp.images.sources import open_source
from seitpp.models import TokenAdapt, load_pretrained, load_pretrained_tokenadapt, save_classifier
from seitpp.models.weights.pretrained import save_pretrained
from seitpp.store import spec
from seitpp.store.release import export_release, import_release
from seitpp.tokenizers import FeatureKMeans, PatchKMeans
from seitpp.tokenizers.adapters import DiffusersVQ, JanusVQ
from seitpp.tokenizers.dct import PatchDCT
from seitpp.tokenizers.refined import refine
from seitpp.tokenizers.transformer import TransformerShape
from seitpp.tokenizers.vit_vqgan import ViTVQGAN
from seitpp.tokenizers.vqgan import VQGAN

Files = dict[str, bytes]
K, D = 20, 4
SETTINGS = {"preset": "digits", "seed": 0, "precision": "no", "overwrite": False, "store": "tokens", "epochs": 2.0}


class Kind(NamedTuple):
    """A kind of files: `write` makes whole ones in an empty folder, `read` reads them and checks the result.

    `seal` brings their own checksums up to date, so that what is behind these is reached. Of all inputs, a kind
    has its `share`, which is smaller where reading takes long.
    """

    write: Callable[[Path], object]
    read: Callable[[Path], object]
    seal: Callable[[Files], Files] | None = None
    share: int = 10


def _photographs() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(4, 3, 16, 16, generator=generator)


def _patch_kmeans(kind: type[PatchKMeans] = PatchKMeans) -> PatchKMeans:
    return kind.fit(_photographs(), image_size=16, patch=4, num_codes=K, code_dim=D)


def _feature_kmeans() -> FeatureKMeans:
    network = timm.create_model("test_vit", img_size=32, num_classes=0)
    pictures = F.interpolate(_photographs(), 32).mul(255).byte()
    return FeatureKMeans.fit([pictures], network, image_size=32, num_codes=K // 2, digits=2, code_dim=D)


# Stores


def write_store(folder: Path, digits: int = 1) -> None:
    ids = np.random.default_rng(0).integers(0, K, (6, *([digits] if digits > 1 else []), 4, 4))
    tables = np.random.default_rng(1).normal(size=(digits, K, D)).astype(np.float32)
    codebook = Books.join(tables, "sum") if digits > 1 else tables[0]
    with StoreWriter(folder / "store", codebook=codebook, grid=(4, 4), class_names=["a", "b"]) as writer:
        writer.add_batch(ids, np.arange(6) % 2)


def write_shards(folder: Path) -> None:
    """A store of three shards, whose numbers of images are recorded, so that they are opened one by one."""
    before, spec.SHARD_IMAGES = spec.SHARD_IMAGES, 2
    try:
        write_store(folder)
    finally:
        spec.SHARD_IMAGES = before


def read_store(folder: Path, verify: bool = True) -> None:
    store = TokenStore(folder / "store", verify=verify)
    ids = store.ids(range(len(store)))
    assert int(ids.max()) < max(store.books.sizes) and len(store.labels) == len(store)


def seal_store(files: Files) -> Files:
    """Write the sizes and checksums of damaged files, and then its own, into tokens.json."""
    name = "store/tokens.json"
    body = files[name].rpartition(b'"checksum"')[0] or files[name]
    for path, data in files.items():
        entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        begin = body.find(json.dumps(path.removeprefix("store/")).encode() + b': {"bytes"')
        end = body.find(b"}", begin)
        if begin >= 0 and end >= 0:
            inside = body.index(b"{", begin)
            body = body[:inside] + json.dumps(entry).encode() + body[end + 1 :]
    digest = hashlib.sha256(body).hexdigest()
    return {**files, name: body + f'"checksum": "{digest}"\n}}\n'.encode()}


def write_token_release(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as elsewhere:
        write_store(Path(elsewhere))
        export_release(Path(elsewhere) / "store", Path(elsewhere) / "release")
        for path in (Path(elsewhere) / "release").iterdir():
            write(folder / path.name, path.read_bytes())


def read_token_release(folder: Path) -> None:
    out = folder / "imported"
    import_release(folder, out)
    assert len(TokenStore(out)) == 6


# Models


def write_classifier(folder: Path) -> None:
    model = timm.create_model("seit_vit_nano", img_size=8, in_chans=D, num_classes=3, embed_dim=24, depth=1)
    save_classifier(folder / "model.safetensors", model, "abc", class_names=["a", "b", "c"], window=(8, 8))


def _tiny_adapt() -> TokenAdapt:
    return TokenAdapt((4, 4), crop=(3, 3), num_codes=K, code_dim=D, width=64, heads=1, mlp=64)


def read_model(folder: Path, name: str = "model.safetensors") -> None:
    loaded = load_pretrained(folder / name)
    assert _whole(loaded.model) and not loaded.model.training


def read_tokenadapt(folder: Path, name: str = "model.safetensors") -> None:
    assert _whole(load_pretrained_tokenadapt(folder / name).model)


def _whole(model: nn.Module) -> bool:
    return not any(tensor.is_meta for tensor in model.state_dict().values())


def write_segmenter(folder: Path) -> None:
    backbone = TokenViT("mtm_vit_nano", img_size=8, in_chans=D, num_codes=K, embed_dim=64, depth=1, num_heads=1)
    model = build_segmenter(backbone, 3, channels=8)
    facts = {"codebook": "abc", "class_names": ["a", "b", "c"], "pixels_per_token": 4, "short_side": 32}
    save_segmenter(folder / "model.safetensors", model, **facts)


def write_release(folder: Path, part: Callable[[], dict[str, torch.Tensor]]) -> None:
    torch.save({"model": part()}, folder / "model.pth")


# Tokenizers


def read_tokenizer(folder: Path, name: str) -> None:
    tokenizer = tokenizers.load(folder / name)
    books = tokenizer.books.to_books()
    assert (books.rows, books.dim) == (tokenizer.spec.num_codes, tokenizer.spec.code_dim)
    assert _whole(tokenizer) and len(tokenizer.fingerprint) == 64


def write_vit_vqgan(folder: Path) -> None:
    spec = ViTVQGAN.new("small", image_size=16, patch=8, num_codes=K, code_dim=D).spec
    shape = TransformerShape(32, 1, 1, 32)
    ViTVQGAN(spec, shape, shape).save(folder / "t.safetensors")


def write_checkpoint_of_vqgan(folder: Path) -> None:
    torch.save({"state_dict": taming_tensors(small_vq_model())}, folder / "t.ckpt")


# Runs


def _trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


def write_checkpoint(folder: Path) -> None:
    model, optimizer = _trained()
    tensors = checkpoint.tensors_of(model, OptimizerState(optimizer), ema=None)
    for step in (1, 2):
        checkpoint.save(folder / "checkpoints", step, data_fingerprint="store", tensors=tensors)


def read_checkpoint(folder: Path) -> None:
    model, optimizer = _trained()
    path = checkpoint.newest(folder / "checkpoints")
    found = checkpoint.load(path)
    state = OptimizerState(optimizer)
    checkpoint.restore(found, data_fingerprint="store", model=model, optimizer=state, ema=None)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert checkpoint.latest(folder / "checkpoints")


def seal_checkpoint(files: Files) -> Files:
    """Write the sizes and checksums of damaged files into the manifests."""
    sealed = dict(files)
    for name in files:
        if name.endswith("manifest.json"):
            inside = name.removesuffix("manifest.json")
            manifest = {
                path.removeprefix(inside): {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                for path, data in files.items()
                if path.startswith(inside) and path != name
            }
            sealed[name] = json.dumps(manifest, indent=2).encode()
    return sealed


def write_run(folder: Path) -> None:
    write(folder / "config.json", json.dumps(SETTINGS))
    write(folder / "inputs.json", json.dumps({"store": "0" * 64}))
    write(folder / "metrics.jsonl", "".join(json.dumps({"step": n, "loss": 1 / (n + 1)}) + "\n" for n in range(4)))
    reading = {"resize": "squash", "scaled": False, "intensity": [0, 255]}
    write(
        folder / "result.json", json.dumps({"recipe": "seit_train", "data": {"tokenizer": {"reading": reading}}})
    )
    write(
        folder / "settings/config.json",
        json.dumps({"out": None, "seed": 3, "trackers": ["wandb"], "log_steps": 5}),
    )


def read_run(folder: Path) -> None:
    """Each file by itself, so that a damaged one does not hide the others, and then the folder as a whole."""
    config = load_config(TrainConfig, folder / "settings/config.json")
    assert type(config.seed) is int and type(config.resume) is bool
    log = MetricsLog(folder / "metrics.jsonl")
    assert all(record["step"] >= -(2**63) for record in log.read())
    log.keep_until(2)
    assert reading_of_run(str(folder), 3).channels == 3
    assert choose_folder("x", SETTINGS, out=str(folder), resume=True, overwrite=False)[1]
    planned_lengths(folder, SETTINGS)


# Images, their labels and their classes


def write_labels(folder: Path) -> None:
    write(folder / "a.json", json.dumps({"1.png": "cat", "2.png": ["dog", "cat"], "3.png": None}))
    write(folder / "b.json", json.dumps({"labels": [["1.png", 3], ["2.png", 0]]}))
    write(folder / "c.jsonl", "".join(json.dumps({"file_name": f"{n}.png", "label": n}) + "\n" for n in range(3)))
    write(folder / "d.csv", "name,label\n1.png,cat\n2.png,dog\n")
    write(folder / "e.txt", "1.png 0\n2.png 17\n3.png -1\n")


def read_labels(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        labels = read_label_file(path)
        assert labels and all(isinstance(name, str) for name in labels)


def write_classes(folder: Path) -> None:
    write(folder / "names.txt", "cat\ndog\n")
    write(folder / "colors.txt", "# name r g b\ncat 250 50 83\ndog 0 10 20\n")
    write(folder / "values.txt", "1 cat\n2: dog\n")
    write(folder / "coco.json", json.dumps({"categories": [{"id": 1, "name": "cat"}, {"id": 7, "name": "dog"}]}))
    write(folder / "names.json", json.dumps({"cat": 1, "dog": 2}))
    write(folder / "objectInfo2.txt", "Idx\tRatio\tName\n1\t0.5\tcat\n2\t0.3\tdog\n")
    write(folder / "names.cls", "cat\ndog\n")


def read_every_class_list(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        listed = read_classes(path)
        assert listed.names and all(name.encode() or True for name in listed.names)


def write_tar(folder: Path) -> None:
    members = {}
    for number, (data, label) in enumerate(photograph_crops(2, (8, 8))):
        members |= {f"{number}.png": data, f"{number}.cls": str(label), f"{number}.json": json.dumps({"label": 1})}
    make_tar(folder / "t.tar", members)


def read_pictures(folder: Path, name: str) -> None:
    source = open_source(str(folder / name), rules=LabelRules(unlabeled="keep"))
    assert len(source.labels.values) == len(source)
    for index in range(len(source)):
        try:
            sample = source.read(index)
        except ImageError as error:
            assert str(error).isprintable()
            continue
        assert isinstance(sample.data, bytes)


def write_parquet(folder: Path) -> None:
    path = as_parquet(folder / "made", photograph_crops(2, (8, 8)))
    first, *others = sorted(path.iterdir())
    first.rename(folder / "t.parquet")
    for other in others:
        other.unlink()
    path.rmdir()


def write_set(folder: Path, name: str) -> None:
    train, validation, _ = finegrained.COPIES[name](folder)
    for path in (train[0][0], validation[0][0]):
        write(folder / path, b"picture")


def read_finegrained(folder: Path, name: str) -> None:
    for split in read_set(name, folder).values():
        classes = split.features["label"].num_classes
        assert all(0 <= label < classes for label in split["label"])
        images = split.data.column("image").combine_chunks()
        assert all(Path(path).is_relative_to(folder) for path in images.field("path").to_pylist())


def _tokenizer(save: Callable[[Path], object], share: int = 10) -> Kind:
    return Kind(
        lambda folder: save(folder / "t.safetensors"), partial(read_tokenizer, name="t.safetensors"), share=share
    )


KINDS = {
    "store": Kind(write_store, read_store, seal_store, share=20),
    "store of digits": Kind(partial(write_store, digits=2), read_store, seal_store),
    "store of shards": Kind(write_shards, partial(read_store, verify=False), seal_store),
    "token release": Kind(write_token_release, read_token_release, share=4),
    "classifier": Kind(write_classifier, read_model),
    "mtm": Kind(
        lambda folder: save_pretrained(folder / "model.safetensors", tiny_mtm(code_dim=D), "abc"), read_model
    ),
    "tokenadapt": Kind(
        lambda folder: save_pretrained(folder / "model.safetensors", _tiny_adapt(), "abc"), read_tokenadapt
    ),
    "segmenter": Kind(write_segmenter, lambda folder: load_segmenter(folder / "model.safetensors"), share=2),
    "released classifier": Kind(
        partial(write_release, part=release_reference.seit_state), partial(read_model, name="model.pth")
    ),
    "released MTM": Kind(
        partial(write_release, part=release_reference.mtm_state), partial(read_model, name="model.pth")
    ),
    "patch k-means": _tokenizer(lambda path: _patch_kmeans().save(path)),
    "patch DCT": _tokenizer(lambda path: _patch_kmeans(PatchDCT).save(path), share=5),
    "feature k-means": _tokenizer(lambda path: _feature_kmeans().save(path), share=1),
    "refined": _tokenizer(lambda path: refine(_patch_kmeans(), _photographs(), steps=0).save(path), share=5),
    "vit_vqgan": Kind(write_vit_vqgan, partial(read_tokenizer, name="t.safetensors"), share=5),
    "vqgan": _tokenizer(lambda path: VQGAN.from_tensors(mage_tensors((32, 32)), path).save(path), share=3),
    "vqgan checkpoint": Kind(write_checkpoint_of_vqgan, partial(read_tokenizer, name="t.ckpt"), share=3),
    "diffusers": _tokenizer(lambda path: DiffusersVQ(small_vq_model()).save(path), share=2),
    "diffusers folder": Kind(
        lambda folder: small_vq_model().save_pretrained(folder / "t"), partial(read_tokenizer, name="t"), share=1
    ),
    "janus": _tokenizer(lambda path: JanusVQ(small_vqvae("JanusVQVAE")).save(path), share=2),
    "janus folder": Kind(
        lambda folder: small_vqvae("JanusVQVAE").save_pretrained(folder / "t"),
        partial(read_tokenizer, name="t"),
        share=1,
    ),
    "checkpoint": Kind(write_checkpoint, read_checkpoint, seal_checkpoint),
    "run": Kind(write_run, read_run, share=20),
    "labels": Kind(write_labels, read_labels, share=20),
    "class lists": Kind(write_classes, read_every_class_list, share=20),
    "tar": Kind(write_tar, partial(read_pictures, name="t.tar"), share=20),
    "parquet": Kind(write_parquet, partial(read_pictures, name="t.parquet")),
    "arrow": Kind(
        lambda folder: as_arrow(folder / "t", photograph_crops(2, (8, 8))),
        partial(read_pictures, name="t"),
        share=5,
    ),
    **{
        name: Kind(partial(write_set, name=name), partial(read_finegrained, name=name), share=5)
        for name in finegrained.COPIES
    },
}
