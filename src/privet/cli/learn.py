"""privet learn: train a learner and measure it on clean images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.markup import escape

from privet.cli.options import MACHINE, Machine
from privet.cli.screen import progress, say
from privet.errors import OK


def learn(
    train: str,
    /,
    *,
    test: str,
    out: Path,
    architecture: str = "resnet18",
    epochs: int = 60,
    batch_size: int = 128,
    learning_rate: float | None = None,
    weight_decay: float | None = None,
    schedule: str = "cosine",
    radius: float = 0.0,
    attack_steps: int = 10,
    weights: Path | None = None,
    flip: bool = True,
    distort: Annotated[bool, Parameter(negative="")] = False,
    size: int | None = None,
    split: str | None = None,
    test_split: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    machine: Machine = MACHINE,
) -> int:
    """Train a network on images, and report its accuracy on clean ones after every epoch.

    A killed run goes on when the same command is given again. On several GPUs: accelerate launch -m privet learn ...

    Parameters
    ----------
    train
        Images to learn from: a folder of class folders, a .csv or .jsonl, Parquet, or a hub id.
    test
        Clean images of the same classes.
    out
        New folder for learner.safetensors and run.json (last and best accuracy, history, settings).
    architecture
        resnet8, resnet10, resnet18, resnet18-imagenet, vgg11, densenet121, mobilenetv2, vit, cnn, ...;
        -wN behind it for another width; timm:NAME for one of timm's; simclr:NAME to learn without labels (SimCLR), and
        to fit a linear probe with them.
    epochs
        Passes over the images.
    batch_size
        Images a step.
    learning_rate
        Highest rate (default: SGD 0.1, without labels 0.5 for batches of at least 512; AdamW for transformers 0.001).
    weight_decay
        Default: SGD 0.0005, without labels 0.0001; AdamW 0.05.
    schedule
        cosine, or step (a tenth after 40 and 80 % of the steps).
    radius
        Of adversarial training (PGD, L-infinity), in 1/255; 0 is standard training.
    attack_steps
        Of its PGD.
    weights
        A .safetensors file to start from (fine-tuning).
    flip
        Whether views are mirrored; --no-flip for handwriting.
    distort
        Change light, colours and geometry of views strongly as well: for networks that are to compare faces.
    size
        Side in pixels at which the network sees the images.
    split
        Split of the training images, if they come from the hub or a folder of Parquet files.
    test_split
        Likewise of the test images.
    limit
        Use only so many of the training images.
    seed
        The same seed gives the same learner.
    machine
        Where it runs.
    """
    from privet.learning import Learner, study

    learner = Learner(
        architecture=architecture,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        schedule=schedule,
        radius=radius,
        attack_steps=attack_steps,
        flip=flip,
        distort=distort,
        weights=weights,
    )
    here = machine.find()
    with progress(here.rank) as listener:
        learned = study(
            train,
            test,
            learner,
            out,
            runtime=here,
            seed=seed,
            size=size,
            split=split,
            test_split=test_split,
            limit=limit,
            progress=listener,
        )
    if here.rank > 0:
        return OK
    best, last = learned.best, learned.history[-1]
    say(
        f"{architecture}: {last.accuracy:.1%} on clean images after the last epoch, {best.accuracy:.1%} at best "
        f"(epoch {best.epoch}); {last.train_accuracy:.1%} on its own images. Written to {escape(str(out))}"
    )
    return OK
