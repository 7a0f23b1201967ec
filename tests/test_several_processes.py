"""Several processes share one job, as `accelerate launch` starts them on several GPUs."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from privet.images import open_images
from privet.learning import Job, Learner, Runtime, learn, study
from privet.learning.checkpoint import save_state
from privet.protection import SEM, UCL, Protection
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


@contextlib.contextmanager
def joined(rank: int, folder: Path) -> Iterator[Runtime]:
    """Make this process one of two for the block."""
    torch.set_num_threads(1)
    where = (folder / "meeting").as_uri()
    torch.distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=2)
    try:
        yield Runtime(device=torch.device("cpu"), rank=rank, world=2)
    finally:
        torch.distributed.destroy_process_group()


def _agree(rank: int, folder: Path) -> None:
    with joined(rank, folder) as shared:
        model = torch.nn.BatchNorm2d(3)
        for buffer in model.buffers():
            buffer.fill_(rank + 5)
        shared.agree(model)
    (folder / f"{rank}.json").write_text(json.dumps([buffer.tolist() for buffer in model.buffers()]))


def test_processes_agree_on_the_first_ones_means(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_agree, (tmp_path,), nprocs=2)
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [[5.0] * 3, [5.0] * 3, 5]


def _learn(rank: int, folder: Path) -> None:
    with joined(rank, folder) as shared:
        for name in ("resnet8-w4", "simclr:resnet8-w4"):
            learner = Learner(architecture=name, epochs=3, batch_size=8, radius=8, attack_steps=2)
            given: dict[str, Any] = {"train": blobs(24), "test": blobs(9), "learner": learner}
            whole, parts = (folder / f"{name}-{state}" for state in ("whole", "parts"))
            learn(**given, runtime=shared, checkpoint=whole)
            with contextlib.suppress(KeyboardInterrupt):
                learn(**given, runtime=shared, checkpoint=parts, progress=stop_after(5))
            model = learn(**given, runtime=shared, checkpoint=parts).model
            save_state(folder / f"{name}-{rank}", model.state_dict(), {})


def test_two_processes_that_were_stopped_learn_the_same_network(tmp_path: Path) -> None:
    """Batch norm's means included, of which each process has its own share's."""
    torch.multiprocessing.spawn(_learn, (tmp_path,), nprocs=2)
    for name in ("resnet8-w4", "simclr:resnet8-w4"):
        for one, other in (("whole", "parts"), ("0", "1")):
            assert (tmp_path / f"{name}-{one}").read_bytes() == (tmp_path / f"{name}-{other}").read_bytes()


def _protect(rank: int, folder: Path, method: Protection) -> None:
    with joined(rank, folder) as shared:
        whole = method.protect(blobs(24), Job(runtime=shared))
        job = Job(runtime=shared, workspace=folder, checkpoint_seconds=0)
        with contextlib.suppress(KeyboardInterrupt):
            method.protect(blobs(24), replace(job, progress=stop_after(4)))
        assert method.protect(blobs(24), job).digest == whole.digest


@pytest.mark.parametrize(
    "method",
    [
        SEM(surrogate="resnet8-w4", train_steps=6, batch_size=8, noise_steps=2, views=1, attack_steps=1),
        # As many batches of noise for either process, so that both stop at the same place.
        UCL(surrogate="resnet8-w4", class_rounds=0, rounds=3, train_steps=2, batch_size=12, noise_steps=1),
    ],
    ids=["sem", "ucl"],
)
def test_two_processes_that_were_stopped_find_the_same_noise(tmp_path: Path, method: Protection) -> None:
    torch.multiprocessing.spawn(_protect, (tmp_path, method), nprocs=2)


@dataclass(frozen=True, kw_only=True)
class Watched(UCL):
    """Keeps what each process finds noise for."""

    folder: str = ""

    def _improve(self, model: torch.nn.Module, *rest: Any) -> None:
        save_state(Path(self.folder, str(rest[-1].runtime.rank)), model.state_dict(), {})
        super()._improve(model, *rest)


def _find(rank: int, folder: Path) -> None:
    method = Watched(
        surrogate="resnet8-w4", class_rounds=0, rounds=1, train_steps=2, batch_size=12, folder=str(folder)
    )
    with joined(rank, folder) as shared:
        method.protect(blobs(24), Job(runtime=shared))


def test_two_processes_find_noise_for_one_encoder(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_find, (tmp_path,), nprocs=2)
    assert (tmp_path / "0").read_bytes() == (tmp_path / "1").read_bytes()


def _repeat(rank: int, folder: Path) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        assert stage not in ("learning", "recovering", "writing")

    learner, images = Learner(architecture="cnn-w4", epochs=1, batch_size=8), folder / "images"
    recovery = create_recovery("jpeg-10")
    with joined(rank, folder) as shared:
        first = study(images, images, learner, folder / "learner", runtime=shared)
        again = study(images, images, learner, folder / "learner", runtime=shared, progress=stop)
        assert again.history == first.history
        restored = restore(blobs(24), recovery, folder / "restored", runtime=shared)
        once_more = restore(blobs(24), recovery, folder / "restored", runtime=shared, progress=stop)
        assert len(once_more.written.records) == len(restored.written.records)


def test_two_processes_do_nothing_again_that_is_finished(tmp_path: Path, make_folder: Make) -> None:
    make_folder(blobs(24), "images")
    torch.multiprocessing.spawn(_repeat, (tmp_path,), nprocs=2)


def _restore(rank: int, folder: Path, reports: int) -> None:
    recovery = create_recovery("blur-1+jpeg-10")
    with joined(rank, folder) as shared, contextlib.suppress(KeyboardInterrupt):
        restore(
            blobs(300),
            recovery,
            folder / "parts",
            runtime=shared,
            checkpoint_seconds=0,
            progress=stop_after(reports),
        )


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
