"""Whose copy leaked: a keyed fingerprint inside the budget, and how sure one can be.

Each licensee's copy differs from the protected images by chips of -1, 0 or 1 in 1/255, one for each group of the
stem along its signs (so that the licensee's network does not see it either), or, without a stem, one for each
pixel, all channels alike. A chip is 1 or -1 by the licensee's key, and 0 where it would leave the budget
around the original, or clip.

Tracing compares each leaked image with the protected one that looks most like it: the change along each chip,
cut to -1 to 1. Of all leaked images that are nearest to one protected image the mean is taken; r is these means,
of every protected image that was found, one after the other, and a licensee's score is c . r / |r|. If a licensee
had no part in the leak, their chips c are independent of r and as good as fair coins, so by Hoeffding's inequality
their score reaches t with probability at most exp(-t^2 / 2), whatever was done to the images. That needs every chip
to count once, which the means see to: were each file scored by itself, a hundred files of one image would be a
hundred times the same coins, and the score of the innocent would grow with the root of their number. The bound,
times the number of licensees, is the stated probability of a false accusation. Of k copies that are averaged
without rounding each keeps a score of about sqrt(N / k), with N chips.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from privet.errors import UsageError
from privet.images import ImageSet, pair
from privet.models.keyed_stem import CHUNK, KeyedStem, key_stream
from privet.progress import Progress, silent

FALSE_ACCUSATIONS = 1e-6
THUMBNAIL = 8  # pixels a side, by which leaked images are found among the protected ones


@dataclass(frozen=True, kw_only=True)
class Suspect:
    """What tracing says of one copy.

    Attributes:
        copy: its name.
        score: c . r / |r|, with each protected image's chips counted once.
        false_accusation: an upper bound on the probability that any of the innocent scores as high.
        guilty: whether that is at most what was allowed.
    """

    copy: str
    score: float
    false_accusation: float
    guilty: bool


def mark(
    protected: ImageSet, clean: ImageSet, key: bytes, *, epsilon: int, stem: KeyedStem | None = None
) -> ImageSet:
    """Return a licensee's copy of the protected images.

    Args:
        protected: what is marked.
        clean: the originals, around which the budget is kept.
        key: of the copy.
        epsilon: the protection's budget, L-infinity, in 1/255.
        stem: of the release, if it has one; the copy looks the same through it.

    Raises:
        InputError: the sets are not of the same images.
        UsageError: the protection has already left this budget.
    """
    original, changed = pair(clean, protected)
    if len(changed) != len(protected):
        raise UsageError(
            f"Expected the original of each of {len(protected)} protected images, got {len(original)} of them."
        )
    chip = _carrier(stem)
    parts = []
    for start in range(0, len(changed), CHUNK):
        before = original.pixels[start : start + CHUNK].to(torch.int32)
        now = changed.pixels[start : start + CHUNK].to(torch.int32)
        delta = now - before
        if (largest := int(delta.abs().max())) > epsilon:
            raise UsageError(
                f"The protection changes values by {largest}/255; its budget was given as {epsilon}."
            )
        low, high = chip.bounds(
            torch.maximum(-epsilon - delta, -now), torch.minimum(epsilon - delta, 255 - now)
        )
        chips = _chips(key, changed.names[start : start + CHUNK], low.shape[1]).to(torch.int32)
        parts.append((now + chip.spread(chips.maximum(low).minimum(high), changed.size)).to(torch.uint8))
    return changed.with_pixels(torch.cat(parts))


def trace(
    leaked: ImageSet,
    protected: ImageSet,
    keys: Mapping[str, bytes],
    *,
    stem: KeyedStem | None = None,
    false_accusations: float = FALSE_ACCUSATIONS,
    progress: Progress = silent,
) -> list[Suspect]:
    """Say of each copy how surely the leaked images come from it, the surest first.

    Args:
        leaked: images that were found, under whatever names, the same one many times among them; opened at the size
            of the protected ones.
        protected: the images before any copy was marked.
        keys: each copy's key by the copy's name.
        stem: of the release, if it has one.
        false_accusations: the probability of accusing anybody innocent that is accepted.
        progress: told about images.

    Raises:
        UsageError: another size, no copies, or an impossible probability.
    """
    if leaked.size != protected.size:
        raise UsageError(
            f"Leaked images are {leaked.size}, protected ones {protected.size}; open both at one size."
        )
    if not keys or not 0 < false_accusations < 1:
        raise UsageError("Expected at least one copy to compare with, and a probability between 0 and 1.")
    chip = _carrier(stem)
    dots, square, done = dict.fromkeys(keys, 0.0), 0.0, 0
    nearest = _nearest(leaked.pixels, protected.pixels)
    matched = torch.unique(nearest)
    for start in range(0, len(matched), CHUNK):
        index = matched[start : start + CHUNK]  # each protected image once, so that its chips count once
        files = torch.isin(nearest, index).nonzero().flatten()
        place = torch.searchsorted(index, nearest[files])
        response = torch.zeros(len(index), chip.groups(protected.size), dtype=torch.float64)
        for first in range(0, len(files), CHUNK):
            some = files[first : first + CHUNK]
            change = leaked.pixels[some].float() - protected.pixels[nearest[some]].float()
            along = chip.amplitude(change).clamp(-1, 1).double()
            response.index_add_(0, place[first : first + CHUNK], along)
            done += len(some)
            progress("tracing", done, len(leaked))
        response /= torch.bincount(place)[:, None]
        square += float(response.square().sum())
        names = [protected.names[position] for position in index.tolist()]
        for copy, key in keys.items():
            dots[copy] += float((_chips(key, names, response.shape[1]) * response).sum())
    suspects = []
    for copy, dot in dots.items():
        score = dot / math.sqrt(square) if square else 0.0
        bound = min(1.0, len(keys) * math.exp(-(max(score, 0.0) ** 2) / 2))
        # None is ever impossible, though a float may not hold how improbable.
        bound = max(bound, sys.float_info.min)
        suspects.append(
            Suspect(copy=copy, score=score, false_accusation=bound, guilty=bound <= false_accusations)
        )
    return sorted(suspects, key=lambda suspect: (-suspect.score, suspect.copy))


def _carrier(stem: KeyedStem | None) -> KeyedStem:
    """Return the groups that carry a chip each: the stem's, or every pixel."""
    if stem is not None:
        return stem
    return KeyedStem(torch.zeros(3, 1, 1, dtype=torch.int32), torch.ones(3, 1, 1, dtype=torch.int8))


def _nearest(leaked: Tensor, protected: Tensor) -> Tensor:
    """Return of each leaked image the position of the protected one that looks most like it."""
    nearest = torch.empty(len(leaked), dtype=torch.int64)
    thumbnails = _thumbnails(protected)
    for start in range(0, len(leaked), CHUNK):
        part = _thumbnails(leaked[start : start + CHUNK])
        nearest[start : start + CHUNK] = torch.cdist(part, thumbnails).argmin(1)
    return nearest


def _chips(key: bytes, names: tuple[str, ...] | list[str], count: int) -> Tensor:
    """Return 1 or -1 for every chip, (images, count), by the key and the images' names."""
    rows = [np.frombuffer(key_stream(key, f"chips/{name}", -(-count // 8)), np.uint8) for name in names]
    bits = np.unpackbits(np.stack(rows), axis=1, count=count)
    return torch.from_numpy(bits.astype(np.int8)) * 2 - 1


def _thumbnails(pixels: Tensor) -> Tensor:
    parts = [
        F.adaptive_avg_pool2d(pixels[start : start + CHUNK].float(), THUMBNAIL).flatten(1)
        for start in range(0, len(pixels), CHUNK)
    ]
    return torch.cat(parts)
