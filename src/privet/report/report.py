"""An audit as report.json and as one self-contained page that needs nothing else."""

from __future__ import annotations

import base64
import statistics
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from privet.audit import Audit
from privet.audit.statistics import recovered, select
from privet.audit.verdict import describe
from privet.files import write_bytes, write_json
from privet.images.montage import montage, png
from privet.learning.confidence import uncertainty
from privet.report.pages import pages
from privet.report.plots import NAMES, accuracy_bars, learning_curves
from privet.report.strips import strips

JSON, PAGE = "report.json", "report.html"
RECOVERED = 5  # images whose recoveries are shown


def write_report(audit: Audit, out: Path) -> Path:
    """Write report.json and report.html into `out`, and return the page's path."""
    report = summarise(audit)
    write_json(out / JSON, report)
    page = render(report, pictures=_pictures(audit), recovered=_recovered(audit))
    write_bytes(out / PAGE, page.encode("utf-8", "backslashreplace"))  # file names need not be UTF-8
    return out / PAGE


def summarise(audit: Audit) -> dict[str, Any]:
    """Return everything that an audit found, as JSON values."""
    facts, material = audit.material.facts, audit.material
    quality = [one.psnr for one in material.similarities if one.psnr is not None]
    structure = [one.ssim for one in material.similarities if one.ssim is not None]
    return {
        "verdict": {
            "grade": audit.verdict.grade,
            "headline": audit.verdict.headline,
            "sentences": list(audit.verdict.sentences),
            "recoveries": [asdict(grade) for grade in audit.verdict.grades],
        },
        "flags": [asdict(flag) for flag in audit.flags],
        "grid": [
            {
                "data": row.data,
                "recovery": row.recovery,
                "architecture": row.architecture,
                "last": row.last.json(),
                "best": row.best.json(),
                "best_epochs": list(row.best_epochs),
                "histories": [
                    result["history"]
                    for cell, result in audit.results.items()
                    if (cell.data, cell.recovery, cell.architecture)
                    == (row.data, row.recovery, row.architecture)
                ],
            }
            for row in audit.table
        ],
        "images": {
            "pairs": facts.paired,
            "unpaired": facts.unpaired,
            "test": facts.test,
            "classes": list(material.clean.class_names),
            "size": list(material.clean.size),
            "chance": facts.chance,
            "linf": facts.linf,
            "l2": max(change.l2 for change in material.similarities),
            "l0": max(change.l0 for change in material.similarities),
            "pixels": material.clean.size[0] * material.clean.size[1],
            "psnr": {"mean": statistics.fmean(quality), "least": min(quality)},
            "ssim": {"mean": statistics.fmean(structure), "least": min(structure)} if structure else None,
        },
        "strips": [
            {"name": material.clean.names[index], **asdict(material.similarities[index])}
            for index in material.shown
        ],
        "recoveries": [_recovery(audit, name) for name in audit.plan.recoveries],
        "protection": facts.protection,
        "run": audit.run,
    }


def _recovery(audit: Audit, name: str) -> dict[str, Any]:
    """Return what a recovery brings back on each architecture, and what it costs."""
    share, unsure = {}, uncertainty(audit.material.facts.test)
    for architecture in audit.plan.architectures:
        clean, protected, after = (
            select(audit.table, data=data, recovery=recovery, architecture=architecture)[0].last.mean
            for data, recovery in (("clean", "none"), ("protected", "none"), ("protected", name))
        )
        share[architecture] = recovered(after, protected, clean, uncertainty=unsure)
    cost = audit.costs[name]
    seconds = cost["seconds"]
    return {
        "name": name,
        "recovered": share,
        "evaluations": _evaluations(cost["facts"]),
        "seconds_per_1000": None if seconds is None else 1000 * seconds / audit.material.facts.paired,
        "versions": len(_versions(audit, name)),
        "chosen": cost["facts"].get("chosen"),
    }


def _versions(audit: Audit, name: str) -> tuple[Tensor, ...]:
    """Return what a recovery made of the shown images: mostly once, never if it leaves images as they are."""
    made = audit.examples.get(name)
    return () if made is None else torch.split(made, len(audit.material.shown))


def _evaluations(facts: Mapping[str, Any]) -> int:
    """Return how often a recovery asked its prior about an image; of a chain, all parts together."""
    parts = (_evaluations(value) for value in facts.values() if isinstance(value, dict))
    return int(facts.get("evaluations", 0)) + sum(parts)


def render(report: dict[str, Any], *, pictures: bytes, recovered: bytes | None) -> str:
    """Return the page for a report.

    Args:
        report: what `summarise` returned, or read back from report.json.
        pictures: the strips, as PNG bytes.
        recovered: likewise originals, protected images and what recoveries made of them, or None.
    """
    names = report["run"]["plan"]["recoveries"]
    recoveries = [{"name": name, "words": describe(name), "short": name} for name in names]
    chance = report["images"]["chance"]
    environment = pages()
    environment.filters["words"] = describe
    return environment.get_template("report.html").render(
        **report,
        table=_table(report),
        names=NAMES,
        uncertainty=uncertainty(report["images"]["test"]),
        bars=accuracy_bars(report["grid"], recoveries, chance),
        curves=learning_curves(report["grid"], recoveries, chance),
        pictures=base64.b64encode(pictures).decode(),
        recovered=recovered and base64.b64encode(recovered).decode(),
    )


def _table(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the grid with clean, random and protected beside each other."""
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for row in report["grid"]:
        line = lines.setdefault(
            (row["recovery"], row["architecture"]),
            {"recovery": row["recovery"], "architecture": row["architecture"]},
        )
        line[row["data"]] = row
    return list(lines.values())


def _pictures(audit: Audit) -> bytes:
    material, index = audit.material, list(audit.material.shown)
    magnify = 127 / material.facts.linf
    return png(strips(material.clean.pixels[index], material.protected.pixels[index], magnify=magnify))


def _recovered(audit: Audit) -> bytes | None:
    """Return a picture with one row for each image: original, protected, and each recovery that changes images."""
    if not audit.examples:
        return None
    material, index = audit.material, list(audit.material.shown[:RECOVERED])
    columns = [material.clean.pixels[index], material.protected.pixels[index]]
    for name in audit.plan.recoveries:
        columns += [pixels[: len(index)] for pixels in _versions(audit, name)]
    return png(montage(list(zip(*columns, strict=True))))
