"""Strips of images to look at: original, protected, and the noise between them, magnified."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from privet.images import ImageSet, Similarity, by_psnr, compare_all, pair
from privet.images.montage import montage


def strips(before: Tensor, after: Tensor, *, magnify: float) -> Image.Image:
    """Return one row for each image: original, changed, difference.

    Args:
        before: uint8, (images, 3, height, width).
        after: likewise.
        magnify: factor on the difference, which is shown around grey.
    """
    difference = (after.to(torch.int16) - before.to(torch.int16)).float() * magnify + 127.5
    return montage(list(zip(before, after, difference.clamp(0, 255).to(torch.uint8), strict=True)))


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
