"""Strips of images to look at: original, protected, and the noise between them, magnified."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from privet.images import ImageSet, Similarity, compare_all, pair

GAP = 4
LEAST_SIDE = 96  # smaller images are enlarged by a whole number, without smoothing


def strips(before: Tensor, after: Tensor, *, magnify: float) -> Image.Image:
    """Return one row for each image: original, changed, difference.

    Args:
        before: uint8, (images, 3, height, width).
        after: likewise.
        magnify: factor on the difference, which is shown around grey.
    """
    difference = (after.to(torch.int16) - before.to(torch.int16)).float() * magnify + 127.5
    rows = [
        _beside([column.permute(1, 2, 0).numpy() for column in columns])
        for columns in zip(before, after, difference.clamp(0, 255).to(torch.uint8), strict=True)
    ]
    gap = np.full((GAP, rows[0].shape[1], 3), 255, np.uint8)
    stacked = [part for row in rows for part in (row, gap)][:-1]
    image = Image.fromarray(np.concatenate(stacked))
    factor = max(1, -(-LEAST_SIDE // before.shape[2]))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def worst_strips(
    clean: ImageSet, changed: ImageSet, count: int
) -> tuple[Image.Image, list[tuple[str, Similarity]]]:
    """Return the strips of the images that changed most, and their names and figures.

    Raises:
        InputError: no image of the two sets has the same name.
    """
    clean, changed = pair(clean, changed)
    found = compare_all(clean.pixels, changed.pixels)
    order = by_psnr(found, clean.names)[:count]
    linf = max(1, max(found[index].linf for index in order))
    image = strips(clean.pixels[order], changed.pixels[order], magnify=127 / linf)
    return image, [(clean.names[index], found[index]) for index in order]


def by_psnr(similarities: Sequence[Similarity], names: Sequence[str]) -> list[int]:
    """Return positions, the lowest PSNR first."""
    return sorted(range(len(names)), key=lambda index: (similarities[index].psnr or math.inf, names[index]))


def png(image: Image.Image) -> bytes:
    """Return the image as PNG bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _beside(images: Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    gap = np.full((images[0].shape[0], GAP, 3), 255, np.uint8)
    parts = [part for image in images for part in (image, gap)][:-1]
    return np.concatenate(parts, 1)
