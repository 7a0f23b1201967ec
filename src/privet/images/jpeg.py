"""JPEG for a whole batch where the batch is: what compression does to pixels, without the file."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# ITU-T T.81, tables K.1 and K.2: steps of the 64 frequencies of luma and chroma at quality 50.
LUMA = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMA = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8 for _ in range(4)),
)
# JFIF: Y, Cb, Cr from R, G, B, and back.
FORWARD = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
BACK = ((1.0, 0.0, 1.402), (1.0, -0.344136, -0.714136), (1.0, 1.772, 0.0))


@torch.no_grad()
def jpeg(x: Tensor, quality: Tensor) -> Tensor:
    """Return images as they come out of JPEG (baseline, 4:2:0).

    The lossless half of JPEG is left out, for it changes nothing. Up to rounding the result is that
    of libjpeg.

    Args:
        x: pixels in [0, 1], (batch, 3, height, width).
        quality: of each image, 1 to 100, (batch,).
    """
    height, width = x.shape[2:]
    pixels = (x.float() * 255).round()
    # libjpeg fills up the right edge before it halves the chroma, and the lower edge, but for one row, afterwards.
    pixels = F.pad(pixels, (0, -width % 16, 0, -height % 2), mode="replicate")
    ycc = _colours(pixels, FORWARD).round()
    scale = torch.where(quality < 50, 5000 / quality, 200 - 2 * quality).view(-1, 1, 1)
    luma = _code(_filled(ycc[:, :1] - 128), _steps(LUMA, scale))
    chroma = _code(_filled(F.avg_pool2d(ycc[:, 1:], 2).round()), _steps(CHROMA, scale))
    chroma = F.interpolate(chroma, scale_factor=2, mode="bilinear", align_corners=False)
    rgb = _colours(torch.cat((luma[:, :, :height] + 128, chroma[:, :, :height]), 1), BACK)
    return rgb[:, :, :, :width].round().clamp(0, 255) / 255


def _filled(planes: Tensor) -> Tensor:
    """Repeat the last row until there are whole blocks."""
    return F.pad(planes, (0, 0, 0, -planes.shape[2] % 8), mode="replicate")


def _colours(x: Tensor, matrix: tuple[tuple[float, ...], ...]) -> Tensor:
    return torch.einsum("oc,bchw->bohw", x.new_tensor(matrix), x)


def _steps(table: tuple[tuple[int, ...], ...], scale: Tensor) -> Tensor:
    """Return each image's steps, (batch, 8, 8), as libjpeg scales them."""
    return ((scale.new_tensor(table) * scale.floor() + 50) / 100).floor().clamp(1, 255)


def _code(planes: Tensor, steps: Tensor) -> Tensor:
    """Round the frequencies of each block of 8 x 8 to whole steps."""
    batch, channels, height, width = planes.shape
    blocks = planes.view(batch, channels, height // 8, 8, width // 8, 8).transpose(3, 4)
    place, frequency = torch.arange(8.0, device=planes.device), torch.arange(8.0, device=planes.device)
    cosines = torch.cos((2 * place + 1) * frequency[:, None] * (math.pi / 16)) / 2  # (frequency, place)
    cosines[0] /= 2**0.5
    steps = steps.view(batch, 1, 1, 1, 8, 8)
    coded = (cosines @ blocks @ cosines.T / steps).round() * steps
    decoded = (cosines.T @ coded @ cosines).round().clamp(-128, 127)
    return decoded.transpose(3, 4).reshape(batch, channels, height, width)
