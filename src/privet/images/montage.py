"""Images side by side, to look at."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GAP = 4
LEAST_SIDE = 96  # smaller images are enlarged by a whole number, without smoothing
TITLE = 20  # pixels above the columns for their names


def montage(rows: Sequence[Sequence[Tensor]], titles: Sequence[str] = ()) -> Image.Image:
    """Return rows of images with white between them.

    Args:
        rows: of images, each uint8, (3, height, width), all of one size.
        titles: what stands above the columns.
    """
    height, width = rows[0][0].shape[1:]
    columns = max(map(len, rows))
    sheet = np.full((len(rows) * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 255, np.uint8)
    for down, row in enumerate(rows):
        for right, image in enumerate(row):
            top, left = down * (height + GAP), right * (width + GAP)
            sheet[top : top + height, left : left + width] = image.permute(1, 2, 0).numpy()
    factor = max(1, -(-LEAST_SIDE // height))
    picture = Image.fromarray(sheet)
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    return _titled(picture, titles, factor * (width + GAP)) if titles else picture


def _titled(picture: Image.Image, titles: Sequence[str], step: int) -> Image.Image:
    sheet = Image.new("RGB", (picture.width, picture.height + TITLE), "white")
    sheet.paste(picture, (0, TITLE))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for column, title in enumerate(titles):
        draw.text((column * step, 1), title, fill="black", font=font)
    return sheet


def png(image: Image.Image) -> bytes:
    """Return the image as PNG bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
