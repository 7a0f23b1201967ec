"""Intervals of counted shares."""

from __future__ import annotations

import numpy as np
import pytest

from privet.learning.confidence import clopper_pearson


@pytest.mark.parametrize(
    ("hits", "trials", "low", "high"),
    [
        (0, 20, 0, 0.16843),
        (20, 20, 0.83157, 1),
        (10, 20, 0.27196, 0.72804),
        (1, 10, 0.00253, 0.44502),
        (50, 100, 0.3983, 0.6017),
    ],
)
def test_clopper_pearson_from_tables(hits: int, trials: int, low: float, high: float) -> None:
    assert clopper_pearson(hits, trials) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_the_interval_covers_what_it_says() -> None:
    random = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        low, high = clopper_pearson(int(random.binomial(200, 0.3)), 200)
        inside += low <= 0.3 <= high
    assert inside >= 0.93 * 400
