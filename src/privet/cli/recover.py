"""privet recover: try to make protected images learnable again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from privet.cli.options import FILES, MACHINE, Files, Machine
from privet.cli.prior import doubt_blind
from privet.errors import UsageError

if TYPE_CHECKING:  # they import torch, which takes seconds
    from privet.images import ImageSet
    from privet.learning import Publication


def recover(
    source: str,
    /,
    *,
    out: Path,
    method: str,
    prior: str | None = None,
    seed: int = 0,
    files: Files = FILES,
    machine: Machine = MACHINE,
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
        purify (purify-1: one round), purify-gently, jcdp, avatar (with a prior), jpeg-QUALITY, grayscale,
        bitdepth-BITS, blur-SIGMA, projection, coin, dvae (dvae-16 on processors); or several joined by +, as in
        purify-1+grayscale; versions, which writes each image as several of them leave it; or auto, which tries some on
        a part of the images and chooses. docs/methods.md says what each does.
    prior
        For purify, jcdp and avatar, and for auto and versions to denoise too: a folder of 'privet prior train', or a
        diffusion model of the hub.
    seed
        The same seed gives the same bytes.
    files
        How images are read and written.
    machine
        Where it runs.
    """
    from privet.recovery import create_recovery, load_prior, restore, uses_prior

    recovery, here = create_recovery(method, prior=prior), machine.find()
    if prior is not None:
        if not uses_prior(method, given=True):
            raise UsageError(f"{method} does not denoise with a prior: leave --prior out.")
        doubt_blind(load_prior(prior, runtime=here), rank=here.rank)

    def change(images: ImageSet, **writing: Any) -> Publication:
        return restore(images, recovery, out, runtime=here, seed=seed, **writing)

    return files.change(source, out, change, rank=here.rank, what=f"recovered with {method}")
