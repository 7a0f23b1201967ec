"""One client's update as an attacker sees it: whoever attacks it knows this record and nothing else.

With plain PyTorch it takes five lines:

    loss = F.cross_entropy(model(images), labels)
    gradient = torch.autograd.grad(loss, list(model.parameters()))
    update = Update.of(model, gradient, architecture="lenet-sigmoid", classes=10, size=(32, 32),
                       batch_size=len(images))
    save_update(Path("update"), update)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from privet.errors import InputError
from privet.models.weights import DTYPES

KINDS = ("gradient", "delta")
MODES = ("train", "eval")
NOISES = ("gaussian", "laplace")
LARGEST = {"classes": 1 << 20, "side": 1 << 14, "images": 1 << 20, "steps": 1 << 16}
GROUPS = ("weights", "values", "statistics")
WRAPPER = "network."  # what privet's own networks have before the names of their tensors


@dataclass(frozen=True, kw_only=True)
class Treatment:
    """What was done to the values before they were sent, in this order, as far as the attacker knows.

    Attributes:
        clip: all values were scaled down together to at most this L2 norm; None if they were not.
        noise: "gaussian" or "laplace": independent noise was added; None if it was not.
        noise_scale: the noise's standard deviation, or for Laplace its scale b.
        sparse: values that are exactly zero were left out because they were the smallest of all (top-k).
        steps: distance between the values that rounding left, by tensor; empty if nothing was rounded.
        stochastic: values were rounded up or down at random, so they are off by up to a whole step.
        sign: only the sign of each value means anything.
    """

    clip: float | None = None
    noise: str | None = None
    noise_scale: float = 0.0
    sparse: bool = False
    steps: Mapping[str, float] = field(default_factory=dict)
    stochastic: bool = False
    sign: bool = False

    def __post_init__(self) -> None:
        if self.clip is not None:
            _positive("treatment.clip", self.clip)
        if (self.noise is None) != (self.noise_scale == 0):
            raise InputError(
                f"Expected treatment.noise and treatment.noise_scale together, got {self.noise!r} and "
                f"{self.noise_scale}."
            )
        if self.noise is not None:
            _one_of("treatment.noise", self.noise, NOISES)
            _positive("treatment.noise_scale", self.noise_scale)
        for name, step in self.steps.items():
            _positive(f"treatment.steps[{name!r}]", step)

    def scaled(self, factor: float) -> Treatment:
        """Return the same treatment of values that have since been multiplied by `factor`."""
        size = abs(factor)
        return replace(
            self,
            clip=None if self.clip is None else self.clip * size,
            noise_scale=self.noise_scale * size,
            steps={name: step * size for name, step in self.steps.items()},
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Update:
    """What one client sent in one round, and what else the attacker knows.

    The client minimised the mean cross-entropy over each batch, by plain SGD if it took several steps.

    Attributes:
        architecture: a name for `create_model`, or any other if the attacker is given the network.
        classes: outputs of the network.
        size: height and width of the private images in pixels.
        weights: the network's tensors (parameters and buffers) before the client's first step, by name.
        values: what was sent for each parameter, by name; a parameter that is absent was not sent.
        kind: "gradient" (of one step) or "delta" (weights after minus weights before).
        batch_size: images in each step.
        images: different images in all; step i takes those from i * batch_size on, round and round.
        local_steps: SGD steps that the client took.
        learning_rate: of those steps; needed for a delta.
        mode: "train" (batch norm used the batch's own statistics) or "eval".
        channels: of the network's input, 3 or 1.
        grey: the images are known to be grey.
        labels: the images' labels, if the attacker knows them.
        statistics: batch norm's buffers after the client's step, by name, if they were sent.
        treatment: what was done to the values before they were sent.
        notes: where it came from; free, and never read by an attack.
    """

    architecture: str
    classes: int
    size: tuple[int, int]
    weights: Mapping[str, Tensor]
    values: Mapping[str, Tensor]
    batch_size: int
    kind: str = "gradient"
    images: int = 0
    local_steps: int = 1
    learning_rate: float | None = None
    mode: str = "train"
    channels: int = 3
    grey: bool = False
    labels: tuple[int, ...] | None = None
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    treatment: Treatment = field(default_factory=Treatment)
    notes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.images == 0:
            object.__setattr__(self, "images", self.batch_size)
        _check_numbers(self)
        _check_tensors(self)

    @classmethod
    def of(cls, model: nn.Module, values: Sequence[Tensor] | Mapping[str, Tensor], **facts: Any) -> Self:
        """Make the record of a model as it was before the step, and of what was sent.

        Args:
            model: the network.
            values: for each of `model.parameters()` in order, or by name.
            facts: the record's other attributes.

        Raises:
            InputError: something does not fit.
        """
        state = {short(name): tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
        if not isinstance(values, Mapping):
            names = [short(name) for name, _ in model.named_parameters()]
            if len(names) != len(values):
                raise InputError(f"Expected a value for each of {len(names)} parameters, got {len(values)}.")
            values = dict(zip(names, values, strict=True))
        sent = {name: tensor.detach().cpu().clone() for name, tensor in values.items()}
        return cls(weights=state, values=sent, **facts)

    def as_gradient(self) -> tuple[dict[str, Tensor], Treatment]:
        """Return the values, and their treatment, in units of a gradient.

        A delta is divided by minus the learning rate and the number of steps: the steps' mean gradient.
        """
        if self.kind == "gradient" or self.learning_rate is None:
            return dict(self.values), self.treatment
        factor = -1 / (self.learning_rate * self.local_steps)
        return {name: value * factor for name, value in self.values.items()}, self.treatment.scaled(factor)


def short(name: str) -> str:
    """Return a tensor's name without the wrapper that privet's own networks wear."""
    return name.removeprefix(WRAPPER)


def _check_numbers(update: Update) -> None:
    _one_of("kind", update.kind, KINDS)
    _one_of("mode", update.mode, MODES)
    _one_of("channels", update.channels, (1, 3))
    if len(update.size) != 2:
        raise InputError(f"Expected a size of height and width, got {update.size}.")
    for name, value, limit in (
        ("classes", update.classes, LARGEST["classes"]),
        ("size", update.size[0], LARGEST["side"]),
        ("size", update.size[1], LARGEST["side"]),
        ("batch_size", update.batch_size, LARGEST["images"]),
        ("images", update.images, LARGEST["images"]),
        ("local_steps", update.local_steps, LARGEST["steps"]),
    ):
        if not 1 <= value <= limit:
            raise InputError(f"Expected {name} between 1 and {limit}, got {value}.")
    if update.batch_size > update.images:
        raise InputError(f"A batch of {update.batch_size} cannot come from {update.images} images.")
    if update.kind == "gradient" and (update.local_steps > 1 or update.images > update.batch_size):
        raise InputError(
            f"A gradient is of one step on one batch; got {update.local_steps} local steps on "
            f"{update.images} images. Record several steps as a delta."
        )
    if update.kind == "delta" and update.learning_rate is None:
        raise InputError("A delta says nothing without the learning rate; set learning_rate.")
    if update.learning_rate is not None:
        _positive("learning_rate", update.learning_rate)
    if update.labels is not None and (
        len(update.labels) != update.images or not all(0 <= label < update.classes for label in update.labels)
    ):
        raise InputError(
            f"Expected a label from 0 to {update.classes - 1} for each of {update.images} images, got "
            f"{update.labels!s:.60}."
        )


def _check_tensors(update: Update) -> None:
    if not update.values:
        raise InputError("The record holds no values: nothing was sent.")
    dtypes = {tensor.dtype for tensor in update.values.values()}
    if len(dtypes) > 1 or not next(iter(dtypes)).is_floating_point:
        raise InputError(f"Expected values of one floating-point type, got {sorted(map(str, dtypes))}.")
    for group, tensors in (("values", update.values), ("statistics", update.statistics)):
        for name, tensor in tensors.items():
            if name not in update.weights:
                raise InputError(f"{group} has {name!r}, which is not among the weights.")
            if tensor.shape != update.weights[name].shape:
                raise InputError(
                    f"Expected {group} of shape {tuple(update.weights[name].shape)} for {name!r}, got "
                    f"{tuple(tensor.shape)}."
                )
    for group in GROUPS:
        for name, tensor in getattr(update, group).items():
            if tensor.dtype not in DTYPES:
                raise InputError(
                    f"{group} holds {tensor.dtype} in {name!r}; expected floats of 16 to 64 bits, integers or bool."
                )
            # flattened, for torch does not iterate over more than 64 dimensions
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor.flatten()).all()):
                raise InputError(f"{group} holds NaN or infinity in {name!r}; such an update says nothing.")
    if unknown := [name for name in update.treatment.steps if name not in update.values]:
        raise InputError(f"treatment.steps has {unknown[0]!r}, which was not sent.")


def _positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise InputError(f"Expected {name} to be finite and above 0, got {value}.")


def _one_of(name: str, value: object, known: Sequence[object]) -> None:
    if value not in known:
        raise InputError(f"Expected {name} to be {' or '.join(map(str, known))}, got {value!r}.")
