"""Resuming: what a run reads may lie elsewhere, it may train longer, absent settings are defaults."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.running import metrics, recipe, refused, smoke_config

from seitpp import StoreWriter, files
from seitpp.engine.contents import content_fingerprint
from seitpp.engine.folder import RunError, choose_folder, enter_folder


def begin(folder: Path, **settings) -> None:
    files.unlock(enter_folder(folder, settings, resumed=False, overwrite=False))


def resume(folder: Path, defaults: dict | None = None, **settings) -> None:
    chosen = choose_folder("x", settings, out=str(folder), resume=True, overwrite=False, defaults=defaults or {})
    assert chosen == (folder, True)


# ----------------------------------------------------------------------------------------------- contents


def a_store(path: Path, code: int = 0) -> Path:
    with StoreWriter(path, codebook=np.zeros((4, 2), np.float32), grid=(2, 2), class_names=["a"]) as writer:
        writer.add(np.full((2, 2), code, np.uint16), 0)
    return path


def another_store(path: Path) -> None:
    shutil.rmtree(path)
    a_store(path, 1)


def a_run(path: Path) -> Path:
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"weights")
    return path


def a_file(path: Path) -> Path:
    path.write_bytes(b"weights")
    return path


def images(path: Path) -> Path:
    for name in ("cat/1.jpg", "cat/2.jpg", "dog/1.jpg"):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(name.encode())
    (path / "all").symlink_to(path)  # a loop
    return path


CASES = {
    "store": (a_store, another_store),
    "checkpoint": (a_run, lambda path: (path / "model.safetensors").write_bytes(b"Weights")),
    "tokenizer": (a_file, lambda path: path.write_bytes(b"Weights")),
    "data": (images, lambda path: (path / "cat/2.jpg").write_bytes(b"resized")),
}


@pytest.mark.parametrize("name", CASES)
def test_equal_contents_are_equal_wherever_they_lie(tmp_path: Path, name: str) -> None:
    make, change = CASES[name]
    first, run = make(tmp_path / "first"), tmp_path / "run"
    begin(run, **{name: str(first), "lr": 1})
    assert json.loads((run / "inputs.json").read_text()) == {name: content_fingerprint(str(first))}
    moved = make(tmp_path / "moved")
    shutil.rmtree(first) if first.is_dir() else first.unlink()
    resume(run, **{name: str(moved), "lr": 1})
    resume(run, **{name: str(first), "lr": 1})  # gone, as after pre-training: whoever needs it says so
    change(moved)
    with pytest.raises(
        RunError, match=rf"{name} {moved} has the content [0-9a-f]{{16}}, expected .* of {first}\)"
    ):
        resume(run, **{name: str(moved), "lr": 1})
    moved.rename(first)
    with pytest.raises(RunError, match=rf"{name} {first} has the content"):
        resume(run, **{name: str(first), "lr": 1})
    for other in (None, str(tmp_path / "nothing")):
        with pytest.raises(RunError, match=f"{name} .*first' -> "):
            resume(run, **{name: other, "lr": 1})


def test_a_run_from_before_inputs_were_recorded_goes_on(tmp_path: Path) -> None:
    """Of the same paths, and of copies as long as the original is there; then they are recorded."""
    first, copy, run = a_file(tmp_path / "first"), a_file(tmp_path / "copy"), tmp_path / "run"
    begin(run, tokenizer=str(first))
    (run / "inputs.json").unlink()
    resume(run, tokenizer=str(first))
    resume(run, tokenizer=str(copy))
    copy.write_bytes(b"Weights")
    with pytest.raises(RunError, match=f"tokenizer {copy} has the content"):
        resume(run, tokenizer=str(copy))
    files.unlock(enter_folder(run, {"tokenizer": str(first)}, resumed=True, overwrite=False))
    assert json.loads((run / "inputs.json").read_text()) == {"tokenizer": content_fingerprint(str(first))}


def test_a_killed_start_leaves_a_folder_that_can_be_taken(tmp_path: Path) -> None:
    """The fingerprints are written before config.json, which makes the folder that of a run."""
    begin(tmp_path, tokenizer=str(a_file(tmp_path.with_name("tokenizer"))))
    (tmp_path / "config.json").unlink()
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "inputs.json"}
    assert choose_folder("x", {}, out=str(tmp_path), resume=True, overwrite=False) == (tmp_path, False)


def test_a_large_file_is_known_by_its_ends(tmp_path: Path) -> None:
    path = tmp_path / "images.tar"
    with path.open("wb") as file:
        file.truncate(5 << 30)  # takes no room
    before = content_fingerprint(str(path))
    with path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    assert before != content_fingerprint(str(path))


def test_a_setting_that_a_run_did_not_have_is_its_default(tmp_path: Path) -> None:
    begin(tmp_path, lr=1)
    resume(tmp_path, {"resize": (1, 2), "clip": None}, lr=1, resize=(1, 2), clip=None)
    with pytest.raises(RunError, match=r"other settings \(resize \[1, 2\] -> \[1, 3\]\)"):
        resume(tmp_path, {"resize": (1, 2)}, lr=1, resize=(1, 3))


# ------------------------------------------------------------------------------------------------- length

SHORT = {
    "steps": {"steps": 2, "warmup_steps": 1},
    "epochs": {"epochs": 0.2, "warmup_epochs": 0.1, "fraction": 0.2, "batch_size": 16},
}


# The other recipes make their schedule as the first one does.
@pytest.mark.parametrize("name", ["tokenizer_train", "segment_ade20k"])
def test_a_finished_run_can_be_prolonged(tmp_path: Path, capfd, name: str) -> None:
    module, length = recipe(name), "steps" if name == "segment_ade20k" else "epochs"
    config = replace(smoke_config(name, tmp_path), **SHORT[length])
    module.main(config)
    out = Path(config.out)
    done, result = len(metrics(out)), json.loads((out / "result.json").read_text())
    assert done == result["steps"] > 0
    capfd.readouterr()
    longer = replace(config, resume=True, **{length: 2 * getattr(config, length)})
    module.main(longer)
    said = capfd.readouterr().out
    assert f"{length} {getattr(config, length):g} -> {getattr(longer, length):g}: " in said
    assert f" steps instead of {done}, {done} of them done; the learning rate falls " in said
    lines, rates = metrics(out), json.loads((out / "config.json").read_text())
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1)) and len(lines) > done
    assert rates[length] == getattr(longer, length) and not rates["resume"]
    assert json.loads((out / "result.json").read_text())["steps"] == len(lines)
    assert f"{lines[done]['lr']:.3e} in the next one, the old plan ended here" in said


def test_a_run_in_its_middle_can_be_longer_and_never_shorter_than_what_is_done(
    tmp_path: Path, capfd, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = recipe("tokenizer_train")
    config = replace(smoke_config("tokenizer_train", tmp_path), fraction=0.2, batch_size=16)
    config = replace(config, epochs=0.4, warmup_epochs=0.1, checkpoint_epochs=0.1)
    module.main(config)
    out = Path(config.out)
    shutil.rmtree(out / "checkpoints/step-00000007")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    line = ["smoke", "--resume", "--out", out, "--fraction", 0.2, "--batch-size", 16]
    line += ["--warmup-epochs", 0.1, "--checkpoint-epochs", 0.1]
    said = (
        f"the run in {out} has done 6 steps, 0.352941 epochs, expected at most the 3 steps of this schedule: pass"
    )
    refused(capfd, monkeypatch, module, [*line, "--epochs", 0.2], said, "a larger --epochs")
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    old = metrics(out)[6]["lr"]
    capfd.readouterr()
    module.main(replace(config, resume=True, epochs=1))
    new = metrics(out)[6]["lr"]
    words = (
        "epochs 0.4 -> 1: 17 steps instead of 7, 6 of them done; the learning rate falls by half a cosine over "
    )
    assert f"{words}all of them: {new:.3e} in the next one, {old:.3e} by the old plan" in capfd.readouterr().out
    assert old < new and len(metrics(out)) == 17
    module.main(replace(config, resume=True, epochs=1))  # as it was: nothing is left to do, nothing to say
    assert "instead of" not in capfd.readouterr().out
