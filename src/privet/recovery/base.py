"""What every recovery is: a countermeasure that makes protected images learnable again."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from privet.images.image_set import ImageSet
from privet.learning.chunks import Change, change_in_chunks
from privet.learning.job import Job
from privet.learning.train import Learner


class Recovery(ABC):
    """What an unauthorised party does against a protection: to the images, or to its training.

    It has the protected images and their labels, and never the clean ones.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """The name that `create_recovery` takes."""

    def record(self) -> dict[str, Any]:
        """Return what the recovered bytes depend on, as JSON values."""
        settings: dict[str, Any] = dataclasses.asdict(self) if dataclasses.is_dataclass(self) else {}
        return {"recovery": self.name, "settings": settings}

    @property
    def multiplies(self) -> bool:
        """Whether it may return several versions of an image."""
        return False

    @property
    def trains(self) -> bool:
        """Whether it is a way of training, of which no files can be made."""
        return False

    def recover(self, images: ImageSet, job: Job) -> ImageSet:
        """Return the training images as the learner gets them.

        They keep their order; where there are several of each, all first ones come first, then all second ones.
        """
        return images

    def present(self, images: ImageSet, facts: Mapping[str, Any]) -> ImageSet:
        """Return the test images as the trained network gets them.

        Args:
            images: the test images.
            facts: what `recover` found out, which is in its job's facts.
        """
        return images

    def adapt(self, learner: Learner) -> Learner:
        """Return how the learner trains."""
        return learner


class ImageRecovery(Recovery):
    """A recovery that changes the training images; it implements `_change`, and grey files stay grey."""

    @final
    def recover(self, images: ImageSet, job: Job) -> ImageSet:
        """Return the training images as the learner gets them, made chunk by chunk."""

        def prepare() -> Change:
            change = self._change(images, job)

            def keep_grey(index: Tensor, randomness: torch.Generator) -> Tensor:
                pixels = change(index, randomness).cpu()
                grey = images.grey[index]
                pixels[grey] = pixels[grey].float().mean(1, keepdim=True).round().to(torch.uint8)
                return pixels

            return keep_grey

        pixels = change_in_chunks(
            images, job, prepare, purpose="recover", together=lambda: self._together(images, job)
        )
        return images.with_pixels(pixels)

    @abstractmethod
    def _change(self, images: ImageSet, job: Job) -> Change:
        """Do what has to be done once, and return the function that recovers a chunk of the images."""

    def _together(self, images: ImageSet, job: Job) -> int | None:
        """Return how many images are recovered together, as `change_in_chunks` asks."""
        return None


class Nothing(Recovery):
    """No countermeasure."""

    name = "none"
