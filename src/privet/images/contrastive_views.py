"""The strong random views that contrastive learning compares (Chen et al., arXiv 2002.05709, appendix A).

Where a crop is one pair of small matrices for each image, a change of colours is one 3 x 3 matrix and
one offset, so that a batch of views is three batched products. No view of the adjoint is written down:
the last step clips, and autograd knows where.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from privet.images.augment import ResizedCrop, Views

LUMA = (0.299, 0.587, 0.114)
# Luma and the two colour differences of NTSC; a turn of the latter changes the hue.
YIQ = (LUMA, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))
FROM_YIQ = torch.tensor(YIQ, dtype=torch.float64).inverse().tolist()


@dataclass(frozen=True)
class ContrastiveViews:
    """A crop (20 to 100 % of the area) that is flipped, changed in its colours, or made grey, at random.

    Brightness, contrast and saturation change by factors of 1 - `jitter` to 1 + `jitter`, the hue by
    up to `hue` turns, with probability 0.8; a fifth of the views are grey. SimCLR's settings for
    32-pixel images, as contrastive poisoning uses them (arXiv 2202.11202): no blur.

    Deviations: the four changes come in this order, not in a random one; pixels are clipped once, after
    all of them; the hue turns in the plane of colour differences, where HSV would bend it.
    """

    flip: bool = True
    jitter: float = 0.4
    hue: float = 0.1

    def draw(self, count: int, size: tuple[int, int], generator: torch.Generator) -> DrawnViews:
        """Draw `count` views of images of this size (height, width), on the generator's device."""
        device = generator.device
        crops = ResizedCrop(size, self.flip, least=0.2).draw(count, size, generator)
        changed, grey, *strengths = torch.rand(6, count, generator=generator, device=device)
        factors = [1 + self.jitter * (2 * strength - 1) for strength in strengths[:3]]
        brightness, contrast, saturation = (torch.where(changed < 0.8, factor, 1.0) for factor in factors)
        turn = torch.where(changed < 0.8, self.hue * (2 * strengths[3] - 1), 0.0)
        return DrawnViews(crops, brightness, contrast, saturation, turn, grey < 0.2)


@dataclass(frozen=True)
class DrawnViews:
    """One view of each image of a batch; each of the tensors is (batch,)."""

    crops: Views
    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    turn: Tensor
    grey: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """Return the views of `x`, (images, 3, height, width), in [0, 1], channels last in memory.

        Where there are more views than images, the images are gone through again and again.
        """
        x = self.crops.apply(x)
        matrix, offset = self._colours(x)
        pixels = x.permute(0, 2, 3, 1).flatten(1, 2)  # (batch, height * width, channels)
        pixels = (pixels @ matrix.transpose(1, 2) + offset).clamp(0, 1)
        return pixels.view(len(x), *x.shape[2:], 3).permute(0, 3, 1, 2)

    def _colours(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return matrices, (batch, 3, 3), and offsets, (batch, 1, 1), that change the colours of `x`.

        Saturation, hue and grey leave grey as it is. So contrast, which pulls every channel to the mean
        luma, does so through an offset that the later changes need not touch.
        """
        luma = x.new_tensor(LUMA)
        identity, to_grey = torch.eye(3, dtype=x.dtype, device=x.device), luma.expand(3, 3)
        saturation = self.saturation.to(x.dtype).view(-1, 1, 1)
        matrix = _turns(self.turn.to(x.dtype)) @ (saturation * identity + (1 - saturation) * to_grey)
        matrix = torch.where(self.grey.view(-1, 1, 1), to_grey, matrix)
        mean = (x.mean((2, 3)) @ luma) * self.brightness
        scale = (self.brightness * self.contrast).to(x.dtype).view(-1, 1, 1)
        return scale * matrix, ((1 - self.contrast) * mean).view(-1, 1, 1)


def _turns(turn: Tensor) -> Tensor:
    """Return matrices, (batch, 3, 3), that turn the hue of RGB by parts of a whole turn, (batch,)."""
    to_yiq = turn.new_tensor(YIQ)
    from_yiq = turn.new_tensor(FROM_YIQ)
    cos, sin = torch.cos(2 * math.pi * turn), torch.sin(2 * math.pi * turn)
    zero, one = torch.zeros_like(turn), torch.ones_like(turn)
    rotation = torch.stack((one, zero, zero, zero, cos, -sin, zero, sin, cos), 1).view(-1, 3, 3)
    return from_yiq @ rotation @ to_yiq
