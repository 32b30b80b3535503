"""A small classifier of the embedded digits, trained once into the user's cache, where no model is named."""

import hashlib
import json
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

import seitpp.models  # noqa: F401 (registers our models in timm)
from seitpp import TokenStore, files
from seitpp.augment import EvalView
from seitpp.codebook import codebook_fingerprint
from seitpp.data.digits import digits
from seitpp.models import save_classifier

# The weights depend on the digits and on these values, whose hash is in the name of the cache folder.
SETTINGS = {"version": 1, "model": "seit_vit_nano", "epochs": 40, "batch_size": 128, "lr": 2e-3, "smoothing": 0.1}


def digits_classifier() -> Path:
    """Return the folder of the classifier in the user's cache; it is trained on first use, in under a minute."""
    values = {**SETTINGS, "digits": str(digits().store.parent.name)}
    name = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]
    return files.make_once(f"digits-classifier-{name}", _train)


def _train(folder: Path) -> None:
    store = TokenStore(digits().store, "train")
    view = EvalView(store.grid, torch.from_numpy(store.codebook))
    maps, labels = view(torch.from_numpy(store.ids(range(len(store))))), torch.from_numpy(store.labels).long()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape = {"img_size": store.grid, "in_chans": maps.shape[1], "num_classes": store.num_classes}
        model = timm.create_model(SETTINGS["model"], **shape)
        _fit(model, maps, labels)
    facts = {"class_names": store.class_names, "window": store.grid}
    save_classifier(folder / "model.safetensors", model, codebook_fingerprint(store.codebook), **facts)


def _fit(model: torch.nn.Module, maps: Tensor, labels: Tensor) -> None:
    size, epochs = SETTINGS["batch_size"], SETTINGS["epochs"]
    steps = epochs * (len(maps) // size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=SETTINGS["lr"], weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, SETTINGS["lr"], total_steps=steps)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(maps)).split(size)[: len(maps) // size]:
            optimizer.zero_grad()
            F.cross_entropy(model(maps[batch]), labels[batch], label_smoothing=SETTINGS["smoothing"]).backward()
            optimizer.step()
            schedule.step()
