"""The model of an evaluation, its tokenizer, and the images as it reads them."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from downstream.robustness.classifiers import PixelClassifier, TokenClassifier
from downstream.robustness.default import digits_classifier
from downstream.robustness.evaluation import Evaluated
from downstream.robustness.extra import RobustnessError
from downstream.robustness.sets import map_classes, wnids
from seitpp import tokenizers
from seitpp.augment import CentralBoxes, EvalView
from seitpp.augment.maps import both_sides
from seitpp.data.digits import DigitsSource, digits
from seitpp.engine.evaluate import ClassMap
from seitpp.engine.inputs import check_codes, embedded, open_once, readable, reading_of_run, require_labels
from seitpp.engine.run import Run
from seitpp.images.batches import ImageDataset
from seitpp.images.decode import RGB, Reading
from seitpp.images.labels import LabelRules
from seitpp.images.sources import ImageSource, open_source
from seitpp.models import MTM, Loaded, input_kind, input_size, load_pretrained
from seitpp.tokenizers import Kind


class Inputs(Protocol):
    """The settings that name the model and the images."""

    checkpoint: str | None
    ema: bool
    data: str | None
    split: str | None
    labels: str | None
    tokenizer: str | None
    tokenizer_kind: Kind | None


class Opened(NamedTuple):
    """A model with its name in messages and its class names, and the size and reading of its images."""

    evaluated: Evaluated
    name: str
    class_names: list[str] | None
    size: tuple[int, int]
    reading: Reading

    @property
    def channels(self) -> int:
        """The channels of the images."""
        return self.reading.channels

    @property
    def num_classes(self) -> int:
        """The number of classes of the model."""
        return self.evaluated.model.num_classes

    def read(self, source: ImageSource) -> ImageDataset:
        """Return images as the model's own evaluation reads them."""
        boxes = None if self.evaluated.has_tokens else CentralBoxes(self.size)
        return ImageDataset(source, self.size, boxes, reading=self.reading)

    @contextmanager
    def read_cropped(self, source: ImageSource) -> Iterator[ImageDataset]:
        """Yield images that are already the central part that the model sees, as those of ImageNet-C.

        In the block, the tokenizer takes images of the size of the window, which is not cropped again.
        """
        classifier = self.evaluated.classifier
        if isinstance(classifier, PixelClassifier):
            yield ImageDataset(source, self.size)
            return
        patch, window = classifier.tokenizer.spec.patch, classifier.view.window
        size = window[0] * patch, window[1] * patch
        with classifier.tokenizer.at_size(size):
            yield ImageDataset(source, size, reading=self.reading)

    def classes_of(self, source: ImageSource, where: str) -> ClassMap | None:
        """Find the classes of images, called `where`, in the model; None if they are the same, in its order.

        Raises RobustnessError if there are classes, or labels, that the model does not have.
        """
        names = source.class_names
        anonymous = self.class_names is None and self.num_classes != len(wnids())
        if names is None or names == self.class_names or (anonymous and len(names) == self.num_classes):
            largest = max(source.labels.values)
            if largest >= self.num_classes:
                raise RobustnessError(
                    f"{where}: an image has class {largest}, expected 0 to {self.num_classes - 1}, the classes of "
                    f"{self.name}: name images of its classes"
                )
            return None
        known = {"classes": self.num_classes, "where": (where, self.name)}
        return map_classes(names, self.class_names, **known, numbered=False)


def open_clean(config: Inputs, run: Run, reading: Reading) -> ImageSource:
    """Open the clean images, which have one label each; the held-out digits if none are named."""
    if config.data is None:
        return DigitsSource("validation")
    rules = LabelRules(file=config.labels)
    source = open_once(run.accelerator, partial(open_source, config.data, config.split, rules))
    require_labels(source, "robustness", config.data)
    if source.labels.multi_label:
        raise RobustnessError(f"{config.data}: images with several classes each, expected one: name other images")
    return readable(source, run, reading=reading)


def open_model(config: Inputs, run: Run) -> Opened:
    """Open the model that is named, or that of the embedded digits, with its tokenizer unless it takes pixels."""
    if config.checkpoint is None and (config.data or config.tokenizer):
        raise RobustnessError("no model: name a run's folder or a model file with --checkpoint")
    checkpoint = config.checkpoint or str(embedded(run, digits_classifier))
    saved = load_pretrained(checkpoint, config.ema)
    if isinstance(saved.model, MTM):
        raise RobustnessError(f"{checkpoint} has no classification head: fine-tune it with recipes/finetune.py")
    if saved.multi_label:
        raise RobustnessError(f"{checkpoint} gives several classes an image, expected one: evaluate another model")
    kind, needs = input_kind(saved.model), "pixels: leave --tokenizer out"
    if kind != "pixels":
        needs = "tokens: name its tokenizer with --tokenizer"
    if (kind == "pixels") != (config.tokenizer is None) and (config.data or config.tokenizer):
        raise RobustnessError(f"{checkpoint} takes {needs}")
    return (_with_pixels if kind == "pixels" else _with_tokens)(config, run, saved, checkpoint)


def _with_pixels(config: Inputs, run: Run, saved: Loaded, checkpoint: str) -> Opened:
    classifier = PixelClassifier(saved.model, None).to(run.device).eval()
    evaluated = Evaluated(saved.model, classifier, classifier.view.standardize, run.accelerator, run.workers)
    return Opened(evaluated, checkpoint, saved.class_names, input_size(saved.model), RGB)


def _with_tokens(config: Inputs, run: Run, saved: Loaded, checkpoint: str) -> Opened:
    path = config.tokenizer or embedded(run, digits).tokenizer
    tokenizer = tokenizers.load(path, config.tokenizer_kind).to(run.device).eval()
    books = tokenizer.books.to_books()
    check_codes(books, source=str(path), saved=saved, checkpoint=checkpoint)
    size = input_size(saved.model)
    window = both_sides(saved.window or size or tokenizer.spec.grid)
    maps = {"codebook": books, "size": size} if input_kind(saved.model) == "maps" else {}
    classifier = TokenClassifier(saved.model, tokenizer, EvalView(window, **maps)).to(run.device).eval()
    evaluated = Evaluated(saved.model, classifier, classifier.view, run.accelerator, run.workers)
    reading = reading_of_run(checkpoint, tokenizer.spec.channels)
    return Opened(evaluated, checkpoint, saved.class_names, tokenizer.spec.image_size, reading)


def limit_to(opened: Opened, classes: ClassMap | None, device: torch.device) -> None:
    """Let attacks see the logits of these classes alone."""
    outputs: Tensor | None = classes and classes.outputs.to(device)
    opened.evaluated.classifier.outputs = outputs
