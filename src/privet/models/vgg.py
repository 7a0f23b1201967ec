"""VGG with batch norm (Simonyan and Zisserman, arXiv 1409.1556), with one linear layer as its head.

The three fully connected layers of the paper suit 224 px; on thumbnails the usual form, kept here,
pools to one position and classifies that.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from privet.models.blocks import conv3x3, conv_bn, initialise

# convolutions in each stage, and each stage's width as a multiple of the first's
DEPTHS = {"vgg11": (1, 1, 2, 2, 2), "vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}
MULTIPLES = (1, 2, 4, 8, 8)


class VGG(nn.Module):
    """Five stages of 3x3 convolutions, each followed by max pooling while the map is larger than 1."""

    def __init__(self, depths: tuple[int, ...], *, classes: int, width: int) -> None:
        super().__init__()
        self.depths = depths
        self.convs, self.bns = nn.ModuleList(), nn.ModuleList()
        inputs = 3
        for depth, multiple in zip(depths, MULTIPLES, strict=True):
            for _ in range(depth):
                self.convs.append(conv3x3(inputs, width * multiple))
                self.bns.append(nn.BatchNorm2d(width * multiple))
                inputs = width * multiple
        self.fc = nn.Linear(inputs, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        layers = zip(self.convs, self.bns, strict=True)
        for depth in self.depths:
            for _ in range(depth):
                conv, bn = next(layers)
                assert isinstance(conv, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d)
                x = F.relu(conv_bn(x, conv, bn), inplace=True)
            if min(x.shape[2:]) > 1:
                x = F.max_pool2d(x, 2)
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def build(name: str, *, classes: int, width: int | None) -> VGG:
    """Build the network of this name; `width` is the first stage's (64 in the paper)."""
    return VGG(DEPTHS[name], classes=classes, width=width or 64)
