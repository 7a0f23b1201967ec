"""The processes of an audit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from privet.audit.pool import each
from privet.errors import UsageError
from privet.learning import Runtime
from privet.progress import Progress

SCRIPT = """
import os, sys, time
from pathlib import Path
from privet.audit.pool import each


class Sleeper:
    def __init__(self, folder):
        self.folder = folder

    def __call__(self, cell, progress):
        (Path(self.folder) / str(os.getpid())).touch()
        time.sleep(600)


if __name__ == "__main__":
    each([1, 2], Sleeper, (sys.argv[1],), keep=print, images=[1, 1], workers=2, threads=1)
"""
# The first cell is done at once, the others never are.
INTERRUPTED = """
import signal, sys, time
from pathlib import Path
from privet.audit.pool import each


class Worker:
    def __init__(self, folder):
        self.folder = Path(folder)

    def __call__(self, cell, progress):
        (self.folder / str(cell)).touch()
        time.sleep(600 if cell else 0)
        return cell


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell takes from what it runs behind
    try:
        each(range(5), Worker, (sys.argv[1],), keep=print, images=[1] * 5, workers=2, threads=1)
    except KeyboardInterrupt:
        print("interrupted")
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks /proc which processes run")
def test_a_killed_audit_leaves_no_processes(tmp_path: Path) -> None:
    script, folder = tmp_path / "sleepers.py", tmp_path / "started"
    script.write_text(SCRIPT)
    folder.mkdir()
    audit = subprocess.Popen([sys.executable, script, folder])
    try:
        started = within(120, lambda: len(list(folder.iterdir())) == 2)
    finally:
        audit.kill()
        audit.wait()
    assert started
    assert within(10, lambda: not any(runs(path.name) for path in folder.iterdir()))


def test_ctrl_c_keeps_what_is_done_and_starts_nothing_more(tmp_path: Path) -> None:
    script, folder = tmp_path / "interrupted.py", tmp_path / "started"
    script.write_text(INTERRUPTED)
    folder.mkdir()
    pool = subprocess.Popen(
        [sys.executable, script, folder],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert within(120, lambda: len(list(folder.iterdir())) == 3)
        os.killpg(pool.pid, signal.SIGINT)  # to every process, as a terminal does
        out, errors = pool.communicate(timeout=120)
    finally:
        pool.kill()
    assert (out, errors) == ("0\ninterrupted\n", "")
    assert sorted(path.name for path in folder.iterdir()) == ["0", "1", "2"]


class Together:
    """Is done with a cell only when both are begun, and says so."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, cell: int, progress: Progress) -> int:
        (self.folder / f"{cell} begun").touch()
        if not within(120, lambda: len(list(self.folder.glob("* begun"))) == 2):
            raise TimeoutError
        (self.folder / f"{cell} done").touch()
        return cell


def test_whoever_ends_it_what_was_done_by_then_is_kept(tmp_path: Path) -> None:
    kept: list[int] = []

    def keep(cell: int) -> None:
        if not kept:
            kept.append(cell)
            within(120, lambda: len(list(tmp_path.glob("* done"))) == 2)
            time.sleep(1)  # for the other one's way here
            raise KeyboardInterrupt
        kept.append(cell)

    with pytest.raises(KeyboardInterrupt):
        each([1, 2], Together, (tmp_path,), keep=keep, images=[1, 1], workers=2, threads=1)
    assert sorted(kept) == [1, 2]


class Deaf:
    def __call__(self, cell: int, progress: Progress) -> bool:
        return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="has no signal masks")
def test_workers_never_hear_ctrl_c_and_who_starts_them_still_does() -> None:
    kept: list[bool] = []
    each([0, 1], Deaf, (), keep=kept.append, images=[1, 1], workers=2, threads=1)
    assert kept == [True, True]
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


class Killed:
    def __call__(self, cell: int, progress: Progress) -> int:
        if cell:
            os.kill(os.getpid(), signal.SIGKILL)
        return cell


def test_a_worker_that_is_killed_is_one_error(tmp_path: Path) -> None:
    kept: list[int] = []
    with pytest.raises(UsageError, match="One of 2 workers was ended from outside"):
        each([0, 1], Killed, (), keep=kept.append, images=[1, 1], workers=2, threads=1)
    assert set(kept) <= {0}


class Half:
    def __call__(self, cell: int, progress: Progress) -> None:
        progress("learning", 1, 2)
        time.sleep(1.5)


@pytest.mark.parametrize("workers", [1, 2])
def test_how_far_learners_are_is_told_as_they_go(workers: int) -> None:
    told: list[tuple[str, int, int]] = []
    each(
        [0, 1],
        Half,
        (),
        keep=lambda result: None,
        images=[20, 50],
        workers=workers,
        threads=1,
        progress=lambda *line: told.append(line),
    )
    assert {(stage, total) for stage, _, total in told} == {("training 2 learners", 70)}
    seen = [done for _, done, _ in told]
    assert seen == sorted(seen)
    assert {10, 25, 35} & set(seen)  # a half of either, or of both
    assert workers > 1 or seen == [10, 45]  # then the first, and a half of the second


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
    def __call__(self, cell: int, progress: Progress) -> bool:
        return bool(torch.backends.cudnn.allow_tf32 or not torch.backends.cudnn.deterministic)


def test_other_processes_compute_as_exactly(runtime: Runtime) -> None:
    found: list[bool] = []
    each([1, 2], Precision, (), keep=found.append, images=[1, 1], workers=2, threads=1)
    assert found == [False, False]
