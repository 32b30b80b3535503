"""The rows of an evaluation: each is computed by all processes together, and kept as soon as it is known."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, tqdm
from torch import Tensor, nn
from torch.utils.data import Dataset

from downstream.robustness.attacks import QUERIES, AutoAttackParts, auto_attack, pgd, white_box
from downstream.robustness.classifiers import SURROGATES, PixelClassifier, TokenClassifier
from seitpp.augment import Keys
from seitpp.augment.maps import center_window
from seitpp.data.dataset import evaluation_loader
from seitpp.engine.evaluate import ClassMap, predict
from seitpp.engine.run import Run
from seitpp.images.batches import Pixels

ALL = 2**62  # a step after every row
ATTACKED = 64  # images that are attacked together: AutoAttack's random numbers depend on them


class Rows:
    """The finished rows of a run, in its metrics.jsonl: a resumed run does not compute them again."""

    def __init__(self, run: Run):
        self._run = run
        self._done: dict[str, dict[str, Any]] = run.on_main(self._read) if run.resumed else {}

    def _read(self) -> dict[str, dict[str, Any]]:
        self._run.log.keep_until(ALL)  # without the incomplete last line of a killed run
        return {record["row"]: record["values"] for record in self._run.log.read()}

    def get(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the values of a row, which `compute` computes on all processes unless they are known."""
        if name not in self._done:
            values = compute()
            record = {"step": len(self._done) + 1, "row": name, "values": values}
            self._run.on_main(lambda: self._run.log.write([record]))
            self._done[name] = values
        return self._done[name]


class Evaluated(NamedTuple):
    """The model of an evaluation, and how it reads images.

    `inputs` turns images (B, C, height, width) in [0, 1], or their ids where there is a tokenizer, into the input
    of the `model`.
    """

    model: nn.Module
    classifier: PixelClassifier | TokenClassifier
    inputs: Callable[[Tensor], Tensor]
    accelerator: Accelerator
    workers: int

    @property
    def has_tokens(self) -> bool:
        """Whether images are tokenized."""
        return isinstance(self.classifier, TokenClassifier)


class CleanTokens:
    """The ids of the clean images that this process evaluates, to count the tokens that a corruption changes."""

    def __init__(self):
        self._ids: dict[int, Tensor] = {}
        self.changed, self.tokens = 0, 0

    def keep(self, indices: Tensor, ids: Tensor) -> None:
        """Keep the ids (B, H, W) or (B, Q, H, W) of a batch of clean images."""
        self._ids[int(indices[0])] = ids.to(torch.int16).cpu()  # large ids wrap around, and stay different

    def compare(self, indices: Tensor, ids: Tensor) -> None:
        """Count the tokens of the same batch, otherwise corrupted, that differ, in any digit."""
        differs = ids.to(torch.int16).cpu() != self._ids[int(indices[0])]
        differs = differs.any(dim=1) if differs.ndim == 4 else differs
        self.changed += int(differs.sum())
        self.tokens += differs.numel()

    def fraction(self) -> float:
        """Return the fraction of changed tokens over all processes, and count anew."""
        changed, tokens = np.sum(gather_object([(self.changed, self.tokens)]), axis=0).tolist()
        self.changed = self.tokens = 0
        return changed / tokens


def score(
    evaluated: Evaluated,
    images: Dataset,
    classes: ClassMap | None,
    *,
    see: Callable[[Tensor, Tensor], None] | None = None,
) -> dict[str, Any]:
    """Return the top-1 accuracy in percent and the number of images; `see` gets indices and ids of each batch.

    They are the ids that the model sees, those of its window.
    """

    def inputs(batch: Pixels) -> Tensor:
        pixels = batch.images.float() / 255
        if not evaluated.has_tokens:
            return evaluated.inputs(pixels)
        ids = evaluated.classifier.tokenizer.encode(pixels)
        if see:
            see(batch.indices, center_window(ids, evaluated.classifier.view.window))
        return evaluated.inputs(ids)

    where = {"inputs": inputs, "accelerator": evaluated.accelerator, "workers": evaluated.workers}
    predictions = predict(evaluated.model, images, classes=classes, **where)
    return {"top1": predictions.top(1).percent, "images": len(predictions.labels)}


class AttackSettings(NamedTuple):
    """The bound of an attack, in [0, 1], its seed, and the queries of Square for an image."""

    eps: float
    seed: int
    queries: int = QUERIES


class Outcome(NamedTuple):
    """What an attack did to a batch: images still classified correctly, by name, and tokens changed, by name."""

    robust: dict[str, int]
    changed: dict[str, int]
    images: int
    tokens: int


# Attacks a batch: its number, clean images (B, C, height, width) in [0, 1], their labels and indices (B,).
Attack = Callable[[int, Tensor, Tensor, Tensor], Outcome]


def attack_row(
    evaluated: Evaluated, images: Dataset, attack: Attack, *, classes: ClassMap | None, title: str
) -> dict[str, Any]:
    """Attack all images, each process some of the batches; return percentages by the name of the attack.

    "correct" are those of images that stay correctly classified, "tokens_changed" those of all tokens, if there
    are any.
    """
    accelerator = evaluated.accelerator
    rank, ranks = accelerator.process_index, accelerator.num_processes
    loader = evaluation_loader(images, ATTACKED, rank=rank, ranks=ranks, workers=evaluated.workers)
    outcomes = []
    for number, batch in enumerate(tqdm(loader, desc=title, unit="batch", leave=False)):
        batch = batch.to(accelerator.device)
        labels = batch.labels if classes is None else classes.labels.to(batch.labels.device)[batch.labels]
        outcomes.append(attack(rank + number * ranks, batch.images.float() / 255, labels, batch.indices))
    every: Sequence[Outcome] = gather_object(outcomes)
    total, tokens = sum(part.images for part in every), sum(part.tokens for part in every)
    row = {name: 100 * sum(part.robust[name] for part in every) / total for name in every[0].robust}
    changed = {name: 100 * sum(part.changed[name] for part in every) / tokens for name in every[0].changed}
    return {"correct": row, "tokens_changed": changed}


def attack_by_pgd(evaluated: Evaluated, settings: AttackSettings) -> Attack:
    """Return an attack by PGD, with each surrogate gradient where there is a tokenizer."""
    classifier = evaluated.classifier

    def attack(_: int, images: Tensor, labels: Tensor, indices: Tensor) -> Outcome:
        draws = Keys(settings.seed, 0, indices).uniform("pgd", images[0].numel())
        start, moved = draws.view_as(images), {}
        for surrogate in SURROGATES if evaluated.has_tokens else ("pixels",):
            classifier.surrogate = surrogate
            moved[f"pgd_{surrogate}"] = pgd(classifier, images, labels, eps=settings.eps, start=start)
        return _outcome(evaluated, images, labels, moved)

    return attack


def attack_by_auto_attack(evaluated: Evaluated, settings: AttackSettings, parts: AutoAttackParts) -> Attack:
    """Return an attack by AutoAttack: its white-box parts, Square alone, and the worst case of both.

    Square sees every image, also those that a white box has broken, so that a black box that beats a white box is
    visible. Gradients are straight-through.
    """
    classifier = evaluated.classifier

    def attack(number: int, images: Tensor, labels: Tensor, indices: Tensor) -> Outcome:
        classifier.surrogate = SURROGATES[0]
        with torch.no_grad():
            classes = classifier(images[:1]).shape[1]
        seed = int(np.random.SeedSequence([settings.seed, number]).generate_state(1)[0])
        common = {"eps": settings.eps, "seed": seed, "queries": settings.queries}
        white = auto_attack(classifier, images, labels, parts=white_box(parts, classes), **common)
        square = auto_attack(classifier, images, labels, parts=("square",), **common)
        worst = torch.where(white.robust.view(-1, 1, 1, 1), square.images, white.images)
        return _outcome(
            evaluated, images, labels, {"apgd": white.images, "square": square.images, "autoattack": worst}
        )

    return attack


@torch.no_grad()
def _outcome(evaluated: Evaluated, clean: Tensor, labels: Tensor, moved: dict[str, Tensor]) -> Outcome:
    """Count the images that are correct both clean and attacked, and the tokens that the attacks changed."""
    classifier = evaluated.classifier
    correct = classifier(clean).argmax(dim=1) == labels
    robust = {
        name: int((correct & (classifier(images).argmax(dim=1) == labels)).sum()) for name, images in moved.items()
    }
    robust = {"clean": int(correct.sum()), **robust}
    if not isinstance(classifier, TokenClassifier):
        return Outcome(robust, {}, len(clean), 0)
    ids = classifier.ids(clean)
    changed = {name: int((classifier.ids(images) != ids).sum()) for name, images in moved.items()}
    return Outcome(robust, changed, len(clean), ids.numel())
