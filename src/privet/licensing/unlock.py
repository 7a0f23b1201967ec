"""The licensee's side of a lock: take each class's pattern off its images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from privet.errors import InputError, LicenceError
from privet.images import ImageSet, pair
from privet.models.keyed_stem import CHUNK


@dataclass(frozen=True, kw_only=True, eq=False)
class Unlock:
    """What was added to the images of each class.

    Attributes:
        patterns: int16, (3, height, width), in 1/255, by the class's name.
    """

    patterns: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        shapes = {tuple(pattern.shape) for pattern in self.patterns.values()}
        if len(shapes) != 1 or any(
            pattern.ndim != 3 or pattern.shape[0] != 3 or pattern.dtype != torch.int16
            for pattern in self.patterns.values()
        ):
            raise InputError(
                f"Expected a lock's patterns in int16, (3, height, width), got {sorted(shapes)}."
            )

    @classmethod
    def between(cls, clean: ImageSet, protected: ImageSet) -> Self:
        """Find the patterns of a class-wise protection from pairs.

        Args:
            clean: the originals.
            protected: the same images, each with the pattern of its class.

        Raises:
            LicenceError: the images of a class were not changed alike.
            InputError: the sets are not of the same images.
        """
        before, after = pair(clean, protected)
        patterns = {}
        for label, name in enumerate(before.class_names):
            pixels = before.pixels[before.labels == label].to(torch.int16)
            locked = after.pixels[before.labels == label].to(torch.int16)
            if not len(pixels):
                continue
            change = locked - pixels
            most, least = change.amax(0), change.amin(0)
            pattern = torch.where(most >= -least, most, least)  # clipping only ever makes a change smaller
            if not torch.equal((pixels + pattern).clamp_(0, 255), locked):
                raise LicenceError(
                    f"The protected images of {name!r} were not changed by one pattern, so no lock of class patterns "
                    "opens them. Protect them with 'privet license protect --method lock'."
                )
            patterns[name] = pattern
        return cls(patterns=patterns)

    def __call__(self, pixels: Tensor, name: str) -> Tensor:
        """Take the pattern of a class off images.

        What clipping took is not known: such a value gets half of its pattern back, and misses the original by
        at most the other half.

        Args:
            pixels: uint8, (..., 3, height, width), stored images of one class.
            name: of the class.

        Returns:
            uint8, of the same shape.

        Raises:
            InputError: the licence has no such class, or images of another size.
        """
        if name not in self.patterns:
            raise InputError(f"The licence opens the classes {sorted(self.patterns)}, got {name!r}.")
        pattern = self.patterns[name].to(pixels.device)
        if pixels.dtype != torch.uint8 or pixels.shape[-3:] != pattern.shape:
            raise InputError(
                f"Expected stored images {tuple(pattern.shape)} in uint8, got {pixels.dtype} {tuple(pixels.shape)}."
            )
        value = pixels.to(torch.int16)
        clipped = ((value == 255) & (pattern > 0)) | ((value == 0) & (pattern < 0))
        half = torch.div(pattern, 2, rounding_mode="trunc")
        return (value - torch.where(clipped, half, pattern)).clamp_(0, 255).to(torch.uint8)

    def apply_to(self, images: ImageSet) -> ImageSet:
        """Unlock a whole image set by its labels."""
        pixels = images.pixels.clone()
        for label, name in enumerate(images.class_names):
            members = (images.labels == label).nonzero().flatten()
            for start in range(0, len(members), CHUNK):  # a class without images needs no pattern
                index = members[start : start + CHUNK]
                pixels[index] = self(images.pixels[index], name)
        return images.with_pixels(pixels)
