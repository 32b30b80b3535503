"""Several random crops of each image of a source, as images of their own (SeiT, ImageNet-1k-5M)."""

from collections.abc import Sequence
from typing import Any, TypeVar, overload

from seitpp.augment.boxes import RandomBoxes
from seitpp.data.dataset import MicroBatch
from seitpp.images.decode import Sample, image_size
from seitpp.images.label_maps import LabelMaps
from seitpp.images.sources import ImageSource

Value = TypeVar("Value")


class Crops:
    """A source of `number` random resized crops of each image of `source`.

    Image i is crop i % number of image i // number, so the crops of an image lie side by side: its file is read
    while it is at hand, and an image that is added at the end changes no earlier crop. Crop c is the one that
    `boxes` draws in epoch c, by the seed, the image and c. Its label is that of the image, or with
    `label_maps` the class with the largest score in it.
    """

    def __init__(
        self, source: ImageSource, number: int, boxes: RandomBoxes, *, label_maps: LabelMaps | None = None
    ):
        self.source, self.number, self.boxes, self.label_maps = source, number, boxes, label_maps
        self.names, self.left_out = Repeated(source.names, number), source.left_out
        self.labels = source.labels._replace(values=Repeated(source.labels.values, number))
        self.class_names = source.class_names

    def __len__(self) -> int:
        return self.number * len(self.source)

    def read(self, index: int) -> Sample:
        """Read the image of crop `index`, with the box and the label of the crop.

        Raises ImageError if the image, or its label map, cannot be read.
        """
        image, crop = divmod(index, self.number)
        sample = self.source.read(image)
        size = image_size(sample)
        box = tuple(self.boxes(MicroBatch([image], crop), [size])[0])
        label = self.label_maps.label(sample.name, box, size) if self.label_maps else sample.label
        return sample._replace(label=label, box=box)

    def to_json(self) -> dict[str, Any]:
        """Return what the inventory of a store says of the crops."""
        labels = "label maps" if self.label_maps else "of the image"
        return {
            "of_each_image": self.number,
            "scale": list(self.boxes.scale),
            "seed": self.boxes.seed,
            "labels": labels,
        }


class Repeated(Sequence[Value]):
    """A sequence that has each value of another one `number` times in succession, without memory for them."""

    def __init__(self, values: Sequence[Value], number: int):
        self.values, self.number = values, number

    def __len__(self) -> int:
        return self.number * len(self.values)

    @overload
    def __getitem__(self, index: int) -> Value: ...
    @overload
    def __getitem__(self, index: slice) -> list[Value]: ...
    def __getitem__(self, index: int | slice) -> Value | list[Value]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        return self.values[range(len(self))[index] // self.number]
