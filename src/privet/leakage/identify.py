"""Whose face is it: images compared with other photographs of known people, by an embedding network.

A reconstruction can be blurred and still be somebody. Each image is embedded, and so is every photograph
of the gallery; from all vectors the gallery's mean is taken away, so that what all faces have in common does
not count; the score of a person is the highest cosine with any of that person's photographs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from privet.errors import InputError, UsageError
from privet.images.image_set import ImageSet
from privet.leakage.embedder import Embedder
from privet.learning.confidence import clopper_pearson

FALSE_ACCEPTS = 0.01  # share of other people that verification may let through
WORST = -2.0  # below every cosine: an image that was not found is like nobody


@dataclass(frozen=True, kw_only=True, eq=False)
class Gallery:
    """Photographs of people whose names are known.

    Attributes:
        photographs: whose classes are the people.
        embedder: what compares faces.
    """

    photographs: ImageSet
    embedder: Embedder

    def __post_init__(self) -> None:
        if seen := sorted(set(self.people) & self.embedder.trained_on):
            raise UsageError(
                f"The embedder was trained on {len(seen)} people of the gallery, {seen[0]!r} for one; what it "
                "recognises in them says nothing of others. Train it on people who are not in the gallery."
            )
        if len(self.people) < 2:
            raise InputError(f"A gallery needs at least 2 people, got {len(self.people)}.")

    @cached_property
    def people(self) -> tuple[str, ...]:
        """Names of those of whom there are photographs."""
        used = set(self.photographs.labels.tolist())
        return tuple(name for label, name in enumerate(self.photographs.class_names) if label in used)

    def without(self, private: Tensor) -> Self:
        """Return the gallery without photographs that are among the private images, pixel for pixel.

        Args:
            private: in [0, 1], (images, 3, height, width), of the gallery's size.

        Raises:
            InputError: of another size.
        """
        if tuple(private.shape[2:]) != self.photographs.size:
            raise InputError(
                f"The private images are {tuple(private.shape[2:])}, the gallery's {self.photographs.size}; open "
                "both at one size."
            )
        known = {_bytes(image) for image in (255 * private).round().to(torch.uint8)}
        kept = [i for i, image in enumerate(self.photographs.pixels) if _bytes(image) not in known]
        return replace(self, photographs=self.photographs.subset(kept))

    def record(self) -> dict[str, Any]:
        """Return what comparisons depend on, as JSON values."""
        return {
            "people": len(self.people),
            "photographs": len(self.photographs),
            "digest": self.photographs.digest,
            "embedder": self.embedder.about,
        }

    @cached_property
    def mean(self) -> Tensor:
        """The mean photograph in [0, 1], (1, 3, height, width)."""
        return self.photographs.pixels.float().mean(0, keepdim=True) / 255

    @cached_property
    def _vectors(self) -> Tensor:
        return self._embedded(self.photographs.pixels.float() / 255)

    def _embedded(self, images: Tensor) -> Tensor:
        vectors = self.embedder.embed(images)
        if vectors.ndim != 2 or len(vectors) != len(images) or not bool(torch.isfinite(vectors).all()):
            raise UsageError(
                f"Expected the embedder to return finite vectors, ({len(images)}, features), got "
                f"{tuple(vectors.shape)}{'' if vectors.ndim != 2 else ' or values that are not finite'}."
            )
        return vectors.double()

    def scores(self, images: Tensor) -> Tensor:
        """Return how much images are like each person, (images, people): the highest cosine of any photograph."""
        centre = self._vectors.mean(0)
        vectors, known = (
            F.normalize(each - centre, dim=1) for each in (self._embedded(images), self._vectors)
        )
        cosines = vectors @ known.T
        owner = torch.tensor([self.photographs.class_names.index(name) for name in self.people])
        mine = self.photographs.labels[None] == owner[:, None]  # (people, photographs)
        return torch.stack([cosines[:, one].amax(1) for one in mine], 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class Identified:
    """How images of known people compared with a gallery.

    Attributes:
        scores: (images, people).
        own: each image's person, by position.
    """

    scores: Tensor
    own: Tensor

    @cached_property
    def genuine(self) -> Tensor:
        """Each image's score with its own person."""
        return self.scores.gather(1, self.own[:, None])[:, 0]

    @cached_property
    def impostor(self) -> Tensor:
        """All scores with other people."""
        others = torch.ones_like(self.scores, dtype=torch.bool).scatter_(1, self.own[:, None], False)
        return self.scores[others]

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """Each image's own person among all by score, from 1; who ties with others comes last of them."""
        return tuple((self.scores >= self.genuine[:, None]).sum(1).tolist())

    @property
    def area(self) -> float:
        """Area under the verification curve: how often one's own person scores above another."""
        ordered = self.impostor.sort().values
        below, upto = (torch.searchsorted(ordered, self.genuine, right=right) for right in (False, True))
        return float((below + upto).double().mean() / 2 / len(ordered))

    @property
    def accepted(self) -> float:
        """Share of images that are accepted as their own person where at most 1 % of other people are."""
        allowed = int(FALSE_ACCEPTS * len(self.impostor))
        threshold = self.impostor.sort(descending=True).values[allowed]
        return float((self.genuine > threshold).double().mean())

    def summary(self) -> dict[str, Any]:
        """Return rank-1 and rank-5 shares with 95 % bounds, and verification, as JSON values."""
        count = len(self.ranks)
        hits = {k: sum(rank <= k for rank in self.ranks) for k in (1, 5)}
        return {
            "images": count,
            **{
                f"rank{k}": {
                    "count": hit,
                    "share": hit / count,
                    "bounds": clopper_pearson(hit, count),
                    "chance": min(1.0, k / self.scores.shape[1]),
                }
                for k, hit in hits.items()
            },
            "verification": {
                "area": self.area,
                "true_accepts_at_1_percent": self.accepted,
                "impostors": len(self.impostor),
            },
        }


def identify(
    images: Tensor, people: Sequence[str], gallery: Gallery, *, failed: Sequence[bool] = ()
) -> Identified:
    """Compare images of known people with a gallery of other photographs.

    Args:
        images: in [0, 1], (images, 3, height, width).
        people: each one's name.
        gallery: without these images themselves, see `Gallery.without`.
        failed: which of the images are none, because the attack on them failed: they are like nobody.

    Raises:
        InputError: the gallery lacks a person.
    """
    if lacking := sorted(set(people) - set(gallery.people)):
        raise InputError(
            f"The gallery has no photograph of {', '.join(lacking[:5])}, other than the private ones. It needs other "
            "photographs of everybody who is attacked, under the same names."
        )
    scores = gallery.scores(images)
    if any(failed):
        scores[torch.tensor(failed)] = WORST
    return Identified(scores=scores, own=torch.tensor([gallery.people.index(name) for name in people]))


def controls(private: Tensor, people: Sequence[str], gallery: Gallery) -> dict[str, Identified]:
    """Return what identification makes of the private images themselves, and of images that show nobody."""
    shown = {
        "clean": private,
        "mean": gallery.mean.expand_as(private),
        "grey": torch.full_like(private, 0.5),
    }
    return {name: identify(images, people, gallery) for name, images in shown.items()}


def _bytes(image: Tensor) -> bytes:
    return image.contiguous().numpy().tobytes()
