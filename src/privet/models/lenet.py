"""LeNet (LeCun et al. 1998) for colour, the smallest network that inversions of gradients are tried on."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from privet.errors import UsageError
from privet.models.blocks import Activation, uniform

LEAST_SIDE = 16  # smaller images leave nothing after the second pooling


class LeNet(nn.Module):
    """Two 5x5 convolutions, each with max pooling, and three linear layers.

    With sigmoids, and at 32 px, it is the target of GRNN (Ren et al., arXiv 2105.00529), whose weights
    start uniform in ±0.5; with PyTorch's own start its sigmoids let hardly any gradient through.
    """

    def __init__(self, *, size: tuple[int, int], classes: int, width: int, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        if min(size) < LEAST_SIDE:
            raise UsageError(f"lenet needs images of at least {LEAST_SIDE} px, got {size[0]} x {size[1]}.")
        height, across = (((side - 4) // 2 - 4) // 2 for side in size)
        deep = 8 * width // 3
        self.conv1, self.conv2 = nn.Conv2d(3, width, 5), nn.Conv2d(width, deep, 5)
        self.fc1 = nn.Linear(deep * height * across, 20 * width)
        self.fc2 = nn.Linear(20 * width, 14 * width)
        self.fc = nn.Linear(14 * width, classes)
        if activation is F.sigmoid:
            uniform(self)

    def forward(self, x: Tensor) -> Tensor:
        for conv in (self.conv1, self.conv2):
            x = F.max_pool2d(self.activation(conv(x)), 2)
        x = x.flatten(1)
        for layer in (self.fc1, self.fc2):
            x = self.activation(layer(x))
        return self.fc(x)  # type: ignore[no-any-return]


class StridedLeNet(nn.Module):
    """Three 5x5 convolutions, the first two with stride 2, and one linear layer.

    With sigmoids, and weights uniform in ±0.5, the target of DLG (Zhu et al., arXiv 1906.08935). There
    is no pooling, so its gradient is smooth in the image, and attacks on it go much further.
    """

    def __init__(self, *, size: tuple[int, int], classes: int, width: int, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        inputs = (3, width, width)
        self.convs = nn.ModuleList(
            nn.Conv2d(channels, width, 5, stride, padding=2)
            for channels, stride in zip(inputs, (2, 2, 1), strict=True)
        )
        height, across = (-(-side // 4) for side in size)
        self.fc = nn.Linear(width * height * across, classes)
        if activation is F.sigmoid:
            uniform(self)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = self.activation(conv(x))
        return self.fc(x.flatten(1))  # type: ignore[no-any-return]


def build(
    name: str, *, size: tuple[int, int], classes: int, width: int | None, activation: Activation
) -> LeNet | StridedLeNet:
    """Build the network for images of this size; `width` is that of its first convolution (6 or 12)."""
    if name == "lenet-strided":
        return StridedLeNet(size=size, classes=classes, width=width or 12, activation=activation)
    return LeNet(size=size, classes=classes, width=width or 6, activation=activation)
