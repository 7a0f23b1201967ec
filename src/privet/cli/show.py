"""privet show: look at what was done to the images."""

from __future__ import annotations

from pathlib import Path

from rich.markup import escape

from privet.cli.screen import say
from privet.errors import OK, UsageError


def show(
    clean: str,
    protected: str,
    /,
    *,
    out: Path = Path("strips.png"),
    count: int = 8,
    size: int | None = None,
    split: str | None = None,
    limit: int | None = None,
) -> int:
    """Draw strips of a protected set: original, protected, and the noise between them, magnified.

    Of what 'privet recover --method versions' wrote, each strip shows the original and all of its versions.

    Parameters
    ----------
    clean
        The images as they were.
    protected
        The same images as published or recovered, under the same names.
    out
        The PNG file to write.
    count
        Images to show, those with the lowest PSNR first.
    size
        Side in pixels at which they are compared.
    split
        Split of the clean images, if they come from the hub or from a folder of several.
    limit
        Use only so many of the clean images.
    """
    from privet.files import write_bytes
    from privet.images import open_images
    from privet.images.montage import png
    from privet.report.strips import worst_strips

    if count < 1:
        raise UsageError(f"Expected a count of at least 1, got {count}.")
    if out.suffix.lower() != ".png":
        raise UsageError(f"Expected a .png file to write, got {out}.")
    before = open_images(clean, size=size, split=split, limit=limit)
    after = open_images(protected, size=before.size)
    image, columns, shown = worst_strips(before, after, count)
    write_bytes(out, png(image))
    for name, similarity in shown:
        quality = (
            "unchanged"
            if similarity.psnr is None
            else f"PSNR {similarity.psnr:.1f} dB, largest change {similarity.linf}/255"
        )
        say(f"{escape(name)}: {quality}")
    say(f"From left to right: {escape(', '.join(columns))}")
    say(f"Written to {escape(str(out))}")
    return OK
