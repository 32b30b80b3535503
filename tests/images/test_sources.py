"""Sources of encoded images: the same photographs through every kind of source."""

import io
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from seitpp.images.batches import ImageDataset
from seitpp.images.decode import ImageError, Sample, decode_image
from seitpp.images.sources import open_source

CLASSES = ["china", "flower"]


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def samples() -> list[tuple[bytes, int]]:
    """Six crops of two photographs, with their classes."""
    photographs = load_sample_images().images
    return [(png(photographs[label][at : at + 50, :70]), label) for label in (0, 1) for at in (0, 100, 200)]


def folder(root: Path, samples: list[tuple[bytes, int]]) -> Path:
    for number, (data, label) in enumerate(samples):
        path = root / "train" / CLASSES[label] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def parquet(root: Path, samples: list[tuple[bytes, int]]) -> Path:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    root.mkdir()
    for part in (0, 1):
        rows = [
            {"image": {"bytes": data, "path": None}, "label": label} for data, label in samples[part * 3 :][:3]
        ]
        dataset = datasets.Dataset.from_list(rows, features=features)
        dataset.to_parquet(root / f"train-{part}.parquet", batch_size=2)
    return root


def tar(root: Path, samples: list[tuple[bytes, int]]) -> Path:
    root.mkdir()
    with tarfile.open(root / "train-0.tar", "w") as file:
        for number, (data, label) in enumerate(samples):
            for suffix, content in (("png", data), ("cls", str(label).encode()), ("txt", b"ignored")):
                info = tarfile.TarInfo(f"../outside/{number}.{suffix}")  # names are never written to disk
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
    return root


@pytest.mark.parametrize("make", [folder, parquet, tar])
def test_every_source_gives_the_same_bytes_and_labels(make, samples, tmp_path) -> None:
    source = open_source(str(make(tmp_path / "source", samples)), "train")
    assert len(source) == 6
    read = [source.read(index) for index in range(6)]
    assert [(sample.data, sample.label) for sample in read] == samples
    assert len({sample.name for sample in read}) == 6
    assert [source.read(index).data for index in (5, 0, 4)] == [samples[index][0] for index in (5, 0, 4)]
    assert source.class_names == (None if make is tar else CLASSES)


def test_a_named_data_set_gives_the_same_bytes_and_labels(samples, monkeypatch) -> None:
    """What `datasets` gives for a name on the hub; only the download is left out."""
    features = datasets.Features({"photo": datasets.Image(), "kind": datasets.ClassLabel(names=CLASSES)})
    rows = [{"photo": {"bytes": data, "path": None}, "kind": label} for data, label in samples]
    asked = []

    def load_dataset(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        return datasets.Dataset.from_list(rows, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = open_source("somebody/photographs", "validation")
    assert asked == [("somebody/photographs", "validation")]
    assert [(source.read(index).data, source.read(index).label) for index in range(6)] == samples
    assert source.class_names == CLASSES


def test_a_flat_folder_has_one_class_without_a_name(samples, tmp_path) -> None:
    (tmp_path / "a.PNG").write_bytes(samples[0][0])
    (tmp_path / "notes.txt").write_text("not an image")
    source = open_source(str(tmp_path), None)
    assert (len(source), source.class_names, source.read(0).label) == (1, None, 0)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "CMYK"])
def test_decoding_resizes_to_exactly_the_size(mode: str, samples) -> None:
    image = Image.open(io.BytesIO(samples[0][0])).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "TIFF" if mode == "CMYK" else "PNG")
    decoded = decode_image(Sample(buffer.getvalue(), "x", 0), (32, 48))
    expected = np.asarray(image.convert("RGB").resize((48, 32), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert decoded.dtype == np.uint8 and np.array_equal(decoded, expected)


def test_a_dataset_decodes_whole_batches(samples, tmp_path) -> None:
    source = open_source(str(folder(tmp_path / "source", samples)), "train")
    indices, images, labels = ImageDataset(source, (32, 32)).__getitems__([4, 1])
    assert indices.tolist() == [4, 1] and images.shape == (2, 3, 32, 32)
    assert labels.tolist() == [source.read(4).label, source.read(1).label]
    assert np.array_equal(images[0], decode_image(source.read(4), (32, 32)))


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:40], lambda data: b"GIF89a" + bytes(50)])
def test_an_unreadable_image_is_named(damage, samples) -> None:
    with pytest.raises(ImageError, match=r"^holiday\.png: cannot be read as an image"):
        decode_image(Sample(damage(samples[0][0]), "holiday.png", 0), (32, 32))


def test_a_bomb_is_refused(monkeypatch, samples) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match="decompression bomb"):
        decode_image(Sample(samples[0][0], "bomb.png", 0), (32, 32))


def test_bad_sources_are_refused(samples, tmp_path) -> None:
    with pytest.raises(ImageError, match="no images below it"):
        open_source(str(tmp_path), None)
    with pytest.raises(ImageError, match="expected a folder of images"):
        open_source(str(tmp_path / "missing"), None)
    with pytest.raises(ImageError, match="no images below it"):
        open_source(str(folder(tmp_path / "f", samples)), "validation")
    with pytest.raises(ImageError, match="no file whose name begins with 'validation', it has train-0"):
        open_source(str(tar(tmp_path / "t", samples)), "validation")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ImageError, match="cannot be read as Parquet"):
        open_source(str(tmp_path / "broken.parquet"), None)
    (tmp_path / "broken.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(ImageError, match="cannot be read as an uncompressed tar"):
        open_source(str(tmp_path / "broken.tar"), None)
