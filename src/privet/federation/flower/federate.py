"""A whole federation in this process: clients with parts of one image set, round after round."""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid

from privet.errors import InputError, UsageError
from privet.federation.flower.checkpoint import load, save
from privet.federation.flower.client import client_app, first_model, first_network, steps_of
from privet.federation.flower.grids import LocalGrid
from privet.federation.flower.link import Arrays, moved
from privet.federation.flower.plan import Plan, create_codec
from privet.federation.flower.strategy import CodecStrategy, Round
from privet.federation.schema import STATISTICS, Update
from privet.files import WORKSPACE, claim, finish, read_json, write_json
from privet.images import ImageSet
from privet.learning.runtime import Runtime, describe_device
from privet.learning.train import accuracy
from privet.learning.update import Treatment, short
from privet.learning.update import Update as Record
from privet.learning.update_files import save_update
from privet.models import SavedModel, create_model, save_model
from privet.progress import Progress, silent
from privet.version import VERSION

REPORT, MODEL, RECORDS = "federation.json", "model.safetensors", "updates"


def federate(
    train: ImageSet,
    test: ImageSet,
    plan: Plan,
    out: Path,
    *,
    runtime: Runtime,
    source: dict[str, Any],
    record: int = 0,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Play a federation, and write federation.json and model.safetensors into `out`; return the former.

    It can be killed at any time, and goes on with the round that was not finished.

    Args:
        train: the clients' images, which are split among them.
        test: images that the model is measured on after each round.
        plan: of the federation.
        out: a new folder, or that of the same federation.
        runtime: where the clients train.
        source: where the images come from, for the report.
        record: number of the last round's updates that are written to `out`/updates as records that the
            leakage room can attack.
        progress: told about rounds.

    Raises:
        InputError: the sets do not fit each other, or not one update could be used.
        OutputError: the folder holds something else, or cannot be written.
        UsageError: there are too few images for so many clients, or a budget is too small for the model.
    """
    if record < 0:
        raise UsageError(f"Expected 0 or more updates to keep as records, got {record}.")
    if train.class_names != test.class_names or train.size != test.size:
        raise InputError("Training and test images must have the same classes and one size.")
    parts = plan.split(train.labels.numpy())
    plan.check(first_model(plan, test))
    run = run_of(plan, test, source=source, runtime=runtime) | {"record": record, "train": train.digest}
    if not claim(out, run):
        images = [train.subset(torch.from_numpy(part)) for part in parts]
        clients: list[dict[str, Any]] = [
            {
                "name": str(number),
                "images": len(part),
                "classes": part.labels.bincount(minlength=part.classes).tolist(),
            }
            for number, part in enumerate(images)
        ]

        def images_of(context: Context) -> ImageSet:
            return images[int(str(context.node_config["partition-id"]))]

        def watch(number: int, name: str, model: Arrays, update: Update) -> None:
            if number == plan.rounds and len(strategy.rounds[-1].accepted) <= record:
                _record(out / RECORDS / name, plan, images[int(name)], model, update, number)

        app = client_app(plan, images_of, runtime=runtime)
        grid = LocalGrid(app, [{"partition-id": number} for number in range(plan.clients)])
        with _quiet():
            strategy = plan.wrapper({client["name"]: client["images"] for client in clients}, watch=watch)
            report = play(plan, test, out, strategy, grid, runtime=runtime, progress=progress)
        write_json(out / REPORT, {**run, **report, "clients": clients})
        finish(out, run, {})
    return read_json(out / REPORT)


def run_of(plan: Plan, test: ImageSet, *, source: dict[str, Any], runtime: Runtime) -> dict[str, Any]:
    """Return what a federation's bytes depend on, beside its clients' images."""
    return {
        "privet": VERSION,
        "plan": plan.json(),
        "source": source,
        "test": test.digest,
        "device": describe_device(runtime.device, torch.get_num_threads()),
        "precision": runtime.precision,
        "torch": torch.__version__,
    }


def play(
    plan: Plan,
    test: ImageSet,
    out: Path,
    strategy: CodecStrategy,
    grid: Grid,
    *,
    runtime: Runtime,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Play all rounds, or those that are left, and write the model; return what happened, as JSON values.

    Args:
        plan: of the federation.
        test: images that the model is measured on after each round.
        out: the federation's folder, which the run has claimed.
        strategy: the server's.
        grid: of the nodes. Their state is kept in files if they live in this process; else they get
            the whole model after a restart.
        runtime: where the model is measured.
        progress: told about rounds.

    Raises:
        InputError: not one update could be used, so that there is no model to write.
    """
    network = first_network(plan, test)
    arrays = ArrayRecord(network.state_dict())
    network = runtime.place(network)
    workspace = out / WORKSPACE
    history: list[float] = []
    local = grid if isinstance(grid, LocalGrid) else None
    if (state := load(workspace, strategy, local)) is not None:
        arrays, history = state

    def after(_: int, arrays: ArrayRecord) -> MetricRecord | None:
        if not strategy.rounds or len(history) == strategy.rounds[-1].round:
            return None  # before the first round
        network.load_state_dict(arrays.to_torch_state_dict())
        network.eval()
        history.append(accuracy(network, test, runtime=runtime))
        save(workspace, strategy, local, arrays, history)
        down, up = (sum(getattr(one, way) for one in strategy.rounds) / 1e6 for way in ("down", "up"))
        news = f"accuracy {history[-1]:.1%}, {down:.1f} MB down, {up:.1f} MB up"
        progress(f"rounds; {news}", len(history), plan.rounds)
        return MetricRecord({"accuracy": history[-1]})

    if len(history) < plan.rounds:
        result = strategy.start(
            grid=grid, initial_arrays=arrays, num_rounds=plan.rounds - len(history), evaluate_fn=after
        )
        arrays = result.arrays or arrays
    if not any(one.accepted for one in strategy.rounds):
        shutil.rmtree(workspace, ignore_errors=True)  # of no worth, and in the way of another attempt
        raise InputError(_nothing(strategy.rounds))
    network.load_state_dict(arrays.to_torch_state_dict())
    saved = SavedModel(architecture=plan.architecture, class_names=test.class_names, size=test.size)
    save_model(out / MODEL, network, saved)
    return _summary(test, history, strategy.rounds, arrays)


def _summary(
    test: ImageSet, history: list[float], rounds: list[Round], arrays: ArrayRecord
) -> dict[str, Any]:
    model = sum(array.numpy().nbytes for array in arrays.values())
    asked = sum(len(one.chosen) for one in rounds)
    return {
        "accuracy": {"last": history[-1], "best": max(history), "last_10_mean": fmean(history[-10:])},
        "tested": len(test),
        "chance": int(test.labels.bincount().max()) / len(test),
        "bytes": {
            "down": sum(one.down for one in rounds),
            "up": sum(one.up for one in rounds),
            "updates": sum(sum(one.accepted.values()) for one in rounds),
            "model": model,
            "whole_models": 2 * model * asked,
        },
        "participations": asked,
        "left_out": sum(len(one.refused) for one in rounds),
        "class_names": list(test.class_names),
        "rounds": [
            {**asdict(one), "accuracy": reached} for one, reached in zip(rounds, history, strict=True)
        ],
    }


def _nothing(rounds: list[Round]) -> str:
    """Say why a federation in which no update was accepted learned nothing."""
    reasons = Counter(reason for one in rounds for reason in one.refused.values())
    reason, count = reasons.most_common(1)[0]
    return (
        f"Not one of {reasons.total()} updates could be used, so nothing was learned or written. Of {count} this is "
        f"the reason: {reason}"
    )


def _record(folder: Path, plan: Plan, images: ImageSet, model: Arrays, update: Update, number: int) -> None:
    """Write what a server knows of a client's update, for an attack on it."""
    network = create_model(plan.architecture, classes=images.classes, size=images.size)
    network.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in model.items()})
    sent = {short(name): torch.from_numpy(np.array(update[name])) for name, _ in network.named_parameters()}
    after = {name: array for name, array in moved(model, update).items() if name.endswith(STATISTICS)}
    batch, steps = steps_of(plan, len(images))
    codec = create_codec(plan.codec)
    save_update(
        folder,
        Record.of(
            network,
            sent,
            architecture=plan.architecture,
            classes=images.classes,
            size=images.size,
            batch_size=batch,
            images=len(images),
            local_steps=steps,
            learning_rate=plan.learning_rate,
            kind="delta",
            statistics={short(name): torch.from_numpy(np.array(array)) for name, array in after.items()},
            treatment=Treatment(sparse=codec is not None and codec.chooses),
            notes={"round": number, "codec": plan.codec, "budget": plan.budget},
        ),
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Flower's log: what it says of rounds and refusals is in the report."""
    log = logging.getLogger("flwr")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
