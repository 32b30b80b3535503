"""Images of any sizes on their way from a source to ids: decoded by a loader's workers, tokenized size by size."""

from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from seitpp.tokenizers.annotated import AnnotatedSample, smallest_png
from seitpp.tokenizers.base import Tokenizer
from seitpp.tokenizers.images import ImageError, ImageSource, Sample, Size, decode_image


class Kept(NamedTuple):
    """What is kept of an image beside its tokens, and the bytes of its annotation's file."""

    label: int
    file_name: str
    source_bytes: int
    annotation: bytes = b""
    annotation_bytes: int = 0


class Decoded(NamedTuple):
    """A batch of readable images; `errors` says which were not readable."""

    pixels: torch.Tensor  # uint8, image after image; one tensor, which a worker hands over without a copy
    sizes: list[tuple[int, int]]  # (height, width)
    kept: list[Kept]
    errors: list[str]


class DecodedImages(Dataset):
    """Images of a source, decoded and resized; an unreadable one is reported, not raised, by a worker."""

    def __init__(self, source: ImageSource, size: Size):
        self.source, self.size = source, size

    def __getitems__(self, indices: list[int]) -> Decoded:
        images, kept, errors = [], [], []
        for index in indices:
            try:
                sample = self.source.read(index)
                images.append(decode_image(sample, self.size))
            except ImageError as error:
                errors.append(str(error))
            else:
                kept.append(_keep(sample))
        pixels = np.concatenate([np.empty(0, np.uint8), *(image.ravel() for image in images)])
        return Decoded(torch.from_numpy(pixels), [image.shape[1:] for image in images], kept, errors)


def encode(tokenizer: Tokenizer, decoded: Decoded, device: torch.device) -> list[np.ndarray]:
    """Ids (h, w) uint16 of every image; images of the same size go through the tokenizer together."""
    parts = decoded.pixels.split([3 * height * width for height, width in decoded.sizes])
    ids = {}
    for size in dict.fromkeys(decoded.sizes):
        same = [number for number, other in enumerate(decoded.sizes) if other == size]
        images = torch.stack([parts[number].view(3, *size) for number in same]).to(device, non_blocking=True)
        with tokenizer.at_size(size):
            encoded = tokenizer.encode(images.float() / 255).cpu().numpy().astype(np.uint16)
        ids.update(zip(same, encoded, strict=True))
    return [ids[number] for number in range(len(parts))]


def _keep(sample: Sample | AnnotatedSample) -> Kept:
    """What the store keeps of a sample, its annotation as small as it can be."""
    kept = Kept(sample.label, sample.name, len(sample.data))
    if isinstance(sample, AnnotatedSample):
        return kept._replace(annotation=smallest_png(sample.annotation), annotation_bytes=len(sample.annotation))
    return kept
