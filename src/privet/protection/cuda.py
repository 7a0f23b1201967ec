"""Convolution-based unlearnable data (CUDA)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from privet.errors import UsageError
from privet.images.budget import UNBOUNDED, Budget
from privet.images.image_set import ImageSet
from privet.learning.job import Job
from privet.protection.base import Perturb, Protection
from privet.seeds import generator


@dataclass(frozen=True, kw_only=True)
class CUDA(Protection):
    """Class-wise convolutions (Sadasivan et al., arXiv 2303.04278): each class is blurred in its own way.

    No surrogate and no training. The filter of a class has weights drawn from [0, blur] and a 1 at a
    random place; every image of the class goes through it, channel by channel, its edges continued,
    and is divided by its largest value. Not additive, so what takes noise off does not help.

    No norm bounds the change: images are visibly blurred, and differ in brightness. Files larger than
    what networks see get the blur of the small image, enlarged.

    Attributes:
        blur: largest weight beside the 1. Larger kernels want less.
        kernel: side of the filter in pixels.
    """

    blur: float = 0.3
    kernel: int = 3

    name: ClassVar[str] = "cuda"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel < 3 or self.kernel % 2 == 0 or self.blur <= 0:
            raise UsageError(
                f"cuda needs an odd kernel of at least 3 and a positive blur, got {self.kernel} and {self.blur}."
            )

    @property
    def budget(self) -> Budget:
        return UNBOUNDED

    def _perturb(self, images: ImageSet, job: Job) -> Perturb:
        draws, values = generator(job.seed, "filters"), self.kernel**2
        filters = torch.rand(images.classes, values, generator=draws) * self.blur
        place = torch.randint(0, values, (images.classes, 1), generator=draws)
        filters = filters.scatter_(1, place, 1.0)

        def perturb(index: Tensor, randomness: torch.Generator) -> Tensor:
            x = images.pixels[index].float()
            height, width = images.size
            padded = F.pad(x, (self.kernel // 2,) * 4, mode="replicate")
            seen = torch.zeros_like(x)
            for tap, weight in enumerate(filters[images.labels[index]].T):
                top, left = divmod(tap, self.kernel)
                seen += weight.view(-1, 1, 1, 1) * padded[:, :, top : top + height, left : left + width]
            return seen * (255 / seen.amax((1, 2, 3), keepdim=True).clamp(min=1)) - x

        return perturb
