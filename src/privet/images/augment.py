"""Random views of a whole batch at once, and the adjoint that carries a gradient back through them.

An augmentation draws one view for each image; a view is linear in the pixels, so the gradient with
respect to the image is the view's adjoint applied to the gradient with respect to the view. Writing
the adjoint down (rather than leaving it to autograd) makes each of the two a single gather, keeps
the order of additions fixed, and so keeps results the same from run to run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Views(Protocol):
    """One view of each image of a batch."""

    def apply(self, x: Tensor) -> Tensor:
        """Return the views of `x`, (images, channels, height, width), channels last in memory.

        Where there are more views than images, the images are gone through again and again.
        """

    def adjoint(self, g: Tensor) -> Tensor:
        """Carry a gradient with respect to the views back to the images, as autograd would."""


class Augmentation(Protocol):
    """A distribution over views."""

    def draw(self, count: int, size: tuple[int, int], generator: torch.Generator) -> Views:
        """Draw `count` views of images of this size (height, width), on the generator's device."""


@dataclass(frozen=True)
class FlipCrop:
    """Flip left to right with probability one half, then shift by up to `pad` pixels over black.

    The augmentation of CIFAR-10 training (pad 4 at 32 px) and of the SEM paper's expectation.
    """

    pad: int
    flip: bool = True

    def draw(self, count: int, size: tuple[int, int], generator: torch.Generator) -> Views:
        device = generator.device
        top, left = torch.randint(0, 2 * self.pad + 1, (2, count), generator=generator, device=device)
        flip = torch.rand(count, generator=generator, device=device) < (0.5 if self.flip else 0.0)
        return _FlipCropViews(flip, top, left, self.pad)


@dataclass(frozen=True)
class ResizedCrop:
    """Cut a random part (`least` to all of the area, aspect 3:4 to 4:3), resize it, flip half of them.

    The augmentation of ImageNet training, here as two small interpolation matrices for each image,
    so that the batch is two matrix products and the adjoint is their transposes. Bilinear, without
    the low-pass filter that image libraries add when they reduce.
    """

    size: tuple[int, int]
    flip: bool = True
    least: float = 0.08

    def draw(self, count: int, size: tuple[int, int], generator: torch.Generator) -> Views:
        device = generator.device
        area, aspect, y, x, flip = torch.rand(5, count, generator=generator, device=device)
        area = (self.least + (1 - self.least) * area) * size[0] * size[1]
        aspect = torch.exp((2 * aspect - 1) * torch.log(torch.tensor(4 / 3)))
        height = (area / aspect).sqrt().clamp(1, size[0])
        width = (area * aspect).sqrt().clamp(1, size[1])
        rows = _interpolation(y * (size[0] - height), height, size[0], self.size[0])
        columns = _interpolation(x * (size[1] - width), width, size[1], self.size[1])
        if self.flip:
            columns = torch.where(flip[:, None, None] < 0.5, columns.flip(1), columns)
        return _ResizedViews(rows, columns)


def augmentation_for(size: tuple[int, int], *, flip: bool = True) -> Augmentation:
    """Return what is usual for images of this size: shifts up to 64 px, resized crops above."""
    if max(size) <= 64:
        return FlipCrop(max(size) // 8, flip)
    return ResizedCrop(size, flip)


@dataclass(frozen=True)
class _FlipCropViews:
    flip: Tensor  # (batch,) bool
    top: Tensor  # (batch,) offset of the window in the padded image, 0 to 2 pad
    left: Tensor
    pad: int

    def apply(self, x: Tensor) -> Tensor:
        columns = torch.arange(x.shape[3], device=x.device) + self.left[:, None]
        # Flipping first and shifting then is shifting a window that is read from the far end.
        columns = torch.where(self.flip[:, None], x.shape[3] + 2 * self.pad - 1 - columns, columns)
        return self._window(x, self.top, columns)

    def adjoint(self, g: Tensor) -> Tensor:
        columns = torch.arange(g.shape[3], device=g.device).expand(len(g), -1)
        columns = torch.where(self.flip[:, None], columns.flip(1), columns)
        return self._window(g, 2 * self.pad - self.top, columns + 2 * self.pad - self.left[:, None])

    def _window(self, x: Tensor, top: Tensor, columns: Tensor) -> Tensor:
        """Read rows from `top` and these columns, (batch, width), of the zero-padded images."""
        images, channels, height, width = x.shape
        batch, pad = len(top), self.pad
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, pad, pad, pad, pad))
        rows = torch.arange(height, device=x.device) + top[:, None]
        image = torch.arange(batch, device=x.device) % max(1, images) * (height + 2 * pad)
        index = (image[:, None] + rows)[:, :, None] * (width + 2 * pad) + columns[:, None, :]
        pixels = padded.reshape(-1, channels).index_select(0, index.view(-1))
        return pixels.view(batch, height, width, channels).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class _ResizedViews:
    rows: Tensor  # (batch, height out, height in)
    columns: Tensor  # (batch, width out, width in)

    def apply(self, x: Tensor) -> Tensor:
        rows, columns = self._matrices(x)
        x = x.repeat(len(rows) // max(1, len(x)), 1, 1, 1)
        y = rows @ x.to(rows.dtype) @ columns.transpose(2, 3)
        if not x.is_floating_point():
            y = y.round().clamp(0, 255)
        return y.to(x.dtype).contiguous(memory_format=torch.channels_last)

    def adjoint(self, g: Tensor) -> Tensor:
        rows, columns = self._matrices(g)
        x = rows.transpose(2, 3) @ g.to(rows.dtype) @ columns
        return x.to(g.dtype).contiguous(memory_format=torch.channels_last)

    def _matrices(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both matrices with a channel axis, in at least float32."""
        kind = torch.promote_types(x.dtype, torch.float32)
        return self.rows[:, None].to(kind), self.columns[:, None].to(kind)


def _interpolation(start: Tensor, length: Tensor, inputs: int, outputs: int) -> Tensor:
    """Return matrices, (batch, outputs, inputs), that resample [start, start + length) linearly."""
    steps = (torch.arange(outputs, device=start.device) + 0.5) / outputs
    position = (start[:, None] + steps * length[:, None] - 0.5).clamp(0, inputs - 1)
    distance = (position[:, :, None] - torch.arange(inputs, device=start.device)).abs()
    return (1 - distance).clamp(min=0)
