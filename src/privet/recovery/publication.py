"""Recover an image set and write it, as one job that can be killed at any moment."""

from __future__ import annotations

from pathlib import Path

from privet.errors import UsageError
from privet.images.image_set import ImageSet
from privet.learning.job import Job
from privet.learning.publication import Publication, publish_changed
from privet.learning.runtime import Runtime
from privet.progress import Progress, silent
from privet.recovery.base import Recovery


def restore(
    images: ImageSet,
    recovery: Recovery,
    out: Path,
    *,
    runtime: Runtime,
    seed: int = 0,
    format: str = "png",
    metadata: str = "keep",
    gps: bool = False,
    workers: int = 4,
    checkpoint_seconds: float = 20.0,
    progress: Progress = silent,
) -> Publication:
    """Recover protected `images` and write them to `out`.

    As `publish_changed`, which gives the arguments.

    Raises:
        UsageError: the recovery is a way of training, and leaves images as they are.
        PrivetError: as `publish_changed`.
    """
    if recovery.trains:
        raise UsageError(
            f"{recovery.name} is a way of training and leaves images as they are; try it with "
            f"'privet audit --recoveries none,{recovery.name}'."
        )
    job = Job(runtime=runtime, seed=seed, checkpoint_seconds=checkpoint_seconds, progress=progress)
    return publish_changed(
        images,
        lambda: recovery.recover(images, job),
        out,
        job=job,
        record=recovery.record(),
        format=format,
        metadata=metadata,
        gps=gps,
        workers=workers,
    )
