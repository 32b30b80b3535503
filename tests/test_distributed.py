"""Executors of datatrove run the tasks of tokenize_images, skip those that ended, and repeat those that failed."""

import importlib
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import dill
import pytest
import tokenize_images
from datatrove.executor import LocalPipelineExecutor
from datatrove.utils.logging import logger
from support.large_grids import IN_A_SHARD, contents, make_pictures, tokenize_line
from support.paths import RECIPES
from support.running import call

from seitpp.distributed import FinishStore, TaskError, TokenizeImages
from seitpp.errors import UserError
from seitpp.files import owned

RECIPE = RECIPES / "tokenize_images.py"
PICTURES = IN_A_SHARD + 1  # in two staged shards


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures, their tokenizer, and the store that one process writes."""
    root = tmp_path_factory.mktemp("inputs")
    make_pictures(root, PICTURES)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        call(tokenize_images, *tokenize_line(root, root / "whole/tokens"))
    return root


@pytest.fixture(autouse=True)
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0})  # so that the end starts no processes


def executor(step: TokenizeImages, out: Path, **more: object) -> LocalPipelineExecutor:
    """Tasks, and after all of them the end."""
    tasks = LocalPipelineExecutor([step], logging_dir=str(out.parent / "logs"), **more)
    return LocalPipelineExecutor([FinishStore(out)], depends=tasks, logging_dir=str(out.parent / "finished"))


@contextmanager
def begun(step: TokenizeImages, made: Path) -> Iterator[BaseProcess]:
    """A process that runs the step as its only task, as soon as the recipe has made something."""
    task = multiprocessing.get_context("fork").Process(target=step.run, args=(None, 0, 1))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests may run where it is ignored
    task.start()
    signal.signal(signal.SIGINT, before)
    wait_for(made.exists)
    yield task
    task.join(20)
    assert task.exitcode


def wait_for(come: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not come():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_free(path: Path) -> bool:
    try:
        with owned(path):
            return True
    except UserError:
        return False


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_failed_task_is_repeated_and_those_that_ended_are_skipped(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, logs = tmp_path / "tokens", tmp_path / "logs"
    shutil.copytree(inputs / "images", tmp_path / "images")
    broken = tmp_path / f"images/{PICTURES - 1}.png"
    broken.write_bytes(broken.read_bytes()[:60])
    monkeypatch.chdir(tmp_path)
    step = TokenizeImages(tokenize_line(inputs, Path("tokens")), recipe=os.path.relpath(RECIPE))
    monkeypatch.chdir("/")
    with pytest.raises(TaskError, match=rf"task 1 of 3 .*exit status 2: error: .*{broken.name}.*repair or remove"):
        executor(step, out, tasks=3, workers=1).run()
    assert names(logs / "completions") == ["00000"] and not out.exists()
    first, failed = ((logs / f"logs/task_0000{task}.log").read_text() for task in (0, 1))
    assert "1 of this task, 0 of them finished" in first and "task 0 of 3 has ended" in first
    assert broken.name in failed.splitlines()[-1], failed

    shutil.copy(inputs / "images" / broken.name, broken)
    executor(step, out, tasks=3, workers=1).run()
    assert contents(out) == contents(inputs / "whole/tokens")
    assert (logs / "logs/task_00000.log").read_text() == first
    assert "0 of this task" in (logs / "logs/task_00002.log").read_text()  # there are more tasks than shards
    assert executor(step, out, tasks=3, workers=1).run() is None  # there is nothing left to do


def test_a_killed_task_ends_its_recipe_and_workers_write_the_bytes_of_one_process(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tasks go to processes of a pool, which get the step as bytes, as other machines do."""
    out, made = tmp_path / "tokens", tmp_path / ".tokens-train.staging"
    monkeypatch.chdir(inputs)
    step = TokenizeImages(tokenize_line(inputs, out), recipe=RECIPE)
    with begun(step, made) as task:
        os.kill(task.pid, signal.SIGKILL)
    wait_for(lambda: is_free(tmp_path / ".tokens-train-task-0.writer"))
    assert not list(made.glob("encoded-*.json")), "the recipe went on to its end"
    executor(dill.loads(dill.dumps(step)), out, tasks=2, workers=2).run()
    assert contents(out) == contents(inputs / "whole/tokens")


def test_an_interrupted_task_ends_a_command_that_prints_nothing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    imports = "import time\nfrom pathlib import Path\nfrom seitpp.files import owned"
    Path("silent.py").write_text(f"{imports}\nwith owned(Path('made')):\n    time.sleep(600)")
    with begun(TokenizeImages(["--out", "tokens"], recipe="silent.py"), tmp_path / "made") as task:
        os.kill(task.pid, signal.SIGINT)
    wait_for(lambda: is_free(tmp_path / "made"))


def test_the_log_has_every_line_and_few_states_of_a_bar_and_the_error_is_found(tmp_path: Path) -> None:
    bar = "for i in range(9): print(f'\\r{i} of 9', end='', file=sys.stderr)"
    rest = "print('\\nd\u00e9j\u00e0 vu')\nprint('error: no disk', file=sys.stderr)\nprint('left: 1')\nsys.exit(2)"
    (tmp_path / "noisy.py").write_text(f"import sys\n{bar}\n{rest}", encoding="utf-8")
    log: list[str] = []
    sink = logger.add(lambda message: log.append(message.rstrip("\n")), format="{message}")
    with pytest.raises(TaskError, match=r"^task 0 of 1 ended with exit status 2: error: no disk$"):
        TokenizeImages(["--out", "tokens"], recipe=tmp_path / "noisy.py").run()
    logger.remove(sink)
    assert log == ["0 of 9", "8 of 9", "d\u00e9j\u00e0 vu", "error: no disk", "left: 1"]


def test_machines_without_a_common_folder_finish_what_is_copied_together(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(inputs)
    for task in range(2):
        call(tokenize_images, *tokenize_line(inputs, tmp_path / f"{task}/tokens"), "--task", task, "--tasks", 2)
        shutil.copytree(tmp_path / str(task), tmp_path / "all", dirs_exist_ok=True)
    FinishStore(tmp_path / "all/tokens").run()
    assert contents(tmp_path / "all/tokens") == contents(inputs / "whole/tokens")


def test_what_cannot_be_run_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for line, recipe, message in (
        (["--out", "tokens", "--task", "3", "--tasks=4"], RECIPE, "--task and --tasks: got among the words"),
        (["published"], RECIPE, "expected --out among them"),
        (["--out=tokens"], tmp_path / "tokenize_images.py", "no such file, expected recipes/tokenize_images.py"),
    ):
        with pytest.raises(TaskError, match=message) as refusal:
            TokenizeImages(line, recipe=recipe)
        assert "\n" not in str(refusal.value)
    step = TokenizeImages(["--out", "tokens"], recipe=RECIPE)
    step.folder = str(tmp_path / "elsewhere")
    with pytest.raises(TaskError, match="not on the machine of this task"):
        step.run()
    with pytest.raises(TaskError, match="got 2 tasks, expected 1"):
        FinishStore("tokens").run(None, 0, 2)
    with pytest.raises(UserError, match="no store, and no task has begun one"):
        FinishStore("tokens").run()


def test_without_datatrove_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "datatrove"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "seitpp.distributed")
    with pytest.raises(UserError, match=r'pip install "seitpp\[distributed\]"'):
        importlib.import_module("seitpp.distributed")
