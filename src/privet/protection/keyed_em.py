"""Keyed error-minimizing noise: EM confined to what a keyed stem takes away."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from privet.errors import UsageError
from privet.images.image_set import ImageSet
from privet.learning.job import Job
from privet.models.keyed_stem import KeyedStem
from privet.protection.base import Perturb
from privet.protection.em import EM
from privet.protection.keyed import Keyed, refuse_other_sizes
from privet.protection.minimise import Confine


@dataclass(frozen=True, kw_only=True)
class KeyedEM(Keyed, EM):
    """Error-minimizing noise confined to what a keyed stem takes away: whoever has the stem still learns.

    The aim is that of Ungeneralizable Examples (Ye and Wang, arXiv 2404.14016): data that stay learnable for
    whom they are licensed to. The way is ours. Each descent of EM moves along the gradient's part in the stem's span,
    by its sign in every group; the delivered noise is the nearest in whole numbers that never clips. So the stem
    makes of a protected image, bit for bit, what it makes of the original, and the licensee loses what the
    stem costs and nothing else, with any network and any training. To others it is error-minimizing noise of
    fewer dimensions. What they can do against it: docs/licensing.md.

    The settings of EM apply, and

    Attributes:
        group: values in a group of the stem; it costs one of so many dimensions.
        tile: side of the stem's tile in pixels.
        grey: the stem moves the channels together, as grey files need. What such noise is worth is not measured.
    """

    group: int = 8
    tile: int = 8
    grey: bool = False

    name: ClassVar[str] = "keyed-em"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # EM's own, but for views: without, networks that augment do not see the noise.
        "paper": {"views": 1},
        "cpu": {
            "surrogate": "vgg11-w16",
            "train_steps": 40,
            "batch_size": 128,
            "noise_steps": 2,
            "step_size": 1.6,
            "stop_error": 0.0,
            "max_rounds": 12,
            "views": 1,
        },
    }

    @cached_property
    def stem(self) -> KeyedStem:
        """What a licensee gets.

        Raises:
            UsageError: no key, or no such stem.
        """
        self.check_key()
        return KeyedStem.from_key(self.key, group=self.group, tile=self.tile, grey=self.grey)

    def settings(self) -> dict[str, Any]:
        """Return every setting by name, as `Keyed` does."""
        self.stem  # noqa: B018 - before anything is written
        return super().settings()

    def _confine(self) -> Confine:
        def confine(gradient: Tensor) -> Tensor:
            return self.stem.spread(self.stem.amplitude(gradient), (gradient.shape[2], gradient.shape[3]))

        return confine

    def _perturb(self, images: ImageSet, job: Job) -> Perturb:
        self._refuse(images)
        wanted = super()._perturb(images, job)

        def perturb(index: Tensor, randomness: torch.Generator) -> Tensor:
            delta = wanted(index, randomness).cpu()
            return self.stem.project(delta, images.pixels[index], epsilon=self.epsilon)

        return perturb

    def _refuse(self, images: ImageSet) -> None:
        if bool(images.grey.any()) and not self.grey:
            raise UsageError(
                "Some images are grey, and their channels must move together: give keyed-em the setting grey=true."
            )
        refuse_other_sizes(images)
