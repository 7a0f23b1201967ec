"""One learner as a job of its own: image sets in, weights and a record out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from privet.errors import InputError
from privet.files import RUN, WORKSPACE, claim, finish, read_json, released
from privet.images import ImageSet, align, open_images
from privet.learning.runtime import Runtime, describe_device
from privet.learning.train import Epoch, Learned, Learner, learn
from privet.models import SavedModel, load_model, save_model
from privet.models.projection import PREFIX
from privet.progress import Progress, silent
from privet.version import VERSION

WEIGHTS = "learner.safetensors"


def study(
    train: str | Path,
    test: str | Path,
    learner: Learner,
    out: Path,
    *,
    runtime: Runtime,
    seed: int = 0,
    size: int | None = None,
    split: str | None = None,
    test_split: str | None = None,
    limit: int | None = None,
    transform: Callable[[ImageSet], ImageSet] | None = None,
    present: Callable[[ImageSet], ImageSet] | None = None,
    progress: Progress = silent,
) -> Learned:
    """Train a learner on files and write learner.safetensors and run.json into `out`.

    Args:
        train: anything `open_images` takes.
        test: likewise; clean images of the same classes.
        learner: the network and how it is trained.
        out: a new folder; a killed study goes on there.
        runtime: where.
        seed: the same seed gives the same learner.
        size: as for `open_images`.
        split: of the training images.
        test_split: of the test images.
        limit: use only so many training images.
        transform: done to the stored training images before all else, or None.
        present: done to the stored test images, or None.
        progress: told about images.

    Raises:
        PrivetError: as `open_images`, `learn` and `claim`.
    """
    images = open_images(train, size=size, split=split, limit=limit, progress=progress)
    clean = align(
        open_images(test, size=images.size, split=test_split, progress=progress), images.class_names
    )
    if transform is not None:
        images = transform(images)
    if present is not None:
        clean = present(clean)
    weights = learner.weights
    if weights is not None and not weights.is_file():
        raise InputError(f"There is no weights file {weights}.")
    run: dict[str, Any] = {
        "privet": VERSION,
        "learner": learner.record(),
        "seed": seed,
        "train": images.digest,
        "test": clean.digest,
        "precision": runtime.precision,
        "compile": runtime.compile,
        "device": describe_device(runtime.device, torch.get_num_threads(), runtime.world),
        "torch": torch.__version__,
    }
    finished = runtime.rank == 0 and claim(out, run)
    runtime.wait()
    if finished and (out / WEIGHTS).exists() and runtime.world == 1:
        model, _ = load_model(out / WEIGHTS)
        history = read_json(out / RUN)["facts"]["history"]
        return Learned(model=model, history=tuple(Epoch(**epoch) for epoch in history))
    with released(out):
        learned = learn(
            images,
            clean,
            learner,
            runtime=runtime,
            seed=seed,
            checkpoint=out / WORKSPACE / "checkpoint.safetensors",
            progress=progress,
        )
    if runtime.rank == 0:
        about = SavedModel(
            architecture=learner.architecture.removeprefix(PREFIX),  # the probe is its last layer
            class_names=images.class_names,
            size=images.size,
            notes={"learner": run["learner"], "seed": seed},
        )
        save_model(out / WEIGHTS, learned.model, about)
        facts = {
            **learned.record(),
            "skipped": len(images.skipped) + len(clean.skipped),
        }
        finish(out, run, facts)
    return learned
