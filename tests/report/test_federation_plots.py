"""The figures of a federation's page."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from privet.report import federation_plots


@pytest.mark.parametrize(("reached", "chance"), [(0.08, 0.125), (0.6, 0.1), (0.01, 0.01)])
def test_everything_drawn_lies_inside_the_axes(
    reached: float, chance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(federation_plots, "svg", lambda figure: drawn.append(figure) or "")
    rounds = [{"round": 1, "down": 10**6, "up": 10**5, "accuracy": reached}]
    federation_plots.accuracy_by_bytes(rounds, chance)
    for axis in drawn[0].axes:
        for line in axis.lines:
            assert 0 <= max(line.get_ydata()) <= axis.get_ylim()[1]
