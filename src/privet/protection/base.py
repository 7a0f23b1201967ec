"""What every protection is, and the one place where its budget is enforced."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, final

import torch
from torch import Tensor

from privet.errors import BudgetError, InputError, UsageError
from privet.images.budget import Budget
from privet.images.image_set import ImageSet
from privet.images.similarity import compare_all
from privet.learning.chunks import CHUNK, Change, change_in_chunks
from privet.learning.job import Job
from privet.models.projection import PREFIX
from privet.protection.surrogate import as_known

Perturb = Callable[[Tensor, torch.Generator], Tensor]
"""Maps positions in the image set, (batch,), to perturbations, (batch, 3, height, width), in 1/255."""


@dataclass(frozen=True, kw_only=True)
class Protection(ABC):
    """A way to choose a perturbation. Subclasses are frozen dataclasses of their settings.

    A method implements `budget` and `_perturb`; clipping, rounding and checking are done here, once,
    and no method can leave them out.
    """

    name: ClassVar[str]
    labelled: ClassVar[bool] = True
    """Whether the noise hides what tells classes apart, of which there must then be two."""
    continues: ClassVar[bool] = False
    """Whether the surrogate of an earlier run protects further images."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {}, "cpu": {}}

    def __post_init__(self) -> None:
        """Refuse now what could not work after hours, or would do nothing.

        Raises:
            UsageError: an impossible budget, or a number that no method can use.
        """
        self.budget  # noqa: B018
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not (math.isfinite(value) and value >= 0):
                raise UsageError(f"{self.name} needs {field.name} as a number of at least 0, got {value}.")
            if field.name == "surrogate" and value.startswith(PREFIX):
                raise UsageError(f"{self.name} needs a surrogate without {PREFIX!r}, got {value!r}.")
            if field.name in ("learning_rate", "step_size") and value == 0:
                raise UsageError(
                    f"{self.name} needs a positive {field.name}, got 0: nothing would ever change."
                )

    def need_one(self, *settings: str) -> None:
        """Raise UsageError unless each of these settings is at least 1."""
        for setting in settings:
            if getattr(self, setting) < 1:
                raise UsageError(f"{self.name} needs {setting} of at least 1, got {getattr(self, setting)}.")

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
            job: where and how; with a workspace, a killed run goes on where it stopped.

        Raises:
            InputError: images that the method cannot work on, or a surrogate that does not know their classes.
            UsageError: a surrogate for a method that goes on from none.
            BudgetError: the method returned NaN or another shape, or its bytes leave the budget.
        """
        if len(images) == 0:
            raise InputError("There is no image to protect.")
        if job.surrogate is not None and not self.continues:
            raise UsageError(f"{self.name} protects with no earlier run's surrogate: leave it out.")
        known = images if job.surrogate is None else as_known(images, job.surrogate)
        if self.labelled and known.classes < 2:
            raise InputError(
                f"{self.name} needs at least 2 classes: with {list(images.class_names)} alone there is nothing to tell "
                "apart. Sort the images into a folder for each class."
            )

        def prepare() -> Change:
            perturb = self._perturb(known, job)
            return lambda index, randomness: self._bytes(images, index, perturb(index, randomness))

        pixels = change_in_chunks(images, job, prepare, purpose="perturb")
        if job.runtime.rank == 0:
            for start in range(0, len(images), CHUNK):
                self._check(images, torch.arange(start, min(start + CHUNK, len(images))), pixels)
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

    def crossing(self, step_size: float) -> int:
        """Return how many steps of this size, in 1/255, take noise from one end of the budget to the other."""
        return math.ceil(2 * self.epsilon / step_size)
