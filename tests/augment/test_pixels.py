"""Pixels of photographs: which part is decoded, by what law, and what is made of it; Pillow, timm, scipy agree."""

import io

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from scipy.ndimage import gaussian_filter
from sklearn.datasets import load_sample_images
from torch import Tensor

from seitpp.augment import CentralBoxes, EvalPixelView, Keys, PixelView, RandomBoxes, random_resized_boxes
from seitpp.augment.pixels import MEAN, STD, color_jitter, gaussian_blur, grayscale, three_augment
from seitpp.data.dataset import Chosen, training_loader
from seitpp.data.order import BatchOrder
from seitpp.export.model import PIXELS
from seitpp.images.batches import ImageDataset
from seitpp.images.decode import Sample, decode_image, image_size
from seitpp.images.labels import Labels

CHINA, FLOWER = load_sample_images().images  # (427, 640, 3) uint8
SIZES = [(427, 640), (640, 427), (100, 30), (7, 300), (33, 33)]


def encoded(pixels: np.ndarray, kind: str = "PNG") -> Sample:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, quality=95)
    return Sample(buffer.getvalue(), f"picture.{kind.lower()}", 0)


class Pictures:
    """Twelve photographs of five sizes as an image source."""

    class_names = None
    labels = Labels([0] * 12, None, "of one class")

    def __init__(self):
        generator = np.random.default_rng(0)
        self.samples = []
        for at in range(12):
            height, width = SIZES[at % len(SIZES)]
            whole = (CHINA, FLOWER)[at % 2]
            whole = whole if height <= 427 else whole.transpose(1, 0, 2)
            top, left = generator.integers([whole.shape[0] - height + 1, whole.shape[1] - width + 1])
            self.samples.append(encoded(whole[top : top + height, left : left + width]))

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> Sample:
        return self.samples[index]


# What is decoded


def test_a_box_is_cut_out_and_resized_in_one_step() -> None:
    """Far from its edge, where the resize sees what is beside the box, as the cut-out part resized by Pillow."""
    top, left, height, width = box = (50, 170, 301, 250)
    cut = Image.fromarray(CHINA).crop((left, top, left + width, top + height))
    expected = np.asarray(cut.resize((90, 80), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    found = decode_image(encoded(CHINA), (80, 90), box)
    assert found.shape == (3, 80, 90) and np.array_equal(found[:, 3:-3, 3:-3], expected[:, 3:-3, 3:-3])


@pytest.mark.parametrize(
    "pixels", [CHINA, CHINA[2:425, 5:], FLOWER[:, 30:229], FLOWER[7:300, :300], CHINA[:40, :51]]
)
def test_evaluation_sees_what_timm_shows(pixels: np.ndarray) -> None:
    """Short side to 8/7, bicubic, central crop: never squashed."""
    transform = timm.data.create_transform((3, 56, 56), **PIXELS)
    source = Pictures()
    source.samples = [encoded(pixels)]
    batch = ImageDataset(source, (56, 56), CentralBoxes((56, 56))).__getitems__([0])
    found, expected = EvalPixelView()(batch.images)[0], transform(Image.fromarray(pixels))
    levels = (found - expected).abs() * torch.tensor(STD).view(3, 1, 1) * 255
    assert levels.max() <= 1.01 and (levels > 0.01).float().mean() < 1e-3


def test_a_large_jpeg_is_decoded_smaller_and_looks_the_same() -> None:
    """At half and a quarter of its size, for odd sizes too; never where too few pixels would be left."""
    pixels = CHINA[:425, :637]
    photograph = encoded(pixels, "JPEG")
    exact = encoded(np.asarray(Image.open(io.BytesIO(photograph.data))))
    for size, box, smaller in (
        (32, (30, 40, 300, 300), True),
        (16, (3, 5, 420, 630), True),
        (52, (30, 40, 300, 300), False),
    ):
        found, expected = (decode_image(image, (size, size), box) for image in (photograph, exact))
        error = np.square(found.astype(float) - expected).mean()
        assert error < 255**2 * 10**-4.9 and (error > 0) == smaller
    assert np.array_equal(decode_image(photograph, (16, 16)), decode_image(exact, (16, 16))), "never for tokens"


# By what law


def test_boxes_of_images_of_their_own_sizes() -> None:
    """Each that of its image alone; extreme ones take the largest box of an allowed ratio."""
    keys, sizes = Keys(3, 1, torch.arange(40)), torch.tensor(SIZES * 8)
    boxes = random_resized_boxes(keys, sizes, (0.08, 1.0))
    for at in range(40):
        alone = random_resized_boxes(keys.of(torch.tensor([at])), tuple(sizes[at].tolist()), (0.08, 1.0))
        assert torch.equal(boxes[at], alone[0])
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] >= 1).all() and (boxes[:, :2] + boxes[:, 2:] <= sizes).all()
    assert torch.equal(random_resized_boxes(keys, sizes, (1.0, 1.0))[3], torch.tensor([0, 145, 7, 9]))


def test_the_pixels_of_an_image_depend_on_seed_epoch_and_index_alone() -> None:
    """Not on processes, accumulation, workers, or where the run began; they differ from epoch to epoch."""
    source = Pictures()
    dataset, order = (
        ImageDataset(source, (24, 24), RandomBoxes(5, (24, 24), (0.2, 1.0))),
        BatchOrder(12, 4, seed=5),
    )
    found: dict[tuple[int, int], list[Tensor]] = {}
    for steps, ranks, accumulation, workers in ((range(9), 1, 1, 0), (range(9), 2, 2, 0), (range(2, 9), 1, 2, 2)):
        for rank in range(ranks):
            loader = training_loader(
                dataset, order, steps, rank=rank, ranks=ranks, accumulation=accumulation, workers=workers
            )
            for turn, batch in enumerate(loader):
                epoch = (steps[0] + turn // accumulation) // order.steps_per_epoch
                for index, image in zip(batch.indices.tolist(), batch.images, strict=True):
                    found.setdefault((epoch, index), []).append(image)
    assert len(found) == 36 and sorted({len(images) for images in found.values()}) == [2, 3]
    for (epoch, index), images in found.items():
        sample = source.read(index)
        size = image_size(sample)
        box = random_resized_boxes(Keys(5, epoch, torch.tensor([index])), size, (0.2, 1.0))[0].tolist()
        expected = torch.from_numpy(decode_image(sample, (24, 24), box))
        assert all(torch.equal(image, expected) for image in images)
    assert not torch.equal(found[0, 0][0], found[1, 0][0])
    some = Chosen(dataset, np.arange(0, 12, 3))  # as --fraction chooses
    for epoch, batch in enumerate(
        training_loader(some, BatchOrder(4, 4, seed=5), range(3), rank=0, ranks=1, accumulation=1, workers=0)
    ):
        for index, image in zip(batch.indices.tolist(), batch.images, strict=True):
            assert torch.equal(image, found[epoch, index][0])


# What is made of it

IMAGES = torch.from_numpy(
    np.stack([picture[60:, left:][:40, :48] for picture in (CHINA, FLOWER) for left in range(0, 400, 50)])
).permute(0, 3, 1, 2)
LABELS, KEYS = torch.arange(16), Keys(3, 2, torch.arange(100, 116))


def by_pillow(image: Tensor, change) -> Tensor:
    """(3, H, W) float in [0, 1], rounded to 8 bits, through Pillow."""
    pixels = image.mul(255).round().byte().permute(1, 2, 0).numpy()
    changed = np.array(change(Image.fromarray(pixels)).convert("RGB"))
    return torch.from_numpy(changed).permute(2, 0, 1).float() / 255


def jittered(image: Tensor, draws: list[float]) -> Tensor:
    """The changes of color jitter one after the other, in the order of the last three draws."""
    kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for kind in sorted(range(3), key=lambda kind: draws[3 + kind]):
        image = by_pillow(image, lambda picture, kind=kind: kinds[kind](picture).enhance(0.7 + 0.6 * draws[kind]))
    return image


def test_gray_is_that_of_pillow() -> None:
    for image, gray in zip(IMAGES / 255, grayscale(IMAGES / 255), strict=True):
        torch.testing.assert_close(
            gray.expand(3, -1, -1), by_pillow(image, ImageOps.grayscale), atol=1 / 255, rtol=0
        )


def test_blur_is_that_of_scipy_and_near_that_of_pillow() -> None:
    """Pillow's three box filters are no Gaussian where the deviation is less than a pixel."""
    sigma = torch.linspace(0.1, 2.0, 16)
    for image, blurred, deviation in zip(
        IMAGES / 255, gaussian_blur(IMAGES / 255, sigma), sigma.tolist(), strict=True
    ):
        channels = image.double().numpy()
        exact = np.stack([gaussian_filter(channel, deviation, mode="nearest", radius=6) for channel in channels])
        torch.testing.assert_close(blurred.double(), torch.from_numpy(exact), atol=1e-5, rtol=0)
        near = by_pillow(image, lambda picture, at=deviation: picture.filter(ImageFilter.GaussianBlur(at)))
        assert deviation < 1 or (blurred - near).abs().mean() < 1 / 255


def test_color_jitter_is_that_of_pillow_in_every_order() -> None:
    """Eight bits after each of three changes there, none here."""
    draws = KEYS.uniform("color_jitter", 6).tolist()
    for image, found, drawn in zip(IMAGES / 255, color_jitter(IMAGES / 255, KEYS), draws, strict=True):
        torch.testing.assert_close(found, jittered(image, drawn), atol=4 / 255, rtol=0)
    assert len({tuple(np.argsort(drawn[3:])) for drawn in draws}) == 6


def test_three_augment_is_that_of_deit_iii() -> None:
    """One of three with equal chance, then color jitter."""
    which, strength = KEYS.uniform("three_augment", 2).T.tolist()
    draws, found = KEYS.uniform("color_jitter", 6).tolist(), three_augment(IMAGES / 255, KEYS)
    blurred = gaussian_blur(IMAGES / 255, 0.1 + 1.9 * torch.tensor(strength))
    for at, image in enumerate(IMAGES / 255):
        choices = by_pillow(image, ImageOps.grayscale), by_pillow(image, ImageOps.solarize), blurred[at]
        expected = jittered(choices[int(3 * which[at])], draws[at])
        torch.testing.assert_close(found[at], expected, atol=5 / 255, rtol=0)
    many = (3 * Keys(0, 0, torch.arange(30_000)).uniform("three_augment", 2)[:, 0]).long().bincount()
    assert len(many) == 3 and (many - 10_000).abs().max() < 400
    assert found.min() >= 0 and found.max() <= 1


def test_the_view_flips_normalizes_and_mixes_each_image_by_its_own_key() -> None:
    made, labels = PixelView(cutmix=0.0, three_augment=False)(IMAGES, LABELS, KEYS)
    back = made * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    flipped = KEYS.uniform("flip", 1)[:, 0] < 0.5
    expected = torch.where(flipped.view(-1, 1, 1, 1), IMAGES.flip(3), IMAGES) / 255
    torch.testing.assert_close(back, expected, atol=1e-6, rtol=0)
    assert 3 <= flipped.sum() <= 13 and labels.weight.eq(1).all()
    still, _ = PixelView(cutmix=0.0, three_augment=False, flip=0.0)(IMAGES, LABELS, KEYS)
    assert torch.equal(still[flipped], made[flipped].flip(3)) and torch.equal(still[~flipped], made[~flipped])
    mirrored, _ = PixelView(cutmix=0.0, three_augment=False, flip=1.0)(IMAGES, LABELS, KEYS)
    assert torch.equal(mirrored, still.flip(3))

    whole, mixed = PixelView(mixup=0.8)(IMAGES, LABELS, KEYS)
    assert torch.equal(mixed.others, LABELS ^ 2) and mixed.weight.lt(1).any()
    part = torch.arange(8, 16)
    halved, _ = PixelView(mixup=0.8)(IMAGES[part], LABELS[part], KEYS.of(part))
    torch.testing.assert_close(halved, whole[part], atol=1e-5, rtol=0)
