"""continual as a user runs it: exact figures, killed and resumed, two processes, tokens and pixels, the figure."""

from pathlib import Path

import continual
import numpy as np
import pytest
import tokenize_images
from support.paths import RECIPES
from support.pictures import write
from support.running import call, distributed, kill_after_an_evaluation, lines_of, refused, result_of, run

from downstream.continual.order import ReplayOrder
from seitpp import StoreWriter, TokenStore
from seitpp.data.digits import DigitsSource, digits
from seitpp.engine.config import parse
from seitpp.engine.folder import unknown_files
from seitpp.recipe import rehearse

STEPS, TASKS, IMAGES = 20, 5, 72  # of the smoke preset: updates and tasks; validation images of a task


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> Path:
    """An uninterrupted run of the smoke preset, through the command line."""
    folder = tmp_path_factory.mktemp("continual") / "run"
    finished = run("continual", "smoke", "--out", folder)
    assert finished.returncode == 0, finished.stderr
    assert "256.0 bytes each by --count paper: the memory holds 96" in finished.stdout
    assert f"average_accuracy   {result_of(folder)['average_accuracy']:6.2f} %" in finished.stdout
    return folder


@pytest.fixture(scope="module")
def folder_of_digits(tmp_path_factory) -> Path:
    """Digits 0 to 3 as DIGITS/SPLIT/CLASS/NAME.png."""
    root = tmp_path_factory.mktemp("folder") / "digits"
    for split in ("train", "validation"):
        source = DigitsSource(split)
        for index, label in enumerate(source.labels.values[:300]):
            if label < 4:
                write(root / split / str(label) / f"{index:03d}.png", source.read(index).data)
    return root


def test_every_task_is_learned_evaluated_and_written_down(smoke: Path) -> None:
    result, lines, evaluations = (
        result_of(smoke),
        lines_of(smoke / "metrics.jsonl"),
        lines_of(smoke / "evaluations.jsonl"),
    )
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1)) and {line["lr"] for line in lines} == {
        0.1
    }
    assert lines[0]["loss"] == pytest.approx(np.log(10), abs=0.5)
    rows = result["accuracies"]
    assert [len(row) for row in rows] == [1, 2, 3, 4, 5]
    assert rows[:-1] == [[line[f"task_{n}"] for n in range(1, len(line))] for line in evaluations]
    for value in (value for row in rows for value in row):
        assert value * IMAGES / 100 == pytest.approx(round(value * IMAGES / 100)), "a percentage of 72 images"
    assert result["average_accuracy"] == pytest.approx(np.mean(rows[-1]))
    assert result["tasks"] == [["0", "1"], ["2", "3"], ["4", "5"], ["6", "7"], ["8", "9"]]
    known = ("input", "count", "memory_bytes", "bytes_per_image", "memory_images", "steps")
    assert [result[name] for name in known] == ["tokens", "paper", 24_600, 256, 96, STEPS]
    assert sum(result["held_by_task"]) == 96 and min(result["held_by_task"]) > 5
    assert (smoke / "matrix.png").read_bytes().startswith(b"\x89PNG") and unknown_files(smoke) == []


def test_killed_and_resumed_gives_the_same_bits(smoke: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    kill_after_an_evaluation("continual", folder, STEPS)
    call(continual, "smoke", "--out", folder, "--resume")
    for name in ("evaluations.jsonl", f"checkpoints/step-{STEPS:08d}/model.safetensors"):
        assert (folder / name).read_bytes() == (smoke / name).read_bytes(), name
    learned = [
        [(at["step"], at["loss"], at["grad_norm"]) for at in lines_of(of / "metrics.jsonl")]
        for of in (smoke, folder)
    ]
    assert learned[0] == learned[1]
    for name in ("accuracies", "held_by_task", "average_accuracy", "forgetting", "backward_transfer"):
        assert result_of(folder)[name] == result_of(smoke)[name]


def test_two_processes_begin_alike_and_have_the_same_memory(tmp_path: Path) -> None:
    """Batch norm and memory are those of one process.

    Later losses stray, as those of one process do after a change of the weights by 1e-6 (docs/results.md).
    """
    line, outs = ["smoke", "--fraction", 0.1, "--lr", 1e-4], [tmp_path / "one", tmp_path / "two"]
    call(continual, *line, "--out", outs[0])
    finished = distributed(2, RECIPES / "continual.py", *line, "--workers", 1, "--out", outs[1])
    assert finished.returncode == 0, finished.stderr
    one, two = map(result_of, outs)
    assert (one["processes"], two["processes"]) == (1, 2) and one["held_by_task"] == two["held_by_task"]
    losses = [[line["loss"] for line in lines_of(out / "metrics.jsonl")] for out in outs]
    assert losses[1][:3] == pytest.approx(losses[0][:3], abs=1e-5)


def test_tokens_and_pixels_see_the_same_images(folder_of_digits: Path, tmp_path: Path, monkeypatch) -> None:
    """Of the digits, and of a folder and the store that was made of it; where the memories hold as many images."""
    seen, yielded = [], ReplayOrder.micro_batches

    def watched(*arguments, **where):
        seen.append([batch.tolist() for batch in yielded(*arguments, **where)])
        return iter(map(np.array, seen[-1]))

    store = tmp_path / "store"
    made = ["--tokenizer", digits().tokenizer, "--splits", "--out", store]
    call(tokenize_images, "smoke", "--data", folder_of_digits, *made)
    monkeypatch.setattr(ReplayOrder, "micro_batches", watched)
    line = ["smoke", "--fraction", 1, "--tasks", 2, "--class-order", "seed"]
    call(continual, *line, "--store", store, "--memory", "4000B", "--out", tmp_path / "tokens")
    pixels = ["--input", "pixels", "--data", folder_of_digits, "--memory", "184.4kB"]
    call(continual, *line, *pixels, "--out", tmp_path / "pixels")
    assert seen[0] == seen[1] and len(seen[0]) > 5
    one, two = (result_of(tmp_path / name) for name in ("tokens", "pixels"))
    assert one["memory_images"] == two["memory_images"] == 15 and one["held_by_task"] == two["held_by_task"]
    assert one["tasks"] == two["tasks"] != [["0", "1"], ["2", "3"]]
    assert (one["bytes_per_image"], two["bytes_per_image"]) == (256, 3 * 32 * 32 * 4)
    train = TokenStore(digits().store, "train").labels.tolist()
    assert train == DigitsSource("train").labels.values, "and so they do on the digits"


@pytest.fixture(scope="module")
def compared(smoke: Path, tmp_path_factory) -> dict[str, Path]:
    """Short runs for the figure, with what they are."""
    root, short = tmp_path_factory.mktemp("compared"), ["smoke", "--fraction", 0.05, "--tasks", 2]
    pixels = ["--input", "pixels", "--size", 8]
    runs = {
        "more": ["--memory", "50kB"],
        "less": ["--memory", "1kB"],
        "none": ["--memory", 0],
        "joint": ["--memory", 0, "--tasks", 1],
        "pixels": [*pixels, "--count", "uint8", "--memory", "1.5kB"],
        "files": [*pixels, "--count", "jpeg", "--file-bytes", "109kB", "--memory", "1MB"],
    }
    for name, flags in runs.items():
        call(continual, *short, *flags, "--out", root / name)
    return {name: root / name for name in runs}


def test_the_baselines(compared: dict[str, Path]) -> None:
    none, joint = result_of(compared["none"]), result_of(compared["joint"])
    assert none["memory_images"] == 0 and none["held_by_task"] == [0, 0]
    assert joint["forgetting"] is joint["backward_transfer"] is None
    assert joint["accuracies"] == [[joint["average_accuracy"]]] and len(joint["tasks"][0]) == 10
    counted = [result_of(compared[name])["memory_images"] for name in ("pixels", "files")]
    assert counted == [7, 9], "of 8 x 8 x 3 bytes, and of 109,000"


def test_the_figure_of_several_runs(
    compared: dict[str, Path], smoke: Path, tmp_path: Path, capfd, monkeypatch
) -> None:
    call(continual, "--figure", *compared.values(), "--out", tmp_path / "figure")
    result, found = (
        result_of(tmp_path / "figure"),
        {name: result_of(of)["average_accuracy"] for name, of in compared.items()},
    )
    assert result["lines"] == {
        "tokens, count paper": {"50000": [found["more"]], "1000": [found["less"]]},
        "pixels, count uint8": {"1500": [found["pixels"]]},
        "pixels, count jpeg": {"1000000": [found["files"]]},
    }
    assert result["levels"] == {"tokens, no memory": [found["none"]], "tokens, all at once": [found["joint"]]}
    assert (tmp_path / "figure/memory.png").read_bytes().startswith(b"\x89PNG")
    assert unknown_files(tmp_path / "figure") == []
    where = ["--out", tmp_path / "refused"]
    both = [compared["more"], smoke]
    refused(capfd, monkeypatch, continual, ["--figure", *both, *where], "more has 2 tasks", "5: expected equal")
    refused(
        capfd, monkeypatch, continual, ["--figure", tmp_path, *where], tmp_path / "result.json", "run of continual"
    )
    write(tmp_path / "other/result.json", '{"top1": 1}')
    refused(
        capfd,
        monkeypatch,
        continual,
        ["--figure", tmp_path / "other", *where],
        "other/result.json cannot be drawn",
    )
    assert not (tmp_path / "refused").exists()


def test_a_dry_run(capsys) -> None:
    rehearse(continual.main, parse(continual.PRESETS, "digits", ["smoke", "--dry-run"]))
    assert "dry run: started, saved, resumed, evaluated, reported in" in capsys.readouterr().out


@pytest.mark.parametrize("name", continual.PRESETS)
def test_presets_are_named_as_they_are(name: str) -> None:
    assert continual.PRESETS[name].preset == name
    assert parse(continual.PRESETS, "digits", [name]) == continual.PRESETS[name]


def test_what_cannot_be_learned_is_refused(folder_of_digits: Path, tmp_path: Path, capfd, monkeypatch) -> None:
    whole, few = TokenStore(digits().store), range(40)
    common = {"codebook": whole.codebook, "grid": whole.grid}
    for name, labels, names in (
        ("unlabeled", [None] * 40, None),
        ("several", [(0, 1)] * 40, ["a", "b"]),
        ("three", [index % 3 for index in few], ["a", "b", "c"]),
    ):
        kind = {"class_names": names, "multi_label": name == "several"}
        with StoreWriter(tmp_path / name, **common, **kind) as writer:
            writer.add_batch(whole.ids(few), labels)
    out, pixels = ["smoke", "--out", tmp_path / "run"], ["--input", "pixels"]
    data = ["--data", folder_of_digits]
    for arguments, *words in (
        (["--memory", "255B"], "--memory of 255 bytes", "0, or at least the 256 bytes"),
        ([*pixels, "--memory", "12kB"], "--memory of 12,000 bytes", "12,288"),
        (["--memory", "much"], "--memory much", "574MB"),
        (["--tasks", 11], "--tasks 11: expected 1 to 10"),
        (["--tasks", 0], "--tasks 0"),
        (["--count", "jpeg"], "--count jpeg with --input tokens: expected paper or stored"),
        (["--count", "uint8"], "--count uint8 with --input tokens"),
        ([*pixels, "--count", "stored"], "--count stored with --input pixels: expected paper or uint8 or jpeg"),
        ([*pixels, "--store", digits().store], "--input pixels with --store"),
        (data, "--input tokens with --data"),
        (["--file-bytes", "109kB"], "--file-bytes 109kB", "--count jpeg"),
        ([*pixels, "--count", "jpeg", "--file-bytes", "0"], "--file-bytes 0"),
        (["--store", tmp_path / "unlabeled"], "continual needs classes", tmp_path / "unlabeled"),
        (["--store", tmp_path / "several"], "several classes", tmp_path / "several"),
        (["--store", tmp_path / "three", "--fraction", 1, "--tasks", 3], "has no validation images"),
        (["--fraction", 0.03], "task 2 of 5 has 7", "expected at least the 10 of a batch"),
        (["--accumulation", 2], "unknown flag --accumulation"),
    ):
        refused(capfd, monkeypatch, continual, [*out, *arguments], *words)
    published = ["published", *out[1:], "--precision", "no"]
    refused(capfd, monkeypatch, continual, published, "published needs --store")
    refused(capfd, monkeypatch, continual, [*published, *pixels], "published needs --data")
    assert not (tmp_path / "run").exists()
