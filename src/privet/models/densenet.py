"""DenseNet-BC (Huang et al., arXiv 1608.06993): every layer of a block reads all layers before it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from privet.models.blocks import conv1x1, conv3x3, conv_bn, initialise

DEPTHS = {"densenet22": (3, 3, 3), "densenet121": (6, 12, 24, 16)}
GROWTH = {"densenet22": 12, "densenet121": 32}


class DenseLayer(nn.Module):
    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), conv1x1(inputs, 4 * growth)
        self.norm2, self.conv2 = nn.BatchNorm2d(4 * growth), conv3x3(4 * growth, growth)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(x), inplace=True)
        y = F.relu(conv_bn(y, self.conv1, self.norm2), inplace=True)
        return torch.cat((x, self.conv2(y)), 1)


class DenseNet(nn.Module):
    """Dense blocks with transitions that halve channels and, while the map is larger than 1, resolution.

    The 3x3 stem keeps the resolution and suits up to 64 px; the ImageNet stem divides it by 4.
    """

    def __init__(self, depths: tuple[int, ...], *, growth: int, classes: int, stem: str) -> None:
        super().__init__()
        self.stem = stem
        channels = 2 * growth
        self.conv0 = conv3x3(3, channels) if stem == "3x3" else nn.Conv2d(3, channels, 7, 2, 3, bias=False)
        self.norm0 = nn.BatchNorm2d(channels)
        self.blocks, self.norms, self.transitions = (
            nn.ModuleList(),
            nn.ModuleList(),
            nn.ModuleList(),
        )
        for index, depth in enumerate(depths):
            block = nn.Sequential()
            for _ in range(depth):
                block.append(DenseLayer(channels, growth))
                channels += growth
            self.blocks.append(block)
            self.norms.append(nn.BatchNorm2d(channels))
            if index < len(depths) - 1:
                self.transitions.append(conv1x1(channels, channels // 2))
                channels //= 2
        self.fc = nn.Linear(channels, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(conv_bn(x, self.conv0, self.norm0), inplace=True)
        if self.stem == "imagenet":
            x = F.max_pool2d(x, 3, 2, padding=1)
        for index, (block, norm) in enumerate(zip(self.blocks, self.norms, strict=True)):
            x = F.relu(norm(block(x)), inplace=True)
            if index < len(self.transitions):
                x = self.transitions[index](x)
                if min(x.shape[2:]) > 1:
                    x = F.avg_pool2d(x, 2)
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def build(name: str, *, classes: int, width: int | None, stem: str) -> DenseNet:
    """Build the network of this name; `width` is its growth rate (32 in the paper's ImageNet form)."""
    return DenseNet(DEPTHS[name], growth=width or GROWTH[name], classes=classes, stem=stem)
