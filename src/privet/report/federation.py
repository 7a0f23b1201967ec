"""A federation as one self-contained page that needs nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from privet.files import write_bytes
from privet.learning.confidence import uncertainty
from privet.report.federation_plots import accuracy_by_bytes, attendance, classes, laws
from privet.report.pages import pages

PAGE = "report.html"


def write_federation(report: dict[str, Any], out: Path) -> Path:
    """Write report.html into `out`, and return its path.

    Args:
        report: what `federate` returned, or read back from federation.json.
        out: the federation's folder.
    """
    write_bytes(out / PAGE, render_federation(report).encode())
    return out / PAGE


def render_federation(report: dict[str, Any]) -> str:
    """Return the page of a federation."""
    environment = pages()
    environment.filters["bytes"] = size_of
    rounds, clients = report["rounds"], report["clients"]
    total = report["bytes"]["down"] + report["bytes"]["up"]
    return environment.get_template("federation.html").render(
        **report,
        uncertainty=uncertainty(report["tested"]),
        total=total,
        times=report["bytes"]["whole_models"] / total if total else 0.0,
        refusals=[(one["round"], name, why) for one in rounds for name, why in one["refused"].items()],
        curves=accuracy_by_bytes(rounds, report["chance"]),
        laws=laws(rounds),
        attendance=attendance(rounds, [client["name"] for client in clients]),
        split=classes(clients, report["class_names"]) if "classes" in clients[0] else None,
    )


def size_of(count: float) -> str:
    """Return a number of bytes as people read it."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count:,.0f} B"
