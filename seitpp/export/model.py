"""From a run's folder to a folder for others: what timm and the Hugging Face hub take.

| file                  | what                                                                       |
|-----------------------|----------------------------------------------------------------------------|
| model.safetensors     | the plain state dict, by timm's names; of a masked token model the encoder |
| config.json           | in timm's layout: how `timm.create_model` makes the model again            |
| recipe.json           | the settings of the run, for `--config` of its recipe                      |
| README.md             | the model card                                                             |
| mtm/model.safetensors | of a masked token model: all of it, for `load_mtm`                         |

After `import seitpp.models`, `timm.create_model("local-dir:FOLDER", pretrained=True)` is the model, and so is
"hf-hub:OWNER/NAME" after a push. `load_pretrained` takes the folder, too.
"""

import json
import os
from pathlib import Path
from typing import Any

from seitpp import __version__, files
from seitpp.augment.pixels import MEAN, STD
from seitpp.export.card import model_card, published
from seitpp.models.mtm import MTM
from seitpp.models.stem import ModelError
from seitpp.models.weights.classifiers import Loaded, classifier_spec, load_classifier, save_classifier
from seitpp.models.weights.pretrained import (
    AVERAGED,
    input_kind,
    input_size,
    load_mtm,
    load_pretrained,
    model_file,
    save_pretrained,
)
from seitpp.store import hub

MODEL, CONFIG, RECIPE, CARD, WHOLE_MTM = FILES = (
    "model.safetensors",
    "config.json",
    "recipe.json",
    "README.md",
    "mtm/model.safetensors",  # timm 1.0.22 wants a folder to have one file of this kind only
)
EXPORTED = ("seit_train", "finetune", "mtm_pretrain")  # the recipes whose models are
# How recipes/finetune.py judges a model of pixels, in timm's words.
PIXELS = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "crop_pct": 0.875, "crop_mode": "center"}


def export_model(run: str | os.PathLike[str], out: str | os.PathLike[str], ema: bool = True) -> Path:
    """Write the model of a finished run of seit_train, finetune or mtm_pretrain as the new folder `out`; its path.

    `ema`: the moving average of the weights, where the run has one. Of the user's files the settings keep the
    names without their folders. Raises ModelError for a folder that is no such run, that is not finished or is
    damaged; UserError if `out` exists.
    """
    run = Path(run)
    settings = published(_read_json(run / "config.json", "expected the folder of a run"))
    result = _read_json(run / "result.json", "the run is not finished; the same command with --resume goes on")
    weights = model_file(run, ema)
    if not weights.is_file():
        raise ModelError(f"no {weights}: expected a run of seit_train, finetune or mtm_pretrain")
    whole = load_pretrained(weights)
    saved = whole._replace(model=whole.model.encoder) if isinstance(whole.model, MTM) else whole
    with files.new_folder(out) as folder:
        folder.mkdir()
        save_classifier(folder / MODEL, saved.model, saved.codebook, saved.class_names, saved.window)
        if isinstance(whole.model, MTM):
            (folder / WHOLE_MTM).parent.mkdir()
            save_pretrained(folder / WHOLE_MTM, whole.model, whole.codebook)
        files.replace_json(folder / CONFIG, timm_config(saved))
        files.replace_json(folder / RECIPE, settings)
        files.replace_text(folder / CARD, model_card(saved, settings, result, weights.name == AVERAGED))
    return Path(out).resolve()


def timm_config(saved: Loaded) -> dict[str, Any]:
    """What timm reads from config.json. `in_chans` of a model of ids is the width of its code embedding."""
    model, spec, size = saved.model, classifier_spec(saved.model), input_size(saved.model)
    # At first_conv timm makes weights fit other numbers of channels; 1.0.22 takes all weights for those of 3.
    pixels = {**PIXELS, "first_conv": model.pretrained_cfg["first_conv"]}
    return {
        "architecture": spec.name,
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        **({"label_names": saved.class_names} if saved.class_names else {}),
        "model_args": spec.arguments,
        "pretrained_cfg": {
            "classifier": model.pretrained_cfg["classifier"],
            "num_classes": model.num_classes,
            "input_size": [spec.arguments["in_chans"], *(size or saved.window)],
            "fixed_input_size": size is not None,
            **(pixels if input_kind(model) == "pixels" else {}),
        },
    }


def push_model(folder: str | os.PathLike[str], repo_id: str, private: bool = False) -> str:
    """Upload a folder of `export_model` as the model `repo_id` ("owner/name"), made if there is none; its address.

    Raises ModelError for another folder or damaged weights, HubError for what the hub refuses.
    """
    root = Path(folder).resolve()
    name = _read_json(root / CONFIG, "expected a folder of `seitpp export-model`").get("architecture")
    if name is None:
        raise ModelError(f"{root}: a run, not an exported model, which `seitpp export-model` makes of it")
    present = [file for file in FILES if (root / file).is_file()]
    load_classifier(root / MODEL)
    if WHOLE_MTM in present:
        load_mtm(root / WHOLE_MTM)
    message = f"{name}, exported by seitpp {__version__}"
    return hub.upload(
        root, repo_id, kind="model", names=present, message=message, private=private, stale="*.safetensors"
    )


def _read_json(path: Path, expected: str) -> dict[str, Any]:
    if not path.is_file():
        raise ModelError(f"no {path}: {expected}")
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
