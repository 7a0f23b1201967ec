"""Strips of images to look at: original, protected, and the noise between them, magnified."""

from __future__ import annotations

import math
from dataclasses import replace

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
) -> tuple[Image.Image, list[str], list[tuple[str, Similarity]]]:
    """Return the strips of the images that changed most, the names of their columns, and each image's figures.

    Of several versions of each image, a strip shows the original and all versions, without differences.

    Raises:
        InputError: no image of the two sets has the same name.
    """
    versions = _versions(clean, changed)
    for one in versions.values():
        clean, _ = pair(clean, one)
    versions = {name: pair(clean, one)[1] for name, one in versions.items()}
    found = {name: compare_all(clean.pixels, one.pixels) for name, one in versions.items()}
    worst = [min(each, key=lambda one: one.psnr or math.inf) for each in zip(*found.values(), strict=True)]
    order = by_psnr(worst, clean.names)[:count]
    if len(versions) == 1:
        ((name, similarities),) = found.items()
        magnify = 127 / max(1, *(similarities[index].linf for index in order))
        image = strips(clean.pixels[order], versions[name].pixels[order], magnify=magnify)
        columns = ["original", name, f"the difference, {magnify:.3g} times"]
        return image, columns, [(clean.names[index], similarities[index]) for index in order]
    pixels = [clean.pixels[order], *(one.pixels[order] for one in versions.values())]
    image = montage(list(zip(*pixels, strict=True)))
    figures = [(f"{clean.names[index]}, {name}", found[name][index]) for index in order for name in versions]
    return image, ["original", *versions], figures


def _versions(clean: ImageSet, changed: ImageSet) -> dict[str, ImageSet]:
    """Return changed images under their originals' names, by version where they are called NAME-VERSION."""
    known = set(clean.names)
    found: dict[str, list[tuple[int, str]]] = {}
    if known.isdisjoint(changed.names):
        for index, name in enumerate(changed.names):
            cuts = [place for place, letter in enumerate(name) if letter == "-" and name[:place] in known]
            if cuts:
                found.setdefault(name[cuts[-1] + 1 :], []).append((index, name[: cuts[-1]]))
    if not found:
        return {"changed": changed}
    return {
        version: replace(changed.subset([index for index, _ in ones]), names=tuple(name for _, name in ones))
        for version, ones in sorted(found.items())
    }
