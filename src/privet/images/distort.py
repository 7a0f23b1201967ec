"""Strong random distortions of a whole batch at once: what people see through and shortcuts may not survive.

They are drawn for each image alone, and carry no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from privet.images.jpeg import jpeg

Operation = Callable[[Tensor, Tensor], Tensor]
"""Maps images and a strength in [-1, 1] for each, (batch, 1, 1, 1), to images."""


@torch.no_grad()
def distort(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random distortion of each image.

    In this order, each but the fourth with probability one half: fractal brightness (amplitude 0.5
    to 1), fractal contrast (factor 0 to 4), channels in another order, one of `OPERATIONS`, and JPEG
    at a quality of 10 to 100.

    Args:
        x: pixels in [0, 1], (batch, 3, height, width).
        generator: on the same device.
    """
    count, device = len(x), x.device

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, 1, 1, 1, generator=generator, device=device) * (high - low) + low

    def half() -> Tensor:
        return uniform(0, 1) < 0.5

    brightness = (2 * plasma(x, uniform(0.3, 0.7), generator) - 1) * uniform(0.5, 1)
    x = torch.where(half(), (x + brightness).clamp(0, 1), x)
    contrast = 4 * plasma(x, uniform(0.3, 0.7), generator)
    x = torch.where(half(), ((x - 0.5) * contrast + 0.5).clamp(0, 1), x)
    order = torch.rand(count, 3, generator=generator, device=device).argsort(1).view(count, 3, 1, 1)
    x = torch.where(half(), x.gather(1, order.expand_as(x)), x)
    x = _one_operation(x, uniform(-1, 1), generator)
    return torch.where(half(), jpeg(x, uniform(10, 100).round().view(-1)), x)


def plasma(like: Tensor, roughness: Tensor, generator: torch.Generator) -> Tensor:
    """Return fractal noise in [0, 1] for each channel: ever finer grids of random values, ever fainter.

    Args:
        like: gives the shape, (batch, channels, height, width), and the device.
        roughness: the share of one grid's amplitude that the next, twice as fine, has; (batch, 1, 1, 1).
        generator: on the same device.
    """
    batch, channels, height, width = like.shape
    noise, amplitude, cells = like.new_zeros(like.shape), torch.ones_like(roughness), 1
    while cells < max(height, width):
        grid = torch.rand(batch, channels, cells + 1, cells + 1, generator=generator, device=like.device)
        finer = F.interpolate(grid, size=(height, width), mode="bilinear", align_corners=True)
        noise, amplitude, cells = noise + amplitude * finer, amplitude * roughness, 2 * cells
    low, high = noise.amin((2, 3), keepdim=True), noise.amax((2, 3), keepdim=True)
    return (noise - low) / (high - low).clamp(min=1e-6)


def _one_operation(x: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Do one operation to each image, as TrivialAugment does (Müller and Hutter, arXiv 2103.10158)."""
    which = torch.randint(len(OPERATIONS), (len(x),), generator=generator, device=x.device)
    done = x.clone()
    for number, operation in enumerate(OPERATIONS.values()):
        (chosen,) = (which == number).nonzero(as_tuple=True)
        if len(chosen):
            done[chosen] = operation(x[chosen], strength[chosen]).clamp(0, 1)
    return done


def auto_contrast(x: Tensor, strength: Tensor) -> Tensor:
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return torch.where(high > low, (x - low) / (high - low).clamp(min=1e-6), x)


def equalize(x: Tensor, strength: Tensor) -> Tensor:
    """Give each value the rank that it has in its channel, from 0 for the least to 1."""
    levels = (x.flatten(2) * 255).round().long()  # (batch, 3, pixels)
    counts = torch.zeros(*levels.shape[:2], 256, dtype=torch.long, device=x.device)
    counts.scatter_add_(2, levels, torch.ones_like(levels))
    ranks = counts.cumsum(2)
    least = counts.gather(2, levels.amin(2, keepdim=True))
    pixels = levels.shape[2]
    table = (ranks - least) / (pixels - least).clamp(min=1)
    equal = table.gather(2, levels).view(x.shape).to(x.dtype)
    return torch.where((least == pixels).unsqueeze(3), x, equal)


def posterize(x: Tensor, strength: Tensor) -> Tensor:
    """Keep 2 to 8 bits."""
    steps = 2 ** (8 - (5 + 3 * strength).round())
    return ((x * 255).round() / steps).floor() * steps / 255


def solarize(x: Tensor, strength: Tensor) -> Tensor:
    """Invert what is brighter than a threshold from 0 to 1."""
    return torch.where(x < (1 + strength) / 2, x, 1 - x)


def brightness(x: Tensor, strength: Tensor) -> Tensor:
    """Multiply by 0.1 to 1.9."""
    return x * (1 + 0.9 * strength)


def contrast(x: Tensor, strength: Tensor) -> Tensor:
    """Move values away from their mean luma, or towards it, by a factor of 0.1 to 1.9."""
    mean = (
        (x * x.new_tensor((0.299, 0.587, 0.114)).view(3, 1, 1))
        .sum(1, keepdim=True)
        .mean((2, 3), keepdim=True)
    )
    return mean + (x - mean) * (1 + 0.9 * strength)


def sharpness(x: Tensor, strength: Tensor) -> Tensor:
    """Move values away from those of a smoothed image, or towards them, by a factor of 0.1 to 1.9."""
    kernel = x.new_tensor(((1, 1, 1), (1, 5, 1), (1, 1, 1))).div(13).expand(3, 1, 3, 3)
    smooth = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)
    return smooth + (x - smooth) * (1 + 0.9 * strength)


def _affine(place: Callable[[Tensor], tuple[Tensor | float, ...]]) -> Operation:
    """Return the operation that fetches (x, y) from (a x + b y + c, d x + e y + f), c and f in half sides."""

    def move(x: Tensor, strength: Tensor) -> Tensor:
        s = strength.view(-1)
        entries = [entry if isinstance(entry, Tensor) else torch.full_like(s, entry) for entry in place(s)]
        matrix = torch.stack(entries, 1).view(-1, 2, 3)
        # The grid counts in half sides, a turn in pixels.
        height, width = x.shape[2:]
        matrix = matrix * matrix.new_tensor(((1, height / width, 1), (width / height, 1, 1)))
        grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    return move


TURN = math.pi / 6

OPERATIONS: dict[str, Operation] = {
    "auto contrast": auto_contrast,
    "equalize": equalize,
    "posterize": posterize,
    "solarize": solarize,
    "brightness": brightness,
    "contrast": contrast,
    "sharpness": sharpness,
    # By up to 30 degrees, 0.3 of the side, half a side.
    "rotate": _affine(
        lambda s: ((TURN * s).cos(), -(TURN * s).sin(), 0.0, (TURN * s).sin(), (TURN * s).cos(), 0.0)
    ),
    "shear x": _affine(lambda s: (1.0, 0.3 * s, 0.0, 0.0, 1.0, 0.0)),
    "shear y": _affine(lambda s: (1.0, 0.0, 0.0, 0.3 * s, 1.0, 0.0)),
    "translate x": _affine(lambda s: (1.0, 0.0, s, 0.0, 1.0, 0.0)),
    "translate y": _affine(lambda s: (1.0, 0.0, 0.0, 0.0, 1.0, s)),
}
