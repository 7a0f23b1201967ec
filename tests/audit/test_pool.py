"""The processes of an audit."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from privet.audit.pool import each
from privet.learning import Runtime

SCRIPT = """
import os, sys, time
from pathlib import Path
from privet.audit.pool import each


class Sleeper:
    def __init__(self, folder):
        self.folder = folder

    def __call__(self, cell):
        (Path(self.folder) / str(os.getpid())).touch()
        time.sleep(600)


if __name__ == "__main__":
    list(each([1, 2], Sleeper, (sys.argv[1],), workers=2, threads=1))
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks /proc which processes run")
def test_a_killed_audit_leaves_no_processes(tmp_path: Path) -> None:
    script, folder = tmp_path / "sleepers.py", tmp_path / "started"
    script.write_text(SCRIPT)
    folder.mkdir()
    audit = subprocess.Popen([sys.executable, script, folder])
    try:
        started = within(60, lambda: len(list(folder.iterdir())) == 2)
    finally:
        audit.kill()
        audit.wait()
    assert started
    assert within(10, lambda: not any(runs(path.name) for path in folder.iterdir()))


def within(seconds: float, true: Callable[[], bool]) -> bool:
    """Wait until it is true, or so long."""
    until = time.monotonic() + seconds
    while not true():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def runs(process: str) -> bool:
    """Say whether a process does more than wait for someone to ask how it ended."""
    try:
        return Path("/proc", process, "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class Precision:
    def __call__(self, cell: int) -> bool:
        return bool(torch.backends.cudnn.allow_tf32 or not torch.backends.cudnn.deterministic)


def test_other_processes_compute_as_exactly(runtime: Runtime) -> None:
    assert list(each([1, 2], Precision, (), workers=2, threads=1)) == [False, False]
