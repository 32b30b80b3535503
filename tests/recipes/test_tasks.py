"""tokenize_images --task: independent tasks in any order, killed and repeated, write the bytes of one process."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tokenize_images
from PIL import Image
from support.buckets import BUCKET, served, upload
from support.faults import in_child
from support.paths import RECIPES
from support.running import ON_CPU, call, kill_when, refused

from seitpp import TokenStore, cli
from seitpp.data.digits import digits
from seitpp.files import owned
from seitpp.recipe import run_recipe
from seitpp.store import publish, spec, staging
from seitpp.store.bucket import Bucket
from seitpp.store.remote import pull

IMAGES, SHARD = 120, 8  # of them 6 are held out, so that the split train has 15 staged shards


# The same in a program of its own, whose arguments are a script and those of the script.
SMALL = f"""import runpy, sys
from seitpp.store import publish, spec
spec.SHARD_IMAGES, spec.FEW_SHARDS, spec.GROUP, publish.TABLE_IMAGES = {SHARD}, 4, 2, {3 * SHARD}
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module", autouse=True)
def small_shards() -> Iterator[None]:
    """A large split has more than 4 staged shards, 2 in each shard of the store, and 3 make the code table."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spec, "SHARD_IMAGES", SHARD)
        patch.setattr(spec, "FEW_SHARDS", 4)
        patch.setattr(spec, "GROUP", 2)
        patch.setattr(publish, "TABLE_IMAGES", 3 * SHARD)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(IMAGES):
        path = root / "ab"[number % 2] / f"{number:03d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(256, size=(8, 8, 3), dtype=np.uint8)).save(path)
    return root


def contents(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


def line(folder: Path, out: Path, *more: object) -> list:
    data = ["--data", folder, "--tokenizer", digits().tokenizer, "--out", out]
    return ["smoke", *data, "--batch-size-per-process", 8, "--workers", 0, *more]


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What one process writes without and with --compact."""
    root = tmp_path_factory.mktemp("whole")
    for name, more in (("all", ()), ("compact", ("--compact",))):
        call(tokenize_images, *line(folder, root / name, *more))
    return {name: root / name for name in ("all", "compact")}


def task(folder: Path, out: Path, number: int, *more: object) -> None:
    call(tokenize_images, *line(folder, out, "--task", number, "--tasks", 4, *more))


def finish(monkeypatch: pytest.MonkeyPatch, out: Path) -> None:
    monkeypatch.setattr("sys.argv", ["seitpp", "finish", str(out)])
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0})  # spawned ones would not have small shards
    cli.main()


def test_tasks_in_any_order_killed_and_repeated_write_the_bytes_of_one_process(
    folder: Path, whole: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    out, made = tmp_path / "store/tokens", tmp_path / "store/.tokens-train.staging"
    words = line(folder, out, "--task", 2, "--tasks", 4, "--workers", 1)
    kill_when(lambda: list(made.glob("shard-*.arrow")), "tokenize_images", *words, logs=tmp_path)
    for number in (2, 3, 0):
        task(folder, out, number)
    refused_finish(monkeypatch, out, capfd, "shards are not finished")
    assert not list(made.glob("encoded-*.json")), "the code table needs shards of task 1"
    for number in (1, 1, 2):  # and two of them again, which may encode now
        task(folder, out, number)
    encoded = len(list(made.glob("encoded-*.json")))
    assert 0 < encoded < len(staging.staged_shards(made)) + encoded
    finish(monkeypatch, out)
    assert contents(out) == contents(whole["all"])
    finish(monkeypatch, out)  # there is nothing left to do
    assert "nothing is left to finish" in capfd.readouterr().out
    assert sorted(path.name for path in out.parent.iterdir()) == ["tokens"]
    store = TokenStore(out, verify=False)
    assert len(store._names) > 4 and len(store) == IMAGES - IMAGES // 20


def test_codes_are_left_out_at_the_end(
    folder: Path, whole: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "compact"
    for part in ("train", "validation"):
        for number in range(4):
            task(folder, out, number, "--compact")
        finish(monkeypatch, out)
        assert TokenStore(out, part).num_codes == TokenStore(whole["compact"]).num_codes
    assert contents(out) == contents(whole["compact"])
    tokenizer, expected = (Path(f"{store}-tokenizer.safetensors") for store in (out, whole["compact"]))
    assert tokenizer.read_bytes() == expected.read_bytes()


def refused_finish(monkeypatch: pytest.MonkeyPatch, out: Path, capfd, words: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        finish(monkeypatch, out)
    lines = capfd.readouterr().err.splitlines()
    assert stopped.value.code == 2 and words in lines[-1], lines


def test_what_cannot_be_a_task_is_refused_in_one_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    out = tmp_path / "tokens"
    for words, message in (
        (["--task", 1], "--tasks"),
        (["--task", 4, "--tasks", 4], "expected 0 .. 3"),
        (["--task", 0, "--tasks", 4, "--tokenizer", "None"], "--tokenizer"),
    ):
        refused(capfd, monkeypatch, tokenize_images, line(folder, out, *words), message)
    refused_finish(monkeypatch, out, capfd, "no task has begun")
    task(folder, out, 0)
    with owned(tmp_path / ".tokens-train-task-0.writer"):  # in forks, which do not hold it

        def again() -> None:
            sys.argv = ["recipe.py", *map(str, line(folder, out, "--task", 0, "--tasks", 4))]
            run_recipe(tokenize_images.main, tokenize_images.PRESETS, "digits")

        for command in (again, partial(finish, monkeypatch, out)):
            log = tmp_path / "log"
            assert in_child(command, log) == 2, log.read_text()
            assert "which writes the same: wait until it ends" in log.read_text().splitlines()[-1]
            log.unlink()


@pytest.fixture
def server() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch, served(patch) as address:
        yield address


def on_machine(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let commands run as on another machine: what they keep is in another folder, which is returned."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / name))
    return root / name / "seitpp/outgoing"


URL, DATA = f"s3://{BUCKET}/sets/tokens", f"s3://{BUCKET}/photos"


def test_tasks_without_a_common_disk_write_the_same_into_a_bucket(
    folder: Path, whole: dict[str, Path], server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    above = Bucket(f"s3://{BUCKET}/sets")
    on_machine("first", tmp_path, monkeypatch)
    words = line(folder, URL, "--task", 2, "--tasks", 4)
    with (tmp_path / "log").open("w") as log:  # no fork, since this process has used a bucket
        program = [sys.executable, "-c", SMALL, str(RECIPES / "tokenize_images.py"), *map(str, words)]
        process = subprocess.Popen(program, stdout=log, stderr=log, env=ON_CPU | dict(os.environ))
    while not any("/shard-" in name for name in above.entries()):
        assert process.poll() is None, (tmp_path / "log").read_text()
    process.kill()
    assert process.wait() == -signal.SIGKILL
    for number in (2, 3, 0):
        kept = on_machine(f"machine-{number}", tmp_path, monkeypatch)
        task(folder, URL, number)
        assert not any(kept.iterdir()), "nothing needs to outlive the machine"
    on_machine("finisher", tmp_path, monkeypatch)
    refused_finish(monkeypatch, URL, capfd, "shards are not finished")
    for number in (1, 1, 2):
        on_machine("other", tmp_path, monkeypatch)
        task(folder, URL, number)
    names = [name.partition(".staging/")[2] for name in above.entries() if "-train.staging" in name]
    assert any(name.startswith("encoded-") for name in names) and any(name.startswith("shard-") for name in names)
    on_machine("finisher", tmp_path, monkeypatch)
    finish(monkeypatch, URL)
    assert "train 114 images, validation 6 images" in capfd.readouterr().out
    assert contents(pull(URL, tmp_path / "pulled")) == contents(whole["all"])
    assert {name.partition("/")[0] for name in above.entries()} == {"tokens"}
    finish(monkeypatch, URL)
    assert "nothing is left to finish" in capfd.readouterr().out


@pytest.mark.parametrize("more", [(), ("--compact",)])
def test_one_command_writes_into_a_bucket_what_it_writes_on_a_disk(
    folder: Path, whole: dict[str, Path], server: str, tmp_path: Path, monkeypatch, more: tuple, capfd
) -> None:
    kept = on_machine("one", tmp_path, monkeypatch)
    upload(folder, DATA)
    name = "compact" if more else "all"
    if more:
        for _ in ("train", "validation"):  # one split, then another one in a store that is there
            for number in range(4):
                task(folder, URL, number, *more)
            finish(monkeypatch, URL)
    else:  # from the bucket, too
        call(tokenize_images, *line(folder, URL, "--data", DATA, "--workers", 2))
        assert f"images in {URL}" in capfd.readouterr().out
    assert not any(kept.iterdir())
    pulled = pull(URL, tmp_path / "pulled")
    assert contents(pulled) == contents(whole[name])
    if more:
        tokenizer = Path(f"{whole[name]}-tokenizer.safetensors")
        assert Bucket(f"s3://{BUCKET}/sets").read("tokens-tokenizer.safetensors") == tokenizer.read_bytes()
