"""Change an image set and write it, as one job that can be killed at any moment."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import PIL
import torch

from privet.errors import InputError
from privet.files import RUN, WORKSPACE, claim, finish, read_json, read_lines, released, sha256, write_bytes
from privet.images.budget import UNBOUNDED, Budget
from privet.images.image_set import ImageSet
from privet.images.source import MANIFEST
from privet.images.write import Written, check_writing, still_there, write_images
from privet.learning.job import Job
from privet.learning.runtime import describe_device
from privet.version import VERSION


@dataclass(frozen=True, kw_only=True)
class Publication:
    """A changed image set on disk.

    Attributes:
        out: its folder.
        written: what was written and what was skipped.
        run: the contents of run.json.
    """

    out: Path
    written: Written
    run: dict[str, Any]


def publish_changed(
    images: ImageSet,
    change: Callable[[], ImageSet],
    out: Path,
    *,
    job: Job,
    record: Mapping[str, Any],
    budget: Budget = UNBOUNDED,
    keep: Sequence[str] = (),
    format: str = "png",
    metadata: str = "keep",
    gps: bool = False,
    workers: int = 4,
) -> Publication:
    """Write what `change` makes of `images` to `out`.

    The folder gets the images under their old names, manifest.jsonl (what happened to each) and
    run.json (every setting, so that the run can be repeated). Called again after a kill, with the
    same arguments, it goes on and ends with the same bytes.

    Args:
        images: the images as opened.
        change: returns them with other pixels, in their order, or several versions of them, one version after the
            other, under names of their own; called only if something is left to do.
        out: a folder that is new, or this run's own.
        job: what `change` works in; gets its workspace here.
        record: what the bytes depend on beside the job and the images; goes into run.json.
        budget: what the written bytes must keep.
        keep: private files of the workspace that the folder gets too, if they are there.
        format: as for `write_images`.
        metadata: likewise.
        gps: likewise.
        workers: likewise.

    Raises:
        OutputError: the folder holds something else, or cannot be written.
        PrivetError: as `change` and `write_images`.
    """
    check_writing(format=format, metadata=metadata, gps=gps)
    runtime = job.runtime
    run = {
        "privet": VERSION,
        **record,
        "seed": job.seed,
        "data": images.digest,
        # Metadata, too, are carried over.
        "files": sha256("".join(file.sha256 for file in images.files).encode()),
        "images": len(images),
        "size": list(images.size),
        "class_names": list(images.class_names),
        "format": format,
        "metadata": metadata,
        "gps": gps,
        "precision": runtime.precision,
        "compile": runtime.compile,
        "device": describe_device(runtime.device, torch.get_num_threads(), runtime.world),
        "versions": versions(),
    }
    written = _intact(out) if runtime.rank == 0 and claim(out, run) else None
    if runtime.told(written is not None):
        return Publication(out=out, written=written or Written(records=()), run=read_json(out / RUN))
    job.workspace = out / WORKSPACE
    with released(out):
        changed = change()
    if runtime.rank > 0:
        return Publication(out=out, written=Written(records=()), run={**run, "facts": job.facts})
    if len(changed) > len(images):
        index = torch.arange(len(changed)) % len(images)
        images = replace(images.subset(index), names=changed.names)
    written = write_images(
        images,
        changed,
        out,
        budget=budget,
        format=format,
        metadata=metadata,
        gps=gps,
        workers=workers,
        progress=job.progress,
    )
    for name in keep:
        if (job.workspace / name).exists():
            write_bytes(out / name, (job.workspace / name).read_bytes(), private=True)
    finish(out, run, job.facts)
    return Publication(out=out, written=written, run={**run, "facts": job.facts})


def protection_record(source: str | Path) -> dict[str, Any] | None:
    """Return the run.json of a protected folder, if privet wrote it."""
    path = Path(source) / RUN
    try:
        found = read_json(path) if path.is_file() else {}
    except InputError:  # other programs have files of this name, too
        return None
    return found if isinstance(found.get("method"), str) and isinstance(found.get("settings"), dict) else None


def versions() -> dict[str, str]:
    """Return the versions of the software on which a result's exact bytes depend."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "pillow": PIL.__version__,
    }


def _intact(out: Path) -> Written | None:
    """Return what a finished run wrote, if all of it is still there unchanged."""
    try:
        records = tuple(read_lines(out / MANIFEST))
    except ValueError:
        return None
    return Written(records=records) if records and still_there(out, records) else None
