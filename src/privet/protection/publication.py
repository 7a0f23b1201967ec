"""Protect an image set and write it, as one job that can be killed at any moment."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import PIL
import torch

import privet
from privet.files import WORKSPACE, claim, finish, read_lines, sha256, write_bytes
from privet.images.image_set import ImageSet
from privet.images.source import MANIFEST
from privet.images.write import Written, still_there, write_images
from privet.learning.runtime import Runtime, describe_device
from privet.progress import Progress, silent
from privet.protection.base import Job, Protection
from privet.protection.surrogate import FILE as SURROGATE


@dataclass(frozen=True, kw_only=True)
class Publication:
    """A protected image set on disk.

    Attributes:
        out: its folder.
        written: what was written and what was skipped.
        run: the contents of run.json.
    """

    out: Path
    written: Written
    run: dict[str, Any]


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
    """Protect `images` with `method` and write them to `out`.

    The folder gets the images under their old names, manifest.jsonl (what happened to each),
    run.json (every setting, so that the run can be repeated) and the surrogate. Called again after
    a kill, with the same arguments, it goes on and ends with the same bytes.

    Raises:
        OutputError: the folder holds something else, or cannot be written.
        PrivetError: as `Protection.protect` and `write_images`.
    """
    run = {
        "privet": privet.__version__,
        "method": method.name,
        "settings": method.settings(),
        "budget": method.budget.json(),
        "seed": seed,
        "surrogate": sha256(surrogate.read_bytes()) if surrogate and surrogate.is_file() else None,
        "data": images.digest,
        "images": len(images),
        "size": list(images.size),
        "class_names": list(images.class_names),
        "format": format,
        "metadata": metadata,
        "gps": gps,
        "precision": runtime.precision,
        "compile": runtime.compile,
        "device": describe_device(runtime.device, torch.get_num_threads()),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "pillow": PIL.__version__,
        },
    }
    if runtime.rank == 0 and claim(out, run) and (written := _intact(out)) and runtime.world == 1:
        return Publication(out=out, written=written, run=run)
    runtime.wait()
    workspace = out / WORKSPACE
    job = Job(
        runtime=runtime,
        seed=seed,
        workspace=workspace,
        surrogate=surrogate,
        checkpoint_seconds=checkpoint_seconds,
        progress=progress,
    )
    changed = method.protect(images, job)
    if runtime.rank > 0:
        return Publication(out=out, written=Written(records=()), run=run)
    written = write_images(
        images,
        changed,
        out,
        budget=method.budget,
        format=format,
        metadata=metadata,
        gps=gps,
        workers=workers,
        progress=progress,
    )
    if (workspace / SURROGATE).exists():
        write_bytes(out / SURROGATE, (workspace / SURROGATE).read_bytes())
    finish(out, run, job.facts)
    return Publication(out=out, written=written, run={**run, "facts": job.facts})


def _intact(out: Path) -> Written | None:
    """Return what a finished run wrote, if all of it is still there unchanged."""
    records = tuple(read_lines(out / MANIFEST))
    return Written(records=records) if records and all(still_there(out, one) for one in records) else None
