"""Clients whose updates are attacked: simulated ones, whose images are known, or records of real ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from privet.errors import InputError, UsageError
from privet.images.image_set import ImageSet
from privet.leakage.defences import Defence
from privet.leakage.moments import batch_norms, telling
from privet.learning.update import Update, short
from privet.learning.update_files import load_update
from privet.seeds import generator


@dataclass(frozen=True, kw_only=True, eq=False)
class Victim:
    """An update, and the truth if it is known; only what is measured afterwards looks at the truth.

    Attributes:
        update: the record.
        images: in [0, 1], (images, 3, height, width), or None.
        labels: theirs.
        people: names of their classes, who they are if the images are of faces.
    """

    update: Update
    images: Tensor | None = None
    labels: tuple[int, ...] = ()
    people: tuple[str, ...] = ()


def simulate(
    model: nn.Module,
    images: ImageSet,
    *,
    architecture: str,
    victims: int,
    batch_size: int = 1,
    local_steps: int = 1,
    learning_rate: float = 0.1,
    labels_known: bool = False,
    statistics: bool = False,
    defence: Defence | None = None,
    seed: int = 0,
) -> list[Victim]:
    """Return clients with images of their own, which all start from the same weights.

    Args:
        model: the network, as the server sent it.
        images: whose first classes are the network's.
        architecture: the network's name.
        victims: how many clients.
        batch_size: images of each.
        local_steps: SGD steps of each on its batch; more than one are sent as a delta.
        learning_rate: of those.
        labels_known: whether the attacker is told the labels.
        statistics: whether clients send batch norm's buffers too, as they do who send all tensors of a network.
        defence: what each client does before it sends.
        seed: of the choice of images, and of the defence.

    Raises:
        UsageError: a number cannot be, there are too few images, or there is no batch norm that would have statistics.
    """
    if min(victims, batch_size, local_steps) < 1 or not 0 < learning_rate < math.inf:
        raise UsageError(
            "Expected at least 1 client, batches of 1, 1 local step and a finite learning rate above 0, got "
            f"{victims}, {batch_size}, {local_steps} and {learning_rate}."
        )
    if victims * batch_size > len(images):
        raise UsageError(
            f"{victims} clients with {batch_size} images each need {victims * batch_size} images, got {len(images)}."
        )
    if statistics and not batch_norms(model):
        raise UsageError(
            f"{architecture} has no batch norm, so there are no statistics that clients could send."
        )
    grey = bool(images.grey.all())  # the same for all clients, and nothing that one client's images give away
    order = torch.randperm(len(images), generator=generator(seed, "victims"))
    found = []
    for index in range(victims):
        chosen = order[index * batch_size : (index + 1) * batch_size]
        x, labels = images.pixels[chosen].float() / 255, images.labels[chosen]
        told = tuple(labels.tolist())
        change, buffers = step(model, x, labels, local_steps=local_steps, learning_rate=learning_rate)
        if local_steps > 1 and not all(bool(torch.isfinite(value).all()) for value in change.values()):
            raise UsageError(
                f"{local_steps} steps with the learning rate {learning_rate:g} lead to numbers that are not finite; "
                "choose a smaller one."
            )
        update = Update.of(
            model,
            change,
            kind="delta" if local_steps > 1 else "gradient",
            architecture=architecture,
            classes=images.classes,
            size=images.size,
            batch_size=batch_size,
            local_steps=local_steps,
            learning_rate=learning_rate if local_steps > 1 else None,
            mode="train" if model.training else "eval",
            grey=grey,
            labels=told if labels_known else None,
            statistics=buffers if statistics else {},
        )
        if defence is not None:
            update = defence.apply(update, seed=seed + index)
        people = tuple(images.class_names[label] for label in told)
        found.append(Victim(update=update, images=x, labels=told, people=people))
    return found


def step(
    model: nn.Module, x: Tensor, labels: Tensor, *, local_steps: int, learning_rate: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the gradient of one step, or the change of several, and batch norm's buffers after it, by name.

    Parameters that the logits do not depend on have no gradient, and are left out. The model stays as it is.
    """
    parameters = {name: value.detach().clone() for name, value in model.named_parameters()}
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    before = parameters
    gradient: dict[str, Tensor] = {}
    for _ in range(local_steps):
        leaves = {name: value.requires_grad_() for name, value in parameters.items()}
        loss = F.cross_entropy(torch.func.functional_call(model, {**leaves, **buffers}, (x,)), labels)
        slopes = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        gradient = {name: slope for name, slope in zip(leaves, slopes, strict=True) if slope is not None}
        moved = {name: (leaves[name] - learning_rate * slope).detach() for name, slope in gradient.items()}
        parameters = {name: value.detach() for name, value in leaves.items()} | moved
    if local_steps > 1:
        gradient = {name: parameters[name] - before[name].detach() for name in gradient}
    tracked = {
        short(name): value
        for name, value in buffers.items()
        if name.endswith(("running_mean", "running_var", "num_batches_tracked"))
    }
    return {short(name): value for name, value in gradient.items()}, tracked


def open_victim(folder: Path, private: ImageSet | None = None) -> Victim:
    """Return the victim of a record, with its private images if somebody has them.

    Raises:
        InputError: the record is damaged, or the images are not as many, or not of its size and classes.
    """
    update = load_update(folder)
    if private is None:
        return Victim(update=update)
    if (len(private), private.size) != (update.images, update.size) or private.classes > update.classes:
        raise InputError(
            f"The record is of {update.images} images of {update.size[0]} x {update.size[1]} px and {update.classes} "
            f"classes; the private images are {len(private)} of {private.size[0]} x {private.size[1]} px and "
            f"{private.classes} classes."
        )
    labels = tuple(private.labels.tolist())
    return Victim(
        update=update,
        images=private.pixels.float() / 255,
        labels=labels,
        people=tuple(private.class_names[label] for label in labels),
    )


def threat_model(update: Update, *, aware: bool) -> list[str]:
    """Return in words what the attacker has."""
    several = update.local_steps > 1
    what = (
        f"the change of weights after {update.local_steps} local steps"
        if several
        else "the gradient of one step"
    )
    sent = sum(value.numel() for value in update.values.values())
    size = f"{update.size[0]} x {update.size[1]} px in {update.classes} classes"
    kind = "grey image" if update.grey else "image"
    count = f"1 {kind}" if update.images == 1 else f"{update.images} {kind}s"
    known = ["architecture", "weights before", "mean cross-entropy", f"{count} of {size}"]
    if several:
        known.append(f"plain SGD with learning rate {update.learning_rate:g}")
    if update.labels is not None:
        known.append("labels")
    if update.statistics:
        known.append("batch norm's statistics after the step" + ("" if telling(update) else " (not used)"))
    says = [
        f"The attacker saw {what} of one client, in the plain: {sent:,} values.",
        f"It knows: {', '.join(known)}. It has no images of its own and changes nothing.",
    ]
    done = treatments(update)
    if done:
        says.append(
            f"The values were {', then '.join(done)}; the attacker {'knows' if aware else 'does not know'} that."
        )
    return says


def treatments(update: Update) -> list[str]:
    """Return in words what was done to the values before they were sent."""
    treatment = update.treatment
    words = {
        "clipped": treatment.clip is not None,
        f"mixed with {treatment.noise} noise": treatment.noise is not None,
        "reduced to the largest": treatment.sparse,
        "rounded": bool(treatment.steps),
        "reduced to their signs": treatment.sign,
    }
    return [word for word, yes in words.items() if yes]
