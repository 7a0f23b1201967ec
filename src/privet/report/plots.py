"""The two figures of a report, as SVG text that is the same for the same data."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg", force=False)
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

COLOURS = {"clean": "#2f6f4f", "random": "#8a8f98", "protected": "#b3412f"}
NAMES = {"clean": "clean files", "random": "random noise", "protected": "protected files"}
WIDEST = 9.0  # inches of bars beside each other
STYLE: Any = {
    "svg.hashsalt": "privet",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
}


def accuracy_bars(grid: Sequence[dict[str, Any]], recoveries: Sequence[dict[str, str]], chance: float) -> str:
    """Draw last-epoch accuracy by recovery and data, one small panel for each architecture.

    Panels stand beside each other where their names can still be read so, else below each other.

    Args:
        grid: rows of report.json.
        recoveries: name and words of each recovery, in order.
        chance: accuracy of always naming the commonest class.
    """
    architectures = list(dict.fromkeys(row["architecture"] for row in grid))
    width = 0.85 * len(recoveries)
    columns = len(architectures) if width * len(architectures) <= WIDEST else 1
    lines = len(architectures) // columns
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            lines,
            columns,
            figsize=(max(5.0, width * columns + 1.2), 2.8 * lines + 0.4),
            sharey=True,
            squeeze=False,
        )
        for axis, architecture in zip(axes.flat, architectures, strict=True):
            for offset, data in enumerate(NAMES):
                rows = [
                    next(
                        row
                        for row in grid
                        if (row["data"], row["recovery"], row["architecture"])
                        == (data, recovery["name"], architecture)
                    )
                    for recovery in recoveries
                ]
                places = [index + (offset - 1) * 0.27 for index in range(len(rows))]
                means = [100 * row["last"]["mean"] for row in rows]
                axis.bar(places, means, 0.25, color=COLOURS[data], label=NAMES[data])
                for place, row in zip(places, rows, strict=True):
                    values = [100 * value for value in row["last"]["values"]]
                    axis.scatter([place] * len(values), values, s=6, color="#222222", zorder=3, linewidths=0)
            axis.axhline(100 * chance, color="#555555", linewidth=0.8, linestyle=(0, (4, 3)))
            axis.set_title(architecture, fontsize=9.5, loc="left")
            axis.set_xticks(
                range(len(recoveries)),
                [recovery["short"] for recovery in recoveries],
                rotation=35,
                ha="right",
            )
            axis.set_ylim(0, 100)
            axis.grid(axis="x", visible=False)
        for axis in axes[:, 0]:
            axis.set_ylabel("accuracy on clean images, %")
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper center", ncols=3, frameon=False, bbox_to_anchor=(0.5, 1.0))
        figure.tight_layout(rect=(0, 0, 1, 1 - 0.28 / figure.get_figheight()))
        return svg(figure)


def learning_curves(
    grid: Sequence[dict[str, Any]], recoveries: Sequence[dict[str, str]], chance: float
) -> str:
    """Draw accuracy on clean images by epoch, a panel for each recovery, a line for each learner."""
    columns = min(3, len(recoveries))
    lines = -(-len(recoveries) // columns)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            lines,
            columns,
            figsize=(3.0 * columns + 0.6, 2.2 * lines + 0.5),
            sharex=True,
            sharey=True,
            squeeze=False,
        )
        for axis, recovery in zip(axes.flat, recoveries, strict=False):
            for row in grid:
                if row["recovery"] != recovery["name"]:
                    continue
                for history in row["histories"]:
                    axis.plot(
                        range(1, len(history) + 1),
                        [100 * epoch["accuracy"] for epoch in history],
                        color=COLOURS[row["data"]],
                        linewidth=1.0,
                        alpha=0.8,
                    )
            axis.axhline(100 * chance, color="#555555", linewidth=0.8, linestyle=(0, (4, 3)))
            axis.set_title(recovery["words"], fontsize=9.5, loc="left")
            axis.set_ylim(0, 100)
        for axis in axes.flat[len(recoveries) :]:
            axis.set_visible(False)
        for axis in axes[:, 0]:
            axis.set_ylabel("accuracy, %")
        for column in range(columns):
            axes[(len(recoveries) - 1 - column) // columns][column].set_xlabel("epoch")
            axes[(len(recoveries) - 1 - column) // columns][column].tick_params(labelbottom=True)
        handles = [Line2D([], [], color=COLOURS[data], label=NAMES[data]) for data in NAMES]
        figure.legend(handles=handles, loc="upper center", ncols=3, frameon=False, bbox_to_anchor=(0.5, 1.0))
        figure.tight_layout(rect=(0, 0, 1, 1 - 0.28 / figure.get_figheight()))
        return svg(figure)


def svg(figure: Figure) -> str:
    """Return a figure as SVG text without a date, and close it."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
