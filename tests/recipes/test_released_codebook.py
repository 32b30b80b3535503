"""The published token set, the used ones of 8,192 codes: made in two ways, met by every command with images."""

import json
from dataclasses import replace
from pathlib import Path

import evaluate
import finetune
import numpy as np
import pytest
import timm
import tokenadapt_train
import tokenize_images
import torch
import torch.nn.functional as F
from PIL import Image
from support.checkpoints import lightning_file
from support.finegrained import write_set
from support.models import tiny_mtm
from support.paths import RECIPES
from support.running import accuracies, call, distributed, refused
from torch import Tensor

from downstream.segmentation.scenes import write_scenes
from seitpp import TokenStore, tokenizers
from seitpp.codebook import codebook_fingerprint
from seitpp.images.batches import ImageDataset
from seitpp.images.sources import open_source
from seitpp.models import load_tokenadapt, save_release
from seitpp.store import SplitStaging, spec, staging
from seitpp.store.release import export_release, import_release
from seitpp.tokenizers import TokenizerSpec, ViTVQGAN
from seitpp.tokenizers.transformer import TransformerShape

K, SIDE, SHARD = 8192, 64, 20
IMAGES = {"train": 48, "validation": 12}
SPEC = TokenizerSpec("vit_vqgan", (SIDE, SIDE), 8, num_codes=K, code_dim=32)
SHAPE = TransformerShape(64, 1, 1, 128)


@pytest.fixture(autouse=True, scope="module")
def small_shards():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spec, "SHARD_IMAGES", SHARD)
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A ViT-VQGAN as its authors' training leaves it, so small that an image takes a millisecond."""
    torch.manual_seed(0)
    tokenizer = ViTVQGAN(SPEC, SHAPE, SHAPE)
    patches = tokenizer.encoder.to_patch_embedding[0]
    with torch.no_grad():  # centered and stretched: else all patches get nearly the same id
        patches.weight.mul_(10)
        patches.bias.copy_(-patches.weight.sum(dim=(1, 2, 3)) / 2)
    return lightning_file(tokenizer, tmp_path_factory.mktemp("tokenizer") / "vitvqgan.ckpt")


@pytest.fixture(scope="module")
def full(checkpoint: Path) -> ViTVQGAN:
    return tokenizers.load(checkpoint).requires_grad_(False)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Coarse noise, in which one color is dimmed for each of three classes."""
    root, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, number in IMAGES.items():
        for at in range(number):
            pixels = generator.integers(256, size=(8, 8, 3), dtype=np.uint8)
            pixels[..., at % 3] //= 2
            folder = root / split / ("red", "green", "blue")[at % 3]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).resize((SIDE, SIDE)).save(folder / f"{at:02}.png")
    return root


def pixels(pictures: Path, split: str) -> Tensor:
    images = ImageDataset(open_source(str(pictures), split), (SIDE, SIDE))
    return images.__getitems__(list(range(len(images)))).images / 255


def arguments(pictures: Path, tokenizer: Path, out: Path, *flags: object, split: str = "train") -> list:
    where = ["--data", pictures, "--source-split", split, "--split", split, "--out", out]
    return [*where, "--tokenizer", tokenizer, "--batch-size-per-process", 16, *flags]


def make(pictures: Path, tokenizer: Path, out: Path, *flags: object) -> Path:
    """A store of both splits, train first."""
    for split in IMAGES:
        call(tokenize_images, *arguments(pictures, tokenizer, out, *flags, split=split))
    return out


def tokenizer_of(store: Path) -> Path:
    """The file of the cut tokenizer."""
    return Path(f"{store}-tokenizer.safetensors")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def store(pictures, checkpoint, tmp_path_factory) -> Path:
    """With the codes that its training images use."""
    return make(pictures, checkpoint, tmp_path_factory.mktemp("compact") / "store", "--compact")


# By counting


def test_the_store_has_the_used_codes_by_popularity(store, full, pictures) -> None:
    whole = full.encode(pixels(pictures, "train"))
    counts = torch.bincount(whole.flatten(), minlength=K)
    used = sorted(whole.unique().tolist(), key=lambda code: (-counts[code], code))
    assert 50 < len(used) < K // 4, "a set that is worth cutting"
    tokens = TokenStore(store)
    assert tokens.num_codes == len(used) and np.array_equal(tokens.codebook, full.codebook[used])
    assert np.array_equal(np.array(used)[tokens.ids(range(len(tokens)))], whole)
    assert tokens.counts.tolist() == counts[used].tolist() and (np.diff(tokens.counts) <= 0).all()
    assert sorted(path.name for path in store.parent.iterdir()) == ["store", "store-tokenizer.safetensors"]


def test_the_tokenizer_beside_it_makes_its_ids(store, full, pictures) -> None:
    tokenizer = tokenizers.load(tokenizer_of(store)).requires_grad_(False)
    assert tokenizer.spec == replace(full.spec, num_codes=len(tokenizer.codebook))
    images = {split: pixels(pictures, split) for split in IMAGES}
    for split in IMAGES:
        tokens = TokenStore(store, split)
        assert tokens.tokenizer["fingerprint"] == tokenizer.fingerprint
        assert np.array_equal(tokens.codebook, tokenizer.codebook)
        ids = torch.from_numpy(tokens.ids(range(len(tokens))).astype(np.int64))
        assert torch.equal(ids, tokenizer.encode(images[split]))
    # Of the validation tokens whose own code was left out, the nearest code that was not.
    whole = {split: full.encode(images[split]) for split in IMAGES}
    unseen = ~torch.isin(whole["validation"], whole["train"])
    assert 0 < unseen.sum() < unseen.numel() / 2
    vectors = F.normalize(full.features(images["validation"]), dim=1).permute(0, 2, 3, 1)
    rows = F.normalize(tokenizer.codebook, dim=1)
    assert torch.equal(ids[unseen], torch.cdist(vectors[unseen], rows).argmin(dim=1))
    assert torch.equal(tokenizer.codebook[ids[~unseen]], full.codebook[whole["validation"][~unseen]])


def test_a_later_split_needs_the_checkpoint_or_the_tokenizer_of_the_first(store, pictures, checkpoint, tmp_path):
    for name, later in (("one", tokenizer_of(store)), ("two", checkpoint)):
        out = tmp_path / name
        call(tokenize_images, *arguments(pictures, checkpoint, out, "--compact"))
        flags = ["--compact"] if later == checkpoint else []
        call(tokenize_images, *arguments(pictures, later, out, *flags, split="validation"))
        assert content(out) == content(store)


class Killed(Exception):
    pass


def test_killed_around_its_publication_it_goes_on_to_the_same_bytes(store, pictures, checkpoint, tmp_path):
    def die(*_: object, **__: object) -> None:
        raise Killed

    # After the first shard; when the tokenizer is written and no store is; when the store is and the rest remains.
    places = [(tokenize_images, "totals_of"), (SplitStaging, "publish"), (staging, "remove_folder")]
    for at, (room, name) in enumerate(places):
        out = tmp_path / str(at) / "store"
        line = arguments(pictures, checkpoint, out, "--compact")
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            patch.setattr(room, name, die)
            call(tokenize_images, *line)
        assert (tokenizer_of(out).exists(), out.exists()) == (at > 0, at > 1)
        make(pictures, checkpoint, out, "--compact")
        assert content(out.parent) == content(store.parent)


def test_two_processes_give_the_same_bytes(store, pictures, checkpoint, tmp_path) -> None:
    line = arguments(pictures, checkpoint, tmp_path / "store", "--compact", "--workers", 0)
    code = "import sys; sys.argv = sys.argv[1:]; from seitpp.store import spec; spec.SHARD_IMAGES = 20; "
    code += "import runpy; runpy.run_path(sys.argv[0], run_name='__main__')"
    (tmp_path / "small_shards.py").write_text(code)
    finished = distributed(2, tmp_path / "small_shards.py", RECIPES / "tokenize_images.py", *line)
    assert finished.returncode == 0, finished.stderr
    assert "in 3 shards" in finished.stdout and "2 process(es)" in finished.stdout
    assert tokenizer_of(tmp_path / "store").read_bytes() == tokenizer_of(store).read_bytes()
    call(tokenize_images, *arguments(pictures, checkpoint, tmp_path / "store", "--compact", split="validation"))
    assert content(tmp_path / "store") == content(store)


# By the rows of a released codebook


@pytest.fixture(scope="module")
def release(store, tmp_path_factory) -> Path:
    """The tokens of `store` as released files, whose codebook holds the rows L2-normalized: other bytes."""
    folder = export_release(store, tmp_path_factory.mktemp("release") / "files")
    rows = F.normalize(torch.load(folder / "codebook.ckpt", weights_only=True), dim=1)
    torch.save(rows, folder / "codebook.ckpt")
    return folder


def test_images_become_the_ids_of_the_released_tokens(store, release, pictures, checkpoint, tmp_path) -> None:
    imported = import_release(release, tmp_path / "imported")
    files = {"ckpt": release / "codebook.ckpt", "safetensors": imported / "codebook.safetensors"}
    for name, file in files.items():
        make(pictures, checkpoint, tmp_path / name, "--codebook", file)
        for split, number in IMAGES.items():
            mine, theirs = TokenStore(tmp_path / name, split), TokenStore(imported, split)
            assert codebook_fingerprint(mine.codebook) == codebook_fingerprint(theirs.codebook)
            assert mine.codebook.tobytes() == theirs.codebook.tobytes()
            assert np.array_equal(mine.ids(range(number)), theirs.ids(range(number)))
        tokenizer = tokenizers.load(tokenizer_of(tmp_path / name))
        assert tokenizer.fingerprint == mine.tokenizer["fingerprint"] != TokenStore(store).tokenizer["fingerprint"]
        assert np.array_equal(tokenizer.codebook.detach(), mine.codebook)
    assert content(tmp_path / "ckpt") == content(tmp_path / "safetensors")


def test_rows_are_found_in_any_order_and_none_in_vain(full) -> None:
    chosen = torch.randperm(K, generator=torch.Generator().manual_seed(1))[:300]
    scales = torch.rand(300, 1, generator=torch.Generator().manual_seed(2)) + 0.5
    rows = full.codebook[chosen] * scales
    cut = full.select(rows)
    assert torch.equal(cut.codebook, rows) and cut.spec.num_codes == 300 and full.spec.num_codes == K
    maps = full.codebook[chosen].T[None, :, :, None]
    assert cut.quantize(maps).flatten().tolist() == list(range(300))
    with torch.no_grad():
        twins = full.select(full.codebook[:10])
        twins.codebook[9] = 2 * twins.codebook[4]  # of the same direction, which only the length tells apart
        assert torch.equal(twins.select(twins.codebook[[9, 4]]).codebook, twins.codebook[[9, 4]])
    rows[7] += 0.01
    rows[9, 0] = torch.nan
    for bad, message in (
        (
            rows,
            r"^2 of 300 rows are not among the 8192 codes .*, the farthest nan away, expected at most 1e-05",
        ),
        (torch.cat([rows[:3], rows[1:2]]), "1 of 4 rows repeat the code of another row"),
        (rows[:, :16], r"rows of shape \(300, 16\) .* 32 dimensions"),
        (rows[:0], r"rows of shape \(0, 32\)"),
    ):
        with pytest.raises(tokenizers.TokenizerError, match=message):
            full.select(bad)
    with pytest.raises(tokenizers.TokenizerError, match=r"^1 of 8 rows .*, the farthest 0\.\d+ away"):
        full.select(rows[:8])


def test_what_cannot_be_cut_is_one_line(release, pictures, checkpoint, tmp_path, capfd, monkeypatch) -> None:
    other = tmp_path / "other.ckpt"
    torch.save(torch.randn(391, 32, generator=torch.Generator().manual_seed(3)), other)
    missing = ["391 of 391 rows are not among the 8192 codes", "use the tokenizer that the codebook belongs to"]
    for flags, words, split in (
        (["--codebook", other], [other, *missing], "train"),
        (
            ["--codebook", tmp_path / "none.ckpt"],
            ["none.ckpt: missing, expected a codebook.ckpt"],
            "train",
        ),
        (["--codebook", checkpoint], ["holds a dict, expected a tensor"], "train"),
        (["--codebook", release / "codebook.ckpt", "--compact"], ["leave one of them out"], "train"),
        (["--compact"], ["--compact counts the codes of the split train"], "validation"),
    ):
        line = arguments(pictures, checkpoint, tmp_path / "out" / "store", *flags, split=split)
        refused(capfd, monkeypatch, tokenize_images, line, *words)
    assert not (tmp_path / "out").exists()


# Every command that meets images


def official(kind: str, num_codes: int, path: Path) -> Path:
    """A checkpoint in the released layout for images of SIDE pixels."""
    torch.manual_seed(0)
    size = {"embed_dim": 64, "depth": 1, "num_heads": 1}
    if kind == "MTM":
        model = tiny_mtm(num_codes=num_codes, encoder_size=size)
    else:
        names = {"img_size": 8, "in_chans": 32, "num_codes": num_codes, "num_classes": 3}
        model = timm.create_model("mtm_vit_nano", **names, **size)
        torch.nn.init.normal_(model.head.weight)
    save_release(model, path)
    return path


def judged(checkpoint: Path, out: Path, *data: object) -> tuple:
    """What evaluate.py finds: accuracies, and who is taken for whom."""
    call(evaluate, "smoke", "--checkpoint", checkpoint, *data, "--out", out)
    return accuracies(out), (out / "confusion.csv").read_bytes(), (out / "per_class.csv").read_bytes()


def test_official_models_meet_images(store, release, pictures, checkpoint, tmp_path, capfd, monkeypatch) -> None:
    """On tokens that were released, on those of images, and on images: the same predictions."""
    imported = import_release(release, tmp_path / "imported")
    mine = make(pictures, checkpoint, tmp_path / "mine", "--codebook", release / "codebook.ckpt")
    tokens = TokenStore(imported)
    classifier = official("classifier", tokens.num_codes, tmp_path / "classifier.pth")
    images = ["--data", pictures, "--tokenizer", tokenizer_of(mine)]
    found = [
        judged(classifier, tmp_path / name, *data)
        for name, data in (("stored", ["--store", mine]), ("images", images))
    ]
    assert found[0] == found[1]
    assert len({line.split(b",")[1] for line in found[0][1].splitlines()[1:]}) > 1, "not all taken for one class"
    assert judged(classifier, tmp_path / "released", "--store", imported)[0] == found[0][0]
    whole = ["smoke", "--checkpoint", classifier, "--data", pictures, "--tokenizer", checkpoint]
    refused(capfd, monkeypatch, evaluate, whole, f"has 8192 codes, {classifier} takes {tokens.num_codes}")

    mtm = official("MTM", tokens.num_codes, tmp_path / "mtm.pth")
    few = ["--batch-size", 16, "--epochs", 1, "--warmup-epochs", 0]
    call(finetune, "smoke", *few, "--checkpoint", mtm, "--store", mine, "--out", tmp_path / "run")
    found = [judged(tmp_path / "run", tmp_path / f"run-{data[0]}", *data) for data in (["--store", mine], images)]
    assert found[0] == found[1] and found[0][0] == accuracies(tmp_path / "run")
    # A run knows its codebook: the same codes in other bytes, those of `store`, are another one.
    of_store = ["--data", pictures, "--tokenizer", tokenizer_of(store)]
    refused(
        capfd, monkeypatch, evaluate, ["smoke", "--checkpoint", tmp_path / "run", *of_store], "is not the codebook"
    )


def test_a_fine_grained_set(store, pictures, checkpoint, tmp_path) -> None:
    write_set("flowers102", tmp_path / "set")
    settings = {"data": str(tmp_path / "set"), "workers": 0}
    ways = {
        "tokenizer": {"tokenizer": str(tokenizer_of(store))},
        "codebook": {"tokenizer": str(checkpoint), "codebook": str(store / "codebook.safetensors")},
    }
    for name, way in ways.items():
        out = str(tmp_path / name)
        tokenize_images.main(
            replace(tokenize_images.PRESETS["published"], set="flowers102", out=out, **settings, **way)
        )
    tokens = TokenStore(tmp_path / "codebook", "validation")
    assert np.array_equal(tokens.codebook, TokenStore(store).codebook) and len(tokens) == 3
    assert tokens.tokenizer == TokenStore(store).tokenizer
    assert content(tmp_path / "tokenizer") == content(tmp_path / "codebook")


def test_ade20k(full, checkpoint, tmp_path) -> None:
    write_scenes(tmp_path / "ade", num_classes=4, images={"training": 6, "validation": 2}, size=(32, 72))
    short = ["ade20k", "--workers", 0, "--short-side", 64, "--data", tmp_path / "ade"]
    stores = {name: tmp_path / name for name in ("whole", "compact")}
    for name, out in stores.items():
        line = [*short, "--tokenizer", checkpoint, "--out", out, *(["--compact"] if name == "compact" else [])]
        call(tokenize_images, *line)
        call(tokenize_images, *line, "--source-split", "validation", "--split", "validation")
    whole, compact = (TokenStore(out) for out in stores.values())
    assert compact.num_codes == (whole.counts > 0).sum() < K and compact.grid is None
    for (ids, label), (fewer, same) in zip(whole, compact, strict=True):
        assert label == same and np.array_equal(whole.codebook[ids], compact.codebook[fewer])
    annotations = [tokens.column("annotation")[range(6)] for tokens in (whole, compact)]
    assert np.array_equal(*annotations)
    tokenizer = tokenizers.load(tokenizer_of(stores["compact"]))
    assert tokenizer.spec.image_size == (SIDE, SIDE)
    assert torch.equal(tokenizer.encoder.en_pos_embedding, full.encoder.en_pos_embedding)
    assert compact.tokenizer["fingerprint"] == tokenizer.fingerprint and compact.tokenizer["short_side"] == 64
    assert TokenStore(stores["compact"], "validation").tokenizer == compact.tokenizer


def test_tokenadapt(store, pictures, tmp_path) -> None:
    flags = ["--data", pictures, "--split", "train", "--validation-split", "validation", "--crop-size", 7]
    sizes = ["--load-size", SIDE, "--image-size", SIDE, "--batch-size", 16, "--warmup-epochs", 0]
    out = tmp_path / "adapt"
    call(tokenadapt_train, "smoke", *flags, *sizes, "--tokenizer", tokenizer_of(store), "--out", out)
    model, codebook, *_ = load_tokenadapt(out / "model.safetensors")
    tokens = TokenStore(store)
    assert model.head.out_features == tokens.num_codes and (model.grid, model.crop) == ((8, 8), (7, 7))
    assert codebook == codebook_fingerprint(tokens.codebook)
    first = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(np.log(tokens.num_codes), abs=1e-3)
