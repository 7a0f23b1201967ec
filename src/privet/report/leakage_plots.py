"""The figures of a leakage report, as SVG text that is the same for the same data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from privet.report.plots import STYLE, svg

INK, RED, AMBER, GREY = "#1d2126", "#b3412f", "#a8700f", "#8a8f98"
COLOURS = {"plain": INK, "aware": RED, "naive": AMBER}
LINES = (  # of defences, in turn
    (),
    (5, 2),
    (1.5, 1.5),
    (6, 2, 1.5, 2),
    (12, 3),
    (3, 1),
    (12, 2, 1.5, 2, 1.5, 2),
    (1, 4),
)
CLOSE = 0.18  # of the range: points nearer to each other would have their names overlap


def loss_curves(report: dict[str, Any]) -> str:
    """Draw how far the gradient was from what was sent, by step; a panel for each method, a line for each victim."""
    methods = list(dict.fromkeys(row["method"] for row in report["settings"]))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(methods), figsize=(4.4 * len(methods) + 0.6, 3.0), squeeze=False, sharey=True
        )
        for axis, method in zip(axes[0], methods, strict=True):
            for row in report["settings"]:
                if row["method"] != method:
                    continue
                for position, victim in enumerate(report["victims"][row["name"]]):
                    points = [(step, value) for step, value in victim["history"] if 0 < value < 1e9]
                    axis.plot(
                        [step for step, _ in points],
                        [value for _, value in points],
                        label=_label(row) if position == 0 else None,
                        **_line(report, row),
                        alpha=0.7,
                    )
            axis.set_yscale("log")
            axis.set_title(method, fontsize=9.5, loc="left")
            axis.set_xlabel("step")
        axes[0][0].set_ylabel("distance to what was sent")
        _legend(axes[0])
        figure.tight_layout()
        return svg(figure)


def psnr_curves(report: dict[str, Any]) -> str:
    """Draw the share of images that came out at so many dB or better; a panel for each method."""
    methods = list(dict.fromkeys(row["method"] for row in report["settings"]))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(methods), figsize=(4.4 * len(methods) + 0.6, 3.0), squeeze=False, sharey=True, sharex=True
        )
        for axis, method in zip(axes[0], methods, strict=True):
            for row in report["settings"]:
                if row["method"] == method:
                    values = sorted(_ratios(report, row))
                    shares = [100 * (len(values) - i) / len(values) for i in range(len(values))]
                    axis.step(
                        [0.0, *values, values[-1]],
                        [100.0, *shares, 0.0],
                        where="pre",
                        label=_label(row),
                        **_line(report, row),
                    )
            _threshold(axis, report)
            axis.set_title(method, fontsize=9.5, loc="left")
            axis.set_xlabel("PSNR, dB")
        highest = max(max(_ratios(report, row)) for row in report["settings"])
        axes[0][0].set_xlim(0, highest + 2)
        axes[0][0].set_ylabel("images at least as good, %")
        _legend(axes[0])
        figure.tight_layout()
        return svg(figure)


def layer_bars(report: dict[str, Any]) -> str:
    """Draw the median PSNR that one layer's gradient alone gives away, dots for images."""
    rows = report["layers"]
    whole = next(
        row for row in report["settings"] if (row["method"], row["defence"]) == (rows[0]["method"], "none")
    )
    names = ["all layers", *(row["layer"] for row in rows)]
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(7.4, 0.34 * len(names) + 1.0))
        for place, row in enumerate([whole, *rows]):
            axis.barh(place, row["median_psnr"], 0.62, color=GREY if place == 0 else RED, alpha=0.75)
            ratios = _ratios(report, row)
            axis.scatter(ratios, [place] * len(ratios), s=7, color=INK, zorder=3, linewidths=0)
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        axis.grid(axis="y", visible=False)
        axis.set_xlabel("PSNR, dB: bars are medians, dots single images")
        _threshold(axis, report)
        figure.tight_layout()
        return svg(figure)


def frontier(report: dict[str, Any]) -> str:
    """Draw each defence by its price and by the success of the best attack, with 95 % bounds.

    The price is read off the accuracy after training with it, or off the error of the mean update.
    """
    measured = report["defences"][0]["accuracy"] is not None
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(7.4, 3.6))
        for one in report["defences"]:
            price = _price(one, measured=measured)
            for key, colour, shift in (("best", RED, 0.0), ("naive", AMBER, 0.6 if measured else 0.006)):
                found = one[key]
                if found is None:
                    continue
                low, high = (100 * bound for bound in found["bounds"])
                share = 100 * found["share"]
                axis.errorbar(
                    price + shift,
                    share,
                    yerr=[[share - low], [high - share]],
                    fmt="o" if key == "best" else "s",
                    color=INK if one["defence"] == "none" else colour,
                    markersize=5,
                    capsize=2,
                    linewidth=1,
                    alpha=1.0 if key == "best" else 0.55,
                )
        _name_points(axis, report, measured=measured)
        for colour, mark, words in ((RED, "o", "best attack"), (AMBER, "s", "best naive attack")):
            axis.plot([], [], mark, color=colour, markersize=5, label=words)
        axis.legend(fontsize=8, frameon=False, loc="upper left" if measured else "upper right")
        axis.set_ylim(-4, 108)
        if measured:
            highest = max(one["accuracy"] for one in report["defences"])
            axis.set_xlim(0, 120 * highest + 1)
            axis.axvline(100 * report["chance"], color=GREY, linewidth=0.8, linestyle=(0, (4, 3)))
            axis.set_xlabel(
                "accuracy after training with the defence, % (dashed: naming the commonest class)"
            )
        else:
            axis.set_xlim(-0.03, 1.05)
            axis.set_xlabel(
                "error of the mean update: 0 nothing lost, 1 nothing left (a stand-in for accuracy)"
            )
        axis.set_ylabel("clients with a recovered image, %")
        figure.tight_layout()
        return svg(figure)


def _price(one: dict[str, Any], *, measured: bool) -> float:
    return float(100 * one["accuracy"] if measured else one["mean_gradient_error"])


def _name_points(axis: Axes, report: dict[str, Any], *, measured: bool) -> None:
    """Write each defence beside its best attack, those of neighbours one above the other."""
    points = sorted(
        (_price(one, measured=measured), 100 * one["best"]["share"], one["defence"])
        for one in report["defences"]
    )
    span = max(price for price, _, _ in points) or 1.0
    level, before = 0, -span
    for price, share, name in points:
        level = level + 1 if price - before < CLOSE * span else 0
        before = price
        axis.annotate(
            "no defence" if name == "none" else name,
            (price, share),
            xytext=(7, 4 + 9 * level if share <= 50 else -10 - 9 * level),
            textcoords="offset points",
            fontsize=8,
        )


def _ratios(report: dict[str, Any], row: dict[str, Any]) -> list[float]:
    return [image["psnr"] for victim in report["victims"][row["name"]] for image in victim["images"]]


def _label(row: dict[str, Any]) -> str:
    return "no defence" if row["defence"] == "none" else f"{row['defence']}, {row['attacker']}"


def _line(report: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    names = [one["defence"] for one in report["defences"] if one["defence"] != "none"]
    style: dict[str, Any] = {"color": COLOURS[row["attacker"]], "linewidth": 1.1}
    if row["defence"] in names:
        dashes = LINES[names.index(row["defence"]) % len(LINES)]
        style["linestyle"] = (0, dashes) if dashes else "-"
    return style


def _threshold(axis: Axes, report: dict[str, Any]) -> None:
    limit = report["run"]["plan"]["success"]["psnr"]
    axis.axvline(limit, color="#555555", linewidth=0.8, linestyle=(0, (4, 3)))


def _legend(axes: Sequence[Axes]) -> None:
    axes[-1].legend(fontsize=7.5, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
