"""Choosing a recovery by the protected images alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from privet.errors import InputError, UsageError
from privet.files import read_json, write_json
from privet.images.image_set import ImageSet
from privet.learning.job import Job
from privet.learning.train import Learner, accuracy, learn
from privet.recovery.base import Recovery
from privet.seeds import generator

HELD_OUT = 5  # every fifth image of the sample is not learned from
FEWEST = 3  # images: two to learn from, one to be asked about
# Some noise is learned late: files of AR teach this network something for 10 epochs, and mostly mislead it after 20.
LEARNER = Learner(architecture="resnet10-w16", epochs=20)


@dataclass(frozen=True)
class Auto(Recovery):
    """The candidate from which a network learns what outlives the other candidates: ours.

    No unprotected image is at hand to say what a recovery is worth, and on protected ones a shortcut
    is always right. But a shortcut that one recovery leaves is seldom left by all of them, and what
    the images show is. So every candidate recovers a sample of the protected images; a small network
    learns from four fifths of it, and is asked about the last fifth as each of the others recovers it.
    The lower quartile of these accuracies is the candidate's score. Not their mean: candidates that leave
    the same shortcut would vote for each other. Not the lowest: a candidate that ruins images would decide
    alone. Of those within a standard error of the highest score the first is chosen.

    Attributes:
        candidates: recoveries that change images, the most trusted first.
        images: of the sample, at most.
        learner: the small network, and how it learns.
    """

    candidates: tuple[Recovery, ...]
    images: int = 5000
    learner: Learner = LEARNER

    name = "auto"
    multiplies = True

    def __post_init__(self) -> None:
        if len({candidate.name for candidate in self.candidates}) < max(2, len(self.candidates)):
            raise UsageError(f"auto needs at least two different candidates, got {self.candidates}.")

    def record(self) -> dict[str, Any]:
        settings = {
            "candidates": [candidate.record() for candidate in self.candidates],
            "images": self.images,
            "learner": self.learner.record(),
        }
        return {"recovery": self.name, "settings": settings}

    def recover(self, images: ImageSet, job: Job) -> ImageSet:
        scores = self._scores(images, job)
        highest, asked = max(scores.values()), -(-min(len(images), self.images) // HELD_OUT)
        enough = highest - math.sqrt(highest * (1 - highest) / asked)
        chosen = next(candidate for candidate in self.candidates if scores[candidate.name] >= enough)
        own = replace(job, workspace=job.file(chosen.name), facts={})
        recovered = chosen.recover(images, own)
        job.facts |= {**own.facts, "chosen": chosen.name, "scores": scores}
        return recovered

    def present(self, images: ImageSet, facts: Mapping[str, Any]) -> ImageSet:
        chosen = next(candidate for candidate in self.candidates if candidate.name == facts["chosen"])
        return chosen.present(images, facts)

    def _scores(self, images: ImageSet, job: Job) -> dict[str, float]:
        """Return what each candidate is worth; every process finds out alone, and finds the same."""
        path = job.file("scores.json")
        scores: dict[str, float] = read_json(path) if path is not None and path.is_file() else {}
        if scores.keys() >= {candidate.name for candidate in self.candidates}:
            return scores
        if len(images) < FEWEST:
            raise InputError(
                f"auto learns from a part of the images and asks about the rest, so it needs at least {FEWEST}, got "
                f"{len(images)}. Name a recovery instead."
            )
        order = torch.randperm(len(images), generator=generator(job.seed, "sample"))[: self.images]
        sample = images.subset(order)
        alone = replace(job.runtime, rank=0, world=1)
        kept = job.workspace if job.runtime.rank == 0 else None
        recovered = {}
        for candidate in self.candidates:
            folder = None if kept is None else kept / f"sample-{candidate.name}"
            trial = replace(job, runtime=alone, workspace=folder, facts={})
            recovered[candidate.name] = candidate.recover(sample, trial)
        held = {name: torch.arange(len(one)) % len(sample) % HELD_OUT == 0 for name, one in recovered.items()}
        views = {name: one.subset(held[name].nonzero().flatten()) for name, one in recovered.items()}
        for candidate in self.candidates:
            name = candidate.name
            if name in scores:
                continue
            one = recovered[name]
            learned = learn(
                one.subset((~held[name]).nonzero().flatten()),
                views[name],
                self.learner.for_versions(len(one) // len(sample)),
                runtime=alone,
                seed=job.seed,
                checkpoint=None if kept is None else kept / f"sample-{name}.safetensors",
                progress=job.progress,
            )
            others = [view for other, view in views.items() if other != name]
            right = [accuracy(learned.model, view, runtime=alone) for view in others]
            scores[name] = torch.tensor(right, dtype=torch.float64).quantile(0.25).item()
            if kept is not None:
                write_json(kept / "scores.json", scores)
        return scores
