"""Evaluation of a masked token model during and after training: its loss on held-out images, and probes."""

from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.data import Dataset

from seitpp.augment import Keys
from seitpp.data.dataset import Chosen, evaluation_loader
from seitpp.engine.evaluate import gather_in_order
from seitpp.engine.probe import ProbeError, labeled_sets, probe
from seitpp.engine.run import Run
from seitpp.engine.waiting import progress
from seitpp.models import MTM
from seitpp.objectives import mask_plan

IMAGES, BLOCK = 1024, 128  # images of each loss, images per forward pass


class Masked(NamedTuple):
    """How well hidden tokens are predicted: mean cross-entropy `loss` in nats, `accuracy` in percent."""

    loss: float
    accuracy: float


class Evaluation:
    """The evaluation of a masked token model on training and held-out images.

    Both losses are those of up to 1,024 images, evenly spread over the set, with half of their patches hidden and
    neither dropout nor augmentation, so they differ only by what the model has seen. `left_out` says why there is
    no probe, and is None if there is one.
    """

    def __init__(self, run: Run, train: Dataset, validation: Dataset, *, num_classes: int, view: nn.Module):
        self._run, self._num_classes, self._view = run, num_classes, view
        self.left_out, self._probed = None, None
        self._sets = {"train": spread(run.eval_subset(train)), "validation": spread(run.eval_subset(validation))}
        try:
            self._probed = labeled_sets(train, validation)
        except ProbeError as error:
            self.left_out = str(error)

    def __str__(self) -> str:
        if self._probed is None:
            return f"no probes: {self.left_out}"
        bank, queries = (len(part) for part in self._probed)
        return f"probes: on the {bank:,} training and {queries:,} validation images that have labels"

    def scores(self, model: MTM) -> dict[str, float]:
        """Return the accuracies of the probes, if there are any, and loss and accuracy on hidden tokens."""
        scores = self.probes(model.encoder)
        for name, images in self._sets.items():
            found = masked_tokens(
                model, images, view=self._view, seed=self._run.config.seed, accelerator=self._run.accelerator
            )
            scores |= {f"masked_loss_{name}": found.loss, f"masked_accuracy_{name}": found.accuracy}
        return scores

    @property
    def images(self) -> int:
        """The number of validation images that are probed; 0 without probes."""
        return len(self._probed[1]) if self._probed else 0

    def probes(self, encoder: VisionTransformer) -> dict[str, float]:
        """Return the accuracies of linear probe and k-NN, or nothing if there are no classes."""
        if self._probed is None:
            return {}
        train, validation = (self._run.eval_subset(part) for part in self._probed)
        return probe(
            encoder,
            train=train,
            validation=validation,
            num_classes=self._num_classes,
            view=self._view,
            accelerator=self._run.accelerator,
            workers=self._run.workers,
        )


def spread(dataset: Dataset, images: int = IMAGES) -> Dataset:
    """Return at most so many images, evenly spread over the dataset: its first ones may be all of one class."""
    if len(dataset) <= images:
        return dataset
    return Chosen(dataset, np.linspace(0, len(dataset) - 1, images).round().astype(np.int64))


@torch.no_grad()
def masked_tokens(model: MTM, dataset: Dataset, *, view: nn.Module, seed: int, accelerator: Accelerator) -> Masked:
    """Return how well the model predicts tokens with half of the patches of each image hidden.

    The masks follow from the seed and the images. The result does not depend on the number of processes.
    """
    device, patches = accelerator.device, model.encoder.patch_embed.num_patches
    model = model.to(device).eval()
    rank, ranks = accelerator.process_index, accelerator.num_processes
    loader = evaluation_loader(dataset, BLOCK, rank=rank, ranks=ranks, workers=0)
    blocks = []
    for batch in progress(loader, "hidden tokens"):
        batch = batch.to(device)
        ids = view(batch.ids)
        plan = mask_plan(Keys(seed, 0, batch.indices).uniform("evaluation", patches), patches // 2, patches // 2)
        with accelerator.autocast():
            loss, accuracy = model(ids, plan, targets=ids)
        blocks.append(torch.stack([loss.float(), accuracy.float(), loss.new_tensor(len(ids))]))
    own = torch.stack(blocks) if blocks else torch.zeros(0, 3, device=device)
    numbers = torch.arange(rank, rank + ranks * len(blocks), ranks, device=device)
    # Summed in one order, in float64, which an Apple GPU does not have.
    loss, accuracy, images = gather_in_order(own, numbers, accelerator).cpu().double().unbind(dim=1)
    loss, accuracy = ((part * images).sum() / images.sum() for part in (loss, accuracy))
    return Masked(float(loss), 100 * float(accuracy))
