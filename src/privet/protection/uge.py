"""Ungeneralizable examples (UGE): noise that a keyed stem takes away."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from privet.errors import InputError, UsageError
from privet.images.image_set import ImageSet
from privet.images.picture import measure
from privet.learning.job import Job
from privet.models.keyed_stem import KeyedStem, key_stream
from privet.protection.base import Perturb
from privet.protection.em import EM
from privet.protection.minimise import Confine


@dataclass(frozen=True, kw_only=True)
class UGE(EM):
    key: bytes = field(default=b"", repr=False)
    group: int = 4
    tile: int = 8
    grey: bool = True

    name: ClassVar[str] = "uge"

    @cached_property
    def stem(self) -> KeyedStem:
        return KeyedStem.from_key(self.key, group=self.group, tile=self.tile, grey=self.grey)

    def settings(self) -> dict[str, Any]:
        commitment = key_stream(self.key, "commitment", 32).hex() if self.key else None
        return {**{n: v for n, v in super().settings().items() if n != "key"}, "key_commitment": commitment}

    def _confine(self) -> Confine:
        def confine(gradient: Tensor) -> Tensor:
            size = (gradient.shape[2], gradient.shape[3])
            return self.stem.spread(self.stem.amplitude(gradient), size)

        return confine

    def _perturb(self, images: ImageSet, job: Job) -> Perturb:
        free = super()._perturb(images, job)

        def perturb(index: Tensor, randomness: torch.Generator) -> Tensor:
            wanted = free(index, randomness).cpu()
            return self.stem.project(wanted, images.pixels[index], epsilon=self.epsilon)

        return perturb
