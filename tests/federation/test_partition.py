"""Who has which images: everybody's own, all of them, as unequal as asked for."""

from __future__ import annotations

from math import inf, nan

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privet.errors import UsageError
from privet.federation.partition import Index, dirichlet, iid

LABELS = np.random.default_rng(0).integers(0, 10, 2000)


def check(parts: list[Index], count: int) -> None:
    assert sorted(np.concatenate(parts).tolist()) == list(range(count))
    assert all((np.diff(part) > 0).all() for part in parts)


@settings(max_examples=25, deadline=None)
@given(clients=st.integers(1, 40), seed=st.integers(0, 5))
def test_each_image_has_one_client(clients: int, seed: int) -> None:
    parts = iid(len(LABELS), clients, seed=seed)
    check(parts, len(LABELS))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    parts = dirichlet(LABELS, clients, alpha=0.5, seed=seed)
    check(parts, len(LABELS))
    assert min(map(len, parts)) >= 10


def test_alpha_says_how_unequal() -> None:
    def largest_share(alpha: float) -> float:
        shares = []
        for part in dirichlet(LABELS, 20, alpha=alpha):
            counts = np.bincount(LABELS[part], minlength=10)
            shares.append(counts.max() / counts.sum())
        return float(np.mean(shares))

    assert largest_share(0.1) > 0.5 > largest_share(1.0) > largest_share(100.0)
    assert largest_share(100.0) < 0.2


def test_the_seed_says_it_all() -> None:
    one, other, third = (dirichlet(LABELS, 5, alpha=0.3, seed=seed) for seed in (1, 1, 2))
    assert all(np.array_equal(*pair) for pair in zip(one, other, strict=True))
    assert not all(np.array_equal(*pair) for pair in zip(one, third, strict=True))


def test_what_cannot_be_had() -> None:
    with pytest.raises(UsageError, match="1 client"):
        iid(3, 4)
    for settings_ in (*({"alpha": alpha} for alpha in (0.0, nan, inf, 1e308)), {"alpha": 0.3, "least": 500}):
        with pytest.raises(UsageError, match="at least"):
            dirichlet(LABELS, 20, **settings_)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="No Dirichlet split"):
        dirichlet(LABELS, 100, alpha=0.01, least=20)
