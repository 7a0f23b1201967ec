"""A plain convolutional network without normalisation or shortcuts: the oldest kind of learner."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from privet.models.blocks import conv3x3, initialise


class CNN(nn.Module):
    """Two 3x3 convolutions at each of three resolutions, then one linear layer."""

    def __init__(self, *, classes: int, width: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList()
        inputs = 3
        for outputs in (width, width, 2 * width, 2 * width, 4 * width, 4 * width):
            conv = conv3x3(inputs, outputs)
            conv.bias = nn.Parameter(conv.weight.new_zeros(outputs))
            self.convs.append(conv)
            inputs = outputs
        self.fc = nn.Linear(inputs, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        for index, conv in enumerate(self.convs):
            x = F.relu(conv(x), inplace=True)
            if index % 2 == 1 and min(x.shape[2:]) > 1:
                x = F.max_pool2d(x, 2)
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def build(*, classes: int, width: int | None) -> CNN:
    """Build the network; `width` is that of its first convolutions (32)."""
    return CNN(classes=classes, width=width or 32)
