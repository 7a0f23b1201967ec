"""What a client can do to an update before it sends it, and how the record says so.

A defence is a neutral change of values with its treatment: whatever compresses updates elsewhere can be
attacked here just the same, if its records say what was done.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from privet.errors import UsageError
from privet.learning.update import Treatment, Update
from privet.seeds import derive

Tensors = dict[str, Tensor]


class Defence(ABC):
    """A change of the values that are sent; in units of the values, whether gradient or delta."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The name that `create_defence` takes."""

    @abstractmethod
    def apply(self, update: Update, *, seed: int = 0) -> Update:
        """Return the update as it is sent, with its treatment on record.

        Args:
            update: before this defence.
            seed: of whatever is random.

        Raises:
            UsageError: an earlier treatment stands later in the order that records can say.
        """


class Single(Defence):
    """A defence that does one thing; it implements `_apply`."""

    @final
    def apply(self, update: Update, *, seed: int = 0) -> Update:
        if ORDER.index(type(self)) <= max(_done(update.treatment), default=-1):
            raise UsageError(
                f"{self.name} comes too late: a record can say clipping, noise, top-k and rounding, each once "
                "and in this order."
            )
        random = torch.Generator().manual_seed(derive(seed, "defence", self.name))
        values, treatment = self._apply(dict(update.values), update.treatment, random)
        return replace(update, values=values, treatment=treatment)

    @abstractmethod
    def _apply(
        self, values: Tensors, treatment: Treatment, random: torch.Generator
    ) -> tuple[Tensors, Treatment]:
        """Return the changed values and the treatment with this defence in it."""


@dataclass(frozen=True)
class Clip(Single):
    """All values are scaled down together to at most this L2 norm."""

    norm: float

    @property
    def name(self) -> str:
        return f"clip-{self.norm:g}"

    def _apply(
        self, values: Tensors, treatment: Treatment, random: torch.Generator
    ) -> tuple[Tensors, Treatment]:
        length = math.sqrt(sum(float(value.double().square().sum()) for value in values.values()))
        factor = min(1.0, self.norm / max(length, 1e-300))
        return {name: value * factor for name, value in values.items()}, replace(treatment, clip=self.norm)


@dataclass(frozen=True)
class Noise(Single):
    """Independent noise on every value: normal with this standard deviation, or Laplace with this scale b."""

    kind: str
    scale: float

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.scale:g}"

    def _apply(
        self, values: Tensors, treatment: Treatment, random: torch.Generator
    ) -> tuple[Tensors, Treatment]:
        noisy = {}
        for name, value in values.items():
            if self.kind == "gaussian":
                noise = torch.randn(value.shape, generator=random)
            else:  # the difference of two exponential variables
                noise = torch.empty(2, *value.shape).exponential_(generator=random).diff(dim=0)[0]
            noisy[name] = value + self.scale * noise.to(value)
        return noisy, replace(treatment, noise=self.kind, noise_scale=self.scale)


@dataclass(frozen=True)
class TopK(Single):
    """The smallest values of all, this share of them in percent, are not sent."""

    dropped: float

    @property
    def name(self) -> str:
        return f"topk-{self.dropped:g}"

    def _apply(
        self, values: Tensors, treatment: Treatment, random: torch.Generator
    ) -> tuple[Tensors, Treatment]:
        sizes = torch.cat([value.abs().flatten() for value in values.values()])
        kept = max(1, round(len(sizes) * (1 - self.dropped / 100)))
        least = sizes.kthvalue(len(sizes) - kept + 1).values
        sparse = {name: torch.where(value.abs() >= least, value, 0.0) for name, value in values.items()}
        return sparse, replace(treatment, sparse=True)


@dataclass(frozen=True)
class Quantise(Single):
    """Each tensor is rounded to 2^(bits - 1) - 1 equal steps either side of zero."""

    bits: int

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    def _apply(
        self, values: Tensors, treatment: Treatment, random: torch.Generator
    ) -> tuple[Tensors, Treatment]:
        rounded, steps = dict(values), {}
        for name, value in values.items():
            step = float(value.abs().max()) / (2 ** (self.bits - 1) - 1)
            if step > 0:
                rounded[name] = (value / step).round() * step
                steps[name] = step
        return rounded, replace(treatment, steps=steps)


@dataclass(frozen=True)
class Sign(Single):
    """Only the sign of each value is sent."""

    name = "sign"

    def _apply(
        self, values: Tensors, treatment: Treatment, random: torch.Generator
    ) -> tuple[Tensors, Treatment]:
        return {name: value.sign() for name, value in values.items()}, replace(treatment, sign=True)


@dataclass(frozen=True)
class Several(Defence):
    """One defence after the other."""

    parts: tuple[Defence, ...]

    @property
    def name(self) -> str:
        return "+".join(part.name for part in self.parts)

    def apply(self, update: Update, *, seed: int = 0) -> Update:
        for part in self.parts:
            update = part.apply(update, seed=seed)
        return update


ORDER: tuple[type[Single], ...] = (Clip, Noise, TopK, Quantise, Sign)
# What makes a defence of its number, and the range of the number.
NUMBERED: dict[str, tuple[Callable[[float], Defence], float, float]] = {
    "clip": (Clip, 1e-9, 1e9),
    "gaussian": (lambda scale: Noise("gaussian", scale), 1e-12, 1e9),
    "laplace": (lambda scale: Noise("laplace", scale), 1e-12, 1e9),
    "topk": (TopK, 0.001, 99.999),
}


def create_defence(name: str) -> Defence:
    """Return the defence of this name: clip-1, gaussian-0.01, laplace-0.01, topk-90, int8, sign.

    Several joined by + are applied one after the other: clip-1+gaussian-0.01.

    Raises:
        UsageError: no such defence, or a number out of range.
    """
    if "+" in name:
        return Several(tuple(create_defence(part) for part in name.split("+")))
    if name == "sign":
        return Sign()
    if match := re.fullmatch(r"int([2-9]|1[0-6])", name):
        return Quantise(int(match.group(1)))
    kind, _, number = name.partition("-")
    if kind in NUMBERED and re.fullmatch(r"\d+(\.\d+)?(e-?\d+)?", number):
        make, least, most = NUMBERED[kind]
        if least <= float(number) <= most:
            return make(float(number))
    raise UsageError(
        f"Unknown defence {name!r}; expected clip-NORM, gaussian-SIGMA, laplace-B, topk-PERCENT (dropped, below "
        "100), int2 to int16, sign, or several joined by +."
    )


def _done(treatment: Treatment) -> list[int]:
    """Return the positions in ORDER of what was done already."""
    done = (
        treatment.clip is not None,
        treatment.noise is not None,
        treatment.sparse,
        bool(treatment.steps),
        treatment.sign,
    )
    return [position for position, yes in enumerate(done) if yes]
