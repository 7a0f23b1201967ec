"""Image shortcut squeezing: compression that removes noise and leaves what people see.

Liu, Zhao and Larson, "Image Shortcut Squeezing", arXiv 2301.13838. As there, JPEG is applied to the
training images alone, and grayscale, being another representation, to the test images too.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from privet.images.image_set import ImageSet
from privet.parallel import ordered
from privet.recovery.base import Recovery

WORKERS = 4


@dataclass(frozen=True)
class JPEG(Recovery):
    """Compress each image as JPEG (4:2:0) and decode it again; quality 10 is the paper's."""

    quality: int

    @property
    def name(self) -> str:
        return f"jpeg-{self.quality}"

    def recover(self, images: ImageSet) -> ImageSet:
        def squeeze(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
            buffer = io.BytesIO()
            Image.fromarray(rgb).save(buffer, "JPEG", quality=self.quality, subsampling="4:2:0")
            return np.asarray(Image.open(buffer))

        return _each(images, squeeze)


@dataclass(frozen=True)
class Grayscale(Recovery):
    """Replace colours by their luma (ITU-R 601), in training and test images."""

    name = "grayscale"

    def recover(self, images: ImageSet) -> ImageSet:
        def squeeze(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
            return np.repeat(np.asarray(Image.fromarray(rgb).convert("L"))[:, :, None], 3, 2)

        return _each(images, squeeze)

    def present(self, images: ImageSet) -> ImageSet:
        return self.recover(images)


def _each(images: ImageSet, change: Callable[[NDArray[np.uint8]], NDArray[np.uint8]]) -> ImageSet:
    """Return the images with a function of (height, width, 3) applied to each."""
    height, width = images.size
    pixels = np.empty((len(images), height, width, 3), np.uint8)

    def one(index: int) -> NDArray[np.uint8]:
        return change(np.ascontiguousarray(images.pixels[index].permute(1, 2, 0).numpy()))

    for index, rgb in ordered(one, range(len(images)), WORKERS):
        pixels[index] = rgb
    return images.with_pixels(torch.from_numpy(pixels).permute(0, 3, 1, 2))
