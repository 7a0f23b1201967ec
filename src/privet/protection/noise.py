"""Two ways to hold noise while it is being optimised: as it is, image by image, or as a network that makes it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from privet.images.image_set import ImageSet
from privet.learning.checkpoint import load_checkpoint, load_state, save_checkpoint, save_state
from privet.learning.job import Job
from privet.protection.generator import UNet
from privet.protection.minimise import Batch, pack, unpack
from privet.seeds import derive, generator

RATE = 1e-3  # of Adam


class Noise(Protocol):
    """Noise for every image of a set, in [0, 1] units."""

    def __call__(self, index: Tensor, batch: Batch) -> Tensor:
        """Return the noise of the images at these positions, (batch, 3, height, width), to differentiate."""

    def descend(self, index: Tensor, delta: Tensor, left: float) -> None:
        """Do one step with the gradient that a backward pass has left, `left` being the share of steps to come."""

    def save(self, path: Path, record: Mapping[str, Any]) -> None:
        """Write the noise and how far its optimisation is."""

    def load(self, path: Path | None) -> dict[str, Any] | None:
        """Read what `save` wrote and return the record, or None if there is nothing."""


class Stored:
    """The noise itself, int8 in steps of epsilon / 127, from a uniform start; descends by the gradient's sign.

    The steps become linearly shorter. Nothing but the noise is kept of an image between its visits.
    """

    def __init__(self, images: ImageSet, *, epsilon: float, step_size: float, job: Job) -> None:
        self.epsilon, self.step_size = epsilon, step_size
        start = generator(job.seed, "start")
        self.noise = torch.randint(-127, 128, images.pixels.shape, generator=start, dtype=torch.int8)

    def __call__(self, index: Tensor, batch: Batch) -> Tensor:
        return unpack(self.noise[index], self.epsilon).to(batch.x.device).requires_grad_()

    @torch.no_grad()
    def descend(self, index: Tensor, delta: Tensor, left: float) -> None:
        assert delta.grad is not None
        moved = delta - self.step_size * left * delta.grad.sign()
        self.noise[index] = pack(moved.clamp(-self.epsilon, self.epsilon), self.epsilon).cpu()

    def save(self, path: Path, record: Mapping[str, Any]) -> None:
        save_state(path, {"noise": self.noise}, record)

    def load(self, path: Path | None) -> dict[str, Any] | None:
        found = load_state(path)
        if found is None:
            return None
        self.noise = found[0]["noise"]
        return found[1]


class Generated:
    """A UNet's noise, `epsilon * tanh(U(x, label))`, by Adam."""

    def __init__(self, images: ImageSet, *, epsilon: float, job: Job) -> None:
        self.epsilon = epsilon
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(job.seed, "generator"))
            model = UNet(classes=images.classes, size=images.size)
        self.model = job.runtime.place(model)
        self.optimizer = torch.optim.Adam(self.model.parameters(), RATE)

    def __call__(self, index: Tensor, batch: Batch) -> Tensor:
        return self.epsilon * self.model(batch.x, batch.labels)  # type: ignore[no-any-return]

    def descend(self, index: Tensor, delta: Tensor, left: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = RATE * left
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def save(self, path: Path, record: Mapping[str, Any]) -> None:
        save_checkpoint(path, model=self.model, optimizer=self.optimizer, record=record)

    def load(self, path: Path | None) -> dict[str, Any] | None:
        found = path and load_checkpoint(path, model=self.model, optimizer=self.optimizer)
        return found[1] if found else None
