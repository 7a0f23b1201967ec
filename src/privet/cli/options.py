"""Options that several verbs have, and what they do with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from privet.cli.screen import progress, written
from privet.errors import OutputError

if TYPE_CHECKING:  # they import torch, which takes seconds
    from privet.learning import Publication, Runtime


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where it runs.

    Parameters
    ----------
    device
        auto, cpu or cuda.
    precision
        bf16 or float32.
    compile
        Use torch.compile; worth it for long runs on a GPU.
    """

    device: str = "auto"
    precision: str = "bf16"
    compile: bool = False

    def find(self) -> Runtime:
        """Return the runtime."""
        from privet.learning import Runtime

        return Runtime.find(self.device, self.precision, compile=self.compile)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Files:
    """How images are read, and written again.

    Parameters
    ----------
    size
        Side in pixels at which networks see the images (default: their own if all are alike and at most 224,
        else 224). Files keep their own size.
    split
        Split of a hub data set or of a folder of Parquet files.
    limit
        Use only so many of the images.
    format
        png, webp (lossless) or parquet. JPEG is refused: it destroys the noise.
    metadata
        keep or strip. Location is stripped in any case, unless --keep-gps is given.
    keep_gps
        Keep the location in the metadata.
    workers
        Files decoded and encoded at a time.
    """

    size: int | None = None
    split: str | None = None
    limit: int | None = None
    format: str = "png"
    metadata: str = "keep"
    keep_gps: Annotated[bool, Parameter(negative="")] = False
    workers: int = 4

    def change(
        self, source: str, out: Path, change: Callable[..., Publication], *, rank: int, what: str
    ) -> int:
        """Open images, let `change` write others, say what was done, and return the exit code.

        Args:
            source: the images.
            out: where `change` writes.
            change: called with the images, and by keyword with how they are written and whom to tell.
            rank: of this process; only the first says anything.
            what: what was done to the images, as in "protected".
        """
        from privet.images import open_images
        from privet.images.picture import check_format

        if self.format != "parquet":
            check_format(self.format)
        if Path(source).exists() and out.absolute().is_relative_to(Path(source).absolute()):
            raise OutputError(
                f"{out} lies inside {source}; its images would be read as well. Choose another folder."
            )
        with progress(rank) as listener:
            images = open_images(
                source,
                size=self.size,
                split=self.split,
                limit=self.limit,
                workers=self.workers,
                workspace=out / ".privet",
                progress=listener,
            )
            publication = change(
                images,
                format=self.format,
                metadata=self.metadata,
                gps=self.keep_gps,
                workers=self.workers,
                progress=listener,
            )
        return written(publication, what, rank=rank)


MACHINE, FILES = Machine(), Files()
