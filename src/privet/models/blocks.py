"""What several networks share: convolution and batch norm as one step, and the input scaling."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = Callable[[Tensor], Tensor]
relu: Activation = partial(F.relu, inplace=True)


def conv3x3(inputs: int, outputs: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, groups=groups, bias=False)


def conv1x1(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, stride, bias=False)


def conv_bn(x: Tensor, conv: nn.Conv2d, bn: nn.BatchNorm2d) -> Tensor:
    """Return `bn(conv(x))`, computed as a single convolution when batch norm is frozen.

    In evaluation mode batch norm is an affine map, so it is folded into the convolution's weights:
    the noise steps and the attacks, which run dozens of frozen passes for each training step, then
    read and write each feature map once instead of twice. The result differs by rounding only.
    """
    if bn.training:
        return bn(conv(x))  # type: ignore[no-any-return]
    assert bn.running_mean is not None and bn.running_var is not None
    scale = bn.weight * torch.rsqrt(bn.running_var + bn.eps)
    bias = bn.bias - bn.running_mean * scale
    if conv.bias is not None:
        bias = bias + conv.bias * scale
    weight = conv.weight * scale.view(-1, 1, 1, 1)
    padding = conv.padding  # the networks here never use the string form
    assert not isinstance(padding, str)
    return F.conv2d(x, weight, bias, conv.stride, padding, conv.dilation, conv.groups)


class Scaled(nn.Module):
    """A network that takes pixels in [0, 1] and scales them itself, so that budgets stay in pixels."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
        std: tuple[float, float, float] = (0.25, 0.25, 0.25),
    ) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map pixels in [0, 1], (batch, 3, height, width), to logits, (batch, classes)."""
        return self.network((x - self.mean) / self.std)  # type: ignore[no-any-return]


def initialise(network: nn.Module) -> None:
    """He initialisation of every convolution (fan out), ones and zeros for batch norm."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def uniform(network: nn.Module, bound: float = 0.5) -> None:
    """Draw every weight and bias uniformly from ±bound: how inversions' sigmoid targets start."""
    for parameter in network.parameters():
        nn.init.uniform_(parameter, -bound, bound)
