"""privet recover: try to make protected images learnable again."""

from __future__ import annotations

from pathlib import Path

from privet.cli.screen import progress, written
from privet.errors import OutputError


def recover(
    source: str,
    /,
    *,
    out: Path,
    method: str,
    prior: str | None = None,
    size: int | None = None,
    split: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    format: str = "png",
    metadata: str = "keep",
    device: str = "auto",
    precision: str = "bf16",
    workers: int = 4,
) -> int:
    """Take a protection off images again, as far as that goes, without the originals.

    A killed run goes on when the same command is given again, and ends with the same bytes.

    Parameters
    ----------
    source
        The protected images: a folder that privet wrote, or anything else that it takes.
    out
        New folder for the recovered images, manifest.jsonl and run.json.
    method
        purify, jcdp, avatar (with a prior), jpeg-QUALITY, grayscale, bitdepth-BITS, blur-SIGMA, projection,
        coin, dvae (dvae-16 on processors); or several joined by +, as in projection+purify. docs/methods.md says what
        each does.
    prior
        For purify, jcdp and avatar: a folder of 'privet prior train', or a diffusion model of the hub.
    size
        Side in pixels at which the recovery works (default: the images' own if all are alike and at most
        224, else 224). Files keep their own size.
    split
        Split of a hub data set or of a folder of Parquet files.
    limit
        Use only so many of the images.
    seed
        The same seed gives the same bytes.
    format
        png, webp (lossless) or parquet.
    metadata
        keep or strip. Location is stripped in any case.
    device
        auto, cpu or cuda.
    precision
        bf16 or float32.
    workers
        Files decoded and encoded at a time.
    """
    from privet.images import open_images
    from privet.images.picture import check_format
    from privet.learning import Runtime
    from privet.recovery import create_recovery, restore

    if format != "parquet":
        check_format(format)
    recovery = create_recovery(method, prior=prior)
    here = Runtime.find(device, precision)
    if Path(source).exists() and out.absolute().is_relative_to(Path(source).absolute()):
        raise OutputError(f"{out} lies inside {source}. Choose another folder.")
    with progress(here.rank) as listener:
        images = open_images(
            source,
            size=size,
            split=split,
            limit=limit,
            workers=workers,
            workspace=out / ".privet",
            progress=listener,
        )
        restored = restore(
            images,
            recovery,
            out,
            runtime=here,
            seed=seed,
            format=format,
            metadata=metadata,
            workers=workers,
            progress=listener,
        )
    return written(restored, f"recovered with {method}", rank=here.rank)
