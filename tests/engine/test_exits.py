"""Whatever ends a run, its process ends too: within seconds, with one line, whatever its workers do."""

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support.faults import in_child
from support.models import tiny_mtm
from support.pictures import encoded, write
from support.running import digits_codebook, forked

from downstream.segmentation.default import FEW_SCENES, default_scenes
from seitpp.data.digits import digits
from seitpp.engine.config import RunConfig
from seitpp.engine.folder import unknown_files
from seitpp.errors import keeping_interrupts
from seitpp.files import owned
from seitpp.models.weights.pretrained import save_pretrained
from seitpp.recipe import run_recipe

SECOND = os.fsdecode(b"b\xe4\n")  # a name that is no UTF-8 and no line, as Linux allows


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Pictures of two classes and scenes with masks, in each split a damaged one, and models for them."""
    root, rng = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    for split in ("train", "validation"):
        for number in range(64):
            pixels = rng.integers(256, size=(40, 40, 3), dtype=np.uint8)
            write(root / f"pictures/{split}/{('a', SECOND)[number % 2]}/{number:02d}.png", encoded(pixels))
        write(root / f"pictures/{split}/{SECOND}/damaged.png", encoded(pixels)[:1000])
    scenes = default_scenes(FEW_SCENES)
    for path in scenes.images.rglob("*.*"):
        write(root / "scenes" / path.relative_to(scenes.images), path.read_bytes())
    for split in ("training", "validation"):
        first = min((root / f"scenes/images/{split}").iterdir())
        first.write_bytes(first.read_bytes()[:500])
        first.rename(first.with_stem("damaged"))
        mask = root / f"scenes/annotations/{split}/{first.stem}.png"
        mask.rename(mask.with_stem("damaged"))
    save_pretrained(root / "mtm.safetensors", tiny_mtm(), digits_codebook())
    return root


def test_an_unreadable_image_ends_every_recipe_or_is_left_out(files: Path, tmp_path: Path) -> None:
    pictures, scenes = ["--data", files / "pictures"], ["--data", files / "scenes"]
    train = ["--data", files / "pictures/train"]
    tokens = ["--tokenizer", digits().tokenizer]
    splits = ["--split", "train", "--validation-split", "validation"]
    few = ["--batch-size", 16, "--epochs", 1, "--warmup-epochs", 0]
    tuned = ["--checkpoint", tmp_path / "finetune-skipped"]
    segmented = ["--checkpoint", tmp_path / "segment_ade20k-skipped"]
    by_scenes = ["--tokenizer", default_scenes(FEW_SCENES).tokenizer]
    steps = ["--steps", 2, "--warmup-steps", 1, "--short-side", 64]
    recipes = {
        "tokenize_images": [*train, *tokens],
        "tokenizer_train": [*pictures, *splits, *few],
        "tokenadapt_train": [*pictures, *splits, *few, *tokens],
        "finetune": [*pictures, *few, "--size", 32, "--checkpoint", files / "mtm.safetensors"],
        "evaluate": [*pictures, *tuned],
        "predict": [*train, *tuned],
        "embed": [*train, *tokens, "--checkpoint", files / "mtm.safetensors"],
        "segment_ade20k": [*scenes, *by_scenes, *steps],
        "evaluate_segmentation": [*scenes, *by_scenes, *segmented],
        "continual": [*pictures, "--input", "pixels", "--tasks", 2, "--fraction", 1],
    }
    jobs = [
        (name, "smoke", *words, "--workers", 2, "--out", tmp_path / f"{name}-{kind}", *more)
        for kind, more in (("skipped", ["--skip-errors"]), ("stopped", []))
        for name, words in recipes.items()
    ]
    for (name, *words), report in zip(jobs, forked(*jobs), strict=True):
        told, out = f"{name}: {report}", tmp_path / f"{name}-skipped"
        if words[-1] == "--skip-errors":
            store = name == "tokenize_images"
            listed = out.with_name(f"{out.name}-train-skipped.txt") if store else out / "skipped.txt"
            lines = listed.read_text().splitlines()
            assert store or unknown_files(out) == []
            assert report["statuses"] == [0] and lines and all("damaged" in line for line in lines), told
        else:
            last = report["err"].splitlines()[-1]
            assert report["statuses"] == [2] and last.startswith("error: ") and "damaged" in last, told


def test_an_error_of_one_process_ends_the_launch(files: Path, tmp_path: Path) -> None:
    """Which reads the one broken image, while the other waits for its gradients."""
    few = ["--batch-size", 16, "--epochs", 1, "--warmup-epochs", 0, "--split", "train"]
    splits = ["--validation-split", "validation", "--workers", 1]
    out = ["--out", tmp_path / "run"]
    job = ("tokenizer_train", "smoke", "--data", files / "pictures", *few, *splits, *out)
    (report,) = forked(job, options=[{"processes": 2}])
    *_, last = report["err"].splitlines()
    assert report["statuses"] == [2, 2] and report["seconds"] < 30, report
    assert last.startswith("error (rank ") and "damaged" in last and "Traceback" not in report["err"], report


def test_a_signal_ends_a_run_at_any_moment(tmp_path: Path) -> None:
    """With one line: while it starts, trains, evaluates and ends, on one process and on two."""
    moments = {
        "": "stopped by SIGINT",
        "config.json": "stopped by SIGINT",
        "metrics.jsonl": "stopped after step ",
        "checkpoints/step-00000011": "stopped in the evaluation after step 11, which is saved: go on with ",
        "model.safetensors": "stopped by SIGINT",
    }
    cases = [(moment, 1) for moment in moments] + [("checkpoints/step-00000011", 2)]
    outs = [tmp_path / str(number) for number in range(len(cases))]
    options = [
        {"signal": signal.SIGINT, "after": str(out / moment) if moment else 0.1, "processes": processes}
        for out, (moment, processes) in zip(outs, cases, strict=True)
    ]
    jobs = [("mtm_pretrain", "smoke", "--evaluation-epochs", 1, "--out", out) for out in outs]
    for (moment, processes), report in zip(cases, forked(*jobs, options=options), strict=True):
        *_, last = report["err"].splitlines()
        assert report["signalled"] and report["statuses"] == [130] * processes, report
        assert last.startswith(moments[moment]) and "Traceback" not in report["err"], report


def test_what_the_system_refuses_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    places = {"n" * 300: "choose a shorter name", "file/run": "a part is a file", "/proc/run": "check the path"}
    jobs = [
        (*words, "--out", tmp_path / place)
        for place in places
        for words in (("seit_train", "smoke"), ("tokenize_images", "smoke"))
    ]
    for job, report in zip(jobs, forked(*jobs), strict=True):
        *_, last = report["err"].splitlines()
        remedy = next(remedy for place, remedy in places.items() if str(job[-1]).endswith(place))
        assert report["statuses"] == [2] and last.startswith("error: ") and last.endswith(remedy), report
        assert "Traceback" not in report["err"], report
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_output_that_takes_nothing_is_one_line(tmp_path: Path) -> None:
    """It lies on a full disk, or is a pipe that nobody reads any more."""
    read, write = os.pipe()
    os.close(read)
    for output, said in ((os.open("/dev/full", os.O_WRONLY), "No space left on device"), (write, "Broken pipe")):

        def recipe(output: int = output) -> None:
            sys.stdout, sys.argv = os.fdopen(output, "w"), ["recipe.py"]
            run_recipe(lambda config: print("done"), {"smoke": RunConfig()}, "smoke")

        log = tmp_path / f"log-{said}"
        assert in_child(recipe, log) == 2
        assert log.read_text().startswith(f"error: standard output: {said}; ") and log.read_text().count("\n") == 1


def test_a_second_command_that_writes_the_same_split_is_refused(tmp_path: Path) -> None:
    with owned(tmp_path / ".tokens-train.writer"):
        (report,) = forked(("tokenize_images", "smoke", "--out", tmp_path / "tokens"))
    assert (
        report["statuses"] == [2] and "which writes the same: wait until it ends" in report["err"].splitlines()[-1]
    )
    assert [*tmp_path.iterdir()] == []


class Finalized:
    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)


def swallow() -> None:
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
    except:  # noqa: E722 (as libraries have it)
        pass


def test_an_interrupt_that_is_swallowed_comes_again() -> None:
    """Of Ctrl-C in a finalizer, or in a library that catches everything, a run would hear nothing."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests may run where it is ignored
    for swallowed in (Finalized, swallow):
        tidied, started = [], time.monotonic()
        with pytest.raises(KeyboardInterrupt), keeping_interrupts():
            try:
                swallowed()
                time.sleep(20)
            finally:  # longer than until the next one, which does not disturb it
                for _ in range(25):
                    time.sleep(0.05)
                tidied.append(True)
        assert tidied and time.monotonic() - started < 10
        time.sleep(1.1)  # and none comes when all is over
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)
