"""Attack victims, naively and aware of what was done to their updates, and say how much came out."""

from __future__ import annotations

import dataclasses
import hashlib
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from privet.errors import UsageError
from privet.files import claim, finish, json_line, read_json, write_bytes, write_json
from privet.images.montage import montage, png
from privet.leakage.base import Inversion, Reconstruction
from privet.leakage.identify import Gallery, Identified, controls, identify
from privet.leakage.measure import (
    OUTCOMES,
    Found,
    Success,
    baselines,
    judge,
    matched,
    psnr,
    ssim,
)
from privet.leakage.victims import Victim, threat_model
from privet.learning.confidence import clopper_pearson
from privet.learning.runtime import Runtime, describe_device
from privet.learning.update import Treatment
from privet.learning.update_files import contents
from privet.progress import Progress, silent
from privet.version import VERSION

REPORT, PICTURE = "report.json", "pairs.png"
DEFAULT = Success()
MOST_ROWS = 16  # of the picture


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
    progress: Progress = silent,
) -> Attack:
    """Attack all victims in one way; arguments and errors as for `attack`."""
    started = time.perf_counter()
    reconstructions = inversion.invert(
        [victim.update for victim in victims], runtime=runtime, seed=seed, network=network, progress=progress
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
        found.append(judge(result, victim.images, victim.labels, success, own))
    return Attack(
        aware=inversion.aware,
        reconstructions=reconstructions,
        found=found,
        identified=identified,
        seconds=time.perf_counter() - started,
    )


def summary(found: Sequence[Sequence[Found]]) -> dict[str, Any]:
    """Return what attacks on several victims came to; a victim counts if any of its images came out."""
    images = [one for victim in found for one in victim]
    if not images:
        return {}
    hit = sum(any(one.outcome == "recovered" for one in victim) for victim in found)
    ssims = [one.ssim for one in images if one.ssim is not None]
    outcomes = Counter(one.outcome for one in images)
    return {
        "victims": len(found),
        "victims_recovered": hit,
        "share": hit / len(found),
        "bounds": clopper_pearson(hit, len(found)),
        "images": len(images),
        "outcomes": {outcome: outcomes[outcome] for outcome in OUTCOMES},
        "labels_right": sum(one.label for one in images),
        "median_psnr": statistics.median(one.psnr for one in images),
        "best_psnr": max(one.psnr for one in images),
        "median_ssim": statistics.median(ssims) if ssims else None,
    }


def report(
    victims: Sequence[Victim],
    attacks: Sequence[Attack],
    success: Success,
    public: Tensor | None = None,
    gallery: Gallery | None = None,
) -> dict[str, Any]:
    """Return everything that was found out, as JSON values.

    Args:
        victims: who was attacked.
        attacks: how.
        success: the thresholds.
        public: images of the same kind that are not private, in [0, 1], for the baselines.
        gallery: of the people whom the images show, as it was attacked with.
    """
    known = [victim.images for victim in victims if victim.images is not None]
    return {
        "threat_model": {
            "aware" if one.aware else "naive": threat_model(victims[0].update, aware=one.aware)
            for one in attacks
        },
        "success": asdict(success),
        "attacks": [
            {
                "aware": one.aware,
                "seconds": round(one.seconds, 2),
                "summary": summary(one.found),
                "identification": one.identified and one.identified.summary(),
                "victims": [
                    victim_row(result, found)
                    for result, found in zip(one.reconstructions, one.found, strict=True)
                ],
            }
            for one in attacks
        ],
        "baselines": baseline_rows(torch.cat(known), public, success) if known and public is not None else {},
        "identification": control_rows(victims, gallery) if known and gallery is not None else {},
    }


def write_attack(
    out: Path,
    victims: Sequence[Victim],
    inversion: Inversion,
    *,
    runtime: Runtime,
    source: dict[str, Any],
    success: Success = DEFAULT,
    seed: int = 0,
    public: Tensor | None = None,
    gallery: Gallery | None = None,
    hide: bool = False,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Attack, and write report.json and pairs.png into `out`; return the report. A finished run is not repeated.

    Args:
        out: a new folder.
        victims: as for `attack`.
        inversion: likewise.
        runtime: likewise.
        source: where the victims come from, for the report.
        success: as for `attack`.
        seed: likewise.
        public: as for `report`.
        gallery: as for `attack`; photographs that are among the private images are left out.
        hide: leave the private images out of the picture.
        progress: told about steps.

    Raises:
        InputError: as for `attack`.
        OutputError: the folder holds something else, or cannot be written.
        UsageError: as for `attack`, or success is to be identified without a gallery.
    """
    gallery = others(gallery, victims, success)
    run = {
        "privet": VERSION,
        **inversion.record(),
        "source": source,
        "success": asdict(success),
        "seed": seed,
        "hide": hide,
        "victims": digest(victims, public),
        "gallery": gallery and gallery.record(),
        "device": describe_device(runtime.device, torch.get_num_threads()),
        "torch": torch.__version__,
    }
    if not claim(out, run):
        attacks = attack(
            victims,
            inversion,
            runtime=runtime,
            success=success,
            seed=seed,
            gallery=gallery,
            progress=progress,
        )
        write_json(out / REPORT, {**run, **report(victims, attacks, success, public, gallery)})
        rows = _pairs(victims, attacks, hide=hide)
        write_bytes(out / PICTURE, png(montage(rows, _titles(victims, attacks, hide=hide))))
        finish(out, run, {})
    return read_json(out / REPORT)


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


def digest(victims: Sequence[Victim], public: Tensor | None) -> str:
    """Return a hash of everything that is known of the victims, and of the public images."""
    hashed = hashlib.sha256()
    for victim in victims:
        about = {**contents(victim.update)[0], "truth": victim.labels, "people": victim.people}
        hashed.update(json_line(about))
    for images in (*(victim.images for victim in victims), public):
        hashed.update(b"" if images is None else images.contiguous().numpy().tobytes())
    return hashed.hexdigest()


def victim_row(result: Reconstruction, found: Sequence[Found]) -> dict[str, Any]:
    """Return what came of one victim, as JSON values."""
    finite = [None if abs(value) == torch.inf else value for value in (result.distance, *result.distances)]
    return {
        "end": result.end,
        "steps": result.steps,
        "distance": finite[0],
        "distances": finite[1:],
        "noise_floor": result.floor,
        "equations": result.equations,
        "unknowns": result.unknowns,
        "labels": result.labels.tolist(),
        "images": [asdict(one) for one in found],
        "history": [list(point) for point in result.history],
    }


def control_rows(victims: Sequence[Victim], gallery: Gallery) -> dict[str, Any]:
    """Return what the gallery makes of the private images themselves, and of images that show nobody."""
    known = [victim for victim in victims if victim.images is not None]
    private = torch.cat([victim.images for victim in known if victim.images is not None])
    people = [person for victim in known for person in victim.people]
    return {name: one.summary() for name, one in controls(private, people, gallery).items()}


def baseline_rows(private: Tensor, public: Tensor, success: Success) -> dict[str, Any]:
    """Return how many private images baselines would count as recovered, as JSON values."""
    rows = {}
    for name, drawn in baselines(private, public).items():
        ratios = psnr(drawn, private).tolist()
        similar = ssim(drawn, private)
        hits = sum(map(success.met, ratios, similar))
        rows[name] = {"median_psnr": statistics.median(ratios), "recovered": hits, "images": len(ratios)}
    return rows


def _pairs(victims: Sequence[Victim], attacks: Sequence[Attack], *, hide: bool) -> list[list[Tensor]]:
    """Return rows of the private image and what each attack made of it, the most faithful first."""
    rows: list[tuple[float, list[Tensor]]] = []
    for index, victim in enumerate(victims):
        results = [one.reconstructions[index] for one in attacks]
        if victim.images is None:
            drawn = [result.images.expand(-1, 3, -1, -1) for result in results]
            rows += [(0.0, list(images)) for images in zip(*drawn, strict=True)]
            continue
        drawn = [matched(result, victim.images) for result in results]
        for position, private in enumerate(victim.images):
            best = max(one.found[index][position].psnr for one in attacks)
            recovered = [images[position] for images in drawn]
            rows.append((-best, recovered if hide else [private, *recovered]))
    rows.sort(key=lambda row: row[0])
    return [[(255 * image).round().to(torch.uint8) for image in row] for _, row in rows[:MOST_ROWS]]


def _titles(victims: Sequence[Victim], attacks: Sequence[Attack], *, hide: bool) -> list[str]:
    """Return what the columns of `_pairs` are."""
    shown = [] if hide or all(victim.images is None for victim in victims) else ["private"]
    if len(attacks) == 1:
        return [*shown, "reconstructed"]
    return [*shown, *("aware" if one.aware else "naive" for one in attacks)]
