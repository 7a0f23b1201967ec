"""The figures of a federation's page, as SVG text that is the same for the same data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.ticker import MaxNLocator

from privet.report.plots import STYLE, svg

INK, SOFT, BAD = "#2f5f8f", "#8a8f98", "#b3412f"


def accuracy_by_bytes(rounds: Sequence[dict[str, Any]], chance: float) -> str:
    """Draw accuracy against bytes moved, both ways together, and against rounds."""
    moved, total = [], 0
    for one in rounds:
        total += one["down"] + one["up"]
        moved.append(total / 1e6)
    reached = [100 * one["accuracy"] for one in rounds]
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 2.9), sharey=True)
        left.plot(moved, reached, color=INK, linewidth=1.4, marker="." if len(rounds) < 40 else "")
        left.set_xlabel("MB moved so far, down and up")
        left.set_ylabel("accuracy, %")
        right.plot([one["round"] for one in rounds], reached, color=INK, linewidth=1.4)
        _by_round(right)
        for axis in (left, right):
            axis.axhline(100 * chance, color="#555555", linewidth=0.8, linestyle=(0, (4, 3)))
        left.set_ylim(0, max(5.0, min(100.0, 1.15 * max(*reached, 100 * chance))))
        left.set_xlim(0)
        figure.tight_layout()
        return svg(figure)


def laws(rounds: Sequence[dict[str, Any]]) -> str | None:
    """Draw threshold, mean and tail index of the values that were sent, or return None if no codec chose any."""
    told = [(one["round"], list(one["laws"].values())) for one in rounds if one["laws"]]
    if not told:
        return None
    numbers = [number for number, _ in told]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(8.4, 2.5))
        for key, words, colour in (("threshold", "smallest sent (τ)", SOFT), ("mean", "mean sent", INK)):
            values = [sum(law[key] for law in found) / len(found) for _, found in told]
            axes[0].plot(numbers, values, color=colour, linewidth=1.4, label=words)
        axes[0].set_ylabel("magnitude")
        axes[0].legend(frameon=False)
        axes[0].set_ylim(0)
        tails = [sum(law["tail"] for law in found) / len(found) for _, found in told]
        axes[1].plot(numbers, tails, color=INK, linewidth=1.4)
        axes[1].axhline(0, color="#555555", linewidth=0.8, linestyle=(0, (4, 3)))
        axes[1].set_ylabel("tail index ξ")
        for axis in axes:
            _by_round(axis)
        figure.tight_layout()
        return svg(figure)


def attendance(rounds: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    """Draw who took part in which round, and whose update was left out."""
    place = {name: row for row, name in enumerate(names)}
    grid = [[0] * len(rounds) for _ in names]
    for column, one in enumerate(rounds):
        for name in one["accepted"]:
            grid[place[name]][column] = 1
        for name in one["refused"]:
            if name in place:
                grid[place[name]][column] = 2
    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure, axis = plt.subplots(figsize=(8.4, max(1.2, min(4.5, 0.09 * len(names) + 0.7))))
        axis.pcolormesh(
            [one["round"] - 0.5 for one in rounds] + [rounds[-1]["round"] + 0.5],
            [row - 0.5 for row in range(len(names) + 1)],
            grid,
            cmap=ListedColormap(["#f1f3f5", INK, BAD]),
            vmin=0,
            vmax=2,
        )
        axis.invert_yaxis()
        _by_round(axis)
        axis.set_ylabel("client")
        figure.tight_layout()
        return svg(figure)


def classes(clients: Sequence[dict[str, Any]], class_names: Sequence[str]) -> str:
    """Draw how many images of each class every client has."""
    with plt.rc_context({**STYLE, "axes.grid": False}):
        figure, axis = plt.subplots(figsize=(8.4, 2.3))
        colours = plt.get_cmap("tab20" if len(class_names) > 10 else "tab10")
        base = [0] * len(clients)
        for label, name in enumerate(class_names):
            counts = [client["classes"][label] for client in clients]
            axis.bar(range(len(clients)), counts, 0.9, bottom=base, color=colours(label % 20), label=name)
            base = [below + count for below, count in zip(base, counts, strict=True)]
        axis.set_xlabel("client")
        axis.set_ylabel("images")
        axis.set_xlim(-0.6, len(clients) - 0.4)
        if len(class_names) <= 10:
            figure.legend(*axis.get_legend_handles_labels(), loc="center right", frameon=False, fontsize=8)
        figure.tight_layout(rect=(0, 0, 0.86 if len(class_names) <= 10 else 1, 1))
        return svg(figure)


def _by_round(axis: Axes) -> None:
    axis.set_xlabel("round")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
