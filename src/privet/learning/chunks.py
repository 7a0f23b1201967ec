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

from privet.files import write_json
from privet.images.image_set import ImageSet
from privet.learning.checkpoint import damaged
from privet.learning.job import Job

# Images that are changed together. Fixed, so that results never depend on how work is split.
CHUNK = 128

Change = Callable[[Tensor, torch.Generator], Tensor]
"""Maps positions in the image set, (batch,), to pixels, uint8, (batch, 3, height, width)."""


def change_in_chunks(images: ImageSet, job: Job, prepare: Callable[[], Change], *, purpose: str) -> Tensor:
    """Return new pixels for an image set, (images, 3, height, width).

    With a workspace, a killed run goes on where it stopped. Several processes share the chunks, and each
    gets the result.

    Args:
        images: the image set.
        job: where and how.
        prepare: does what has to be done once, if anything is left to do, and returns the change.
        purpose: names the random numbers and the stage, as in "perturb" and "perturbing".

    Raises:
        OutputError: what an earlier call kept in the workspace is damaged.
    """
    runtime = job.runtime
    done = runtime.told(_done(images, job) if runtime.rank == 0 else 0)
    starts = range(0, len(images), CHUNK)
    change = prepare() if done < len(starts) else None
    pixels = _output(images, job, done) if runtime.rank == 0 else torch.empty_like(images.pixels)
    if runtime.world > 1:  # only the first process has the workspace
        for start in starts[:done]:
            part = slice(start, start + CHUNK)
            if runtime.rank > 0:
                pixels[part] = 0
            pixels[part] = runtime.sum(pixels[part].to(runtime.device)).cpu()
    if change is not None:
        world, rank = runtime.world, runtime.rank
        for first in range(done, len(starts), world):
            chunks = range(first, min(first + world, len(starts)))
            for chunk in chunks:
                index = torch.arange(starts[chunk], min(starts[chunk] + CHUNK, len(images)))
                if chunk % world == rank:
                    pixels[index] = change(index, job.random(purpose, chunk)).cpu()
                else:
                    pixels[index] = 0
            if world > 1:
                part = slice(starts[chunks[0]], starts[chunks[0]] + CHUNK * len(chunks))
                pixels[part] = runtime.sum(pixels[part].to(runtime.device)).cpu()
            job.progress(f"{purpose}ing", min((first + world) * CHUNK, len(images)), len(images))
            if job.checkpoint_due():
                _record(job, first + len(chunks), len(starts))
    if runtime.rank == 0:
        _record(job, len(starts), len(starts))
    return pixels


def _done(images: ImageSet, job: Job) -> int:
    """Return how many chunks an earlier call has done, and take over what it found out."""
    record, path = job.file("changed.json"), job.file("changed.npy")
    if record is None or path is None or not (record.exists() and path.exists()):
        return 0
    most = math.ceil(len(images) / CHUNK)
    try:
        earlier = json.loads(record.read_bytes())
        done, facts = earlier["chunks"], earlier["facts"]
        if type(done) is not int or not 0 <= done <= most or not isinstance(facts, dict):
            raise ValueError(f"expected up to {most} chunks, and facts, got {done!r} and {facts!r}")
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
    head = io.BytesIO()  # compared, as numpy reads damaged ones with errors of many kinds
    np.lib.format.write_array_header_1_0(head, {"descr": "|u1", "fortran_order": False, "shape": shape})
    with path.open("rb") as file:
        begins = file.read(head.tell()) == head.getvalue()
    return begins and path.stat().st_size == head.tell() + math.prod(shape)


def _output(images: ImageSet, job: Job, done: int) -> Tensor:
    """Return the pixels to fill, in the workspace if there is one, with what is done of them."""
    path = job.file("changed.npy")
    if path is None:
        return torch.empty_like(images.pixels)
    path.parent.mkdir(parents=True, exist_ok=True)
    mode = "r+" if done else "w+"
    shape = None if done else _shape(images)
    array = np.lib.format.open_memmap(path, mode=mode, dtype=np.uint8, shape=shape)
    return torch.from_numpy(array).permute(0, 3, 1, 2)


def _record(job: Job, done: int, total: int) -> None:
    path = job.file("changed.json")
    if path is not None:
        write_json(path, {"chunks": done, "of": total, "facts": job.facts})
