"""A pack: encoded pictures one after another in an Arrow file, with labels, as a token store keeps its images."""

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path

import pyarrow as pa

from downstream.storage.sizes import Sizes, buffers, listed
from seitpp.files import new_folder
from seitpp.images.decode import Sample
from seitpp.images.inventory import LeftOut
from seitpp.images.labels import Labels

FILE = "images.arrow"
ROWS = 1024  # pictures of a record batch, whose offsets have 32 bits
SCHEMA = {"image": pa.binary(), "label": pa.int64()}


def write_pack(folder: Path, samples: Iterable[Sample], class_names: Sequence[str]) -> None:
    """Write a new pack; it is there when it is whole."""
    schema = pa.schema(SCHEMA, metadata={"class_names": json.dumps(list(class_names))})
    samples = iter(samples)
    with new_folder(folder) as made:
        made.mkdir()
        with pa.OSFile(str(made / FILE), "wb") as file, pa.ipc.new_file(file, schema) as writer:
            while chunk := list(islice(samples, ROWS)):
                images, labels = [sample.data for sample in chunk], [sample.label for sample in chunk]
                writer.write_batch(pa.record_batch([pa.array(images), pa.array(labels)], schema=schema))


class Pack:
    """The pictures of a pack, with the interface of `seitpp.images.sources.ImageSource`; they stay on disk."""

    def __init__(self, folder: Path):
        self.folder, self.left_out = folder, LeftOut()
        self.class_names = json.loads(self._reader.schema.metadata[b"class_names"])
        labels = [label for batch in self._batches() for label in batch["label"].to_pylist()]
        self.labels = Labels(labels, self.class_names, f"the pack {folder}")
        self.names = [f"{folder.name}#{index}" for index in range(len(labels))]

    def __len__(self) -> int:
        return len(self.names)

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_reader"}

    @cached_property
    def _reader(self) -> pa.RecordBatchFileReader:
        return pa.ipc.open_file(pa.memory_map(str(self.folder / FILE)))

    def _batches(self) -> Iterator[pa.RecordBatch]:
        return (self._reader.get_batch(number) for number in range(self._reader.num_record_batches))

    def read(self, index: int) -> Sample:
        """Return picture `index`."""
        data = self._reader.get_batch(index // ROWS)["image"][index % ROWS].as_py()
        return Sample(data, self.names[index], self.labels.values[index])

    def sizes(self) -> Sizes:
        """Return the sizes of the pack, without that of the framing."""
        parts = []
        for batch in self._batches():
            parts.append((*buffers(batch["image"]), sum(buffers(batch["label"]))))
        offsets, payload, labels = map(sum, zip(*parts, strict=True))
        rest = sum(listed(self.folder).values()) - payload - offsets - labels
        return Sizes(payload, offsets, labels, codebook=0, codec_table=0, metadata=rest)
