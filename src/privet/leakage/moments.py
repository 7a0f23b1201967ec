"""What batch norm's buffers, if a client sent them, say of its batch: the moments of each channel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from privet.leakage.objective import Tensors
from privet.learning.update import Update, short


def batch_norms(network: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    """Return a network's batch norms by their names in records."""
    return {
        short(name): module
        for name, module in network.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    }


def telling(update: Update) -> bool:
    """Say whether batch norm's buffers were sent after a single step on the batch's own statistics.

    Several steps leave a mixture, and in evaluation mode the buffers stay as they are.
    """
    return bool(update.statistics) and update.mode == "train" and update.local_steps == 1


def sent_moments(update: Update, network: nn.Module) -> Tensors:
    """Return the mean and the unbiased variance of each channel before each batch norm, (2, channels), by its name.

    A batch norm moves its buffers by a known share towards what it sees, so the buffers before and
    after one step give that away exactly. There are none where the buffers are not `telling`.

    Args:
        update: the record.
        network: the network, for that share.
    """
    if not telling(update):
        return {}
    found = {}
    for name, module in batch_norms(network).items():
        means, variances = (f"{name}.{buffer}" for buffer in ("running_mean", "running_var"))
        if means not in update.statistics or variances not in update.statistics:
            continue
        share = module.momentum
        if share is None:  # the mean of all batches so far
            share = 1 / (int(update.weights[f"{name}.num_batches_tracked"]) + 1)
        moved = [
            update.weights[one].double() + (update.statistics[one] - update.weights[one]).double() / share
            for one in (means, variances)
        ]
        found[name] = torch.stack(moved)
    return found


def watch(network: nn.Module, seen: Tensors) -> None:
    """Have a network write into `seen` what `sent_moments` returns, for every batch that goes through it."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            channels = inputs[0].transpose(0, 1).flatten(1)
            seen[name] = torch.stack((channels.mean(1), channels.var(1)))

        return note

    for name, module in batch_norms(network).items():
        module.register_forward_pre_hook(hook(name))


def mismatch(found: Mapping[str, Tensor], sent: Mapping[str, Tensor]) -> Tensor:
    """Return how far moments are from those that were sent, in units of the channels' variance, (members,).

    Args:
        found: by batch norm, (members, 2, channels).
        sent: the same; not empty.
    """
    each = []
    for name, truth in sent.items():
        variance = truth[:, 1].clamp_min(1e-6)
        apart = (found[name] - truth).square()
        each.append((apart[:, 0] / variance + apart[:, 1] / variance.square()).mean(1))
    return torch.stack(each).mean(0)


def disagreement(x: Tensor, victims: Tensor, counted: Tensor | None = None) -> Tensor:
    """Return how far each member's images are from the mean of its victim's members: squared, the mean over pixels.

    The group consistency of GradInversion (Yin et al., arXiv 2104.07586, section 3.4) without its
    registration: restarts agree on pixels, or not.

    Args:
        x: (members, images, channels, height, width).
        victims: whose restart each is, (members,).
        counted: which members the mean is of, (members,), or None for all. Those that are done are not: how long they
            stay in the stack depends on who else is in it.

    Returns:
        (members,).
    """
    if counted is None:
        counted = torch.ones_like(victims, dtype=torch.bool)
    names, place = torch.unique(victims, return_inverse=True)
    flat, count = x.flatten(1), torch.bincount(place[counted], minlength=len(names)).clamp_min(1)
    known = flat.detach()[counted]
    total = flat.new_zeros(len(names), flat.shape[1]).index_add_(0, place[counted], known)
    return (flat - (total / count[:, None])[place]).square().mean(1)
