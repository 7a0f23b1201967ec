"""The client's computation as a function of images and labels, for many attacks at once."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, replace_all_batch_norm_modules_, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from privet.errors import UsageError
from privet.leakage.moments import telling, watch
from privet.leakage.objective import Tensors
from privet.learning.update import Update, short
from privet.models import create_model
from privet.models.projection import PREFIX


def network_of(update: Update) -> nn.Module:
    """Return the network that a record names.

    Raises:
        UsageError: privet does not know it, it has no classes, or the record's weights do not fit it.
    """
    if update.architecture.startswith(PREFIX):
        raise UsageError(
            f"{update.architecture} learns without labels, and inversions are of networks that learn with them."
        )
    build = partial(create_model, update.architecture, classes=update.classes, size=update.size)
    if ":" not in update.architecture:  # a short name can ask for any amount of memory
        with torch.device("meta"):
            _fit(update, build())
    return build()


def _fit(update: Update, network: nn.Module) -> None:
    """Raise UsageError if a record's weights and values are not those of a network."""
    expected = {short(name): tensor.shape for name, tensor in network.state_dict().items()}
    found = {name: tensor.shape for name, tensor in update.weights.items()}
    if found != expected or not set(update.values) <= {short(name) for name, _ in network.named_parameters()}:
        wrong = [name for name in {**expected, **found} if found.get(name) != expected.get(name)]
        raise UsageError(
            f"The record's weights do not fit {update.architecture}: {(wrong or ['a value'])[0]} is absent, "
            "unknown or of another shape. Pass the network that the client trained."
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Client:
    """What a client computes, for several members: attacks that run side by side.

    Every member has weights of its own, even where they are all alike: so each one's arithmetic is
    the same whatever runs beside it (a lone member takes other paths, so there are always two).

    Dropout is switched off: its mask is not known, and counts as noise.

    Attributes:
        module: the network, without a state of its own.
        parameters: trained tensors by their names in the module, (members, ...).
        buffers: likewise; empty in training mode, where batch norm uses the batch alone.
        sent: names in the record of what was sent, and in the module.
        update: one of the members' records, for what they have in common.
        seen: the moments of the batch that the module last saw, if it is watched (see `simulate`).
    """

    module: nn.Module
    parameters: Tensors
    buffers: Tensors
    sent: Mapping[str, str]
    update: Update
    seen: Tensors = field(default_factory=dict)

    @classmethod
    def of(
        cls, updates: Sequence[Update], network: nn.Module, *, device: torch.device, dtype: torch.dtype
    ) -> Self:
        """Make the client of these members, which share a network and all numbers.

        Raises:
            UsageError: the network is not the one of the records, or they differ.
        """
        first = updates[0]
        if any(_shape(update) != _shape(first) for update in updates):
            raise UsageError(
                "These updates differ in architecture, size, batch, steps, in what was sent or in whether labels "
                "are known; attack those that are alike together."
            )
        module = copy.deepcopy(network).to(device, dtype).train(first.mode == "train")
        for part in module.modules():
            if isinstance(part, nn.modules.dropout._DropoutNd):
                part.eval()
        names = {short(name): name for name, _ in module.named_parameters()}
        state = {short(name): name for name, _ in module.named_buffers()}
        _fit(first, module)
        if first.mode == "train":
            replace_all_batch_norm_modules_(module)
        seen: Tensors = {}
        if telling(first):
            watch(module, seen)

        def stack(wanted: Mapping[str, str]) -> Tensors:
            return {
                full: torch.stack([update.weights[name].to(device, dtype) for update in updates])
                for name, full in wanted.items()
                if name in first.weights
            }

        return cls(
            module=module,
            parameters=stack(names),
            buffers=stack(state) if first.mode == "eval" else {},
            sent={name: names[name] for name in first.values},
            update=first,
            seen=seen,
        )

    def subset(self, kept: Tensor) -> Client:
        """Return the client of these members."""
        return replace(
            self,
            parameters={name: value[kept] for name, value in self.parameters.items()},
            buffers={name: value[kept] for name, value in self.buffers.items()},
        )

    def gradient(self, x: Tensor, y: Tensor) -> Tensors:
        """Return each member's update in units of a gradient; as `simulate`, without the moments."""
        return self.simulate(x, y)[0]

    def simulate(self, x: Tensor, y: Tensor) -> tuple[Tensors, Tensors]:
        """Return each member's update in units of a gradient, and what batch norm saw in its step.

        Args:
            x: pixels in [0, 1], (members, images, channels, height, width).
            y: probabilities of the classes, (members, images, classes).

        Returns:
            Values by name in the record, (members, ...); and moments by batch norm, as `sent_moments` has them,
            (members, 2, channels), where the records have them too.
        """
        with sdpa_kernel(SDPBackend.MATH):  # the fast kernels of attention have no second derivative
            found, moments = vmap(self._one)(self.parameters, self.buffers, x, y)
        return {name: found[full] for name, full in self.sent.items()}, moments

    def logits(self, x: Tensor) -> Tensor:
        """Return (members, images, classes) of each member's weights before the first step."""

        def one(parameters: Tensors, buffers: Tensors, x: Tensor) -> Tensor:
            return functional_call(self.module, {**parameters, **buffers}, (self._input(x),))  # type: ignore[no-any-return]

        with sdpa_kernel(SDPBackend.MATH):
            return vmap(one)(self.parameters, self.buffers, x)

    def _input(self, x: Tensor) -> Tensor:
        return x.expand(-1, self.update.channels, -1, -1)

    def _one(self, parameters: Tensors, buffers: Tensors, x: Tensor, y: Tensor) -> tuple[Tensors, Tensors]:
        def loss(parameters: Tensors, x: Tensor, y: Tensor) -> tuple[Tensor, Tensors]:
            logits = functional_call(self.module, {**parameters, **buffers}, (self._input(x),))
            return -(y * F.log_softmax(logits, 1)).sum() / len(x), dict(self.seen)

        update = self.update
        slope: Tensors
        moments: Tensors
        if update.local_steps == 1 and update.images == update.batch_size:
            slope, moments = grad(loss, has_aux=True)(parameters, x, y)
            return slope, moments
        rate, moved = update.learning_rate, parameters
        assert rate is not None
        for step in range(update.local_steps):
            index = [(step * update.batch_size + i) % update.images for i in range(update.batch_size)]
            slope, moments = grad(loss, has_aux=True)(moved, x[index], y[index])
            moved = {name: value - rate * slope[name] for name, value in moved.items()}
        span = rate * update.local_steps
        return {name: (parameters[name] - value) / span for name, value in moved.items()}, moments


def _shape(update: Update) -> tuple[object, ...]:
    return (
        (update.architecture, update.classes, update.size, update.channels, update.grey, update.mode),
        (update.batch_size, update.images, update.local_steps, update.learning_rate),
        {name: tensor.shape for name, tensor in update.weights.items()},
        {name: tensor.dtype for name, tensor in update.values.items()},
        set(update.statistics),
        update.labels is None,
    )
