"""Attack victims, naively and aware of what was done to their updates."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from privet.errors import UsageError
from privet.leakage.base import Inversion, Reconstruction
from privet.leakage.identify import Gallery, Identified, identify
from privet.leakage.measure import Found, Success, judge, matched
from privet.leakage.victims import Victim
from privet.learning.runtime import Runtime
from privet.learning.update import Treatment
from privet.progress import Progress, silent

DEFAULT = Success()


@dataclass(frozen=True, kw_only=True, eq=False)
class Attack:
    """One way to attack all victims.

    Attributes:
        aware: whether it made use of what is known of the updates' treatment.
        reconstructions: one for each victim.
        found: for each victim, what came out for each of its images; empty where the truth is not known.
        identified: how all reconstructions compared with a gallery, or None.
        seconds: how long it took.
    """

    aware: bool
    reconstructions: list[Reconstruction]
    found: list[list[Found]]
    identified: Identified | None
    seconds: float


def attack(
    victims: Sequence[Victim],
    inversion: Inversion,
    *,
    runtime: Runtime,
    success: Success = DEFAULT,
    seed: int = 0,
    network: nn.Module | None = None,
    gallery: Gallery | None = None,
    workspace: Path | None = None,
    progress: Progress = silent,
) -> list[Attack]:
    """Attack all victims; if their updates were treated, once aware of it and once naively.

    Args:
        victims: alike in architecture, size, batch and number of steps.
        inversion: how.
        runtime: where.
        success: what counts as recovered.
        seed: of the inversion's starting points.
        network: if privet does not know the architecture.
        gallery: of the people whom the images show, to see whether they are recognised.
        workspace: a folder for what a killed attack goes on from, or None; as for `Inversion.invert`.
        progress: told about steps.

    Raises:
        InputError: the gallery lacks a person.
        UsageError: the inversion cannot be applied to these updates.
    """
    treated = any(victim.update.treatment != Treatment() for victim in victims)
    kinds = (True, False) if treated and inversion.aware else (inversion.aware,)
    return [
        attack_once(
            victims,
            dataclasses.replace(inversion, aware=aware),
            runtime=runtime,
            success=success,
            seed=seed,
            network=network,
            gallery=gallery,
            workspace=None if workspace is None else workspace / ("aware" if aware else "naive"),
            progress=progress,
        )
        for aware in kinds
    ]


def attack_once(
    victims: Sequence[Victim],
    inversion: Inversion,
    *,
    runtime: Runtime,
    success: Success = DEFAULT,
    seed: int = 0,
    network: nn.Module | None = None,
    gallery: Gallery | None = None,
    workspace: Path | None = None,
    progress: Progress = silent,
) -> Attack:
    """Attack all victims in one way; arguments and errors as for `attack`."""
    started = time.perf_counter()
    reconstructions = inversion.invert(
        [victim.update for victim in victims],
        runtime=runtime,
        seed=seed,
        network=network,
        workspace=workspace,
        progress=progress,
    )
    known = [
        (victim, victim.images, result)
        for victim, result in zip(victims, reconstructions, strict=True)
        if victim.images is not None
    ]
    identified = None
    if gallery is not None and known:
        identified = identify(
            torch.cat([matched(result, images) for _, images, result in known]),
            [person for victim, _, _ in known for person in victim.people],
            gallery,
            failed=[result.failed for _, images, result in known for _ in images],
        )
    ranks = iter(identified.ranks if identified is not None else ())
    found: list[list[Found]] = []
    for victim, result in zip(victims, reconstructions, strict=True):
        if victim.images is None:
            found.append([])
            continue
        own = [next(ranks, None) for _ in victim.labels]
        told = victim.update.labels is not None
        found.append(judge(result, victim.images, victim.labels, success, own, told=told))
    return Attack(
        aware=inversion.aware,
        reconstructions=reconstructions,
        found=found,
        identified=identified,
        seconds=time.perf_counter() - started,
    )


def others(gallery: Gallery | None, victims: Sequence[Victim], success: Success) -> Gallery | None:
    """Return the gallery without the victims' own images.

    Raises:
        UsageError: success is to be identified, and there is no gallery.
    """
    if gallery is None:
        if success.identified:
            raise UsageError("To be identified takes a gallery of photographs to be identified in.")
        return None
    known = [victim.images for victim in victims if victim.images is not None]
    return gallery.without(torch.cat(known)) if known else gallery
