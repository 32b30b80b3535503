"""Pictures as people have them become the pixels that a viewer shows, or are refused by name."""

import io
import random
import shutil

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images
from support.pictures import encoded

from seitpp.images.decode import FORMATS, ImageError, Reading, Sample, decode_image, image_size, is_image

PHOTOGRAPH = load_sample_images().images[0][:60, :90]
RAMP = np.arange(60 * 90).reshape(60, 90)


def sample(data: bytes) -> Sample:
    return Sample(data, "holiday.png", None)


def saved(image: Image.Image, kind: str, **options: object) -> Sample:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return sample(buffer.getvalue())


def squashed(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(image.convert("RGB").resize(size[::-1], Image.Resampling.BICUBIC)).transpose(2, 0, 1)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P", "1", "CMYK"])
def test_decoding_resizes_to_exactly_the_size(mode: str) -> None:
    image = Image.fromarray(PHOTOGRAPH).convert(mode)
    decoded = decode_image(saved(image, "TIFF" if mode == "CMYK" else "PNG"), (32, 48))
    assert decoded.dtype == np.uint8 and np.array_equal(decoded, squashed(image, (32, 48)))


@pytest.mark.parametrize("kind", FORMATS)
def test_every_named_format_is_read_by_its_content(kind: str) -> None:
    data = encoded(PHOTOGRAPH, kind)
    assert is_image(data[:4096])
    with Image.open(io.BytesIO(data)) as image:
        assert np.array_equal(decode_image(sample(data), (20, 30)), squashed(image, (20, 30)))


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_orientation_is_that_of_a_viewer(kind: str, turn: int) -> None:
    exif = Image.Exif()
    exif[274] = turn
    turned = saved(Image.fromarray(PHOTOGRAPH), kind, exif=exif)
    with Image.open(io.BytesIO(turned.data)) as image:
        upright = ImageOps.exif_transpose(image)
    assert image_size(turned) == upright.size[::-1] == ((90, 60) if turn >= 5 else (60, 90))
    assert np.array_equal(decode_image(turned, (32, 32)), squashed(upright, (32, 32)))
    box = (5, 10, 40, 45)
    part = upright.crop((10, 5, 55, 45))
    whole = decode_image(turned, (40, 45), box).astype(int)
    assert np.abs(whole - squashed(part, (40, 45))).max() == 0


def test_a_damaged_exif_does_not_matter() -> None:
    exif = Image.Exif()
    exif[274] = 6
    data = saved(Image.fromarray(PHOTOGRAPH), "JPEG", exif=exif).data
    at = data.index(b"Exif\0\0") + 6
    broken = data[:at] + b"\xff" * 10 + data[at + 10 :]
    assert image_size(sample(broken)) == (60, 90) and decode_image(sample(broken), (8, 8)).shape == (3, 8, 8)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "NPY"])
def test_sixteen_bits_are_scaled_by_their_range(kind: str) -> None:
    values = (RAMP * 12).astype(np.uint16)
    assert values.max() > 64_000
    deep = sample(encoded(values, kind))
    decoded = decode_image(deep, (60, 90))
    assert np.array_equal(decoded, np.broadcast_to(np.round(values / 257).astype(np.uint8), (3, 60, 90)))
    twelve = decode_image(deep, (60, 90), reading=Reading(intensity=(1000, 5095)))
    assert np.array_equal(twelve[0], np.round((values.astype(float).clip(1000, 5095) - 1000) / 4095 * 255))


@pytest.mark.parametrize("kind", ["TIFF", "NPY"])
@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_values_without_a_range_need_one(kind: str, dtype: type) -> None:
    data = sample(encoded((RAMP / 10).astype(dtype), kind))
    with pytest.raises(ImageError, match=r"no fixed range: say .* --intensity 0 539"):
        decode_image(data, (8, 8))
    assert decode_image(data, (60, 90), reading=Reading(intensity=(0, 539)))[0, -1, -1] == 255


@pytest.mark.parametrize("bands", [2, 4, 13])
@pytest.mark.parametrize("first", [False, True])
def test_any_number_of_bands(bands: int, first: bool) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, bands), dtype=np.uint8)
    stored = pixels.transpose(2, 0, 1) if first else pixels
    tiff = io.BytesIO()
    tifffile.imwrite(tiff, stored, photometric="minisblack", planarconfig="separate" if first else "contig")
    for data in (encoded(stored, "NPY"), tiff.getvalue()):
        decoded = decode_image(sample(data), (60, 90), reading=Reading(channels=bands))
        assert np.array_equal(decoded, pixels.transpose(2, 0, 1))
        with pytest.raises(ImageError, match=r"^holiday.png: "):
            decode_image(sample(data), (60, 90))
    with pytest.raises(ImageError, match=rf"expected {bands} band\(s\), first or last"):
        decode_image(sample(encoded(PHOTOGRAPH)), (60, 90), reading=Reading(channels=bands))


def test_one_band_is_gray() -> None:
    decoded = decode_image(sample(encoded(PHOTOGRAPH)), (60, 90), reading=Reading(channels=1))
    assert np.array_equal(decoded[0], np.asarray(Image.fromarray(PHOTOGRAPH).convert("L")))


def test_wide_pictures_are_squashed_cropped_or_padded() -> None:
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, 40:80] = 200
    picture = sample(encoded(wide))
    assert np.array_equal(decode_image(picture, (40, 40)), squashed(Image.fromarray(wide), (40, 40)))
    assert (decode_image(picture, (40, 40), reading=Reading("center_crop")) == 200).all()
    padded = decode_image(picture, (60, 60), reading=Reading("pad"))
    assert (padded[:, :20] == 0).all() and (padded[:, 40:] == 0).all() and padded[:, 20:40, 22:38].min() > 190
    assert decode_image(picture, (1, 500), reading=Reading("pad")).shape == (3, 1, 500)
    for reading in (Reading(), Reading("center_crop", intensity=(0, 9.5)), Reading("pad", scaled=True)):
        assert Reading.from_json(reading.to_json()) == reading
    assert Reading.from_json(None) == Reading()


def test_a_large_jpeg_can_be_decoded_scaled() -> None:
    large = Image.fromarray(load_sample_images().images[0]).resize((1280, 854), Image.Resampling.BICUBIC)
    picture = saved(large, "JPEG", quality=95)
    readings = (Reading(), Reading(scaled=True))
    exact, scaled = (decode_image(picture, (128, 128), reading=reading).astype(int) for reading in readings)
    assert np.array_equal(exact, squashed(Image.open(io.BytesIO(picture.data)), (128, 128)))
    assert 0 < np.abs(exact - scaled).mean() < 2
    small = decode_image(picture, (600, 600), reading=Reading(scaled=True))  # less than twice the size
    assert np.array_equal(small, decode_image(picture, (600, 600)))


def test_other_formats_are_not_opened(tmp_path, monkeypatch) -> None:
    """EPS inside a .jpg would start Ghostscript."""
    started = tmp_path / "started"
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {started}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert shutil.which("gs") == str(program)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    with pytest.raises(ImageError, match="none of the formats JPEG, PNG"):
        decode_image(sample(eps), (8, 8))
    assert not started.exists() and not is_image(eps)


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:40], lambda data: b"GIF89a" + bytes(50)])
def test_an_unreadable_image_is_named(damage) -> None:
    messages = []
    for _ in range(2):
        with pytest.raises(ImageError, match=r"^holiday\.png: cannot be read as an image") as caught:
            decode_image(sample(damage(encoded(PHOTOGRAPH))), (32, 32))
        messages.append(str(caught.value))
    assert messages[0] == messages[1] and "0x" not in messages[0]


def test_arrays_that_are_no_pictures_are_refused(monkeypatch) -> None:
    header = encoded(RAMP, "NPY").replace(b"False", b"Falsy")  # the parser names an object by its address
    for data, message in (
        (header, "cannot be read as an image"),
        (
            encoded(np.zeros((0, 4, 3), np.uint8), "NPY"),
            r"\(0, 4, 3\) of uint8, expected numbers, a pixel at least",
        ),
        (encoded(np.array([["a", "b"]]), "NPY"), "expected numbers"),
    ):
        with pytest.raises(ImageError, match=message) as caught:
            decode_image(sample(data), (8, 8))
        assert "0x" not in str(caught.value)
    tiff = io.BytesIO()
    tifffile.imwrite(tiff, np.zeros((60, 90, 5), np.uint8), photometric="minisblack")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match="27,000 values"):
        decode_image(sample(tiff.getvalue()), (8, 8), reading=Reading(channels=5))


def test_a_bomb_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match="decompression bomb"):
        decode_image(sample(encoded(PHOTOGRAPH)), (32, 32))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "NPY"])
@pytest.mark.filterwarnings("ignore")
def test_a_mutated_picture_is_read_or_refused(kind: str) -> None:
    """A short form of tests/long/pictures.py."""
    rng, data = random.Random(0), encoded(PHOTOGRAPH[:20, :30], kind)
    for _ in range(60):
        mutated = bytearray(data)
        for _ in range(rng.randint(1, 8)):
            mutated[rng.randrange(len(mutated))] = rng.randrange(256)
        try:
            decoded = decode_image(sample(bytes(mutated[: rng.randint(len(data) // 2, len(data))])), (8, 8))
        except ImageError as error:
            assert "\n" not in str(error)
        else:
            assert decoded.shape == (3, 8, 8)
