"""SIGKILL at several points: the same command goes on, and ends with the bytes of an undisturbed run."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.audit.test_run import untimed
from tests.conftest import blobs
from tests.images.test_write import tree

Make = Callable[..., Path]

PROTECT = """
import sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from privet.images import open_images
from privet.learning import Runtime
from privet.protection import METHODS, publish
from privet.protection import base
base.CHUNK = 8
method = METHODS[sys.argv[3]]
settings = dict(surrogate="cnn-w4", train_steps=6, batch_size=16, noise_steps=2)
settings.update(dict(max_rounds=4) if method.name == "em" else dict(views=2, attack_steps=2, warm_start=True))
runtime = Runtime(device=torch.device("cpu"), precision="float32")
images = open_images(sys.argv[1])
print("ready", flush=True)
slow = lambda stage, done, total: time.sleep(0.01)
publish(images, method(**settings), Path(sys.argv[2]), runtime=runtime, checkpoint_seconds=0, progress=slow)
print("done", flush=True)
"""

AUDIT = """
import sys
from privet.cli import main
if __name__ == "__main__":
    print("ready", flush=True)
    code = main([
        "audit", sys.argv[1], sys.argv[2], "--test", sys.argv[1], "--out", sys.argv[3], "--device", "cpu",
        "--epochs", "2", "--architectures", "cnn-w4,resnet8-w4", "--seeds", "1", "--recoveries", "none,jpeg-50",
        "--workers", "1", "--no-flip",
    ])
    assert code == 0, code
    print("done", flush=True)
"""


def run(script: Path, *arguments: str, kill_after: float | None = None) -> float | None:
    """Run a script; kill it so many seconds after it is ready. Return the seconds it then took if it finished."""
    process = subprocess.Popen(
        [sys.executable, str(script), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    with process.stdout, process.stderr:
        for line in process.stdout:
            if line == "ready\n":
                break
        started = time.monotonic()
        if kill_after is not None:
            time.sleep(kill_after)
            process.send_signal(signal.SIGKILL)
        out, errors = process.stdout.read(), process.stderr.read()
        process.wait()
    if kill_after is None:
        assert process.returncode == 0, errors
    return time.monotonic() - started if "done\n" in out else None


def whole_and_killed(script: Path, make: Callable[[Path], tuple[str, ...]], folder: Path, kills: int) -> None:
    """Run a script in folder / "whole", and in folder / "killed" as often as it takes, killed in between."""
    length = run(script, *make(folder / "whole"))
    assert length is not None
    moments, killed = random.Random(0), 0
    for _ in range(6):  # a machine that was busy before, and no longer is, may finish too soon
        while killed < kills and not run(
            script, *make(folder / "killed"), kill_after=moments.uniform(0, 0.4 * length)
        ):
            killed += 1
        if killed >= 2:
            break
        shutil.rmtree(folder / "killed")
        length, killed = length / 2, 0
    assert killed >= 2, "the run was over before it could be killed"
    assert run(script, *make(folder / "killed")) is not None


@pytest.mark.parametrize("method", ["em", "sem"])
def test_protect(tmp_path: Path, make_folder: Make, method: str) -> None:
    clean = make_folder(blobs(60, size=(12, 12)))
    script = tmp_path / "protect.py"
    script.write_text(PROTECT)
    whole_and_killed(script, lambda out: (str(clean), str(out), method), tmp_path, kills=5)
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")


def test_audit(tmp_path: Path, make_folder: Make) -> None:
    clean = make_folder(blobs(60, size=(12, 12)), "clean")
    protect = tmp_path / "protect.py"
    protect.write_text(PROTECT)
    run(protect, str(clean), str(tmp_path / "protected"), "em")
    script = tmp_path / "audit.py"
    script.write_text(AUDIT)
    protected = str(tmp_path / "protected")
    whole_and_killed(script, lambda out: (str(clean), protected, str(out)), tmp_path, kills=4)
    assert untimed(tmp_path / "killed") == untimed(tmp_path / "whole")
    lines = (tmp_path / "killed/cells.jsonl").read_bytes().splitlines()
    assert len(lines) == 2 * 3 * 2  # no cell was trained twice
