"""The tail index, against samples of which it is known."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
from scipy.stats import genpareto

from privet.federation import DHQ, Schema, SenderState
from privet.federation.law import Law, law

COUNT = 40_000


@pytest.mark.parametrize("tail", [-0.3, 0.0, 0.2])
def test_the_tail_of_a_generalised_pareto_law(tail: float) -> None:
    random = np.random.default_rng(1)
    values = 0.5 + genpareto.rvs(tail, scale=0.1, size=COUNT, random_state=random)
    values *= random.choice([-1, 1], COUNT)
    schema = Schema.of({"a": np.zeros(300, np.float32), "b": np.zeros(COUNT, np.float32)})
    index = np.arange(200, 300 + COUNT)  # some values of the small tensor, which count for nothing
    found = law(index, np.concatenate([np.full(100, 1e-6), values]).astype(np.float32), schema)
    assert found.kept == COUNT
    assert found.threshold == pytest.approx(0.5, abs=1e-3)
    assert found.mean == pytest.approx(0.5 + 0.1 / (1 - tail), rel=0.02)
    assert found.tail == pytest.approx(tail, abs=0.03)


def test_equal_values_have_no_tail() -> None:
    schema = Schema.of({"a": np.zeros(300, np.float32)})
    assert law(np.arange(5), np.full(5, -2, np.float32), schema).tail == 0


def test_it_is_of_the_values_before_levels() -> None:
    update = {"a": np.random.default_rng(0).standard_t(3, 4000).astype(np.float32)}
    state = SenderState()
    DHQ().encode(update, budget="5%", state=state)
    assert state.told is not None
    index, values = state.told
    assert np.array_equal(values, update["a"][index]) and len(index) == 200
    assert np.abs(values).min() >= np.sort(np.abs(update["a"]))[-200]


def test_what_a_stranger_tells() -> None:
    for magnitudes in ([1.0], [1.0, 3.0], [2.0] * 99 + [1.0], [3.4e38] * 3, [1e-45, 2e-45]):
        values = np.array(magnitudes, np.float32)
        found = law(np.arange(len(values)), values, Schema.of({"a": np.zeros(300, np.float32)}))
        assert Law.told(asdict(found)) == found
    sound = {"kept": 4, "threshold": 0.5, "mean": 1.0, "tail": 0.2}
    assert Law.told(sound) == Law(kept=4, threshold=0.5, mean=1.0, tail=0.2)
    for wrong in (
        {"kept": 4.0},
        {"kept": [4]},
        {"kept": 0},
        {"kept": 10**400},
        {"threshold": [0.5]},
        {"threshold": -0.5},
        {"threshold": np.nan},
        {"mean": np.inf},
        {"mean": 1e39},
        {"tail": 0.51},
        {"tail": -4.1},
        {"more": 1.0},
    ):
        assert Law.told({**sound, **wrong}) is None
    assert Law.told({name: value for name, value in sound.items() if name != "tail"}) is None
    assert Law.told({}) is None
