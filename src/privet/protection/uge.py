"""Ungeneralizable examples (UGE): images meant to teach nobody but chosen networks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import exp
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from privet.errors import UsageError
from privet.images.augment import augmentation_for
from privet.images.image_set import ImageSet
from privet.learning.chunks import CHUNK
from privet.learning.job import Job
from privet.learning.train import Learner
from privet.models import placeless
from privet.protection.authorised import derangement, initial_weights
from privet.protection.base import Bounded, Perturb
from privet.protection.feature_space import train_space
from privet.protection.keyed import Keyed
from privet.protection.minimise import Batch, Batches
from privet.protection.noise import Generated, Noise, Stored
from privet.protection.objective import Objective
from privet.protection.trajectory import Point, follow
from privet.seeds import generator

CHOICES = {
    "parameters": ("direct", "generator"),
    "matching": ("cosine", "residual"),
    "distance": ("repel", "permute", "surrogate"),
    "weighting": ("dual", "paper"),
}
ROUNDED = 0.2  # of the steps, the last, see noise in whole 1/255
MEMORY = 0.05  # share of a step in the running mean that is held against the tolerance
HASTE = 0.05  # how fast the weight of the matching follows, in powers of e a step
LEAST, MOST = 1e-2, 1e3  # it


@dataclass(frozen=True, kw_only=True)
class UGE(Keyed, Bounded):
    """Ungeneralizable examples after Ye and Wang (arXiv 2404.14016), reconstructed: there is no code to compare.

    The vendor chooses networks, by architecture and secret initial weights θ_0, that shall learn from the
    published images x_u as from the originals x, while all others shall not:

        min over |x_u - x| <= ε of  w L_match + w_d L_distance + w_u L_undistil

    L_match compares the gradients that x and x_u give at random points of the authorised network's training;
    L_distance drives x_u away from x in a common space of features; L_undistil spoils what the trained network's
    answers on x_u could teach others. That there are these three terms, a bound and a generator is known from the
    abstract and a caption; that they are summed, and a cosine distance at random epochs, from summaries by others. All
    else is a reconstruction, as the formulas were not to be had. Ours are in particular:

    - noise of each image by signed descents instead of a generator (`parameters`), which is `epsilon * tanh(U)`
      and not the clamp of its output, as a clamp has no gradient outside;
    - the same random view of x and x_u, batch norm as in training, weights of two dimensions or more;
    - `residual`: |g_u - g|² over the squared norm of the mean gradient. A small angle between gradients of a batch can
      hide a deviation that is the same in all batches and adds up along the training;
    - points on the way of a training on the current x_u (`refreshes`) beside those on the originals;
    - features of networks trained on the images to be protected instead of CLIP's, whitened;
      `permute` and `surrogate`, which move every class towards another that the key chooses;
    - the undistillation: softened answers on the wrong classes differ, where the network is late and sure;
    - the weight of the matching, which follows how good the match is (`weighting`).

    What we measured protects nothing: the images teach the authorised network and all others alike (docs/methods.md).

    Of several processes each does the whole matching; the training and the last pass are shared.

    Attributes:
        authorised: architectures of the authorised networks, each with weights of its own.
        parameters: "direct" (each image its noise) or "generator" (a UNet of image and label; with a budget of 1 some
            of its noise can round to nothing).
        matching: "cosine" or "residual".
        distance: "repel" (from the image's own features), "permute" (from its class's mean towards another's)
            or "surrogate" (the encoders take it for the other class).
        encoders: architectures whose features count, `simclr:` before one that learns without labels. An
            authorised architecture among them is a decoy: it starts from other weights than the authorised network.
        encoder_epochs: of their training on the originals.
        weighting: "dual" (the weight of the matching rises while the match is worse than `tolerance`, and
            falls while it is better) or "paper" (it is 1).
        tolerance: what the running mean of L_match is kept at.
        distance_weight: w_d.
        undistil: w_u.
        train_epochs: of the authorised networks, trained as `Learner` does.
        points: of each of their trainings.
        refreshes: how often they are trained on what the images are by then.
        passes: over the images before the first refresh, and after each.
        batch_size: images a step, of the noise and of all networks.
        step_size: of a descent in 1/255, at first; the steps become linearly shorter. Not for a generator.
        flip: whether views are mirrored; no for handwriting.
    """

    authorised: tuple[str, ...] = ("resnet18",)
    parameters: str = "direct"
    matching: str = "residual"
    distance: str = "surrogate"
    encoders: tuple[str, ...] = ("resnet18", "vgg11")
    encoder_epochs: int = 40
    weighting: str = "dual"
    tolerance: float = 0.3
    distance_weight: float = 0.3
    undistil: float = 0.1
    train_epochs: int = 60
    points: int = 12
    refreshes: int = 3
    passes: int = 10
    batch_size: int = 128
    step_size: float = 0.8
    flip: bool = True

    name: ClassVar[str] = "uge"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # What is known of the paper; numbers are not.
        "paper": {
            "parameters": "generator",
            "matching": "cosine",
            "distance": "repel",
            "encoders": ("simclr:resnet18",),
            "encoder_epochs": 200,
            "weighting": "paper",
            "refreshes": 0,
            "passes": 50,
        },
        # For some thousands of small images.
        "cpu": {
            "authorised": ("vgg11-w16",),
            "encoders": ("vgg11-w16", "cnn-w16"),
            "encoder_epochs": 12,
            "train_epochs": 12,
            "refreshes": 1,
            "passes": 5,
            "step_size": 2.0,
        },
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for setting, known in CHOICES.items():
            if (value := getattr(self, setting)) not in known:
                raise UsageError(f"Unknown {setting} {value!r}; expected {' or '.join(known)}.")
        least = {
            "encoder_epochs": 1,
            "train_epochs": 1,
            "points": 2,
            "refreshes": 0,
            "passes": 1,
            "batch_size": 2,
        }
        for setting, number in least.items():
            if getattr(self, setting) < number:
                raise UsageError(f"uge needs {setting} of at least {number}, got {getattr(self, setting)}.")
        for setting in ("authorised", "encoders"):
            if not isinstance(getattr(self, setting), tuple) or not getattr(self, setting):
                raise UsageError(f"uge needs {setting} as a tuple of at least one architecture.")
        if min(self.tolerance, self.step_size) <= 0 or min(self.distance_weight, self.undistil) < 0:
            raise UsageError("uge needs a positive tolerance and step_size, and weights of at least 0.")

    def settings(self) -> dict[str, Any]:
        """Return every setting by name, as `Keyed` does; pretrained encoders by their hash."""
        known = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in super().settings().items()
        }
        return {**known, "encoders": [placeless(name) for name in self.encoders]}

    def networks(self, images: ImageSet) -> list[nn.Module]:
        """Return the authorised networks as they start; what a licensee gets, saved with `save_model`."""
        self.check_key()
        return [
            initial_weights(self.key, name, classes=images.classes, size=images.size, number=number)
            for number, name in enumerate(self.authorised)
        ]

    def _perturb(self, images: ImageSet, job: Job) -> Perturb:
        batches = Batches(images, job.runtime)
        noise = self._optimise(images, batches, job)

        def perturb(index: Tensor, randomness: torch.Generator) -> Tensor:
            return noise(index, batches[index]).detach() * 255

        return perturb

    def _optimise(self, images: ImageSet, batches: Batches, job: Job) -> Noise:
        """Return noise that lowers the objective; enter into the job's facts how well it does in the end."""
        noise = self._start(images, job)
        size = min(self.batch_size, len(images))
        per_pass = len(images) // size
        per_round = self.passes * per_pass
        steps = (self.refreshes + 1) * per_round
        path = job.file("uge.safetensors")
        state = noise.load(path) or {"step": 0, "weight": 1.0, "level": self.tolerance, "sums": {}}
        objective = self._objective(images, job) if state["step"] < steps else None
        originals: list[list[Point]] = []
        pools: list[list[Point]] = []
        for step in range(state["step"], steps):
            assert objective is not None
            if not pools or step % per_round == 0:
                round_ = step // per_round + 1
                originals = originals or self._follow(images, images, "originals", job)
                pools = originals
                if round_ > 1:
                    changed = self._changed(noise, images, batches)
                    latest = self._follow(changed, images, f"round-{round_}", job)
                    pools = [one + other for one, other in zip(originals, latest, strict=True)]
            if step % per_pass == 0:
                state["sums"] = {}
            order = torch.randperm(len(images), generator=generator(job.seed, "order", step // per_pass))
            index = order[step % per_pass * size :][:size]
            chosen = [
                pool[int(torch.randint(len(pool), (), generator=generator(job.seed, "point", step, number)))]
                for number, pool in enumerate(pools)
            ]
            measured = self._descend(
                noise,
                index,
                batches[index],
                objective,
                chosen,
                step / steps,
                state["weight"],
                job.random("views", step),
            )
            if self.weighting == "dual":
                self._steer(state, measured[self.matching])
            state["sums"] = {name: state["sums"].get(name, 0.0) + value for name, value in measured.items()}
            state["step"] = step + 1
            stage = f"round {step // per_round + 1}: matching gradients"
            job.progress(stage, (step % per_round + 1) * size, per_round * size)
            # A round is always kept: the training that follows takes long.
            if path is not None and job.checkpoint_due(last=(step + 1) % per_round == 0):
                noise.save(path, state)
        means = {name: value / per_pass for name, value in state["sums"].items()}
        job.facts.update(means, matching_weight=state["weight"])
        return noise

    def _steer(self, state: dict[str, Any], mismatch: float) -> None:
        """Raise the weight of the matching while the mean of the mismatch is above the tolerance, else lower it.

        The mean counts: at single points the mismatch is far below it or far above, and each step sees one.
        """
        state["level"] += MEMORY * (mismatch - state["level"])
        excess = min(1.0, state["level"] / self.tolerance - 1)
        state["weight"] = min(MOST, max(LEAST, state["weight"] * exp(HASTE * excess)))

    def _start(self, images: ImageSet, job: Job) -> Noise:
        if self.parameters == "generator":
            return Generated(images, epsilon=self.epsilon / 255, job=job)
        return Stored(images, epsilon=self.epsilon / 255, step_size=self.step_size / 255, job=job)

    def _objective(self, images: ImageSet, job: Job) -> Objective:
        return Objective(
            matching=self.matching,
            distance=self.distance,
            distance_weight=self.distance_weight,
            undistil=self.undistil,
            networks=self._placed(images, job),
            spaces=[
                train_space(images, self._learner(name, self.encoder_epochs), number=number, job=job)
                for number, name in enumerate(self.encoders)
            ],
            targets=derangement(self.key, images.classes).to(job.runtime.device),
        )

    def _changed(self, noise: Noise, images: ImageSet, batches: Batches) -> ImageSet:
        """Return the images as they would be published now."""
        chunks = torch.split(torch.arange(len(images)), CHUNK)
        pixels = [self._bytes(images, index, noise(index, batches[index]).detach() * 255) for index in chunks]
        return images.with_pixels(torch.cat(pixels))

    def _follow(self, images: ImageSet, originals: ImageSet, name: str, job: Job) -> list[list[Point]]:
        """Return points of each authorised network's training on the images."""
        return [
            follow(
                model,
                self._learner(architecture, self.train_epochs),
                images,
                originals,
                count=self.points,
                name=f"authorised-{number + 1}-{name}",
                job=job,
            )
            for number, (model, architecture) in enumerate(
                zip(self._placed(originals, job), self.authorised, strict=True)
            )
        ]

    def _placed(self, images: ImageSet, job: Job) -> list[nn.Module]:
        """Return the authorised networks on the device, never compiled: that has no second derivative."""
        return [
            model.to(job.runtime.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
            for model in self.networks(images)
        ]

    def _descend(
        self,
        noise: Noise,
        index: Tensor,
        batch: Batch,
        objective: Objective,
        points: list[Point],
        done: float,
        weight: float,
        randomness: torch.Generator,
    ) -> dict[str, float]:
        """Do one step of the noise on a batch; return what the objective consisted of."""
        delta = noise(index, batch)
        tied = torch.where(batch.grey.view(-1, 1, 1, 1), delta.mean(1, keepdim=True), delta)
        changed = (batch.x + tied).clamp(0, 1)
        if done >= 1 - ROUNDED:
            changed = changed + ((changed.detach() * 255).round() / 255 - changed.detach())
        size = (batch.x.shape[2], batch.x.shape[3])
        views = augmentation_for(size, flip=self.flip).draw(len(index), size, randomness)
        seen = views.apply(changed.detach()).requires_grad_()
        loss, measured = objective(seen, views.apply(batch.x), batch.labels, points=points, weight=weight)
        gradient = torch.autograd.grad(loss, seen)[0]
        changed.backward(views.adjoint(gradient))  # type: ignore[no-untyped-call]
        noise.descend(index, delta, 1 - done)
        return measured

    def _learner(self, architecture: str, epochs: int) -> Learner:
        """Return how networks are trained here: by the defaults of `Learner`, but for the batch."""
        return Learner(architecture=architecture, epochs=epochs, batch_size=self.batch_size, flip=self.flip)
