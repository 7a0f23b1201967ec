"""What every recovery is: a countermeasure that makes protected images learnable again."""

from __future__ import annotations

from abc import ABC, abstractmethod

from privet.images.image_set import ImageSet
from privet.learning.train import Learner


class Recovery(ABC):
    """What an unauthorised party does against a protection: to the images, or to its training."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The name that `create_recovery` takes."""

    def recover(self, images: ImageSet) -> ImageSet:
        """Return the training images as the learner gets them."""
        return images

    def present(self, images: ImageSet) -> ImageSet:
        """Return the test images as the trained network gets them."""
        return images

    def adapt(self, learner: Learner) -> Learner:
        """Return how the learner trains."""
        return learner


class Nothing(Recovery):
    """No countermeasure."""

    name = "none"
