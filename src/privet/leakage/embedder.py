"""What compares faces: a function of images, plain pixels, or a network that learned other people."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from privet.files import sha256
from privet.images.image_set import ImageSet
from privet.learning.probe import features
from privet.learning.runtime import Runtime
from privet.models import load_model


@dataclass(frozen=True, kw_only=True, eq=False)
class Embedder:
    """What maps images to vectors whose cosine says how alike two faces are.

    Attributes:
        embed: maps images in [0, 1], (images, 3, height, width), to vectors, (images, features).
        trained_on: names of the people it learned from, as far as known; none of them may be in a gallery.
        about: what it is, as JSON values, for reports.
    """

    embed: Callable[[Tensor], Tensor]
    trained_on: frozenset[str] = frozenset()
    about: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def pixels(cls) -> Self:
        """Return the grey pixels themselves: what needs no training, and is hard to beat on aligned faces."""
        return cls(embed=lambda images: images.mean(1).flatten(1), about={"embedder": "pixels"})

    @classmethod
    def load(cls, path: Path, runtime: Runtime) -> Self:
        """Return the features of a network that `privet learn` trained to tell people apart.

        Its classes are the people that it saw.

        Raises:
            InputError: not such a file.
        """
        model, about = load_model(path)
        runtime.place(model)

        def embed(images: Tensor) -> Tensor:
            pixels = (255 * _sized(images, about.size)).round().to(torch.uint8)
            unlabelled = ImageSet.from_arrays(pixels, torch.zeros(len(pixels)))
            return features(model, unlabelled, runtime=runtime).cpu()

        record = {
            "embedder": "network",
            "architecture": about.architecture,
            "people": len(about.class_names),
            "size": list(about.size),
            "sha256": sha256(path.read_bytes()),
        }
        return cls(embed=embed, trained_on=frozenset(about.class_names), about=record)


def _sized(images: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(images.shape[2:]) == size:
        return images
    resized = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
    return resized.clamp(0, 1)
