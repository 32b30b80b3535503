"""A tokenizer that is fitted where none is named: bounded, by the size of the images, without unreadable ones."""

import pytest
from support.pictures import as_folder, photograph_crops, write

from seitpp.images.decode import ImageError, Reading
from seitpp.images.sources import SourceSubset, open_source
from seitpp.tokenizers import TokenizerError, fitting


@pytest.mark.parametrize(
    ("size", "side", "patch"), [((300, 260), 256, 8), ((128, 200), 128, 8), ((127, 300), 64, 4), ((20, 30), 32, 2)]
)
def test_the_median_short_side_decides_on_the_size(size, side: int, patch: int, tmp_path) -> None:
    source = open_source(str(as_folder(tmp_path, photograph_crops(4, size))))
    spec = fitting.fit_to_source(source, reading=Reading(), skip_errors=False).spec
    assert (spec.image_size, spec.patch) == ((side, side), patch)


def test_few_of_many_images_are_read(tmp_path, monkeypatch) -> None:
    source = open_source(str(as_folder(tmp_path, photograph_crops(4, (20, 30)))))
    many = SourceSubset(source, [index % 4 for index in range(1999)])
    read, places = many.read, []
    monkeypatch.setattr(many, "read", lambda index: places.append(index) or read(index))
    fitting.fit_to_source(many, reading=Reading(), skip_errors=False)
    assert len(set(places)) == 1000 and max(places) >= 1998 - 2


def test_unreadable_images_stop_it_or_are_left_out(tmp_path) -> None:
    as_folder(tmp_path, photograph_crops(4, (20, 30)))
    write(tmp_path / "china" / "broken.png", b"no picture")
    source = open_source(str(tmp_path))
    with pytest.raises(ImageError, match=r"china/broken\.png: cannot be read"):
        fitting.fit_to_source(source, reading=Reading(), skip_errors=False)
    assert fitting.fit_to_source(source, reading=Reading(), skip_errors=True).spec.image_size == (32, 32)
    with pytest.raises(TokenizerError, match="none of 1 images can be read"):
        fitting.fit_to_source(SourceSubset(source, [2]), reading=Reading(), skip_errors=True)
