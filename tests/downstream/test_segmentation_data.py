"""downstream/segmentation: label maps from a store, and the view in which they follow their tokens."""

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import stats
from torch import Tensor

from downstream.segmentation.data import AnnotationError, Segmented, SegmentedTokens
from downstream.segmentation.view import SegmentView, crop_labels, random_boxes
from seitpp import StoreWriter, TokenStore
from seitpp.augment import Keys, ViewError
from seitpp.augment.color import ColorAugment
from seitpp.codebook import embed
from seitpp.data.dataset import training_loader
from seitpp.data.order import BatchOrder
from seitpp.models import TokenAdapt

COLUMNS = 16  # of the numbered grids, which have at most 15 rows: token numbers are labels, below 255
PLACES = torch.cartesian_prod(torch.arange(15.0), torch.arange(float(COLUMNS)))  # codebook: row and column
PATCH, CROP = 5, 8
NAMES = ["sky", "tree", "road"]


def png(values: np.ndarray, palette: bool = False) -> bytes:
    image = Image.fromarray(values)
    if palette:
        image.putpalette([255 - number for number in range(256) for _ in range(3)])
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def write_store(path: Path, grids: list[tuple[int, int]], annotations: list[bytes], **settings) -> TokenStore:
    rng = np.random.Generator(np.random.Philox(0))
    settings = {"columns": {"annotation": "binary"}, "class_names": NAMES} | settings
    with StoreWriter(path, codebook=rng.normal(size=(40, 4)), grid=None, **settings) as writer:
        for grid, annotation in zip(grids, annotations, strict=True):
            columns = {"annotation": annotation} if settings["columns"] else None
            writer.add(rng.integers(40, size=grid), 0, columns)
    return TokenStore(path)


def keys(n: int, first: int = 0, epoch: int = 0) -> Keys:
    return Keys(3, epoch, torch.arange(first, first + n))


def numbered(grids: list[tuple[int, int]]) -> Segmented:
    """Images in which every token is the number of its place, and so is the label of each of its pixels."""
    height, width = (max(sides) for sides in zip(*grids, strict=True))
    ids = torch.zeros(len(grids), height, width, dtype=torch.uint16)
    labels = torch.full((len(grids), PATCH * height, PATCH * width), 255, dtype=torch.uint8)
    for image, label, (h, w) in zip(ids, labels, grids, strict=True):
        numbers = torch.arange(15 * COLUMNS).view(15, COLUMNS)[:h, :w]
        image[:h, :w] = numbers.to(torch.uint16)
        label[: PATCH * h, : PATCH * w] = numbers.repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1)
    return Segmented(torch.arange(len(grids)), ids, torch.tensor(grids), labels)


GRIDS = [(15, 16), (8, 12), (13, 9), (6, 16), (3, 4), (8, 8), (15, 8), (10, 5)] * 8


def part(batch: Segmented, places: slice) -> Segmented:
    """Some images of a batch, padded to the largest of them only."""
    indices, ids, grids, labels = (tensor[places] for tensor in batch)
    height, width = grids.amax(dim=0).tolist()
    return Segmented(indices, ids[:, :height, :width], grids, labels[:, : PATCH * height, : PATCH * width])


def test_images_of_any_size_make_a_batch(tmp_path: Path) -> None:
    rng = np.random.Generator(np.random.Philox(1))
    values = [rng.integers(4, size=(2 * h, 2 * w), dtype=np.uint8) for h, w in [(3, 5), (4, 2), (1, 1)]]
    store = write_store(
        tmp_path / "store", [(3, 5), (4, 2), (1, 1)], [png(v, n == 1) for n, v in enumerate(values)]
    )
    dataset = SegmentedTokens(store, 2)
    batch = dataset.__getitems__([1, 0])
    assert batch.indices.tolist() == [1, 0] and batch.grids.tolist() == [[4, 2], [3, 5]]
    assert batch.ids.shape == (2, 4, 5) and batch.labels.shape == (2, 8, 10)
    for row, index in enumerate([1, 0]):
        (h, w), label = store.grids[index], (values[index].astype(int) - 1) % 256
        assert np.array_equal(batch.ids[row, :h, :w].numpy(), store[index][0])
        assert np.array_equal(batch.labels[row, : 2 * h, : 2 * w].numpy(), label)
        assert np.array_equal(dataset.annotation(index), label)
        assert (batch.ids[row, h:].long().sum() + batch.ids[row, :, w:].long().sum()) == 0
        assert (batch.labels[row, 2 * h :] == 255).all() and (batch.labels[row, :, 2 * w :] == 255).all()


def test_annotations_of_another_size_are_resized_by_nearest(tmp_path: Path) -> None:
    values = np.random.Generator(np.random.Philox(1)).integers(4, size=(33, 50), dtype=np.uint8)
    dataset = SegmentedTokens(write_store(tmp_path / "store", [(4, 6)], [png(values)]), 5)
    rows, columns = (np.arange(20) + 0.5) * 33 / 20, (np.arange(30) + 0.5) * 50 / 30
    expected = values[rows.astype(int)[:, None], columns.astype(int)] - np.uint8(1)
    assert np.array_equal(dataset.__getitems__([0]).labels[0].numpy(), expected)
    assert np.array_equal(dataset.annotation(0), values - np.uint8(1))


def test_the_loader_gives_batches_and_workers_get_a_store_by_its_path(tmp_path: Path) -> None:
    grids = [(2, 3), (4, 4), (3, 2), (2, 2)]
    store = write_store(tmp_path / "store", grids, [png(np.ones((40 * h, 40 * w), np.uint8)) for h, w in grids])
    dataset = SegmentedTokens(store, 4)
    assert len(pickle.dumps(dataset)) < 500
    order = BatchOrder(len(dataset), 2, 0)
    for loaded in (dataset, pickle.loads(pickle.dumps(dataset))):
        batches = list(training_loader(loaded, order, range(2), rank=0, ranks=1, accumulation=1, workers=0))
        assert torch.equal(torch.cat([batch.indices for batch in batches]), torch.from_numpy(order.epoch_order(0)))
        for batch in batches:
            assert torch.equal((batch.labels == 0).sum(dim=(1, 2)), 16 * batch.grids.prod(dim=1))


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        (png(np.full((4, 4), 4, np.uint8)), r"image 1 has the value 4, expected 0 \(ignored\) to 3"),
        (png(np.zeros((4, 4), np.uint16)), r"image 1 has \(4, 4\) values of uint16, expected .* 8 bits"),
        (png(np.zeros((4, 4, 3), np.uint8)), r"image 1 has \(4, 4, 3\) values of uint8"),
        (b"", "image 1 cannot be read"),
        (png(np.zeros((400, 400), np.uint8))[:60], "image 1 cannot be read"),
    ],
    ids=["class", "16 bits", "colors", "empty", "cut off"],
)
def test_a_bad_label_map_is_named(tmp_path: Path, annotation: bytes, message: str) -> None:
    good = png(np.full((4, 4), 3, np.uint8))
    dataset = SegmentedTokens(write_store(tmp_path / "store", [(2, 2)] * 2, [good, annotation]), 2)
    assert (dataset.annotation(0) == 2).all()
    for read in (dataset.annotation, lambda index: dataset.__getitems__([0, index])):
        with pytest.raises(AnnotationError, match=message) as raised:
            read(1)
        assert str(tmp_path / "store") in str(raised.value)


def test_a_store_without_label_maps_or_names_is_refused(tmp_path: Path) -> None:
    bytes_of_one = png(np.zeros((4, 4), np.uint8))
    for name, settings, message in [
        ("none", {"columns": None}, "no label maps: expected a binary column 'annotation', got the columns none"),
        ("unnamed", {"class_names": None}, "no class names"),
    ]:
        store = write_store(tmp_path / name, [(2, 2)], [bytes_of_one], **settings)
        with pytest.raises(AnnotationError, match=message) as raised:
            SegmentedTokens(store, 2)
        assert str(tmp_path / name) in str(raised.value)


def test_labels_follow_their_tokens_exactly_without_a_resize() -> None:
    maps, labels = SegmentView(PLACES, crop=CROP, pixels_per_token=PATCH, scale=(1.0, 1.0))(
        numbered(GRIDS), keys(64)
    )
    cells = labels.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).flatten(3)
    assert (cells == cells[..., :1]).all()
    inside = cells[..., 0] != 255
    heights, widths = torch.tensor(GRIDS).clamp(max=CROP).unbind(dim=1)
    assert torch.equal(inside.sum(dim=(1, 2)), heights * widths)
    tokens = maps[:, 0] * COLUMNS + maps[:, 1]
    assert torch.equal(tokens[inside], cells[..., 0][inside].float())


def test_labels_follow_their_tokens_within_half_a_cell_of_a_resize() -> None:
    maps, labels = SegmentView(PLACES, crop=CROP, pixels_per_token=PATCH)(numbered(GRIDS), keys(64))
    centers = labels[:, PATCH // 2 :: PATCH, PATCH // 2 :: PATCH]
    inside = centers != 255
    assert 0.5 < inside.float().mean() < 1
    for axis, token in enumerate((centers // COLUMNS, centers % COLUMNS)):
        # The bicubic kernel moves a ramp by 0.048 of a token at most.
        assert (maps[:, axis] - token)[inside].abs().max() < 0.55


def test_maps_and_labels_equal_interpolation_of_the_cut_box() -> None:
    batch, view = (
        numbered(GRIDS),
        SegmentView(torch.randn(240, 3, dtype=torch.float64), crop=CROP, pixels_per_token=PATCH),
    )
    boxes = random_boxes(
        batch, keys(64), crop=CROP, pixels_per_token=PATCH, scale=view.scale, max_share=view.max_share
    )
    maps, labels = view(batch, keys(64))
    beyond = 0
    for n, (top, left, height, width) in enumerate(boxes.tolist()):
        h, w = GRIDS[n]
        real = embed(batch.ids[n : n + 1, :h, :w], view.codebook)[:, :, top : top + height, left : left + width]
        missing = (0, width - real.shape[3], 0, height - real.shape[2])
        beyond += any(missing)
        cut = F.interpolate(F.pad(real, missing, mode="replicate"), (CROP, CROP), mode="bicubic")
        torch.testing.assert_close(maps[n : n + 1], cut, atol=2e-6, rtol=0)
        real = batch.labels[n, : PATCH * h, : PATCH * w][
            PATCH * top : PATCH * (top + height), PATCH * left : PATCH * (left + width)
        ]
        cut = F.pad(real.double(), [PATCH * side for side in missing], value=255)[None, None]
        cut = F.interpolate(cut, (PATCH * CROP, PATCH * CROP), mode="nearest-exact")
        assert torch.equal(labels[n], cut[0, 0].long())
    assert 10 < beyond < 60


def test_boxes_follow_their_laws() -> None:
    n, grid = 3000, (40, 30)
    blank = Segmented(
        torch.arange(n),
        torch.zeros(1),
        torch.tensor([grid] * n),
        torch.zeros(1, 200, 150).expand(n, -1, -1).byte(),
    )
    top, left, height, width = random_boxes(
        blank, keys(n), crop=20, pixels_per_token=PATCH, scale=(0.5, 2.0), max_share=1.0
    ).unbind(dim=1)
    assert torch.equal(height, width) and height.min() == 10 and height.max() == 40
    edges = (20 / (np.arange(10, 42) - 0.5)).clip(0.5, 2.0)  # s that rounds to sides of 10 .. 40
    expected = n * (edges[:-1] - edges[1:]) / 1.5
    assert stats.chisquare(height.bincount()[10:].numpy(), expected).pvalue > 1e-3
    for start, length, spare in ((top, 40, 40 - height), (left, 30, 30 - width)):
        assert (start >= 0).all() and (start <= spare.clamp(min=0)).all()
        place = (start + keys(n).uniform("within a cell", 1)[:, 0]) / (spare.clamp(min=0) + 1)
        assert stats.kstest(place.numpy(), "uniform").pvalue > 1e-3, length


def test_boxes_avoid_one_class_when_they_can() -> None:
    n = 1500
    labels = torch.zeros(n, 150, 150, dtype=torch.uint8)
    labels[:, :50, :60], labels[:, 100:] = 1, 255
    labels[::3] = 0  # nothing to be found
    batch = Segmented(torch.arange(n), torch.zeros(1), torch.tensor([[30, 30]] * n), labels)

    def boxes_and_largest_share(max_share: float) -> tuple[Tensor, Tensor]:
        boxes = random_boxes(
            batch, keys(n), crop=12, pixels_per_token=PATCH, scale=(1.0, 1.0), max_share=max_share
        )
        pixels = crop_labels(batch, boxes.unsqueeze(1), pixels_per_token=PATCH, size=12 * PATCH).flatten(1)
        counts = torch.stack([(pixels == 0).sum(dim=1), (pixels == 1).sum(dim=1)])
        return boxes, counts.amax(dim=0) / counts.sum(dim=0)

    (first, free), (boxes, found) = boxes_and_largest_share(1.0), boxes_and_largest_share(0.75)
    assert (free[::3] == 1).all() and (found[::3] == 1).all()
    assert (first != boxes)[::3].any(dim=1).float().mean() > 0.99  # the last one, not the first
    mixed = torch.arange(n) % 3 > 0
    share = (free[mixed] <= 0.75).float().mean()
    assert 0.05 < share < 0.25
    success = (found[mixed] <= 0.75).float().mean()
    assert abs(success - (1 - (1 - share) ** 11)) < 0.05  # ten attempts, and what comes after them


def test_a_box_without_labels_is_not_wanted() -> None:
    labels = torch.full((200, 100, 100), 255, dtype=torch.uint8)
    labels[:, :10, :10], labels[:, 10:40, :40] = 0, 1
    batch = Segmented(torch.arange(200), torch.zeros(1), torch.tensor([[20, 20]] * 200), labels)
    boxes = random_boxes(batch, keys(200), crop=8, pixels_per_token=PATCH, scale=(1.0, 1.0), max_share=1.0)
    found = crop_labels(batch, boxes.unsqueeze(1), pixels_per_token=PATCH, size=8) != 255
    assert found.flatten(1).any(dim=1).float().mean() > 0.97


def still_adapt(grid: int, crop: int, codes: int = 240) -> TokenAdapt:
    """f and g that know the code of every token, and whose tokens are their own mirror images."""
    model = TokenAdapt(
        (grid, grid), crop=(crop, crop), num_codes=codes, code_dim=codes, width=codes, heads=1, mlp=4
    )
    eye = torch.eye(codes)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            tensor.fill_(1.0 if "norm.weight" in name else 0.0)
        for layer in (model.embed, model.head):
            layer.weight.copy_(eye)
        for layer in (model.to_space, model.from_space):
            layer.weight.copy_(eye.view(codes, codes, 1, 1).expand(-1, -1, 2, 2))
    return model


def test_every_second_image_is_mirrored_through_tokenadapt_with_its_labels() -> None:
    batch, codebook = numbered(GRIDS[:16]), torch.eye(240)
    plain_maps, plain_labels = SegmentView(codebook, crop=CROP, pixels_per_token=PATCH, scale=(1.0, 1.0))(
        batch, keys(16)
    )
    maps, labels = SegmentView(
        codebook, crop=CROP, pixels_per_token=PATCH, scale=(1.0, 1.0), adapt=still_adapt(7, 6)
    )(batch, keys(16))
    assert torch.equal(maps[::2], plain_maps[::2]) and torch.equal(labels[::2], plain_labels[::2])
    assert torch.equal(maps[1::2], plain_maps[1::2].flip(3)) and torch.equal(
        labels[1::2], plain_labels[1::2].flip(2)
    )


def test_a_mirrored_resized_box_has_its_labels() -> None:
    maps, labels = SegmentView(torch.eye(240), crop=CROP, pixels_per_token=PATCH, adapt=still_adapt(7, 6))(
        numbered(GRIDS), keys(64)
    )
    centers, tokens = labels[1::2, PATCH // 2 :: PATCH, PATCH // 2 :: PATCH], maps[1::2].argmax(dim=1)
    inside = centers != 255
    for axis in (lambda number: number // COLUMNS, lambda number: number % COLUMNS):
        assert (axis(tokens) - axis(centers))[inside].abs().max() <= 1
    assert ((tokens == centers) & inside).sum() > 0.6 * inside.sum()


def test_the_mirror_is_g_of_the_mirrored_f() -> None:
    torch.manual_seed(0)
    adapt = TokenAdapt((8, 8), crop=(CROP, CROP), num_codes=240, code_dim=2, width=64, heads=1, mlp=64)
    torch.nn.init.normal_(adapt.head.weight)
    batch = numbered([(8, 8)] * 4)
    maps, _ = SegmentView(PLACES, crop=CROP, pixels_per_token=PATCH, scale=(1.0, 1.0), adapt=adapt)(batch, keys(4))
    space = adapt.convert(embed(batch.ids[1::2], PLACES))
    assert torch.equal(maps[1::2], embed(adapt.invert(space.flip(3)).argmax(dim=1), PLACES))
    assert adapt.crop == (8, 8) and adapt.head.weight.requires_grad  # the caller's model stays as it is


@pytest.mark.parametrize("mirrored", [False, True])
def test_an_image_does_not_depend_on_its_batch(mirrored: bool) -> None:
    torch.manual_seed(0)
    codebook = torch.randn(240, 240)
    adapt = (
        TokenAdapt((7, 7), crop=(6, 6), num_codes=240, code_dim=240, width=64, heads=1, mlp=64)
        if mirrored
        else None
    )
    if mirrored:
        torch.nn.init.normal_(adapt.head.weight)
    batch, view = numbered(GRIDS[:16]), SegmentView(codebook, crop=CROP, pixels_per_token=PATCH, adapt=adapt)
    maps, labels = view(batch, keys(16))
    assert maps.shape == (16, 240, CROP, CROP) and labels.shape == (16, PATCH * CROP, PATCH * CROP)
    assert all(torch.equal(a, b) for a, b in zip(view(batch, keys(16)), (maps, labels), strict=True))
    size = 2 if mirrored else 1
    for first in range(0, 16, size):
        some_maps, some_labels = view(part(batch, slice(first, first + size)), keys(size, first))
        torch.testing.assert_close(some_maps, maps[first : first + size], atol=2e-5, rtol=0)
        assert torch.equal(some_labels, labels[first : first + size])
    assert not torch.equal(view(batch, keys(16, epoch=1))[0], maps)


def test_color_comes_last() -> None:
    batch = numbered(GRIDS[:8])
    maps, labels = SegmentView(PLACES, crop=CROP, pixels_per_token=PATCH)(batch, keys(8))
    colored, same = SegmentView(PLACES, crop=CROP, pixels_per_token=PATCH, color="seitpp")(batch, keys(8))
    assert torch.equal(colored, ColorAugment("seitpp")(maps, keys(8))) and torch.equal(same, labels)


def test_the_view_says_what_it_does_and_what_does_not_fit() -> None:
    view = SegmentView(PLACES, crop=CROP, pixels_per_token=PATCH, color="coloradapt")
    for words in ("crop=8, pixels_per_token=5, scale=(0.5, 2.0), max_share=0.75; no mirror", "color_adapt=0.5"):
        assert words in repr(view)
    mirroring = SegmentView(torch.eye(240), crop=CROP, pixels_per_token=PATCH, adapt=still_adapt(7, 6))
    assert "half of the images mirrored" in repr(mirroring)
    with pytest.raises(ViewError, match="a batch of 3 images on one process"):
        mirroring(numbered(GRIDS[:3]), keys(3))
    with pytest.raises(ViewError, match=r"TokenAdapt for a codebook of \(240, 240\), expected one for \(240, 2\)"):
        SegmentView(PLACES, crop=CROP, pixels_per_token=PATCH, adapt=still_adapt(7, 6))
