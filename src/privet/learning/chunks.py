"""Changing an image set chunk by chunk: resumable, and the same bytes however the work is split."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from privet.files import write_json
from privet.images.image_set import ImageSet
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
    """
    runtime = job.runtime
    done = _done(job) if runtime.rank == 0 else 0
    done = int(runtime.sum(torch.tensor(done, device=runtime.device)))
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


def _done(job: Job) -> int:
    """Return how many chunks an earlier call has done, and take over what it found out."""
    record, path = job.file("changed.json"), job.file("changed.npy")
    if record is None or path is None or not (record.exists() and path.exists()):
        return 0
    earlier = json.loads(record.read_text())
    job.facts.update(earlier["facts"])
    return int(earlier["chunks"])


def _output(images: ImageSet, job: Job, done: int) -> Tensor:
    """Return the pixels to fill, in the workspace if there is one, with what is done of them."""
    path = job.file("changed.npy")
    if path is None:
        return torch.empty_like(images.pixels)
    count, channels, height, width = images.pixels.shape
    shape = (count, height, width, channels)
    path.parent.mkdir(parents=True, exist_ok=True)
    mode = "r+" if done else "w+"
    array = np.lib.format.open_memmap(path, mode=mode, dtype=np.uint8, shape=None if done else shape)
    return torch.from_numpy(array).permute(0, 3, 1, 2)


def _record(job: Job, done: int, total: int) -> None:
    path = job.file("changed.json")
    if path is not None:
        write_json(path, {"chunks": done, "of": total, "facts": job.facts})
