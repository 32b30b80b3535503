"""New pictures as the inputs of a trained model: decoded, tokenized, and viewed as in its own evaluation."""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from accelerate.utils import gather_object, tqdm
from torch import Tensor
from torch.utils.data import DataLoader

from seitpp import tokenizers
from seitpp.augment import CentralBoxes, EvalPixelView, EvalView
from seitpp.data.digits import DigitsSource, digits
from seitpp.engine.config import PictureConfig
from seitpp.engine.inputs import check_codes, embedded, open_once, reading_of_run
from seitpp.engine.run import SKIPPED, Run
from seitpp.errors import UserError
from seitpp.files import replace_text
from seitpp.images.batches import DecodedBatch, DecodedImages, already_a_batch
from seitpp.images.sources import ImageSource, open_source
from seitpp.models import Loaded, input_kind, input_size
from seitpp.tokenizers import Tokenizer
from seitpp.tokenizers.encoding import encode

BATCH = 64  # pictures at a time


class Pictures:
    """Decoded pictures of a source, and what turns a batch of them into the input of a model.

    Of n processes, each has one part of them, in the order of the source. `errors` has a line for each of its
    pictures that could not be read so far.
    """

    def __init__(self, images: DecodedImages, inputs: Callable[[DecodedBatch], Tensor], run: Run):
        self.images, self.errors, self._inputs, self._run = images, [], inputs, run

    def __iter__(self) -> Iterator[tuple[list[str], Tensor]]:
        """Yield names of pictures and the input of the model for them, batch by batch.

        Raises UserError for the first picture that cannot be read, unless the config says skip_errors.
        """
        total, accelerator = len(self.images.source), self._run.accelerator
        rank, ranks = accelerator.process_index, accelerator.num_processes
        own = range(rank * total // ranks, (rank + 1) * total // ranks)
        chosen = [list(own[start : start + BATCH]) for start in range(0, len(own), BATCH)]
        loader = DataLoader(
            self.images, batch_sampler=chosen, collate_fn=already_a_batch, num_workers=self._run.workers
        )
        for batch in tqdm(loader, total=len(chosen), unit="batch"):
            self.errors += refuse_unreadable(batch.errors, self._run)
            if batch.kept:
                yield [record.file_name for record in batch.kept], self._inputs(batch)


def refuse_unreadable(errors: list[str], run: Run) -> list[str]:
    """Return lines about pictures that cannot be read; raise UserError if there is one and none may be skipped."""
    if errors and not run.config.skip_errors:
        raise UserError(f"{errors[0]}; repair or remove it, or pass --skip-errors")
    return errors


def open_data(config: PictureConfig, run: Run) -> tuple[ImageSource, Tokenizer | None]:
    """Open the pictures of a recipe without their labels, and the tokenizer that it names; else the digits'.

    Without a tokenizer, but with pictures, the model is to take pixels: the tokenizer is None.
    """
    if config.checkpoint is None:
        raise UserError("no model: name a run's folder or a model file with --checkpoint")
    if config.data is None:
        source = DigitsSource(config.source_split or "validation")
    else:
        source = open_once(run.accelerator, partial(open_source, config.data, config.source_split, None))
        if config.tokenizer is None:
            return source, None
    path = config.tokenizer or embedded(run, digits).tokenizer
    return source, tokenizers.load(path, config.tokenizer_kind).to(run.device).eval()


def finish(run: Run, errors: list[str], pictures: int) -> None:
    """Finish a run on `pictures`; `errors` has a line for each picture of this process that could not be read."""
    errors = gather_object(errors)
    if run.is_main and errors:
        replace_text(run.out / SKIPPED, "".join(f"{error}\n" for error in errors))
        print(f"{len(errors):,} of {pictures:,} pictures could not be read, see {run.out / SKIPPED}")
    run.finish({"pictures": pictures - len(errors), "skipped": len(errors)})


def open_pictures(source: ImageSource, saved: Loaded, *, tokenizer: Tokenizer | None, run: Run) -> Pictures:
    """Open pictures for a model of tokens, with its tokenizer, or of pixels, without one.

    Raises UserError if the model takes the other, or was trained on another codebook.
    """
    checkpoint, device = run.config.checkpoint, run.device
    reading = reading_of_run(checkpoint, tokenizer.spec.channels if tokenizer else 3)
    model = getattr(saved.model, "encoder", saved.model)
    kind, size = input_kind(model), input_size(model)
    if (kind == "pixels") != (tokenizer is None):
        takes = (
            "pixels: leave --tokenizer out" if kind == "pixels" else "tokens: name its tokenizer with --tokenizer"
        )
        raise UserError(f"{checkpoint} takes {takes}")
    if tokenizer is None:
        size, pixels = size or saved.window, EvalPixelView().to(device)
        images = DecodedImages(source, size, reading=reading, boxes=CentralBoxes(size))
        return Pictures(images, lambda batch: pixels(batch.pixels.view(-1, 3, *size).to(device)), run)
    books = tokenizer.books.to_books()
    check_codes(books, source=run.config.tokenizer or "the digits", saved=saved, checkpoint=checkpoint)
    maps = {"codebook": books, "size": size} if kind == "maps" else {}
    view = EvalView(saved.window or size or tokenizer.spec.grid, **maps).to(device)

    def inputs(batch: DecodedBatch) -> Tensor:
        ids = np.stack(encode(tokenizer, batch, device)).astype(np.int64)
        return view(torch.from_numpy(ids).to(device))

    return Pictures(DecodedImages(source, tokenizer.spec.image_size, reading=reading), inputs, run)
