"""A small vision transformer (Dosovitskiy et al., arXiv 2010.11929) for thumbnails.

Pre-norm encoder, learned positions, mean pooling instead of a class token (simpler, and as good at
this size: Beyer et al., arXiv 2205.01580).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from privet.errors import UsageError

HEAD_WIDTH = 32
DEPTH = 6


class ViT(nn.Module):
    """Patches of an eighth of the image's side, `DEPTH` encoder layers, heads of `HEAD_WIDTH` channels.

    Where patches do not divide a side, zeros (grey, behind `Scaled`) fill the last ones up.
    """

    def __init__(self, *, size: tuple[int, int], classes: int, width: int) -> None:
        super().__init__()
        heads = max(1, width // HEAD_WIDTH)
        if width % heads:
            raise UsageError(
                f"Expected a width of vit that its {heads} heads share evenly, got {width}; take a multiple of "
                f"{HEAD_WIDTH}."
            )
        self.patch = max(1, min(size) // 8)
        tokens = -(-size[0] // self.patch) * -(-size[1] // self.patch)
        self.patches = nn.Conv2d(3, width, self.patch, self.patch)
        self.positions = nn.Parameter(torch.randn(1, tokens, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width,
            heads,
            4 * width,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.encoder = nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        down, right = (-side % self.patch for side in x.shape[2:])
        x = F.pad(x, (0, right, 0, down))
        tokens = self.patches(x).flatten(2).transpose(1, 2)  # (batch, tokens, width)
        return self.fc(self.norm(self.encoder(tokens + self.positions)).mean(1))  # type: ignore[no-any-return]


def build(*, size: tuple[int, int], classes: int, width: int | None) -> ViT:
    """Build the network for images of this size; `width` is that of its tokens (192)."""
    return ViT(size=size, classes=classes, width=width or 192)
