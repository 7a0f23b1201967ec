"""An audit as report.json and as one self-contained page that needs nothing else."""

from __future__ import annotations

import base64
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2

from privet.audit import Audit
from privet.audit.statistics import interval
from privet.audit.verdict import describe
from privet.files import write_bytes, write_json
from privet.images.montage import png
from privet.report.plots import NAMES, accuracy_bars, learning_curves
from privet.report.strips import by_psnr, strips

JSON, PAGE = "report.json", "report.html"
STRIPS = 8  # images shown


def write_report(audit: Audit, out: Path) -> Path:
    """Write report.json and report.html into `out`, and return the page's path."""
    report = summarise(audit)
    write_json(out / JSON, report)
    page = render(report, pictures=_pictures(audit, report["strips"]))
    write_bytes(out / PAGE, page.encode())
    return out / PAGE


def summarise(audit: Audit) -> dict[str, Any]:
    """Return everything that an audit found, as JSON values."""
    facts, material = audit.material.facts, audit.material
    quality = [one.psnr for one in material.similarities if one.psnr is not None]
    structure = [one.ssim for one in material.similarities if one.ssim is not None]
    worst = by_psnr(material.similarities, material.clean.names)
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
            for index in worst[:STRIPS]
        ],
        "protection": facts.protection,
        "run": audit.run,
    }


def render(report: dict[str, Any], *, pictures: bytes) -> str:
    """Return the page for a report.

    Args:
        report: what `summarise` returned, or read back from report.json.
        pictures: the strips, as PNG bytes.
    """
    names = report["run"]["plan"]["recoveries"]
    recoveries = [{"name": name, "words": describe(name), "short": name} for name in names]
    chance, count = report["images"]["chance"], report["images"]["test"]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("privet.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda share: f"{100 * share:.1f}"
    environment.filters["words"] = describe
    return environment.get_template("report.html").render(
        **report,
        table=_table(report),
        names=NAMES,
        uncertainty=max(high - low for low, high in [interval(0.5, count)]) / 2,
        bars=accuracy_bars(report["grid"], recoveries, chance),
        curves=learning_curves(report["grid"], recoveries, chance),
        pictures=base64.b64encode(pictures).decode(),
    )


def _table(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the grid with clean, random and protected beside each other."""
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    grades = {grade["recovery"]: grade["grade"] for grade in report["verdict"]["recoveries"]}
    for row in report["grid"]:
        line = lines.setdefault(
            (row["recovery"], row["architecture"]),
            {
                "recovery": row["recovery"],
                "architecture": row["architecture"],
                "grade": grades[row["recovery"]],
            },
        )
        line[row["data"]] = row
    return list(lines.values())


def _pictures(audit: Audit, shown: list[dict[str, Any]]) -> bytes:
    position = {name: index for index, name in enumerate(audit.material.clean.names)}
    index = [position[one["name"]] for one in shown]
    image = strips(
        audit.material.clean.pixels[index],
        audit.material.protected.pixels[index],
        magnify=127 / audit.material.facts.linf,
    )
    return png(image)
