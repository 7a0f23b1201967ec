"""privet federate: train a network on images that stay where they are, on few bytes."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.markup import escape

from privet.cli.options import MACHINE, Machine
from privet.cli.screen import progress, say
from privet.errors import OK


def federate(
    train: str,
    /,
    *,
    test: str,
    out: Path,
    architecture: str = "lenet",
    clients: int = 50,
    alpha: float = 0.3,
    rounds: int = 100,
    strategy: str = "fedavg",
    codec: str = "dhq-deadzone",
    budget: Annotated[str, Parameter(show_default=False)] = "",
    download: str = "dhq-deadzone",
    download_budget: Annotated[str, Parameter(show_default=False)] = "",
    sampler: str = "cyclic",
    schedule: str = "static",
    fraction: float = 0.2,
    decay: float = 0.01,
    floor: float = 0.05,
    local_epochs: int = 1,
    batch_size: int = 32,
    learning_rate: float = 0.05,
    augment: bool = True,
    record: int = 0,
    size: int | None = None,
    split: str | None = None,
    test_split: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    machine: Machine = MACHINE,
) -> int:
    """Train a network on images that are split among clients, each of which sends only what its training changed.

    A killed run goes on when the same command is given again. The clients live in this process; for real ones,
    on Flower, see docs/federation.md.

    Parameters
    ----------
    train
        Images to learn from: a folder of class folders, a .csv or .jsonl, Parquet, or a hub id.
    test
        Images of the same classes that the model is measured on after each round.
    out
        New folder for report.html, federation.json and model.safetensors.
    architecture
        As for privet learn.
    clients
        Number of clients.
    alpha
        Of the Dirichlet distribution that splits each class among them, up to a million; 0 deals the images at random.
    rounds
        Number of rounds.
    strategy
        fedavg, fedavgm or fedadam.
    codec
        For what clients send: dhq, dhq-lloyd, dhq-deadzone, fp16, int8, qsgd, terngrad, sign, topk, stc, eden, or
        none for whole models.
    budget
        Of an update: a share of its values as in 1%, for codecs that choose values; or a size as in 64KiB, into which
        at least one value must fit. Default: 1% for those that choose; others send every value.
    download
        Codec of what they receive.
    download_budget
        Likewise, of one difference to the model.
    sampler
        uniform, cyclic (everybody takes a turn) or weighted (drawn by numbers of images, then counted alike).
    schedule
        Of the fraction of clients: static, exponential (dynamic sampling), linear, cosine or step.
    fraction
        Of the clients that take part in a round; with other schedules than static, in the first.
    decay
        Of the exponential schedule, per round.
    floor
        Least fraction.
    local_epochs
        Passes of a client over its images in a round.
    batch_size
        Images a step.
    learning_rate
        Of the clients' plain SGD.
    augment
        Whether clients shift and mirror their images; --no-augment for handwriting.
    record
        Keep so many of the last round's updates as records for privet invert, in folders named after the clients.
    size
        Side in pixels at which the network sees the images.
    split
        Split of the training images, if they come from the hub or a folder of Parquet files.
    test_split
        Likewise of the test images.
    limit
        Use only so many of the training images.
    seed
        The same seed gives the same model.
    machine
        Where it runs.
    """
    from privet.federation.flower.federate import RECORDS
    from privet.federation.flower.federate import federate as play
    from privet.federation.flower.plan import Plan
    from privet.images import align, open_images
    from privet.report import write_federation

    given: dict[str, Any] = locals()
    plan = Plan(**{field.name: given[field.name] for field in fields(Plan)})
    here = machine.find()
    here.alone("privet federate")
    with progress(here.rank) as listener:
        images = open_images(train, size=size, split=split, limit=limit, progress=listener)
        others = align(
            open_images(test, size=images.size, split=test_split, progress=listener), images.class_names
        )
        report = play(
            images,
            others,
            plan,
            out,
            runtime=here,
            source={"train": train, "test": test},
            record=record,
            progress=listener,
        )
    page = write_federation(report, out)
    total = report["bytes"]
    say(
        f"{report['accuracy']['last']:.1%} after {rounds} rounds; {total['down'] + total['up']:,} bytes moved, "
        f"{total['down']:,} down and {total['up']:,} up. Whole models would have taken {total['whole_models']:,}. "
        f"See {escape(str(page))}"
    )
    if report["left_out"]:
        say(
            f"{report['left_out']:,} of {report['participations']:,} updates were left out; the page says whose, and "
            "why."
        )
    for folder in sorted((out / RECORDS).glob("*")):
        say(f"A record for privet invert: {escape(str(folder))}")
    return OK
