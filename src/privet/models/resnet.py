"""Residual networks (He et al., arXiv 1512.03385), for thumbnails and for photographs.

`resnet18` to `resnet50` carry torchvision's parameter names, so that its weights load into the
networks with the ImageNet stem. `resnet8` and `resnet20` are the paper's narrow three-stage family
for CIFAR-10 (section 4.2), with projection shortcuts. With sigmoids instead of ReLUs, and weights
uniform in ±0.5, they are targets of inversions, which need a gradient that is smooth in the image.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from privet.models.blocks import Activation, conv1x1, conv3x3, conv_bn, initialise, relu, uniform


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        self.conv1, self.bn1 = conv3x3(inputs, width, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv3x3(width, width), nn.BatchNorm2d(width)
        self.downsample = _shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(conv_bn(x, self.conv1, self.bn1))
        y = conv_bn(y, self.conv2, self.bn2)
        if self.downsample is not None:
            x = self.downsample(x)
        return self.activation(y + x)


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        outputs = width * self.expansion
        self.conv1, self.bn1 = conv1x1(inputs, width), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv3x3(width, width, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv1x1(width, outputs), nn.BatchNorm2d(outputs)
        self.downsample = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(conv_bn(x, self.conv1, self.bn1))
        y = self.activation(conv_bn(y, self.conv2, self.bn2))
        y = conv_bn(y, self.conv3, self.bn3)
        if self.downsample is not None:
            x = self.downsample(x)
        return self.activation(y + x)


class ResNet(nn.Module):
    """Stages of residual blocks; each stage after the first halves the resolution and doubles the width.

    Args:
        block: the residual block.
        depths: blocks in each stage.
        classes: outputs.
        width: channels of the stem and of the first stage.
        stem: "3x3" keeps the resolution (thumbnails), "imagenet" divides it by 4 (photographs).
        activation: after each convolution but those of the shortcuts.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, ...],
        *,
        classes: int,
        width: int,
        stem: str,
        activation: Activation,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.stem = stem
        self.conv1 = conv3x3(3, width) if stem == "3x3" else nn.Conv2d(3, width, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        inputs = width
        for index, depth in enumerate(depths):
            stage = nn.Sequential()
            for position in range(depth):
                stride = 2 if index > 0 and position == 0 else 1
                stage.append(block(inputs, width << index, stride, activation))
                inputs = (width << index) * block.expansion
            self.add_module(f"layer{index + 1}", stage)
        self.stages = len(depths)
        self.fc = nn.Linear(inputs, classes)
        initialise(self)
        if activation is F.sigmoid:
            uniform(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(conv_bn(x, self.conv1, self.bn1))
        if self.stem == "imagenet":
            x = F.max_pool2d(x, 3, 2, padding=1)
        for index in range(self.stages):
            x = self.get_submodule(f"layer{index + 1}")(x)
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


class Projection(nn.Sequential):
    """A shortcut that changes width or resolution; a sequence, for torchvision's parameter names."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        # For the weights' gradient of a strided 1x1 convolution of few channels, last, oneDNN writes past a buffer, and
        # gets it wrong: of fewer than 8 with AVX2, of fewer than 16 with AVX-512, on larger images
        # (github.com/uxlfoundation/oneDNN/issues/6035). So pixels are left out first.
        self.step = stride if inputs < 16 else 1
        super().__init__(conv1x1(inputs, outputs, stride // self.step), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        conv, bn = self
        assert isinstance(conv, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d)
        return conv_bn(x[..., :: self.step, :: self.step], conv, bn)


def _shortcut(inputs: int, outputs: int, stride: int) -> Projection | None:
    return None if stride == 1 and inputs == outputs else Projection(inputs, outputs, stride)


DEPTHS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, ...], int]] = {
    "resnet8": (BasicBlock, (1, 1, 1), 16),
    "resnet10": (BasicBlock, (1, 1, 1, 1), 64),
    "resnet20": (BasicBlock, (3, 3, 3), 16),
    "resnet18": (BasicBlock, (2, 2, 2, 2), 64),
    "resnet34": (BasicBlock, (3, 4, 6, 3), 64),
    "resnet50": (Bottleneck, (3, 4, 6, 3), 64),
}


def build(name: str, *, classes: int, width: int | None, stem: str, activation: Activation = relu) -> ResNet:
    """Build the network of this name; `width` defaults to the published one."""
    block, depths, published = DEPTHS[name]
    return ResNet(block, depths, classes=classes, width=width or published, stem=stem, activation=activation)
