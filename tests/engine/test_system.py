"""The number of data loading processes follows from the cores that a process may use."""

import math
import os
from pathlib import Path

import pytest

from seitpp.engine import system
from seitpp.engine.system import cores, loader_workers


def limited(root: Path, *lines: str, **limits: str) -> float:
    """The quota of a process in the groups of `lines`, with files of these names and contents."""
    root.mkdir()
    for name, content in limits.items():
        path = root / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (root / "membership").write_text("".join(f"{line}\n" for line in lines))
    return system._quota(root / "membership", root / "groups")


def test_the_quota_is_the_smallest_of_all_groups_above_a_process(tmp_path: Path) -> None:
    inner, outer = "0::/slice/job", {"slice/cpu.max": "300000 100000\n"}
    assert limited(tmp_path / "none", inner) == math.inf == limited(tmp_path / "missing")
    assert limited(tmp_path / "outer", inner, **outer, **{"slice/job/cpu.max": "max 100000\n"}) == 3
    assert limited(tmp_path / "inner", inner, **outer, **{"slice/job/cpu.max": "150000 100000\n"}) == 1.5
    assert limited(tmp_path / "beside", inner, **{"slice/other/cpu.max": "100000 100000\n"}) == math.inf
    # In a container the path of the group may be that of the host.
    assert limited(tmp_path / "inside", "0::/docker/0123", **{"cpu.max": "200000 100000\n"}) == 2
    files = {
        f"cpu,cpuacct/job/cpu.cfs_{name}_us": value for name, value in (("quota", "400000"), ("period", "100000"))
    }
    old = ("5:memory:/job", "4:cpu,cpuacct:/job")
    assert limited(tmp_path / "version-1", *old, **files) == 4
    assert limited(tmp_path / "free", *old, **files | {"cpu,cpuacct/job/cpu.cfs_quota_us": "-1\n"}) == math.inf
    assert limited(tmp_path / "damaged", inner, **{"slice/cpu.max": "?"}) == math.inf


def test_workers_share_the_cores_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (loader_workers(0), loader_workers(40)) == (0, 40)
    assert 1 <= cores() <= os.cpu_count() and loader_workers(None) == min(16, cores())
    monkeypatch.setattr(os, "cpu_count", lambda: 48)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(48), raising=False)
    monkeypatch.setattr(system, "_quota", lambda *_: 40.5)
    for processes, workers in ((1, 16), (8, 5), (48, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert loader_workers(None) == workers
    monkeypatch.delattr(os, "sched_getaffinity")  # as on a Mac and Windows
    assert cores() == 40
