"""What every protection is, and the one place where its budget is enforced."""

from __future__ import annotations

import dataclasses
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self, final

import numpy as np
import torch
from torch import Tensor

from privet.errors import BudgetError, InputError, UsageError
from privet.files import write_json
from privet.images.budget import Budget
from privet.images.image_set import ImageSet
from privet.images.similarity import compare_all
from privet.learning.runtime import Runtime
from privet.progress import Progress, silent
from privet.seeds import generator

# Images that are perturbed together. Fixed, so that results never depend on how work is split.
CHUNK = 128

Perturb = Callable[[Tensor, torch.Generator], Tensor]
"""Maps positions in the image set, (batch,), to perturbations, (batch, 3, height, width), in 1/255."""


@dataclass(kw_only=True)
class Job:
    """One run of a protection: where, with which seed, and what is kept between a kill and a resume.

    Attributes:
        runtime: device, precision, share of the work.
        seed: the same seed gives the same bytes on the same kind of device.
        workspace: a folder for what a resumed run needs, or None to keep nothing.
        surrogate: weights of an earlier run's surrogate to use instead of training one, or None.
        checkpoint_seconds: how often unfinished work is saved.
        progress: told about images done.
        facts: what the run found out about itself (rounds needed, the surrogate's error).
    """

    runtime: Runtime
    seed: int = 0
    workspace: Path | None = None
    surrogate: Path | None = None
    checkpoint_seconds: float = 20.0
    progress: Progress = silent
    facts: dict[str, Any] = field(default_factory=dict)
    _saved: float = field(default_factory=time.monotonic)

    def file(self, name: str) -> Path | None:
        """Return the workspace's file of this name, or None if nothing is kept."""
        return None if self.workspace is None else self.workspace / name

    def checkpoint_due(self, last: bool = False) -> bool:
        """Say whether to save unfinished work: now and then, and always after the last step.

        Only the first process ever does.
        """
        if self.workspace is None or self.runtime.rank > 0:
            return False
        if time.monotonic() - self._saved < self.checkpoint_seconds and not last:
            return False
        self._saved = time.monotonic()
        return True

    def random(self, *purpose: str | int) -> torch.Generator:
        """Return this run's random numbers for one purpose, on the device."""
        return generator(self.seed, *purpose, device=self.runtime.device)


@dataclass(frozen=True, kw_only=True)
class Protection(ABC):
    """A way to choose a perturbation. Subclasses are frozen dataclasses of their settings.

    A method implements `budget` and `_perturb`; clipping, rounding and checking are done here, once,
    and no method can leave them out.
    """

    name: ClassVar[str]
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {}, "cpu": {}}

    def __post_init__(self) -> None:
        self.budget  # noqa: B018 - an impossible one is refused now, not after hours

    @property
    @abstractmethod
    def budget(self) -> Budget:
        """How far an image may be changed, and in which norm."""

    @classmethod
    def preset(cls, name: str, **settings: Any) -> Self:
        """Build the method with a preset's settings, some of them replaced.

        Raises:
            UsageError: no such preset, or no such setting.
        """
        if name not in cls.presets:
            raise UsageError(f"Unknown preset {name!r}; {cls.name} has {', '.join(cls.presets)}.")
        known = [entry.name for entry in dataclasses.fields(cls)]
        for setting in settings:
            if setting not in known:
                raise UsageError(f"{cls.name} has no setting {setting!r}; it has {', '.join(known)}.")
        return cls(**{**cls.presets[name], **settings})

    def settings(self) -> dict[str, Any]:
        """Return every setting by name."""
        return dataclasses.asdict(self)

    @final
    def protect(self, images: ImageSet, job: Job) -> ImageSet:
        """Return the protected images: perturbed, clipped to the budget, rounded, and checked as bytes.

        Args:
            images: what to protect.
            job: where and how; with a workspace, a killed run goes on where it stopped. Of several
                processes only the first gets the result.

        Raises:
            InputError: images that the method cannot work on.
            BudgetError: the method returned NaN or another shape, or its bytes leave the budget.
        """
        if len(images) == 0:
            raise InputError("There is no image to protect.")
        pixels, done = _output(images, job) if job.runtime.rank == 0 else (torch.empty_like(images.pixels), 0)
        done = int(job.runtime.sum(torch.tensor(done, device=job.runtime.device)))
        starts = range(0, len(images), CHUNK)
        if done < len(starts):
            perturb = self._perturb(images, job)
            world, rank = job.runtime.world, job.runtime.rank
            for first in range(done, len(starts), world):
                chunks = range(first, min(first + world, len(starts)))
                for chunk in chunks:
                    index = torch.arange(starts[chunk], min(starts[chunk] + CHUNK, len(images)))
                    if chunk % world == rank:
                        delta = perturb(index, job.random("perturb", chunk))
                        pixels[index] = self._bytes(images, index, delta)
                    else:
                        pixels[index] = 0
                if world > 1:
                    part = slice(starts[chunks[0]], starts[chunks[0]] + CHUNK * len(chunks))
                    pixels[part] = job.runtime.sum(pixels[part].to(job.runtime.device)).cpu()
                job.progress("perturbing", min((first + world) * CHUNK, len(images)), len(images))
                if job.checkpoint_due():
                    _record(job, first + len(chunks), len(starts))
        if job.runtime.rank == 0:
            for start in starts:
                self._check(images, torch.arange(start, min(start + CHUNK, len(images))), pixels)
            _record(job, len(starts), len(starts))
        return images.with_pixels(pixels)

    @abstractmethod
    def _perturb(self, images: ImageSet, job: Job) -> Perturb:
        """Do what has to be done once, and return the function that perturbs a chunk of the images."""

    def _bytes(self, images: ImageSet, index: Tensor, delta: Tensor) -> Tensor:
        """Clip and round a method's perturbation, and return the pixels that it makes."""
        pixels = images.pixels[index]
        if delta.shape != pixels.shape or not bool(torch.isfinite(delta).all()):
            raise BudgetError(
                f"{self.name} returned a perturbation of shape {tuple(delta.shape)} for pixels "
                f"{tuple(pixels.shape)}, or one that is not finite. Nothing was written."
            )
        delta = delta.cpu().float()
        grey = images.grey[index]
        delta[grey] = delta[grey].mean(1, keepdim=True).expand(-1, 3, -1, -1)
        return (pixels + self.budget.fit(delta)).clamp_(0, 255).to(torch.uint8)

    def _check(self, images: ImageSet, index: Tensor, pixels: Tensor) -> None:
        changes = compare_all(images.pixels[index], pixels[index], ssim=False)
        for position, change in zip(index.tolist(), changes, strict=True):
            if excess := self.budget.excess(change, images.size, seen=images.size):
                raise BudgetError(f"{self.name} changed {images.names[position]} by {excess}.")


@dataclass(frozen=True, kw_only=True)
class Bounded(Protection):
    """A protection whose budget is L-infinity: nobody sees a change so small, wherever it lies.

    Attributes:
        epsilon: no channel of a pixel changes by more, in 1/255.
    """

    epsilon: int = 8

    @property
    def budget(self) -> Budget:
        return Budget(norm="linf", amount=self.epsilon)


def _output(images: ImageSet, job: Job) -> tuple[Tensor, int]:
    """Return the pixels to fill, in the workspace if there is one, and how many chunks are done."""
    path = job.file("protected.npy")
    if path is None:
        return torch.empty_like(images.pixels), 0
    count, channels, height, width = images.pixels.shape
    shape = (count, height, width, channels)
    record = job.file("perturbed.json")
    done = 0
    if record is not None and record.exists() and path.exists():
        earlier = json.loads(record.read_text())
        done = int(earlier["chunks"])
        job.facts.update(earlier["facts"])
    path.parent.mkdir(parents=True, exist_ok=True)
    mode = "r+" if done else "w+"
    array = np.lib.format.open_memmap(path, mode=mode, dtype=np.uint8, shape=None if done else shape)
    return torch.from_numpy(array).permute(0, 3, 1, 2), done


def _record(job: Job, done: int, total: int) -> None:
    path = job.file("perturbed.json")
    if path is not None:
        write_json(path, {"chunks": done, "of": total, "facts": job.facts})
