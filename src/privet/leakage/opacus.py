"""Records of steps of differentially private training with Opacus, to be attacked like any others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from privet.errors import UsageError
from privet.learning.update import Treatment, Update, short

WRAPPER = "_module."  # what Opacus has before the names of a network's tensors


def record_steps(model: nn.Module, optimizer: Any, keep: Callable[[Update], object], **facts: Any) -> None:
    """Have an Opacus optimiser hand every step it takes to `keep`, as whoever sees its gradients gets it.

        model, optimizer, loader = PrivacyEngine().make_private(...)
        record_steps(model, optimizer, updates.append, architecture="lenet", classes=10, size=(32, 32))

    Each image's gradient was clipped, and noise was added to their sum; the record says so. It holds the
    mean over the images that took part, of whom the attacker is taken to know the number. A step in which nobody took
    part, as Poisson sampling draws now and then, is noise alone and not recorded.

    Args:
        model: what `make_private` returned.
        optimizer: likewise.
        keep: told every step with images, before the weights change.
        facts: the record's other attributes, as for `Update.of`, but for batch size and treatment.

    Raises:
        UsageError: at a step whose batch came in several pieces.
    """

    def step(optimizer: Any) -> None:
        if optimizer.accumulated_iterations != 1:
            raise UsageError(
                f"This step's batch came in {optimizer.accumulated_iterations} pieces; record steps on whole batches."
            )
        count = len(optimizer.grad_samples[0])
        if count == 0:
            return
        divided = optimizer.expected_batch_size if optimizer.loss_reduction == "mean" else 1
        spread = optimizer.noise_multiplier * optimizer.max_grad_norm / count
        named = [(name.removeprefix(WRAPPER), one) for name, one in model.named_parameters()]
        update = Update.of(
            getattr(model, WRAPPER[:-1], model),
            {short(name): one.grad * (divided / count) for name, one in named if one.grad is not None},
            batch_size=count,
            treatment=Treatment(
                clip=optimizer.max_grad_norm, noise="gaussian" if spread else None, noise_scale=spread
            ),
            **facts,
        )
        keep(update)

    optimizer.attach_step_hook(step)
