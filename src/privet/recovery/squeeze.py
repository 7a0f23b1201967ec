"""Image shortcut squeezing: compression that removes noise and leaves what people see.

Liu, Zhao and Larson, "Image Shortcut Squeezing", arXiv 2301.13838. As there, only the training images are
squeezed; but grayscale, being another representation, is applied to the test images too.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor

from privet.images.image_set import ImageSet
from privet.learning.chunks import Change
from privet.learning.job import Job
from privet.parallel import ordered
from privet.recovery.base import ImageRecovery

WORKERS = 4


class Squeeze(ImageRecovery):
    """A recovery that treats each image alone, with Pillow."""

    def _change(self, images: ImageSet, job: Job) -> Change:
        return lambda index, randomness: self._each(images.pixels[index])

    def _each(self, pixels: Tensor) -> Tensor:
        """Squeeze images, uint8, (images, 3, height, width)."""
        squeezed = pixels.clone()

        def one(index: int) -> NDArray[np.uint8]:
            picture = Image.fromarray(np.ascontiguousarray(pixels[index].permute(1, 2, 0).numpy()))
            return np.asarray(self._squeeze(picture).convert("RGB"))

        for index, rgb in ordered(one, range(len(pixels)), WORKERS):
            squeezed[index] = torch.from_numpy(rgb.copy()).permute(2, 0, 1)
        return squeezed

    def _squeeze(self, picture: Image.Image) -> Image.Image:
        raise NotImplementedError


@dataclass(frozen=True)
class JPEG(Squeeze):
    """Compress each image as JPEG (4:2:0) and decode it again; quality 10 is the paper's."""

    quality: int

    @property
    def name(self) -> str:
        return f"jpeg-{self.quality}"

    def _squeeze(self, picture: Image.Image) -> Image.Image:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=self.quality, subsampling="4:2:0")
        return Image.open(buffer)


@dataclass(frozen=True)
class BitDepth(Squeeze):
    """Keep the highest bits of each channel; 2 is the paper's."""

    bits: int

    @property
    def name(self) -> str:
        return f"bitdepth-{self.bits}"

    def _squeeze(self, picture: Image.Image) -> Image.Image:
        return ImageOps.posterize(picture, self.bits)


@dataclass(frozen=True)
class Blur(Squeeze):
    """Blur with a Gaussian of this standard deviation in pixels."""

    sigma: float

    @property
    def name(self) -> str:
        return f"blur-{self.sigma:g}"

    def _squeeze(self, picture: Image.Image) -> Image.Image:
        return picture.filter(ImageFilter.GaussianBlur(self.sigma))


@dataclass(frozen=True)
class Grayscale(Squeeze):
    """Replace colours by their luma (ITU-R 601), in training and test images."""

    name = "grayscale"

    def present(self, images: ImageSet, facts: Mapping[str, Any]) -> ImageSet:
        return images.with_pixels(self._each(images.pixels))

    def _squeeze(self, picture: Image.Image) -> Image.Image:
        return picture.convert("L")
