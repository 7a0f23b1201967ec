"""A network that makes the noise of an image from the image and its label."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 4  # of group norm
DEEPEST = 3  # halvings at most


class UNet(nn.Module):
    """A UNet (Ronneberger et al., arXiv 1505.04597) with an embedding of the label in its middle.

    Two 3x3 convolutions at each resolution, each with group norm, so that an image's noise depends on no other
    image; average pooling on the way down. On the way up every value is doubled and a 3x3 mean taken, nearly
    bilinear: the gradient of bilinear interpolation has no fixed order of additions on a GPU.
    """

    def __init__(self, *, classes: int, size: tuple[int, int], width: int = 16) -> None:
        """Build it for images of a size (height, width), with `width` channels at full resolution."""
        super().__init__()
        depth = min(DEEPEST, min(size).bit_length() - 1)
        widths = [width << level for level in range(depth + 1)]
        self.down = nn.ModuleList(_block(i, o) for i, o in zip([3, *widths[:-1]], widths, strict=True))
        self.up = nn.ModuleList(_block(3 * o, o) for o in reversed(widths[:-1]))
        self.label = nn.Embedding(classes, widths[-1])
        self.out = nn.Conv2d(width, 3, 1)
        nn.init.normal_(self.out.weight, std=width**-0.5)  # noise that is there from the start

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """Map images in [0, 1], (batch, 3, height, width), and labels, (batch,), to noise in (-1, 1)."""
        y, skipped = 2 * x - 1, list[Tensor]()
        for level, block in enumerate(self.down):
            if level:
                skipped.append(y)
                y = F.avg_pool2d(y, 2)
            y = block(y)
        y = y + self.label(labels)[:, :, None, None]
        for block in self.up:
            beside = skipped.pop()
            y = block(torch.cat((_double(y, beside.shape[2:]), beside), 1))
        return self.out(y).tanh()  # type: ignore[no-any-return]


def _block(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [
            nn.Conv2d(channels, outputs, 3, padding=1, bias=False),
            nn.GroupNorm(GROUPS, outputs),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)


def _double(x: Tensor, size: torch.Size) -> Tensor:
    """Double the resolution; where halving had dropped a last row or column, repeat the one before."""
    batch, channels, height, width = x.shape
    y = x[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2).reshape(batch, channels, 2 * height, 2 * width)
    if y.shape[2:] != size:
        y = F.pad(y, (0, size[1] - 2 * width, 0, size[0] - 2 * height), mode="replicate")
    return F.avg_pool2d(y, 3, 1, padding=1, count_include_pad=False)
