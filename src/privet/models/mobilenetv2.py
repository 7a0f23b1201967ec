"""MobileNetV2 (Sandler et al., arXiv 1801.04381): inverted residuals with linear bottlenecks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from privet.models.blocks import conv1x1, conv3x3, conv_bn, initialise

# expansion, output width (for a stem of 32), repeats, stride of the first repeat: table 2 of the paper
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, *, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.convs, self.bns = nn.ModuleList(), nn.ModuleList()
        if expansion > 1:
            self.convs.append(conv1x1(inputs, hidden))
        self.convs.append(conv3x3(hidden, hidden, stride, groups=hidden))
        self.convs.append(conv1x1(hidden, outputs))
        for conv in self.convs:
            assert isinstance(conv, nn.Conv2d)
            self.bns.append(nn.BatchNorm2d(conv.out_channels))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for index, (conv, bn) in enumerate(zip(self.convs, self.bns, strict=True)):
            assert isinstance(conv, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d)
            y = conv_bn(y, conv, bn)
            if index < len(self.convs) - 1:  # the last one is the linear bottleneck
                y = F.relu6(y, inplace=True)
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    """The network of table 2; with the 3x3 stem the first two reductions are left out (thumbnails)."""

    def __init__(self, *, classes: int, width: int, stem: str) -> None:
        super().__init__()

        def scaled(channels: int) -> int:
            return max(8, round(channels * width / 32 / 8) * 8)

        small = stem == "3x3"
        self.conv0 = conv3x3(3, scaled(32), 1 if small else 2)
        self.norm0 = nn.BatchNorm2d(scaled(32))
        self.blocks = nn.Sequential()
        inputs = scaled(32)
        for index, (expansion, outputs, repeats, stride) in enumerate(STAGES):
            for repeat in range(repeats):
                step = stride if repeat == 0 and not (small and index == 1) else 1
                self.blocks.append(
                    InvertedResidual(inputs, scaled(outputs), stride=step, expansion=expansion)
                )
                inputs = scaled(outputs)
        last = max(scaled(1280), 4 * inputs)
        self.conv1, self.norm1 = conv1x1(inputs, last), nn.BatchNorm2d(last)
        self.fc = nn.Linear(last, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(conv_bn(x, self.conv0, self.norm0), inplace=True)
        x = self.blocks(x)
        x = F.relu6(conv_bn(x, self.conv1, self.norm1), inplace=True)
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def build(*, classes: int, width: int | None, stem: str) -> MobileNetV2:
    """Build the network; `width` is the stem's (32 in the paper), and all others scale with it."""
    return MobileNetV2(classes=classes, width=width or 32, stem=stem)
