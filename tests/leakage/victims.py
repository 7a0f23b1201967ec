"""Small victims for the tests of inversions."""

from __future__ import annotations

from typing import Any

import torch

from privet.images import ImageSet
from privet.leakage.defences import create_defence
from privet.leakage.victims import Victim, simulate
from privet.models import create_model
from privet.seeds import generator

SMALL = "lenet-strided-sigmoid-w4"


def blocks(count: int, *, side: int = 16, grey: bool = False, classes: int = 3) -> ImageSet:
    """Return images of four blocks of strong colours."""
    channels = 1 if grey else 3
    colours = torch.randint(0, 256, (count, channels, 2, 2), generator=generator(0, "blocks"))
    pixels = colours.repeat_interleave(side // 2, 2).repeat_interleave(side // 2, 3).to(torch.uint8)
    labels = torch.arange(count) % classes
    names = [f"{label}/{index:04d}" for index, label in enumerate(labels.tolist())]
    return ImageSet.from_arrays(pixels, labels, names=names)


def victims(
    count: int = 2,
    *,
    architecture: str = SMALL,
    grey: bool = False,
    defence: str | None = None,
    mode: str = "train",
    **settings: Any,
) -> list[Victim]:
    """Return clients with images of 16 px, which start from the same weights."""
    model = create_model(architecture, classes=3, size=(16, 16), seed=1).train(mode == "train")
    return simulate(
        model,
        blocks(12, grey=grey),
        architecture=architecture,
        victims=count,
        defence=None if defence is None else create_defence(defence),
        **settings,
    )
