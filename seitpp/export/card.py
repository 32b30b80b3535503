"""Write the model card, README.md, of an exported model."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from seitpp.models.weights.classifiers import Loaded, classifier_spec
from seitpp.models.weights.pretrained import input_kind, input_size

METRICS = {
    "top1": "top-1, %",
    "top5": "top-5, %",
    "balanced_accuracy": "mean accuracy of the classes, %",
    "mAP": "mean average precision, %",
    "linear_probe_top1": "linear probe of the frozen encoder, top-1, %",
    "linear_probe_top1_untrained": "the same before training, top-1, %",
    "knn_top1": "k-NN by the features of the frozen encoder, top-1, %",
    "knn_top1_untrained": "the same before training, top-1, %",
    "loss": "loss of the last update, nats per hidden token",
}
LOADING = 'model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()'
FROM_THE_HUB = 'To load the model from the hub, pass `"hf-hub:OWNER/NAME"` instead of `"local-dir:FOLDER"`.'
PATHS = ("checkpoint", "store", "data", "tokenizer", "tokenadapt")  # settings that are paths of the user


def model_card(saved: Loaded, *, settings: Mapping[str, Any], result: Mapping[str, Any], averaged: bool) -> str:
    """Return the text of README.md: what the model is, how to load it, its data, results and training.

    `saved` is the exported model, for an MTM its encoder. `settings` and `result` are config.json and result.json
    of the run. `averaged` is true if the weights are the moving average. Facts missing in `result` are left out.
    """
    name, data = classifier_spec(saved.model).name, _data_name(settings)
    parts = [
        _front_matter(saved),
        f"# {name}, {'trained' if saved.model.num_classes else 'pre-trained'} on {data}",
        _what(saved, averaged),
        f"## Use\n\n```python\n{_example(saved, name)}```",
        f"{FROM_THE_HUB}{_codes(saved)}",
        f"## Data\n\n{_table(_data_facts(saved, data, result))}",
        f"## Results\n\n{_table(_metrics(result, averaged), ('metric', 'value'))}",
        f"Accuracies are on the validation images{_evaluated(saved)}.",
        f"## Training\n\n{_table(_training_facts(settings, result))}",
        *_command(settings, result),
        f"The settings, also in recipe.json:\n\n```json\n{json.dumps(settings, indent=2)}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(saved: Loaded) -> str:
    tags = ["timm", "seitpp", *([] if input_kind(saved.model) == "pixels" else ["image-tokens"])]
    lines = ["library_name: timm", "tags:", *(f"- {tag}" for tag in tags)]
    if input_kind(saved.model) == "pixels":  # models on tokens have none: the hub would feed them images
        lines.append("pipeline_tag: image-classification")
    return "\n".join(["---", *lines, "# license: name one here, for example apache-2.0", "---"])


def _what(saved: Loaded, averaged: bool) -> str:
    model, spec = saved.model, classifier_spec(saved.model).arguments
    size = input_size(model) or saved.window
    sides = f"{size[0]} x {size[1]}"
    inputs = {
        "pixels": f"images of {sides} pixels",
        "maps": f"images as tokens: maps of {sides} code vectors of dimension {spec['in_chans']}",
        "ids": f"images as tokens: {sides} ids of a codebook with {spec.get('num_codes')} codes",
    }[input_kind(model)]
    classes = f"{model.num_classes:,} {'independent ' if saved.multi_label else ''}classes"
    what = f"A classifier of {classes}" if model.num_classes else "The encoder of an MTM"
    weights = "; the weights are the moving average of those of the run" if averaged else ""
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    return f"{what} with {parameters:.1f} M parameters{weights}. It takes {inputs}."


def _example(saved: Loaded, name: str) -> str:
    kind, size = input_kind(saved.model), input_size(saved.model)
    output = "logits" if saved.model.num_classes else "features"
    if kind == "pixels":
        return f"""import timm
from PIL import Image

{LOADING}
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
{output} = model(transform(Image.open("PICTURE").convert("RGB"))[None])
"""
    codebook = ", store.books" if kind == "maps" else ""
    resized = f", {size}" if kind == "maps" and size else ""
    return f"""import timm
import torch
import seitpp.models  # registers {name} with timm
from seitpp import TokenStore
from seitpp.augment import EvalView

{LOADING}
store = TokenStore("STORE", "validation")
view = EvalView({saved.window or size}{codebook}{resized})
{output} = model(view(torch.from_numpy(store.ids(range(8)))))
"""


def _codes(saved: Loaded) -> str:
    if not saved.codebook:
        return ""
    return f"\nThe ids must come from the tokenizer whose codebook has the fingerprint {saved.codebook[:16]}."


def _data_name(settings: Mapping[str, Any]) -> str:
    return settings.get("store") or settings.get("data") or "the embedded digits"


def _data_facts(saved: Loaded, name: str, result: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    data, size = result.get("data") or {}, result.get("payload_bytes_per_image")
    yield "data", name
    if "images" in data:
        yield "images", ", ".join(f"{split} {images:,}" for split, images in data["images"].items())
    if size:
        yield "bytes per image", f"{size:.1f}"
    if "grid" in data:
        yield "grid", f"{data['grid'][0]} x {data['grid'][1]} tokens"
        yield "codes", f"{data['num_codes']} of dimension {data['code_dim']}"
        yield "codec", data["codec"]
        yield "fingerprint of the store", data["fingerprint"][:16]
        yield "tokenizer", _tokenizer(data["tokenizer"])
    if saved.codebook:
        yield "fingerprint of the codebook", saved.codebook[:16]
    if saved.model.num_classes:
        yield "classes", f"{saved.model.num_classes:,}"


def _tokenizer(tokenizer: Mapping[str, Any] | None) -> str:
    spec, fingerprint = (tokenizer or {}).get("spec") or {}, (tokenizer or {}).get("fingerprint", "")
    return " ".join([spec.get("kind", ""), fingerprint[:16]]).strip() or "not recorded"


def _metrics(result: Mapping[str, Any], averaged: bool) -> Iterable[tuple[str, str]]:
    for name, text in METRICS.items():
        value = result.get(f"{name}_ema" if averaged else name)
        if value is not None:
            yield text, f"{value:.4g}"


def _evaluated(saved: Loaded) -> str:
    return f", cropped to the central {saved.window[0]} x {saved.window[1]} tokens" if saved.window else ""


def _training_facts(settings: Mapping[str, Any], result: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    if "recipe" in result:
        yield "recipe", f"recipes/{result['recipe']}.py, preset {settings['preset']}"
    if settings.get("checkpoint"):
        yield "initialized from", settings["checkpoint"]
    yield "updates", f"{result['steps']:,} of {settings['batch_size']:,} images"
    if "images_per_second" in result:
        yield "throughput", f"{result['images_per_second']:,.0f} images/s"
    yield "total seconds", f"{result['seconds']:,.0f}"
    yield "processes", f"{result['processes']}, {result['device']}"
    commit = f", commit {result['git_commit']}" if result["git_commit"] else ""
    yield "seitpp", f"{result['seitpp']}{commit}"


def _command(settings: Mapping[str, Any], result: Mapping[str, Any]) -> Iterable[str]:
    """The command that repeats the training, in which flags name the files of the user."""
    if "recipe" not in result:
        return
    flags = "".join(f" \\\n    --{name} {settings[name]}" for name in PATHS if settings.get(name))
    command = f"accelerate launch recipes/{result['recipe']}.py --config recipe.json --out RUN{flags}"
    yield f"To repeat the training:\n\n```sh\n{command}\n```"


def _table(rows: Iterable[tuple[str, str]], header: tuple[str, str] = ("fact", "value")) -> str:
    return "\n".join(f"| {name} | {value} |" for name, value in [header, ("---", "---"), *rows])


def published(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings for publication: absolute paths are cut to their last name, `out` is None."""
    names = {
        name: Path(settings[name]).name
        for name in PATHS
        if settings.get(name) and Path(settings[name]).is_absolute()
    }
    return {**settings, **names, "out": None, "resume": False, "overwrite": False}
