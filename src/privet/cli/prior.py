"""privet prior: train a diffusion prior, and say what is known of one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cyclopts import App
from rich.markup import escape

from privet.cli.options import MACHINE, Machine
from privet.cli.screen import doubt, progress, say
from privet.errors import OK
from privet.files import refuse_other_files

if TYPE_CHECKING:  # it imports torch, which takes seconds
    from privet.recovery import Prior

prior = App(name="prior", help="Train the diffusion prior that recoveries denoise with, or describe one.")


@prior.command
def train(
    source: str,
    /,
    *,
    out: Path,
    scale: str = "small",
    steps: int = 20_000,
    batch_size: int = 128,
    learning_rate: float = 2e-4,
    max_t: int = 250,
    flip: bool = True,
    size: int | None = None,
    split: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    machine: Machine = MACHINE,
) -> int:
    """Learn what unprotected images look like. A killed training goes on when the same command is given again.

    Never train it on the originals of what it shall recover, nor on test images: the audit would flag it.

    Parameters
    ----------
    source
        Unprotected images: a folder of class folders, a .csv or .jsonl, Parquet, or a hub id.
    out
        New folder for the prior in diffusers' layout, its loss, and a picture of what it makes of noise.
    scale
        tiny (0.6 million weights, for processors), small (6 million) or ddpm (36 million).
    steps
        Of the optimiser.
    batch_size
        Images a step.
    learning_rate
        Of AdamW.
    max_t
        Train only for times below, of 1,000: a recovery never needs more.
    flip
        Whether images are mirrored; --no-flip for handwriting.
    size
        Side in pixels at which the images are learned.
    split
        Split of a hub data set or of a folder of Parquet files.
    limit
        Use only so many of the images.
    seed
        The same seed gives the same prior.
    machine
        Where it runs.
    """
    from privet.images import open_images
    from privet.learning import protection_record
    from privet.recovery import PriorTraining, train_prior

    here = machine.find()
    if here.rank == 0 and (protection := protection_record(source)):
        doubt(
            f"{source} was protected with {protection['method']}: a prior that learns its noise takes none of it off "
            "other images. Train it on unprotected ones."
        )
    training = PriorTraining(
        scale=scale,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        max_t=max_t,
        flip=flip,
    )
    refuse_other_files(out)
    with progress(here.rank) as listener:
        images = open_images(source, size=size, split=split, limit=limit, progress=listener)
        made = train_prior(images, training, out, runtime=here, seed=seed, progress=listener)
    if here.rank == 0:
        say(f"Prior written to {escape(str(out))}: mean squared error of its noise {made.about['loss']:.4f}")
        doubt_blind(made)
    return OK


@prior.command
def info(source: str, /) -> int:
    """Say what is known of a prior.

    Parameters
    ----------
    source
        A folder that privet or diffusers wrote, or a model of the hub.
    """
    from privet.learning import Runtime
    from privet.recovery import load_prior

    found = load_prior(source, runtime=Runtime.find("cpu", "float32"))
    weights = sum(weight.numel() for weight in found.model.parameters())
    say(f"weights: {weights:,}")
    say(f"times: below {found.max_t} of {len(found.kept)}")
    if found.about:
        training = found.about["training"]
        say(f"trained on: {found.about['images']:,} images, {'x'.join(map(str, found.about['size']))} px")
        say(f"training: {training['scale']}, {training['steps']:,} steps of {training['batch_size']}")
        say(f"mean squared error of its noise: {found.about['loss']:.4f}")
        doubt_blind(found)
    else:
        say("trained on: unknown, so an audit cannot tell whether it has seen what it recovers")
    return OK


def doubt_blind(found: Prior, *, rank: int = 0) -> None:
    """Say so, in the first process, if a prior is known to take next to no noise off images."""
    if rank == 0 and found.blind:
        doubt(
            f"this prior is blind: its error is {found.about['loss']:.2f}, and 1 is that of seeing no noise at all, so "
            "that recoveries with it add noise and take hardly any off. Train one with more --steps."
        )
