"""Export a run to a folder that timm and the Hugging Face hub can load, and push the folder to the hub.

| file                  | content                                                                        |
|-----------------------|--------------------------------------------------------------------------------|
| model.safetensors     | the state dict with the names of timm; of a masked token model only the encoder |
| config.json           | the arguments of `timm.create_model`, in the format of timm                    |
| recipe.json           | the settings of the run, for `--config` of its recipe                          |
| README.md             | the model card                                                                 |
| mtm/model.safetensors | only for a masked token model: the whole model, for `load_mtm`                 |

After `import seitpp.models`, `timm.create_model("local-dir:FOLDER", pretrained=True)` loads the model; after a
push, "hf-hub:OWNER/NAME" does so too. `load_pretrained` accepts the folder as well.
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
    "mtm/model.safetensors",  # in a subfolder, since timm 1.0.22 accepts only one safetensors file per folder
)
EXPORTED = ("seit_train", "finetune", "mtm_pretrain")  # the recipes whose models can be exported
# The evaluation transform of recipes/finetune.py for pixels, as timm describes it.
PIXELS = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "crop_pct": 0.875, "crop_mode": "center"}


def export_model(run: str | os.PathLike[str], out: str | os.PathLike[str], ema: bool = True) -> Path:
    """Export the model of a finished seit_train, finetune or mtm_pretrain run; return the path of the new folder.

    `ema` exports the moving average of the weights if the run has one. The exported settings contain the names of
    the user's files without their folders. Raises ModelError if `run` is not such a run, is not finished, or is
    damaged, and UserError if `out` exists.
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
        header = {"class_names": saved.class_names, "window": saved.window, "multi_label": saved.multi_label}
        save_classifier(folder / MODEL, saved.model, saved.codebook, **header)
        if isinstance(whole.model, MTM):
            (folder / WHOLE_MTM).parent.mkdir()
            save_pretrained(folder / WHOLE_MTM, whole.model, whole.codebook)
        files.replace_json(folder / CONFIG, timm_config(saved))
        files.replace_json(folder / RECIPE, settings)
        card = model_card(saved, settings=settings, result=result, averaged=weights.name == AVERAGED)
        files.replace_text(folder / CARD, card)
    return Path(out).resolve()


def timm_config(saved: Loaded) -> dict[str, Any]:
    """Return the content of config.json, which timm reads; `in_chans` of a model on ids is its embedding width."""
    model, spec, size = saved.model, classifier_spec(saved.model), input_size(saved.model)
    # timm adapts the weights of first_conv to other in_chans, and 1.0.22 assumes that they are for 3 channels. So
    # only models for pixels name first_conv.
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
    """Upload a folder of `export_model` as the model `repo_id` ("owner/name") and return its URL.

    The repository is created if it does not exist. Raises ModelError for another folder or damaged weights, and
    HubError if the hub refuses the upload.
    """
    root = Path(folder).resolve()
    name = _read_json(root / CONFIG, "expected a folder of `seitpp export-model`").get("architecture")
    if name is None:
        raise ModelError(f"{root}: got a run, expected an exported model: export it with `seitpp export-model`")
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
        return dict(json.loads(path.read_bytes()))
    except (OSError, TypeError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
