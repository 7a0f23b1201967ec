"""A licence's audit as report.json and as one self-contained page."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.lines import Line2D

from privet.audit import LicenceAudit
from privet.audit.licence_plan import CLEAN, CLEAN_PART, LICENSEE, MIXED
from privet.audit.licence_verdict import COST, GAP, NO, OPEN, PLAINLY, YES, who
from privet.files import write_bytes, write_json
from privet.learning.confidence import uncertainty
from privet.report.pages import pages
from privet.report.plots import STYLE, svg
from privet.report.report import JSON, PAGE

KINDS = {
    "clean": ("#2f6f4f", "the originals"),
    "licensee": ("#3b6ea5", "the licensee"),
    "part": ("#8a8f98", "with a part of the originals"),
    "others": ("#b3412f", "everybody else"),
}
GRADES = {  # by the page's colours
    YES: "holds",
    PLAINLY: "partly",
    NO: "fails",
    OPEN: "inconclusive",
}


def write_licence_report(audit: LicenceAudit, out: Path) -> dict[str, Any]:
    """Write report.json and report.html into `out`, and return the report."""
    report = {
        "verdict": asdict(audit.verdict),
        "bounds": {"cost": COST, "gap": GAP},
        "rows": [
            {
                "who": row.who,
                "words": who(row.who),
                "kind": _kind(row.who),
                "architecture": row.architecture,
                "freedom": row.freedom,
                "last": row.last.json(),
                "peak": row.peak.json(),
                "counts": row.counts,
            }
            for row in audit.table
        ],
        "learners": [{**asdict(seat), **result} for seat, result in audit.results.items()],
        "facts": audit.facts,
        "run": audit.run,
    }
    write_json(out / JSON, report)
    write_bytes(out / PAGE, render_licence(report).encode())
    return report


def render_licence(report: dict[str, Any]) -> str:
    """Return the page for a report."""
    main = report["run"]["plan"]["architectures"][0]
    rows = [row for row in report["rows"] if not row["freedom"]]
    free: dict[str, dict[str, Any]] = {}
    for row in report["rows"]:
        if row["freedom"]:
            free.setdefault(row["freedom"], {})[row["kind"]] = row
    return (
        pages()
        .get_template("licence.html")
        .render(
            **report,
            main=main,
            mains=[row for row in rows if row["architecture"] == main],
            elsewhere=[row for row in rows if row["architecture"] != main],
            free=free,
            uncertainty=uncertainty(report["facts"]["test"]),
            strongest=who(report["verdict"]["strongest"]),
            grade=GRADES[report["verdict"]["grade"]],
            bars=party_bars([row for row in rows if row["architecture"] == main], report),
        )
    )


def party_bars(rows: list[dict[str, Any]], report: dict[str, Any]) -> str:
    """Draw what each party's networks learned: bars after the last epoch, dots at each seed's best epoch."""
    clean = next(row["last"]["mean"] for row in rows if row["who"] == CLEAN)
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(7.6, 0.34 * len(rows) + 1.3))
        for place, row in enumerate(rows):
            colour = KINDS[row["kind"]][0]
            axis.barh(place, 100 * row["last"]["mean"], 0.62, color=colour)
            peaks = [100 * value for value in row["peak"]["values"]]
            axis.scatter(peaks, [place] * len(peaks), s=10, color="#222222", zorder=3, linewidths=0)
        chance = 100 * report["facts"]["chance"]
        lines = (
            (100 * (clean - COST), (0, ()), "licensee at least"),
            (100 * (clean - GAP), (0, (1, 1.5)), "everybody else at most"),
            (chance, (0, (4, 3)), "chance"),
        )
        for value, dashes, _ in lines:
            axis.axvline(value, color="#333333", linewidth=0.9, linestyle=dashes)
        axis.set_yticks(range(len(rows)), [row["words"] for row in rows])
        axis.invert_yaxis()
        axis.set_xlim(0, 100)
        axis.grid(axis="y", visible=False)
        axis.set_xlabel("accuracy on clean images, %")
        seen = {row["kind"] for row in rows}
        handles = [
            Line2D([], [], color=colour, linewidth=6, label=words)
            for kind, (colour, words) in KINDS.items()
            if kind in seen
        ]
        handles += [
            Line2D([], [], color="#333333", linewidth=0.9, linestyle=dashes, label=words)
            for _, dashes, words in lines
        ]
        handles.append(
            Line2D([], [], color="#222222", marker=".", linestyle="", label="best epoch of a seed")
        )
        figure.legend(handles=handles, loc="upper center", ncols=4, frameon=False, fontsize=8)
        figure.tight_layout(rect=(0, 0, 1, 1 - 0.5 / figure.get_figheight()))
        return svg(figure)


def _kind(name: str) -> str:
    return {CLEAN: "clean", LICENSEE: "licensee", CLEAN_PART: "part", MIXED: "part"}.get(name, "others")
