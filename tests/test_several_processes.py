"""Several processes share one job, as `accelerate launch` starts them on several GPUs."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from privet.images import open_images
from privet.learning import Runtime
from privet.recovery import create_recovery, restore
from tests.conftest import blobs, stop_after
from tests.images.test_write import tree

Make = Callable[..., Path]


def launch(*arguments: str) -> str:
    """Run privet in two processes; what `accelerate launch` does on several GPUs, it does not do without one."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "--module",
    ]
    command += ["privet", *arguments, "--device", "cpu"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_two_processes_learn_one_network(tmp_path: Path, make_folder: Make) -> None:
    train, test = make_folder(blobs(192), "train"), make_folder(blobs(60, seed=1), "test")
    options = ["--architecture", "resnet8-w8", "--epochs", "12", "--batch-size", "32", "--no-flip"]
    out = launch("learn", str(train), "--test", str(test), "--out", str(tmp_path / "out"), *options)
    assert out.count("on clean images after the last epoch") == 1
    run = json.loads((tmp_path / "out/run.json").read_text())
    assert run["facts"]["last"] > 0.8
    assert run["device"].endswith(", 2 processes")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["em", "sem", "rem", "ucl"])
def test_two_processes_protect_one_set(tmp_path: Path, make_folder: Make, method: str) -> None:
    clean = make_folder(blobs(300))
    options = [
        "--set",
        "surrogate=cnn-w4",
        "--set",
        "train_steps=3",
        "--set",
        "noise_steps=2",
        "--set",
        "batch_size=32",
    ]
    options += {
        "em": ["--set", "max_rounds=2"],
        "ucl": ["--set", "class_rounds=1", "--set", "rounds=2"],
    }.get(method, ["--set", "warm_start=yes", "--set", "attack_steps=2"])
    results = []
    for name in ("a", "b"):
        out = tmp_path / name
        launch("protect", str(clean), "--out", str(out), "--method", method, *options)
        assert json.loads((out / "run.json").read_text())["device"].endswith(", 2 processes")
        results.append(tree(out))
    assert results[0] == results[1]
    before, after = open_images(clean), open_images(tmp_path / "a")
    place = {name: index for index, name in enumerate(before.names)}
    order = [place[name] for name in after.names]
    change = (after.pixels.short() - before.pixels[order].short()).abs().amax((1, 2, 3))
    assert len(after) == 300
    assert bool((change > 0).all()) and int(change.max()) <= 8


def _agree(rank: int, folder: Path) -> None:
    where = (folder / "meeting").as_uri()
    torch.distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=2)
    model = torch.nn.BatchNorm2d(3)
    for buffer in model.buffers():
        buffer.fill_(rank + 5)
    Runtime(device=torch.device("cpu"), rank=rank, world=2).agree(model)
    (folder / f"{rank}.json").write_text(json.dumps([buffer.tolist() for buffer in model.buffers()]))
    torch.distributed.destroy_process_group()


def test_processes_agree_on_the_first_ones_means(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_agree, (tmp_path,), nprocs=2)
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [[5.0] * 3, [5.0] * 3, 5]


def _restore(rank: int, folder: Path, reports: int) -> None:
    where = (folder / f"meeting-{reports}").as_uri()
    torch.distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=2)
    recovery = create_recovery("blur-1+jpeg-10")
    shared = Runtime(device=torch.device("cpu"), rank=rank, world=2)
    with contextlib.suppress(KeyboardInterrupt):
        restore(
            blobs(300),
            recovery,
            folder / "parts",
            runtime=shared,
            checkpoint_seconds=0,
            progress=stop_after(reports),
        )
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("reports", [1, 3])
def test_two_processes_go_on_where_they_were_stopped(tmp_path: Path, runtime: Runtime, reports: int) -> None:
    """What one has kept the other gets too: the next part of a chain works on all of it."""
    for calls in (reports, 1000):
        torch.multiprocessing.spawn(_restore, (tmp_path, calls), nprocs=2)
    restore(blobs(300), create_recovery("blur-1+jpeg-10"), tmp_path / "whole", runtime=runtime)
    whole, parts = open_images(tmp_path / "whole"), open_images(tmp_path / "parts")
    assert parts.names == whole.names
    assert torch.equal(parts.pixels, whole.pixels)


@pytest.mark.slow
def test_two_processes_recover_one_set(tmp_path: Path, make_folder: Make) -> None:
    """What one trains the other uses too, batch norm's means included."""
    protected = make_folder(blobs(150))
    results = []
    for name in ("a", "b"):
        out = tmp_path / name
        launch("recover", str(protected), "--out", str(out), "--method", "dvae-4", "--precision", "float32")
        assert json.loads((out / "run.json").read_text())["device"].endswith(", 2 processes")
        results.append(tree(out))
    assert results[0] == results[1]
    before, after = open_images(protected), open_images(tmp_path / "a")
    near = (after.pixels.float() - before.pixels.float()).square().mean((1, 2, 3))
    assert float(near[:128].mean()) == pytest.approx(float(near[128:].mean()), rel=0.25)  # one process's each
