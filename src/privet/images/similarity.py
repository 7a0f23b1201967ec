"""How much images differ: largest difference, length, pixels, PSNR, SSIM."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

WINDOW = 11  # SSIM's, in pixels; smaller images have no SSIM
TILE = 2048  # larger images are measured in tiles of about this side
BATCH_PIXELS = 1 << 21  # measured together, to bound memory


@dataclass(frozen=True, kw_only=True)
class Similarity:
    """What a perturbation did to one image.

    Attributes:
        linf: the largest change of any channel of any pixel, in 1/255.
        l2: the length of the change, of values in [0, 1].
        l0: how many pixels changed.
        psnr: in dB; None if nothing changed.
        ssim: structural similarity (Wang et al. 2004, Gaussian window); None for images below 11 px.
    """

    linf: int
    l2: float
    l0: int
    psnr: float | None
    ssim: float | None


def compare(before: NDArray[np.uint8], after: NDArray[np.uint8], *, ssim: bool = True) -> Similarity:
    """Compare two images, (height, width, 3) in 0 to 255, as `compare_all` does."""
    pair = [torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None] for image in (before, after)]
    return compare_all(*pair, ssim=ssim)[0]


def compare_all(before: Tensor, after: Tensor, *, ssim: bool = True) -> list[Similarity]:
    """Compare images one by one, uint8, (images, 3, height, width), without SSIM in a tenth of the time."""
    found = []
    height, width = before.shape[2:]
    batch = max(1, BATCH_PIXELS // (height * width))
    for start in range(0, len(before), batch):
        one, other = before[start : start + batch], after[start : start + batch]
        difference = (other.to(torch.int16) - one.to(torch.int16)).abs()
        linf = difference.amax((1, 2, 3)).tolist()
        squares = difference.double().square_().sum((1, 2, 3)).tolist()
        pixels = difference.amax(1).count_nonzero((1, 2)).tolist()
        for largest, square, changed, similarity in zip(
            linf, squares, pixels, _ssim(one, other) if ssim else [None] * len(one), strict=True
        ):
            values = 3 * height * width
            psnr = 10 * math.log10(255**2 * values / square) if square > 0 else None
            found.append(
                Similarity(
                    linf=int(largest), l2=math.sqrt(square) / 255, l0=int(changed), psnr=psnr, ssim=similarity
                )
            )
    return found


def by_psnr(similarities: Sequence[Similarity], names: Sequence[str]) -> list[int]:
    """Return positions, the lowest PSNR first."""
    return sorted(range(len(names)), key=lambda index: (similarities[index].psnr or math.inf, names[index]))


def _ssim(before: Tensor, after: Tensor) -> list[float] | list[None]:
    """Return each image's mean structural similarity, over tiles if it is large."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    count, _, height, width = before.shape
    if min(height, width) < WINDOW:
        return [None] * count
    total = torch.zeros(count, dtype=torch.float64)
    for top, bottom in _tiles(height):
        for left, right in _tiles(width):
            pair = [image[:, :, top:bottom, left:right].float() for image in (after, before)]
            tile = structural_similarity_index_measure(*pair, data_range=255.0, reduction="none")
            total += tile.double() * (bottom - top) * (right - left)
    return (total / (height * width)).tolist()


def _tiles(length: int) -> list[tuple[int, int]]:
    """Cut a length into nearly equal parts of at most TILE."""
    count = math.ceil(length / TILE)
    edges = [round(index * length / count) for index in range(count + 1)]
    return list(pairwise(edges))
