"""Stored training sets: their bytes, against the files; qualities, parts and boxes; the Pareto front."""

import io
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from support.pictures import photograph_crops

from downstream.storage.front import Score, pareto
from downstream.storage.packs import ROWS, Pack, write_pack
from downstream.storage.pictures import best_quality, compressed, fitted, framing, in_kind, opened, smaller
from downstream.storage.scores import best, read_scores, write_scores
from downstream.storage.shelf import Shelf
from downstream.storage.table import aligned
from downstream.storage.tokens import CentralWindows, SameBoxes
from seitpp import tokenizers
from seitpp.augment import Keys
from seitpp.augment.maps import crop_ratio, random_resized_boxes
from seitpp.data.dataset import MicroBatch
from seitpp.data.digits import DigitsSource, digits
from seitpp.errors import UserError
from seitpp.images.decode import Sample
from seitpp.images.sources import SourceSubset
from seitpp.store import TokenStore


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    """Of 60 digits, and 20 to test on."""
    train, test = (SourceSubset(DigitsSource(split), range(n)) for split, n in (("train", 60), ("validation", 20)))
    tokenizer = tokenizers.load(digits().tokenizer)
    folder, device = tmp_path_factory.mktemp("shelf") / "stored", torch.device("cpu")
    return Shelf(folder, train=train, test=test, tokenizer=tokenizer, device=device, seed=0)


def photograph(side: int = 64, file_format: str = "PNG") -> Sample:
    picture, _ = photograph_crops(2, (side, side))[0]
    buffer = io.BytesIO()
    Image.open(io.BytesIO(picture)).save(buffer, file_format)
    return Sample(buffer.getvalue(), "one", 0)


def test_every_byte_of_pictures_is_counted_once(shelf: Shelf) -> None:
    change = partial(compressed, file_format="JPEG", quality=5)
    row = shelf.pictures("JPEG", "q5", change=change)
    files = [change(opened(shelf.train.read(at)), shelf.train.read(at).data) for at in range(60)]
    assert row.sizes.total == bytes_in(row.folder) and row.sizes.payload == sum(map(len, files))
    assert (row.sizes.labels, row.sizes.codebook, row.sizes.codec_table) == (60 * 8, 0, 0)
    assert row.sizes.offsets >= 61 * 4 and 0 < row.sizes.metadata < 2000 and row.images == 60
    gray = io.BytesIO()
    Image.new("L", (8, 8), 128).save(gray, "JPEG", quality=5)
    assert row.sizes.framing == 60 * gray.tell() < row.sizes.payload
    kept = Pack(row.folder)
    assert [kept.read(at).data for at in range(60)] == files and kept.class_names == shelf.train.class_names
    assert kept.labels.values == shelf.train.labels.values and len(Pack(row.matched)) == 20


def test_every_byte_of_tokens_is_counted_once(shelf: Shelf) -> None:
    whole = shelf.tokens("tokens", "all")
    part, crops = shelf.tokens("part", "0.2", fraction=0.2), shelf.crops("crops", "2", number=2, scale=(0.7, 1.0))
    for row, images in ((whole, 60), (part, 12), (crops, 120)):
        store = TokenStore(row.folder)
        assert row.sizes.total == bytes_in(row.folder) and row.images == images == len(store)
        assert row.sizes.payload == store.payload_bytes and row.sizes.labels >= 8 * images
        assert row.sizes.codebook == (row.folder / "codebook.safetensors").stat().st_size > 64 * 32 * 4
    every = TokenStore(crops.folder)
    first, second = every.ids(range(0, 120, 2)), every.ids(range(1, 120, 2))
    assert (first != second).any() and (every.labels[::2] == every.labels[1::2]).all()
    assert len(shelf.test_tokens()) == 20 and whole.sizes.codec_table == 0


def test_a_set_that_is_there_is_not_made_again(shelf: Shelf) -> None:
    row = shelf.pictures("uniform", "0.5", chosen=np.arange(30))
    before = (row.folder / "images.arrow").stat().st_mtime_ns
    assert shelf.pictures("uniform", "0.5", chosen=np.arange(30)) == row and row.images == 30
    assert (row.folder / "images.arrow").stat().st_mtime_ns == before
    assert Pack(row.folder).read(3).data == shelf.train.read(3).data, "originals stay as they are"


@pytest.mark.parametrize("file_format", ["WEBP", "AVIF"])
def test_the_best_quality_within_a_budget(shelf: Shelf, file_format: str) -> None:
    assert shelf.within(file_format, file_format, 40) is None, "its framing alone is more"
    budget = {"WEBP": 120, "AVIF": 400}[file_format]
    row = shelf.within(file_format, file_format, budget)
    assert row.sizes.total <= 60 * budget
    change = partial(fitted, file_format=file_format, size=(32, 32))
    samples = [shelf.train.read(at) for at in range(60)]
    quality, overhead = int(row.setting[1:]), row.sizes.total - row.sizes.payload
    sizes = [
        sum(len(change(opened(one), one.data, quality=q)) for one in samples)
        for q in range(quality + 1, min(quality + 3, 101))
    ]
    assert all(size + overhead > 60 * budget for size in sizes)
    assert best_quality(samples, change, 10) is None and best_quality(samples, change, 10**6) == 100


def test_pictures_keep_their_kind_and_are_never_enlarged() -> None:
    for file_format, sides in product(("PNG", "JPEG"), ((64, 0.3), (8, 0.1))):
        sample = photograph(sides[0], file_format)
        image = Image.open(io.BytesIO(smaller(opened(sample), sample.data, scale=sides[1])))
        assert image.format == file_format and image.size == (max(1, round(sides[1] * sides[0])),) * 2
    sample = photograph(64)
    for size, found in (((32, 32), (32, 32)), ((128, 128), (64, 64))):
        data = fitted(opened(sample), sample.data, file_format="WEBP", quality=50, size=size)
        assert Image.open(io.BytesIO(data)).size == found
    assert framing([sample, sample], in_kind) < len(sample.data)


def test_pictures_of_several_batches_of_a_pack(tmp_path: Path) -> None:
    """Read in any order, and in another process."""
    samples = [Sample(bytes([at % 251]) * (at % 7), "", at % 3) for at in range(ROWS + 5)]
    write_pack(tmp_path / "pack", samples, ["a", "b", "c"])
    pack = Pack(tmp_path / "pack")
    again = Pack.__new__(Pack)
    again.__dict__ |= pack.__getstate__()
    for at in (ROWS + 4, 0, ROWS - 1, ROWS):
        assert pack.read(at)[::2] == again.read(at)[::2] == samples[at][::2]
    assert pack.sizes().payload == sum(len(sample.data) for sample in samples)
    with pa.OSFile(str(tmp_path / "pack/images.arrow")) as file:
        assert pa.ipc.open_file(file).num_record_batches == 2
    with pytest.raises(UserError, match="exists"):
        write_pack(tmp_path / "pack", samples, ["a"])


def test_pictures_show_the_parts_that_tokens_do() -> None:
    boxes = SameBoxes(3, (8, 8), (8, 8), (0.3, 1.0))
    found = torch.tensor(boxes(MicroBatch([5, 9], 2), [(80, 40), (2, 2)]))
    tokens = random_resized_boxes(Keys(3, 2, torch.tensor([5, 9])), (8, 8), (0.3, 1.0), ratio=crop_ratio(8))
    assert torch.equal(found[0], tokens[0] * torch.tensor([10, 5, 10, 5]).double())
    assert torch.equal(found[1], tokens[1] / 4)
    assert CentralWindows((32, 32), (28, 28))([0], [(320, 64)]) == [(20, 4, 280, 56)]


def test_the_pareto_front_has_what_no_other_point_beats() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        points = [tuple(map(float, point)) for point in generator.integers(6, size=(12, 2))]
        front = pareto(points)
        best_of_all = {
            (cost, value)
            for cost, value in points
            if not any(other[0] <= cost and other[1] >= value and other != (cost, value) for other in points)
        }
        assert [points[at] for at in front] == sorted(best_of_all)
    assert pareto([(1, 5), (1, 5)]) == [0] and pareto([]) == []


def test_scores_and_tables(tmp_path: Path) -> None:
    scores = np.array([0.5, 2.0, -1.0, 2.0])
    write_scores(tmp_path / "scores", scores)
    assert read_scores(tmp_path / "scores", 4).tolist() == scores.tolist()
    assert best(scores, 0.5, "high").tolist() == [1, 3] and best(scores, 0.5, "low").tolist() == [0, 2]
    assert best(scores, 0.01, "low").tolist() == [2]
    for text in ("1\n2\n", "1\nnan\n3\n", "1\ntwo\n3\n"):
        (tmp_path / "wrong").write_text(text)
        with pytest.raises(UserError, match=r"wrong: .*expected 3 lines"):
            read_scores(tmp_path / "wrong", 3)
    with pytest.raises(UserError, match="expected 3 lines"):
        read_scores(tmp_path / "none", 3)
    assert str(Score.of([1.0, 2.0])) == "1.5 +- 0.7" and Score.of([3.0]) == (3.0, 0.0)
    assert aligned([["a", "10"], ["bbb", ""]]) == "a    10\nbbb"
