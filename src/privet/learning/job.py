"""One run of a protection or a recovery, and what it keeps between a kill and a resume."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from privet.learning.runtime import Runtime
from privet.progress import Progress, silent
from privet.seeds import generator


@dataclass(kw_only=True)
class Job:
    """One run: where, with which seed, and what is kept between a kill and a resume.

    Attributes:
        runtime: device, precision, share of the work.
        seed: the same seed gives the same bytes on the same kind of device.
        workspace: a folder for what a resumed run needs, or None to keep nothing.
        surrogate: weights of an earlier run's surrogate for a protection to use instead of training one,
            or None.
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

    def batch(self, step: int, *purpose: str | int, count: int, size: int) -> torch.Tensor:
        """Return which of `count` images a step takes, (size,): each pass over all takes them in an order of its own.

        Args:
            step: from 0, over all passes.
            purpose: what the order is for, where a run has several.
            count: images.
            size: images a step, at most `count`; those left over at the end of a pass wait for another.
        """
        turn, place = divmod(step, count // size)
        order = torch.randperm(count, generator=generator(self.seed, "order", *purpose, turn))
        return order[place * size :][:size]

    def random(self, *purpose: str | int) -> torch.Generator:
        """Return this run's random numbers for one purpose, on the device."""
        return generator(self.seed, *purpose, device=self.runtime.device)
