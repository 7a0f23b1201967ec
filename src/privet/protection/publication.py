"""Protect an image set and write it, as one job that can be killed at any moment."""

from __future__ import annotations

from pathlib import Path

from privet.files import sha256
from privet.images.image_set import ImageSet
from privet.learning.job import Job
from privet.learning.publication import Publication, publish_changed
from privet.learning.runtime import Runtime
from privet.progress import Progress, silent
from privet.protection.base import Protection
from privet.protection.surrogate import FILE as SURROGATE


def publish(
    images: ImageSet,
    method: Protection,
    out: Path,
    *,
    runtime: Runtime,
    seed: int = 0,
    surrogate: Path | None = None,
    format: str = "png",
    metadata: str = "keep",
    gps: bool = False,
    workers: int = 4,
    checkpoint_seconds: float = 20.0,
    progress: Progress = silent,
) -> Publication:
    """Protect `images` with `method` and write them to `out`, with the surrogate beside them.

    As `publish_changed`, which gives the arguments.

    Raises:
        PrivetError: as `Protection.protect` and `publish_changed`.
    """
    job = Job(
        runtime=runtime,
        seed=seed,
        surrogate=surrogate,
        checkpoint_seconds=checkpoint_seconds,
        progress=progress,
    )
    record = {
        "method": method.name,
        "settings": method.settings(),
        "budget": method.budget.json(),
        "surrogate": sha256(surrogate.read_bytes()) if surrogate and surrogate.is_file() else None,
    }
    return publish_changed(
        images,
        lambda: method.protect(images, job),
        out,
        job=job,
        record=record,
        budget=method.budget,
        keep=(SURROGATE,),
        format=format,
        metadata=metadata,
        gps=gps,
        workers=workers,
    )
