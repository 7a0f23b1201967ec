"""A keyed lock: one pattern of noise for each class, which whoever holds the patterns takes off again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from privet.errors import UsageError
from privet.images.image_set import ImageSet
from privet.learning.job import Job
from privet.protection.base import Perturb
from privet.protection.em import EM
from privet.protection.keyed import Keyed, refuse_other_sizes


@dataclass(frozen=True, kw_only=True)
class Lock(Keyed, EM):
    """Class-wise error-minimizing noise as a lock: the licence holds the patterns, and subtracting them unlocks.

    In the manner of Learnability Lock (Peng et al., arXiv 2202.03576), whose transforms are class-wise and
    invertible too. Theirs scale and shift pixels, or are an invertible network; ours only shift, in whole
    numbers, so that nothing is lost but what clips at 0 and 255. Rounds begin from a pattern that follows
    from the key instead of from none, and what they end with gives the signs: every value moves by the whole
    budget. Whoever has the labels and the patterns learns from the originals, with any network and any
    training. The patterns are a secret of each class, not of each image: one pair of an original and its
    protected file gives its class away.

    The settings of EM apply.
    """

    mode: str = "class"

    name: ClassVar[str] = "lock"
    continues: ClassVar[bool] = False  # it finds its own patterns
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # EM's own, but for views: without, networks that augment do not see the noise.
        "paper": {"views": 1},
        "cpu": {**EM.presets["cpu"], "surrogate": "cnn-w32", "max_rounds": 15},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode != "class":
            raise UsageError(f"{self.name} has one pattern for each class: leave mode at 'class'.")

    def _perturb(self, images: ImageSet, job: Job) -> Perturb:
        refuse_other_sizes(images)
        pattern = super()._perturb(images, job)
        # One pattern for the whole class: where some of its files are grey, the channels of all move together.
        tied = bool(images.grey.any())

        def perturb(index: Tensor, randomness: torch.Generator) -> Tensor:
            delta = pattern(index, randomness)
            delta = delta.mean(1, keepdim=True).repeat(1, 3, 1, 1) if tied else delta
            return self.epsilon * delta.sign()

        return perturb

    def _begin(self, images: ImageSet) -> Tensor:
        shape = (images.classes, 3, *images.size)
        start = np.frombuffer(self._secret("lock", int(np.prod(shape))), np.int8).reshape(shape)
        return torch.from_numpy(start.copy()).clamp_(min=-127)  # -128 is no step of packed noise
