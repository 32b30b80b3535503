"""Embed pictures with a trained encoder, for retrieval: one vector of unit length for each.

    accelerate launch recipes/embed.py --checkpoint runs/mtm_pretrain-digits
    accelerate launch recipes/embed.py --checkpoint RUN --data photos --tokenizer tokens-tokenizer.safetensors
    accelerate launch --multi_gpu --num_processes 8 recipes/embed.py --checkpoint RUN --data photos \\
        --tokenizer tokens-tokenizer.safetensors

--checkpoint is the folder of a run of mtm_pretrain, finetune or seit_train, a model file, or an official
checkpoint. The vector of a picture is the output of the cls token and the mean output of the patches, as in the
probes, of a ResNet its pooled output; the scalar product of two vectors is their cosine similarity. The recipe
writes OUT/embeddings.parquet (name, vector), in the order of the pictures, and OUT/nearest.png: some pictures
with their nearest neighbors. Without --data, the held-out digits are embedded, in seconds. A picture that cannot
be read stops it; with --skip-errors it is listed in OUT/skipped.txt. Speed on a GPU is not measured.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seitpp import files, plots
from seitpp.engine.config import PictureConfig
from seitpp.engine.pictures import Pictures, finish, open_data, open_pictures
from seitpp.engine.probe import pooled
from seitpp.engine.report import Report
from seitpp.engine.run import Run
from seitpp.errors import UserError, escaped
from seitpp.images.batches import DecodedImages
from seitpp.images.decode import decode_image
from seitpp.models import load_pretrained
from seitpp.recipe import run_recipe

SHOWN, NEIGHBORS = 8, 6  # pictures in nearest.png, and their neighbors
SIDE = 96  # pixels of a picture in nearest.png


PRESETS = {"published": PictureConfig()}
PRESETS["digits"] = replace(PRESETS["published"], preset="digits", precision="no", workers=0)
PRESETS["smoke"] = replace(PRESETS["digits"], preset="smoke")


def main(config: PictureConfig) -> None:
    # 1. Run: the output folder and the processes.
    run = Run("embed", config)

    # 2. Pictures, and the encoder with its tokenizer.
    source, tokenizer = open_data(config, run)
    saved = load_pretrained(config.checkpoint, config.ema)
    pictures = open_pictures(source, saved, tokenizer=tokenizer, run=run)
    encoder = getattr(saved.model, "encoder", saved.model).to(run.device).eval()
    run.start()
    run.describe(f"{len(source):,} pictures; left out: {source.left_out}", model=encoder)

    # 3. Vectors: each process writes those of its part of the pictures, one process joins the parts.
    write_part(run.out / part_name(run.accelerator.process_index), embed(encoder, pictures, run))
    run.accelerator.wait_for_everyone()
    if run.is_main:
        parts = [run.out / part_name(rank) for rank in range(run.accelerator.num_processes)]
        join_parts(parts, run.out / "embeddings.parquet")
        rows = nearest(run.out / "embeddings.parquet", pictures.images)
        plots.picture_grid(rows, run.out / "nearest.png")
        print(f"vectors in {run.out / 'embeddings.parquet'}, nearest neighbors in {run.out / 'nearest.png'}")
    finish(run, pictures.errors, len(source))
    if run.is_main:
        text = "Each column is a picture and those whose vectors are most like its own, the nearest first."
        shown = [plots.shown_rows(rows, run.out / "nearest.png", "Nearest pictures", text=text)]
        run.report(Report("Pictures, as vectors", shown=shown))


@torch.no_grad()
def embed(encoder: nn.Module, pictures: Pictures, run: Run) -> Iterator[tuple[list[str], np.ndarray]]:
    """Yield the names of pictures and their vectors (n, D) float32, of unit length, batch by batch."""
    for names, inputs in pictures:
        with run.accelerator.autocast():
            vectors = pooled(encoder, inputs).float()
        yield names, F.normalize(vectors, dim=1).cpu().numpy()


def part_name(rank: int) -> str:
    """Return the name of the file that a process writes before all are joined."""
    return f".embeddings-{rank:05d}.parquet"


def write_part(path: Path, batches: Iterator[tuple[list[str], np.ndarray]]) -> None:
    """Write batches of names and vectors to a Parquet file, none if there are no batches."""
    writer = None
    for names, vectors in batches:
        flat = pa.array(vectors.ravel(), pa.float32())
        columns = [pa.array(names, pa.string()), pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])]
        table = pa.table(columns, names=["name", "vector"])
        with files.naming(path):  # not around the batches, which show their progress on another file
            writer = writer or pq.ParquetWriter(path, table.schema)
            writer.write_table(table)
    if writer:
        with files.naming(path):
            writer.close()


def join_parts(parts: list[Path], path: Path) -> None:
    """Join Parquet files in order, one row group after the other, and remove them; some may not exist.

    Raises UserError if there are none, because no picture could be read.
    """
    there = [pq.ParquetFile(part) for part in parts if part.is_file()]
    if not there:
        raise UserError("no picture could be read: check --data")

    def write(temporary: Path) -> None:
        with pq.ParquetWriter(temporary, there[0].schema_arrow) as writer:
            for file in there:
                for group in range(file.num_row_groups):
                    writer.write_table(file.read_row_group(group))

    files.replace_file(path, write)
    for part in parts:
        part.unlink(missing_ok=True)


def nearest(path: Path, images: DecodedImages) -> dict[str, list[Tensor]]:
    """Return a row of evenly spaced pictures, then rows of those with the nearest vectors, nearest first."""
    table = pq.read_table(path)
    vectors = table["vector"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
    queries = np.linspace(0, len(table) - 1, min(SHOWN, len(table))).round().astype(int)
    similar = vectors[queries] @ vectors.T
    similar[np.arange(len(queries)), queries] = np.inf  # the picture itself comes first
    ranked = np.argsort(-similar, axis=1, kind="stable")[:, : NEIGHBORS + 1]
    whole = replace(images.reading, resize="pad")
    places = {escaped(name): index for index, name in enumerate(images.source.names)}
    names = table["name"].to_pylist()
    columns: dict[str, list[Tensor]] = {}
    for rank in range(ranked.shape[1]):
        shown = [images.source.read(places[names[index]]) for index in ranked[:, rank]]
        pixels = [decode_image(sample, (SIDE, SIDE), reading=whole) for sample in shown]
        columns[f"nearest {rank}" if rank else "picture"] = [torch.from_numpy(image) / 255 for image in pixels]
    return columns


if __name__ == "__main__":
    run_recipe(main, PRESETS, default="digits")
