"""Changing an image set chunk by chunk: resumable, and the same bytes however the work is split."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from privet.files import reserve, write_json
from privet.images.image_set import ImageSet
from privet.learning.checkpoint import damaged
from privet.learning.job import Job

# Images that are changed together, unless that would take minutes. Fixed, so that results never depend on how work is
# split.
CHUNK = 128
RECORD, PIXELS = "changed.json", "changed.npy"

Change = Callable[[Tensor, torch.Generator], Tensor]
"""Maps positions in the image set, (batch,), to pixels, uint8, (batch, 3, height, width)."""


def change_in_chunks(
    images: ImageSet,
    job: Job,
    prepare: Callable[[], Change],
    *,
    purpose: str,
    together: Callable[[], int | None] = lambda: None,
) -> Tensor:
    """Return new pixels for an image set, (images, 3, height, width).

    With a workspace, a killed run goes on where it stopped. Several processes share the chunks, and each
    gets the result.

    Args:
        images: the image set.
        job: where and how.
        prepare: does what has to be done once, if anything is left to do, and returns the change.
        purpose: names the random numbers and the stage, as in "perturb" and "perturbing".
        together: asked after `prepare`, returns how many images are changed together, or None for `CHUNK`; a kill loses
            the work on so many. A change that draws random numbers needs the same number every time.

    Raises:
        OutputError: what an earlier call kept in the workspace is damaged, or the workspace has no room.
    """
    runtime = job.runtime
    done = runtime.told(_done(images, job) if runtime.rank == 0 else 0)
    change = prepare() if done < len(images) else None
    pixels = _output(images, job, done) if runtime.rank == 0 else torch.empty_like(images.pixels)
    if runtime.world > 1:  # only the first process has the workspace
        for start in range(0, done, CHUNK):
            part = slice(start, min(start + CHUNK, done))
            if runtime.rank > 0:
                pixels[part] = 0
            pixels[part] = runtime.sum(pixels[part].to(runtime.device)).cpu()
    if change is not None:
        world, rank, size = runtime.world, runtime.rank, runtime.told(together() or CHUNK)
        starts = range(0, len(images), size)
        for first in range(done // size, len(starts), world):
            chunks = range(first, min(first + world, len(starts)))
            for chunk in chunks:
                index = torch.arange(starts[chunk], min(starts[chunk] + size, len(images)))
                if chunk % world == rank:
                    pixels[index] = change(index, job.random(purpose, chunk)).cpu()
                else:
                    pixels[index] = 0
            end = min(starts[chunks[-1]] + size, len(images))
            if world > 1:
                part = slice(starts[first], end)
                pixels[part] = runtime.sum(pixels[part].to(runtime.device)).cpu()
            job.progress(f"{purpose}ing", end, len(images))
            if job.checkpoint_due():
                _record(job, end)
    if runtime.rank == 0:
        _record(job, len(images))
    return pixels


def _done(images: ImageSet, job: Job) -> int:
    """Return how many images an earlier call has done, and take over what it found out."""
    record, path = job.file(RECORD), job.file(PIXELS)
    if record is None or path is None or not (record.exists() and path.exists()):
        return 0
    try:
        earlier = json.loads(record.read_bytes())
        done, facts = earlier["images"], earlier["facts"]
        if type(done) is not int or not 0 <= done <= len(images) or not isinstance(facts, dict):
            raise ValueError(f"expected up to {len(images)} images, and facts, got {done!r} and {facts!r}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise damaged(record, error) from error
    if not _whole(path, _shape(images)):
        raise damaged(path, f"expected an array of bytes {_shape(images)}")
    job.facts.update(facts)
    return done


def _shape(images: ImageSet) -> tuple[int, ...]:
    count, channels, height, width = images.pixels.shape
    return count, height, width, channels


def _whole(path: Path, shape: tuple[int, ...]) -> bool:
    """Say whether a file has the first bytes and the length that `_output` gave it."""
    head = _head(shape)  # compared, as numpy reads damaged ones with errors of many kinds
    with path.open("rb") as file:
        begins = file.read(len(head)) == head
    return begins and path.stat().st_size == len(head) + math.prod(shape)


def _head(shape: tuple[int, ...]) -> bytes:
    """Return how a .npy file of bytes begins."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return head.getvalue()


def _output(images: ImageSet, job: Job, done: int) -> Tensor:
    """Return the pixels to fill, in the workspace if there is one, with what is done of them."""
    path = job.file(PIXELS)
    if path is None:
        return torch.empty_like(images.pixels)
    shape = _shape(images)
    head = _head(shape)
    if not done:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(RECORD).unlink(missing_ok=True)  # it would be believed after a kill
        with path.open("wb") as file:
            reserve(file, len(head) + math.prod(shape), path)
            file.write(head)
    array = np.memmap(path, np.uint8, "r+", offset=len(head), shape=shape)
    return torch.from_numpy(array).permute(0, 3, 1, 2)


def _record(job: Job, done: int) -> None:
    path = job.file(RECORD)
    if path is not None:
        write_json(path, {"images": done, "facts": job.facts})
