"""Spaces of features in which protected images move away from their originals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from privet.images.image_set import ImageSet
from privet.learning.job import Job
from privet.learning.probe import features, probe, with_probe
from privet.learning.runtime import Runtime
from privet.learning.train import Learner, learn
from privet.models import create_model, is_pretrained
from privet.models.projection import other_head
from privet.seeds import derive

SMALLEST = 1e-3  # directions with a smaller share of the largest variance are left out
MARGIN = 0.9  # quantile of the distances between classes, from which on images count as far
TEST = 256  # of its own images tell how an encoder gets on


@dataclass(frozen=True, kw_only=True)
class Whitening:
    """Moves and scales features so that those it was fitted to have mean 0 and covariance 1.

    Attributes:
        mean: (features,).
        matrix: (features, directions); directions that hardly vary are left out.
    """

    mean: Tensor
    matrix: Tensor

    @classmethod
    def fit(cls, rows: Tensor) -> Self:
        """Fit to features, (images, features)."""
        mean = rows.double().mean(0)
        centred = rows.double() - mean
        variance, directions = torch.linalg.eigh(centred.T @ centred / len(rows))
        kept = variance > SMALLEST * variance.amax().clamp(min=1e-12)
        matrix = directions[:, kept] * variance[kept].rsqrt()
        return cls(mean=mean.to(rows.dtype), matrix=matrix.to(rows.dtype))

    def __call__(self, rows: Tensor) -> Tensor:
        """Map features, (images, features), to whitened ones, (images, directions)."""
        return (rows - self.mean) @ self.matrix


@dataclass(frozen=True, kw_only=True)
class FeatureSpace:
    """A frozen network and what original images look like to it, in whitened features.

    Distances are mean squares over directions: between originals that have nothing in common about 2.

    Attributes:
        model: a classifier.
        whitening: of what its last layer gets.
        prototypes: mean of each class, (classes, directions).
        runtime: precision of the network's passes; all else is float32.
        margin: a distance that nine tenths of the pairs of originals of different classes do not exceed.
    """

    model: nn.Module
    whitening: Whitening
    prototypes: Tensor
    runtime: Runtime
    margin: float

    @classmethod
    def fit(cls, model: nn.Module, images: ImageSet, job: Job) -> Self:
        """Fit the whitening, the prototypes and the margin to original images."""
        rows = features(model, images, runtime=job.runtime)
        whitening = Whitening.fit(rows)
        z, labels = whitening(rows), images.labels.to(rows.device)
        membership = F.one_hot(labels, images.classes).to(z.dtype)  # (images, classes)
        prototypes = membership.T @ z / membership.sum(0).clamp(min=1)[:, None]
        # Images lie sorted by class: half a turn brings others.
        pairs = [
            (z - z.roll(turn, 0)).square().mean(1)[labels != labels.roll(turn)] for turn in _turns(len(z))
        ]
        apart = torch.cat(pairs)
        margin = float(apart.sort().values[int(MARGIN * (len(apart) - 1))]) if len(apart) else 1.0
        return cls(
            model=model,
            whitening=whitening,
            prototypes=prototypes,
            runtime=job.runtime,
            margin=max(margin, 1e-6),
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Map images in [0, 1], (batch, 3, height, width), to whitened features, (batch, directions)."""
        with other_head(self.model, nn.Identity()), self.runtime.autocast():
            rows = self.model(x)
        return self.whitening(rows.float())

    def repel(self, x: Tensor, originals: Tensor) -> Tensor:
        """Return how near images still are to their originals: 1 in the same place, 0 from the margin on.

        Where they are the originals the gradient is zero, so whoever lowers this must start elsewhere.
        """
        with torch.no_grad():
            own = self(originals)
        return F.relu(1 - (self(x) - own).square().mean(1) / self.margin).mean()

    def permute(self, x: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
        """Return how far images are on the side of their class's prototype: 1 there, 0 from the target's on.

        Along the line that joins the two prototypes; what lies across does not count.
        """
        z, own, other = self(x), self.prototypes[labels], self.prototypes[targets]
        length = (own - other).square().sum(1).clamp(min=1e-6)
        return F.relu(((z - other) * (own - other)).sum(1) / length).mean()

    def surrogate(self, x: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy of the network's answers to the targets."""
        with self.runtime.autocast():
            logits = self.model(x)
        return F.cross_entropy(logits.float(), targets)


def train_space(images: ImageSet, learner: Learner, *, number: int, job: Job) -> FeatureSpace:
    """Train an encoder on the original images, with labels or (`simclr:`) without, and fit its feature space.

    A pretrained encoder (`transformers:FOLDER`) stays as it is, with a linear probe as its last layer.

    Args:
        images: the originals.
        learner: the encoder and how it is trained; one without labels gets a linear probe as its last layer.
        number: of the encoder.
        job: where and how; with a workspace, a killed run goes on.
    """
    if is_pretrained(learner.architecture):
        model = create_model(learner.architecture, classes=images.classes, size=images.size)
        model = job.runtime.place(model.eval().requires_grad_(False))
        layer, _ = probe(model, images, runtime=job.runtime)
        return FeatureSpace.fit(with_probe(model, layer.requires_grad_(False)), images, job)
    learned = learn(
        images,
        images.subset(list(range(0, len(images), -(-len(images) // TEST)))),
        learner,
        runtime=job.runtime,
        seed=derive(job.seed, "encoder", number),
        checkpoint=job.file(f"encoder-{number}.safetensors"),
        progress=lambda stage, done, total: job.progress(f"encoder {number + 1}: {stage}", done, total),
    )
    return FeatureSpace.fit(learned.model.eval().requires_grad_(False), images, job)


def _turns(count: int) -> set[int]:
    return {count // 2, count // 3, count // 5} - {0}
