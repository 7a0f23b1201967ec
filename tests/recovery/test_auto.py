"""The choice of a recovery by the protected images alone."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from tests.conftest import blobs, stop_after
from torch import Tensor

from privet.errors import InputError, UsageError
from privet.files import read_json
from privet.images import ImageSet
from privet.learning import Job, Learner, Runtime
from privet.learning.chunks import Change
from privet.recovery import Auto, Nothing, Recovery, create_recovery
from privet.recovery.base import ImageRecovery

LEARNER = Learner(architecture="resnet8-w8", epochs=8, batch_size=16, flip=False)


@dataclass(frozen=True)
class Cover(ImageRecovery):
    """Paints rows grey."""

    first: int
    last: int

    @property
    def name(self) -> str:
        return f"cover-{self.first}-{self.last}"

    def _change(self, images: ImageSet, job: Job) -> Change:
        def change(index: Tensor, randomness: torch.Generator) -> Tensor:
            pixels = images.pixels[index].clone()
            pixels[:, :, self.first : self.last] = 100
            return pixels

        return change


def marked(count: int = 240) -> ImageSet:
    """Blobs, which show their class above, each with a bright mark below that tells it too."""
    images = blobs(count, size=(16, 16))
    pixels = images.pixels.clone()
    for label in range(3):
        pixels[images.labels == label, :, 11:16, 5 * label : 5 * label + 5] = 255
    return images.with_pixels(pixels)


def chosen(images: ImageSet, candidates: tuple[Recovery, ...], runtime: Runtime) -> str:
    job = Job(runtime=runtime)
    recovered = Auto(candidates, learner=LEARNER).recover(images, job)
    name = str(job.facts["chosen"])
    (winner,) = (one for one in candidates if one.name == name)
    assert torch.equal(recovered.pixels, winner.recover(images, Job(runtime=runtime)).pixels)
    assert name == max(job.facts["scores"], key=job.facts["scores"].__getitem__)
    return name


def test_what_outlives_the_other_candidates_is_chosen(runtime: Runtime) -> None:
    # Without its mark an image is told by its patch, whatever else was done; without its patch by nothing that lasts.
    candidates = (Nothing(), Cover(9, 16), Cover(10, 16), Cover(0, 9))
    assert chosen(marked(), candidates, runtime) in ("cover-9-16", "cover-10-16")


def test_the_sample_bounds_what_is_tried(runtime: Runtime) -> None:
    tried: list[int] = []

    class Counting(Nothing):
        def recover(self, images: ImageSet, job: Job) -> ImageSet:
            tried.append(len(images))
            return images

    auto = Auto((Counting(), Cover(0, 16)), images=40, learner=LEARNER)
    auto.recover(blobs(90, size=(16, 16)), Job(runtime=runtime))
    assert tried == [40, 90]
    with pytest.raises(UsageError, match="at least two different candidates"):
        Auto((Nothing(), Nothing()))
    with pytest.raises(InputError, match="needs at least 3, got 2"):
        auto.recover(blobs(2, size=(16, 16)), Job(runtime=runtime))


def test_everything_that_the_choice_depends_on_is_on_record() -> None:
    auto = Auto((Nothing(), Cover(0, 9)))
    others = (replace(auto, learner=LEARNER), replace(auto, images=7), Auto((Nothing(), Cover(0, 8))))
    assert all(json.dumps(other.record()) != json.dumps(auto.record()) for other in others)


def test_with_a_prior_there_is_one_candidate_more() -> None:
    without, with_prior = create_recovery("auto"), create_recovery("auto", prior="somewhere")
    assert isinstance(without, Auto)
    assert isinstance(with_prior, Auto)
    assert [one.name for one in with_prior.candidates] == [
        *(one.name for one in without.candidates),
        "purify",
    ]


def test_a_killed_choice_keeps_what_it_has_measured(runtime: Runtime, tmp_path: Path) -> None:
    images, auto = marked(60), Auto((Nothing(), Cover(9, 16)), learner=LEARNER)
    whole = Job(runtime=runtime)
    expected = auto.recover(images, whole)
    workspace = tmp_path / "work"
    workspace.mkdir()
    learner_steps = LEARNER.epochs * (48 // LEARNER.batch_size)
    with pytest.raises(KeyboardInterrupt):
        auto.recover(
            images, Job(runtime=runtime, workspace=workspace, progress=stop_after(learner_steps + 5))
        )
    assert list(read_json(workspace / "scores.json")) == ["none"]
    again = Job(runtime=runtime, workspace=workspace)
    assert torch.equal(auto.recover(images, again).pixels, expected.pixels)
    assert again.facts == whole.facts
