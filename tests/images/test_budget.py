"""Budgets: integers that keep to them, at every size."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conftest import blobs

from privet.images import Budget, compare_all

SIDES = st.integers(1, 20)


@settings(deadline=None)
@given(
    amount=st.floats(0.05, 5),
    height=SIDES,
    width=SIDES,
    scale=st.floats(0.01, 200),
    seed=st.integers(0, 99),
)
def test_integers_keep_an_l2_budget_and_use_it(
    amount: float, height: int, width: int, scale: float, seed: int
) -> None:
    budget = Budget(norm="l2", amount=amount)
    delta = torch.randn(3, 3, height, width, generator=torch.Generator().manual_seed(seed)) * scale
    fitted = budget.fit(delta)
    assert torch.equal(fitted, fitted.round())
    allowed = 255 * amount * math.sqrt(height * width) / 32
    assert math.isclose(budget.allowed((height, width), seen=(height, width)) * 255, allowed)
    # What integers must waste: half a unit a value when all are rounded down, or the one unit that would be too much.
    waste = max(1.0, math.sqrt(3 * height * width) / 2)
    for before, after in zip(delta.double(), fitted.double(), strict=True):
        length = float(np.sqrt((after.numpy() ** 2).sum()))
        assert length <= allowed * (1 + 1e-12)
        assert length >= min(float(before.norm()), allowed) - waste - 0.01


@settings(deadline=None)
@given(
    norm=st.sampled_from(["linf", "l2", "l0"]),
    height=st.integers(2, 9),
    width=st.integers(2, 9),
    larger=st.tuples(st.integers(2, 40), st.integers(2, 40)),
    seed=st.integers(0, 99),
)
def test_a_file_of_another_size_keeps_the_budget_too(
    norm: str, height: int, width: int, larger: tuple[int, int], seed: int
) -> None:
    budget = Budget(norm=norm, amount={"linf": 8, "l2": 1.0, "l0": 2}[norm])
    delta = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 100
    if norm == "l0":
        keep = torch.randperm(height * width, generator=torch.Generator().manual_seed(seed))[:2]
        mask = torch.zeros(height * width).index_fill_(0, keep, 1).view(height, width)
        delta *= mask
    found = budget.enlarge(budget.fit(delta)[0].to(torch.int16), larger)
    assert found.shape == (3, *larger)
    before = torch.full((1, 3, *larger), 128, dtype=torch.uint8)
    after = (before + found).clamp(0, 255).to(torch.uint8)
    (change,) = compare_all(before, after, ssim=False)
    assert budget.excess(change, larger, seen=(height, width)) is None
    assert norm != "l0" or change.l0 > 0


def test_a_pixel_is_as_many_rows_everywhere() -> None:
    budget, delta = Budget(norm="l0", amount=1), torch.zeros(3, 32, 1, dtype=torch.int16)
    for row in range(32):
        delta.zero_()[:, row] = 9
        changed = int((budget.enlarge(delta, (3488, 1)) != 0).any(0).sum())
        assert changed == 109  # 3488 / 32, which float32 makes 110 of some


def test_an_excess_is_said_in_its_norm() -> None:
    before = blobs(1).pixels
    after = before.clone()
    after[0, 0, :2, 7] += 20
    (change,) = compare_all(before, after, ssim=False)
    assert (change.linf, change.l0) == (20, 2)
    assert change.l2 == math.sqrt(2 * 20**2) / 255
    say = {
        budget.norm: budget.excess(change, (8, 8), seen=(8, 8))
        for budget in (
            Budget(norm="linf", amount=8),
            Budget(norm="l2", amount=0.1),
            Budget(norm="l0", amount=1),
        )
    }
    assert say == {
        "linf": "20/255; the budget is 8/255",
        "l2": "an L2 norm of 0.1109; the budget is 0.0250",
        "l0": "2 pixels; the budget is 1",
    }
    assert Budget(norm="none").excess(change, (8, 8), seen=(8, 8)) is None
    assert Budget(norm="none").json() == {"norm": "none"}
