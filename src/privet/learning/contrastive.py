"""Contrastive learning (SimCLR, Chen et al., arXiv 2002.05709), judged by a linear probe.

The encoder never sees a label: it learns to tell two views of one image from the views of all others. A
linear layer on its frozen features then learns the labels, and is measured on clean images.

The probe learns from the images that the encoder learned from: whoever found protected files has no others. The
authors of contrastive poisoning (arXiv 2202.11202) fit it to clean images instead, and so measure the encoder alone;
`probe` does that too, given such images.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from privet.images.contrastive_views import ContrastiveViews
from privet.images.image_set import ImageSet
from privet.learning.attack import ascend, frozen
from privet.learning.probe import probe, with_probe
from privet.learning.runtime import Runtime
from privet.learning.train import Epoch, Learned, Learner, accuracy, begin, keep, origin_of, schedule
from privet.models.projection import other_head
from privet.progress import Progress, silent
from privet.seeds import derive, generator

TEMPERATURE = 0.5


def nt_xent(projections: Tensor, *, temperature: float = TEMPERATURE) -> Tensor:
    """Return the normalised, temperature-scaled cross-entropy, averaged over all views (SimCLR, eq. 1).

    Every view must find the other view of its image among all views but itself, by cosine similarity.

    Args:
        projections: (2 * images, width); view i and view i + images are of one image.
        temperature: similarities are divided by it.
    """
    z = F.normalize(projections, dim=1)
    similarity = z @ z.T / temperature
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    partner = torch.arange(len(z), device=z.device).roll(len(z) // 2)
    return F.cross_entropy(similarity.masked_fill(itself, -torch.inf), partner)


def contrastive_loss(model: nn.Module, views: Tensor, *, runtime: Runtime) -> Tensor:
    """Return `nt_xent` of a network's projections of views, (2 * images, 3, height, width), in [0, 1]."""
    with runtime.autocast():
        projections = model(views)
    return nt_xent(projections.float())


def contrastive_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, views: Tensor, *, rate: float, runtime: Runtime
) -> Tensor:
    """Do one step of the optimiser on two views of every image; return the loss."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    model.train()
    with torch.enable_grad():
        loss = contrastive_loss(model, views, runtime=runtime)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(model.parameters(), 5.0)
    optimizer.step()
    return loss.detach()


def attacked(
    model: nn.Module, views: Tensor, learner: Learner, randomness: torch.Generator, runtime: Runtime
) -> Tensor:
    """Return views that are harder to match, within the radius of adversarial training (arXiv 2010.13337)."""

    def gradient(inputs: Tensor) -> Tensor:
        inputs = inputs.detach().requires_grad_()
        with torch.enable_grad():
            loss = contrastive_loss(model, inputs, runtime=runtime)
        return torch.autograd.grad(loss, inputs)[0]

    with frozen(model):
        return ascend(
            views,
            gradient,
            radius=learner.radius / 255,
            step_size=learner.step_size / 255,
            steps=learner.attack_steps,
            generator=randomness,
        )


def learn_contrastive(
    train: ImageSet,
    test: ImageSet,
    learner: Learner,
    *,
    runtime: Runtime,
    seed: int = 0,
    checkpoint: Path | None = None,
    progress: Progress = silent,
) -> Learned:
    """Train an encoder without labels; probe it, and measure the probe on clean images, after every epoch.

    Takes and returns what `learn` does, which calls it. In the history `loss` is the contrastive one and
    `train_accuracy` the probe's; the network that comes back is the encoder with the last probe. Of several
    processes each compares the views of its own share of a batch.
    """
    learner = usual(learner, len(train))
    origin = origin_of(train, test, learner, seed) if checkpoint is not None else {}
    model, optimizer, rate, history = begin(
        train, learner, runtime=runtime, seed=seed, checkpoint=checkpoint, origin=origin
    )
    trained = runtime.distribute(model)
    layer: nn.Linear | None = None

    pixels, augmentation = runtime.hold(train.pixels), ContrastiveViews(learner.flip)
    batch = learner.batch_size
    steps = len(train) // batch
    for epoch in range(len(history), learner.epochs):
        order = torch.randperm(len(train), generator=generator(seed, "order", epoch))
        order = order.to(runtime.device)
        randomness = generator(seed, "views", epoch, runtime.rank, device=runtime.device)
        total = torch.zeros((), device=runtime.device)
        with runtime.drawing(derive(seed, "network", epoch, runtime.rank)):
            for step in range(steps):
                index = runtime.share(order[step * batch : (step + 1) * batch])
                x = runtime.take(pixels, index).float() / 255
                views = augmentation.draw(2 * len(index), train.size, randomness).apply(x)
                views = attacked(model, views, learner, randomness, runtime)
                fraction = (epoch * steps + step) / (learner.epochs * steps)
                total += contrastive_step(
                    trained,
                    optimizer,
                    views,
                    rate=rate * schedule(learner.schedule, fraction),
                    runtime=runtime,
                )
                progress("learning", (epoch * steps + step + 1) * batch, learner.epochs * steps * batch)
        runtime.agree(model)
        loss = float(runtime.sum(total)) / steps / runtime.world
        layer, own = probe(model, train, runtime=runtime)
        with other_head(model, layer):
            clean = accuracy(model, test, runtime=runtime)
        loss = loss if math.isfinite(loss) else 1e30
        history.append(Epoch(epoch=epoch + 1, loss=loss, train_accuracy=own, accuracy=clean))
        keep(checkpoint, model, optimizer, history, origin=origin, runtime=runtime)
    if layer is None:  # every epoch was over before
        layer, _ = probe(model, train, runtime=runtime)
    return Learned(model=with_probe(model, layer).eval(), history=tuple(history))


def usual(learner: Learner, images: int) -> Learner:
    """Return a learner with SimCLR's rate and decay for SGD where it names none, and a batch of no more images."""
    batch = min(learner.batch_size, images)
    if learner.adamw:
        return replace(learner, batch_size=batch)
    return replace(
        learner,
        batch_size=batch,
        learning_rate=learner.learning_rate or 0.5 * min(1, batch / 512),
        weight_decay=1e-4 if learner.weight_decay is None else learner.weight_decay,
    )
