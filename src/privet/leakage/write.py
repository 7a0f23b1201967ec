"""An attack with its files: report.json, and the images side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from privet.files import WORKSPACE, claim, finish, read_json, released, write_bytes, write_json
from privet.images.montage import montage, png
from privet.leakage.attack import DEFAULT, Attack, attack, others
from privet.leakage.base import Inversion
from privet.leakage.identify import Gallery
from privet.leakage.measure import Success, matched
from privet.leakage.results import digest, report
from privet.leakage.victims import Victim
from privet.learning.runtime import Runtime, describe_device
from privet.progress import Progress, silent
from privet.version import VERSION

REPORT, PICTURE = "report.json", "pairs.png"
MOST_ROWS = 16  # of the picture


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
    """Attack, and write report.json and pairs.png into `out`; return the report.

    A killed run goes on, and a finished one is not repeated.

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
        with released(out):
            attacks = attack(
                victims,
                inversion,
                runtime=runtime,
                success=success,
                seed=seed,
                gallery=gallery,
                workspace=out / WORKSPACE,
                progress=progress,
            )
        write_json(out / REPORT, {**run, **report(victims, attacks, success, public, gallery)})
        rows = _pairs(victims, attacks, hide=hide)
        write_bytes(out / PICTURE, png(montage(rows, _titles(victims, attacks, hide=hide))))
        finish(out, run, {})
    return read_json(out / REPORT)


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
