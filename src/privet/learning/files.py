"""One learner as a job of its own: image sets in, weights and a record out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from privet.errors import UsageError
from privet.files import RUN, WORKSPACE, claim, finish, read_json, refuse_other_files, released
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

    A pretrained network (`transformers:FOLDER`) is recorded in run.json by its hash. learner.safetensors names its
    folder as it was given: it can only be loaded where that folder lies.

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
        UsageError: the training has diverged.
        PrivetError: as `open_images`, `learn` and `claim`.
    """
    refuse_other_files(out)
    images = open_images(train, size=size, split=split, limit=limit, progress=progress)
    clean = align(
        open_images(test, size=images.size, split=test_split, progress=progress), images.class_names
    )
    if transform is not None:
        images = transform(images)
    if present is not None:
        clean = present(clean)
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
    finished = runtime.rank == 0 and claim(out, run) and (out / WEIGHTS).exists()
    if runtime.told(finished):
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
    if (name := _not_finite(learned.model)) is not None:
        rate = "the usual one" if learner.learning_rate is None else f"{learner.learning_rate:g}"
        raise UsageError(
            f"{learner.architecture} has diverged: {name} holds NaN or infinity, so that nothing was written. Delete "
            f"{out}, and repeat this with a learning rate below {rate}."
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


def _not_finite(model: nn.Module) -> str | None:
    """Return the name of a tensor of a network that cannot be used, if there is one."""
    tensors = model.state_dict().items()
    return next((name for name, value in tensors if not bool(torch.isfinite(value).all())), None)
