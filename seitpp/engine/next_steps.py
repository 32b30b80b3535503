"""What makes sense after a run: the commands that the last lines of a recipe show, with the paths of the run."""

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Step(NamedTuple):
    """A command and what it is for. `program` is a recipe's name, or "seitpp"; `words` are its arguments."""

    purpose: str
    program: str
    words: tuple[str, ...]


def next_steps(recipe: str, config: Any, out: Path | str, *, result: Mapping[str, Any]) -> list[Step]:
    """Return up to three commands that make sense after a run of `recipe` that has written `out`.

    `result` holds its figures. Other programs than our recipes have none.
    """
    return AFTER[recipe](config, out, result) if recipe in AFTER else []


def block(steps: Sequence[Step]) -> str:
    """Format the commands, each below what it is for, as they can be pasted into the shell of this run."""
    return "\n".join(["next:", *(f"  # {step.purpose}\n  {command(step)}" for step in steps)])


def command(step: Step) -> str:
    """Return the command line of a step, whose recipe is in the folder of the one that was started."""
    if step.program == "seitpp":
        return shlex.join(["seitpp", *step.words])
    started = Path(sys.argv[0])
    folder = started.parent if started.suffix == ".py" and started.stem in AFTER else Path("recipes")
    return shlex.join(["accelerate", "launch", str(folder / f"{step.program}.py"), *step.words])


def _recipe(purpose: str, recipe: str, **settings: object) -> Step:
    """Return a step that runs a recipe; settings that are None keep their default."""
    flags = [(f"--{name.replace('_', '-')}", str(value)) for name, value in settings.items() if value is not None]
    return Step(purpose, recipe, tuple(word for flag in flags for word in flag))


def _seitpp(purpose: str, *words: object) -> Step:
    return Step(purpose, "seitpp", tuple(map(str, words)))


def _export(folder: Path | str) -> Step:
    return _seitpp("write the model for timm and the hub", "export-model", folder, f"{folder}-exported")


def _pictures(config: Any) -> dict[str, Any]:
    """Return the settings with which another recipe reads the same images, tokenized in the same way."""
    return {name: getattr(config, name, None) for name in ("data", "tokenizer", "tokenizer_kind")}


def _after_tokenize_images(config: Any, out: Path | str, result: Mapping[str, Any]) -> list[Step]:
    if result.get("annotated"):
        return [_recipe("train a segmenter on the tokens", "segment_ade20k", store=out)]
    steps = [_recipe("pre-train on the tokens, without labels", "mtm_pretrain", store=out)]
    if result.get("classes"):
        steps.append(_recipe("train a classifier on the tokens", "seit_train", store=out))
    if "://" in str(out):
        return [*steps, _seitpp("copy the store to this disk", "pull", out, Path(str(out)).name)]
    return [*steps, _seitpp("see what the store holds", "info", out)]


def _after_tokenizer_train(config: Any, out: Path | str, _: Mapping[str, Any]) -> list[Step]:
    tokenizer, tokens = Path(out) / "tokenizer.safetensors", f"{out}-tokens"
    return [
        _recipe("tokenize the images", "tokenize_images", data=config.data, tokenizer=tokenizer, out=tokens),
        _recipe("then pre-train on the tokens", "mtm_pretrain", store=tokens),
        _seitpp("look at them", "show", tokens, "--tokenizer", tokenizer, "--out", f"{tokens}.png"),
    ]


def _after_tokenadapt_train(config: Any, out: Path | str, _: Mapping[str, Any]) -> list[Step]:
    if config.data is None and config.preset == "photos":  # two photographs that are no data set
        return []
    tokens = f"{out}-tokens"
    known = {**_pictures(config), "tokenizer": config.tokenizer or Path(out) / "tokenizer.safetensors"}
    kind = ["--tokenizer-kind", config.tokenizer_kind] if config.tokenizer_kind else []
    shown = ["--tokenizer", known["tokenizer"], *kind, "--augment", "--tokenadapt", out, "--out", f"{tokens}.png"]
    return [
        _recipe("tokenize images with the same tokenizer", "tokenize_images", **known, out=tokens),
        _recipe("then pre-train with this augmentation", "mtm_pretrain", store=tokens, tokenadapt=out),
        _seitpp("see what it makes of the tokens", "show", tokens, *shown),
    ]


def _after_seit_train(config: Any, out: Path | str, _: Mapping[str, Any]) -> list[Step]:
    return [
        _recipe("tables of the classes", "evaluate", checkpoint=out, store=config.store),
        _recipe("train it further, on these or other classes", "finetune", checkpoint=out, store=config.store),
        _export(out),
    ]


def _after_mtm_pretrain(config: Any, out: Path | str, result: Mapping[str, Any]) -> list[Step]:
    where = {"checkpoint": out, "store": config.store}
    filled = _recipe("fill what is hidden", "inpaint", **where, **_tokenizer(config))
    if not any("top1" in name for name in result):  # the store has no classes
        return [filled, _export(out)]
    return [
        _recipe("fine-tune it with labels", "finetune", **where),
        _recipe("probe its frozen encoder", "probe", **where),
        filled,
    ]


def _tokenizer(config: Any) -> dict[str, Any]:
    return {"tokenizer": config.tokenizer, "tokenizer_kind": config.tokenizer_kind}


def _after_finetune(config: Any, out: Path | str, _: Mapping[str, Any]) -> list[Step]:
    split = {"split": config.validation_split} if config.data else {}
    steps = [
        _recipe("tables of the classes", "evaluate", checkpoint=out, store=config.store, data=config.data, **split)
    ]
    if config.store is None:
        steps.append(_recipe("classes of pictures", "predict", checkpoint=out, data=config.data))
    return [*steps, _export(out)]


def _after_probe(config: Any, out: Path | str, _: Mapping[str, Any]) -> list[Step]:
    where = {"checkpoint": config.checkpoint, "store": config.store}
    return [
        _recipe("fine-tune it with labels", "finetune", **where),
        _recipe("fill what is hidden", "inpaint", **where),
    ]


def _after_inpaint(config: Any, out: Path | str, _: Mapping[str, Any]) -> list[Step]:
    where = {"checkpoint": config.checkpoint, "store": config.store}
    return [
        _recipe("fine-tune it with labels", "finetune", **where),
        _recipe("probe its frozen encoder", "probe", **where),
        _recipe(
            "choose the codes in more rounds", "inpaint", **where, **_tokenizer(config), rounds=2 * config.rounds
        ),
    ]


def _after_evaluate(config: Any, out: Path | str, _: Mapping[str, Any]) -> list[Step]:
    if config.store is not None:
        return [_recipe("train it further", "finetune", checkpoint=config.checkpoint, store=config.store)]
    where = {"checkpoint": config.checkpoint, **_pictures(config)}
    clean = {"split": config.split, "labels": config.labels} if config.data else {}
    return [
        _recipe("classes of pictures, as a table", "predict", **where),
        _recipe("vectors of pictures, and nearest neighbors", "embed", **where),
        _recipe("corruptions and attacks", "robustness", **where, **clean),
    ]


def _after_predict(config: Any, out: Path | str, _: Mapping[str, Any]) -> list[Step]:
    where = {"checkpoint": config.checkpoint, **_pictures(config)}
    if (Path(out) / "labels").is_dir():
        return [_recipe("its scores, where masks are known", "evaluate_segmentation", **where)]
    split = {"split": config.source_split or "None"} if config.data else {}  # None: all of it
    return [
        _recipe("vectors of the pictures, and nearest neighbors", "embed", **where),
        _recipe("its accuracy, where labels are known", "evaluate", **where, **split),
    ]


def _after_embed(config: Any, out: Path | str, _: Mapping[str, Any]) -> list[Step]:
    if config.data is None or config.tokenizer is None:
        return [_recipe("fine-tune the encoder", "finetune", checkpoint=config.checkpoint, data=config.data)]
    tokens = f"{out}-tokens"
    return [
        _recipe("tokenize the pictures", "tokenize_images", **_pictures(config), out=tokens),
        _recipe("then fine-tune the encoder", "finetune", checkpoint=config.checkpoint, store=tokens),
    ]


def _after_segment_ade20k(config: Any, out: Path | str, _: Mapping[str, Any]) -> list[Step]:
    return _segmented({**_segmenter(config), "checkpoint": out}, config)


def _after_evaluate_segmentation(config: Any, out: Path | str, _: Mapping[str, Any]) -> list[Step]:
    return _segmented({**_segmenter(config), "checkpoint": config.checkpoint}, config)[1:]


def _segmenter(config: Any) -> dict[str, Any]:
    only_data = {"layout": config.layout, "classes": config.classes} if config.data else {}
    return {"checkpoint": None, "store": config.store, **_pictures(config), **only_data}


def _segmented(where: Mapping[str, Any], config: Any) -> list[Step]:
    """Return what can be done with a segmenter: evaluate it once, at several scales, and apply it."""
    evaluated = _recipe("scores and pictures of the classes", "evaluate_segmentation", **where)
    scales = ("--scales", "0.75", "1.0", "1.25")
    steps = [evaluated, evaluated._replace(purpose="the same at several scales", words=evaluated.words + scales)]
    if config.data and config.tokenizer:
        checkpoint = {"checkpoint": where["checkpoint"]}
        steps.append(_recipe("label maps of pictures", "predict", **checkpoint, **_pictures(config)))
    return steps


def _after_robustness(config: Any, out: Path | str, _: Mapping[str, Any]) -> list[Step]:
    more = {"suite": "attacks", "attack": "standard", "out": f"{out}-standard"}
    steps = [_recipe("the standard set of attacks", "robustness", config=Path(out) / "config.json", **more)]
    if config.checkpoint is None:
        return steps
    split = {"split": config.split, "labels": config.labels} if config.data else {}
    where = {"checkpoint": config.checkpoint, **_pictures(config), **split}
    return [_recipe("tables of the classes", "evaluate", **where), *steps]


def _after_continual(config: Any, out: Path | str, _: Mapping[str, Any]) -> list[Step]:
    if config.figure:
        return []
    other = f"{out}-no-memory"
    settings = {"config": Path(out) / "config.json", "memory": 0, "out": other}
    return [
        _recipe("the same without a memory, for comparison", "continual", **settings),
        Step("then draw both", "continual", ("--figure", str(out), other, "--out", f"{out}-figure")),
    ]


def _after_storage_tradeoff(config: Any, out: Path | str, _: Mapping[str, Any]) -> list[Step]:
    tokenizer, tokens = config.tokenizer or Path(out) / "tokenizer.safetensors", f"{out}-tokens"
    return [
        _recipe("keep the images as tokens", "tokenize_images", data=config.data, tokenizer=tokenizer, out=tokens),
        _recipe("then train on them", "seit_train", store=tokens),
    ]


AFTER: dict[str, Callable[[Any, Path | str, Mapping[str, Any]], list[Step]]] = {
    "continual": _after_continual,
    "embed": _after_embed,
    "evaluate": _after_evaluate,
    "evaluate_segmentation": _after_evaluate_segmentation,
    "finetune": _after_finetune,
    "inpaint": _after_inpaint,
    "mtm_pretrain": _after_mtm_pretrain,
    "predict": _after_predict,
    "probe": _after_probe,
    "robustness": _after_robustness,
    "segment_ade20k": _after_segment_ade20k,
    "seit_train": _after_seit_train,
    "storage_tradeoff": _after_storage_tradeoff,
    "tokenadapt_train": _after_tokenadapt_train,
    "tokenize_images": _after_tokenize_images,
    "tokenizer_train": _after_tokenizer_train,
}
