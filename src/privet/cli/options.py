"""Options that several verbs have, and what they do with them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number

from privet.cli.screen import progress, written
from privet.errors import InputError, OutputError, UsageError
from privet.files import refuse_other_files

SOME = Parameter(validator=Number(gte=1))
Workers = Annotated[int | None, SOME]

if TYPE_CHECKING:  # they import torch, which takes seconds
    from torch import nn

    from privet.images import ImageSet
    from privet.leakage.measure import Success
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
        bf16, float32, or auto: bf16 where the device multiplies in it, else float32.
    compile
        Use torch.compile; worth it for long runs on a GPU.
    """

    device: str = "auto"
    precision: str = "auto"
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
        Split of a hub data set or of a folder of Parquet files, or the folder of a folder that is meant (train, test).
    limit
        Use only so many of the images.
    format
        png, webp (lossless) or parquet. JPEG is refused: it destroys the noise.
    metadata
        keep or strip. GPS and fields that name a place are stripped in any case, unless --keep-gps is given.
    keep_gps
        Keep GPS and places in the metadata; not with --metadata strip.
    workers
        Files decoded and encoded at a time.
    """

    size: int | None = None
    split: str | None = None
    limit: int | None = None
    format: str = "png"
    metadata: str = "keep"
    keep_gps: Annotated[bool, Parameter(negative="")] = False
    workers: Annotated[int, SOME] = 4

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
        from privet.images.write import check_writing

        check_writing(format=self.format, metadata=self.metadata, gps=self.keep_gps)
        if Path(source).exists() and out.resolve().is_relative_to(Path(source).resolve()):
            raise OutputError(
                f"{out} lies inside {source}; its images would be read as well. Choose another folder."
            )
        refuse_other_files(out)  # before many photographs are read
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


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Clients:
    """Clients that are simulated, to be attacked.

    Parameters
    ----------
    model
        The network of simulated clients, as 'privet learn' saved it.
    architecture
        In place of a model: a network with fresh weights.
    batch_size
        Private images of each client.
    local_steps
        SGD steps of each client before it sends its change.
    learning_rate
        Of those.
    labels_known
        The attacker is told the labels.
    statistics
        Clients send batch norm's statistics too, as those do who send all tensors of a network.
    size
        Side in pixels of the clients' images.
    split
        Split of a hub data set or of a folder of Parquet files.
    """

    model: Path | None = None
    architecture: str | None = None
    batch_size: int = 1
    local_steps: int = 1
    learning_rate: float = 0.1
    labels_known: Annotated[bool, Parameter(negative="")] = False
    statistics: Annotated[bool, Parameter(negative="")] = False
    size: int | None = None
    split: str | None = None

    @property
    def network(self) -> str:
        """The model or architecture, for a report."""
        return str(self.model or self.architecture)

    @property
    def settings(self) -> dict[str, Any]:
        """What each client does, as `simulate` takes it."""
        return {
            "batch_size": self.batch_size,
            "local_steps": self.local_steps,
            "learning_rate": self.learning_rate,
            "labels_known": self.labels_known,
            "statistics": self.statistics,
        }

    def open(self, source: str, *, seed: int) -> tuple[nn.Module, str, ImageSet]:
        """Return their network, in training mode, its architecture, and their images.

        Raises:
            InputError: there are no images.
            UsageError: there are records of updates in the place of images; or neither a model nor an architecture is
                given, or both.
        """
        from privet.images import align, open_images
        from privet.learning.update_files import RECORD
        from privet.models import create_model, load_model

        # A record itself, several as in updates, those of a federation, or one of several that is not there.
        folder, places = Path(source), (RECORD, f"*/{RECORD}", f"updates/*/{RECORD}")
        if not folder.exists() and folder.parent.name:
            folder = folder.parent
        if records := [path.parent for place in places for path in sorted(folder.glob(place))]:
            raise UsageError(
                f"{folder} holds what clients sent ({len(records)} in all), and no images to simulate clients with. "
                f"Attack one record: privet invert {records[0]}"
            )
        if (self.model is None) == (self.architecture is None):
            raise UsageError(
                f"{source} is no record of an update, so clients are simulated with its images: give either --model or "
                "--architecture."
            )
        if self.model is not None:
            network, about = load_model(self.model)
            images = align(open_images(source, size=about.size, split=self.split), about.class_names)
            name = about.architecture
        else:
            images = open_images(source, size=self.size, split=self.split)
            name = self.architecture or ""
            network = create_model(name, classes=images.classes, size=images.size, seed=seed)
        if not len(images):
            raise InputError(f"{source} holds no images.")
        return network.train(), name, images


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What reconstructions are compared with, and which of them count.

    Parameters
    ----------
    public
        Images of the same kind that are not private, for the baselines.
    gallery
        Other photographs of the same people, in a folder for each, to see whether reconstructions are recognised.
        The classes of the private images must be the same people.
    embedder
        What compares faces: pixels, or a file of 'privet learn', trained on a folder for each of other people.
    psnr
        An image counts as recovered from so many dB on,
    ssim
        or from this structural similarity on,
    identified
        or, with this, if the gallery names its person first.
    """

    public: str | None = None
    gallery: str | None = None
    embedder: str = "pixels"
    psnr: float = 20.0
    ssim: float = 0.6
    identified: Annotated[bool, Parameter(negative="")] = False

    @property
    def success(self) -> Success:
        """What counts as recovered."""
        from privet.leakage.measure import Success

        return Success(psnr=self.psnr, ssim=self.ssim, identified=self.identified)

    def open(self, size: tuple[int, int], runtime: Runtime) -> dict[str, Any]:
        """Return the public images and the gallery at this size, or None for either, as attacks take them."""
        from privet.images import open_images
        from privet.leakage import Embedder, Gallery

        public = None if self.public is None else open_images(self.public, size=size).pixels.float() / 255
        if self.gallery is None:
            return {"public": public, "gallery": None}
        pixels = self.embedder == "pixels"
        chosen = Embedder.pixels() if pixels else Embedder.load(Path(self.embedder), runtime)
        gallery = Gallery(photographs=open_images(self.gallery, size=size), embedder=chosen)
        return {"public": public, "gallery": gallery}


MACHINE, FILES = Machine(), Files()
CLIENTS, JUDGEMENT = Clients(), Judgement()


def processes(runtime: Runtime) -> int:
    """Return how many learners are trained at a time: the number of processors, or 1 on a GPU."""
    return 1 if runtime.device.type == "cuda" else os.cpu_count() or 1


def split(value: str) -> tuple[str, ...]:
    """Return what stands between commas."""
    return tuple(part.strip() for part in value.split(",") if part.strip())
