"""What the probe and `predict` make of the same data on this launch's processes, for tests.

torchrun --nproc_per_node 2 tests/support/probed.py OUT.json
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from support.models import tiny_mtm
from torch import Tensor
from torch.utils.data import Subset

from seitpp import TokenStore
from seitpp.augment import EvalView
from seitpp.data.dataset import TokenDataset
from seitpp.data.digits import digits
from seitpp.engine.evaluate import gather_in_order, predict
from seitpp.engine.probe import BLOCK, Features, extract_features, fit, knn, linear_probe, probe


def share(vectors: Tensor, labels: Tensor, accelerator: Accelerator) -> Features:
    """This process's blocks of features."""
    rows = torch.arange(len(labels))
    own = rows[rows // BLOCK % accelerator.num_processes == accelerator.process_index]
    return Features(vectors[own].half(), labels[own], own)


def bits(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


def figures(accelerator: Accelerator) -> dict:
    """Counts, and hashes of weights, features and predictions."""
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(7, (4 * BLOCK + 9,), generator=random)
    centers = torch.randn(7, 48, generator=random)
    # Small whole numbers: many images are equal, and more are equally similar.
    vectors = (0.6 * centers[labels] + torch.randn(len(labels), 48, generator=random)).clamp(-1, 1).round()
    vectors[:, 0] *= 100  # of another size than the rest
    train = share(vectors[: 2 * BLOCK + 99], labels[: 2 * BLOCK + 99], accelerator)
    validation = share(vectors[2 * BLOCK + 99 :], labels[2 * BLOCK + 99 :], accelerator)
    few = share(vectors[:10], labels[:10], accelerator)
    torch.manual_seed(0)
    encoder, view = (
        tiny_mtm().encoder,
        EvalView((8, 8)),
    )
    encoder.reset_classifier(10)
    store = TokenDataset(TokenStore(digits().store, verify=False))
    some = Subset(store, range(300))  # one block: the other processes have none
    features = extract_features(encoder, store, view=view, accelerator=accelerator)
    found = predict(
        encoder, Subset(store, range(1)), inputs=lambda batch: view(batch.ids), accelerator=accelerator
    )
    settings = {"num_classes": 7, "accelerator": accelerator}
    return {
        "knn": knn(train, validation, **settings),
        "knn of few": [knn(few, validation, **settings), knn(train, few, **settings)],
        "linear probe": linear_probe(train, validation, **settings),
        "linear probe of few": linear_probe(few, few, **settings),
        "weights": [bits(part) for part in fit(train, **settings)],
        "features": bits(gather_in_order(features.vectors, features.indices, accelerator)),
        "predictions": [bits(found.ranked), found.labels.tolist()],
        "all predictions": bits(
            predict(encoder, store, inputs=lambda batch: view(batch.ids), accelerator=accelerator).ranked
        ),
        "probe": probe(
            encoder, train=store, validation=some, num_classes=10, view=view, accelerator=accelerator, workers=1
        ),
    }


def main() -> None:
    accelerator = Accelerator()
    own = figures(accelerator)
    Path(f"{sys.argv[1]}.{accelerator.process_index}").write_text(json.dumps(own))
    accelerator.end_training()


if __name__ == "__main__":
    main()
