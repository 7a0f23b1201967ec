"""Intervals and distances, against slow oracles; and what each defence leaves of the truth."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.leakage.victims import victims
from torch import Tensor

from privet.errors import UsageError
from privet.leakage.defences import create_defence
from privet.leakage.objective import Evidence
from privet.learning import Treatment, Update
from privet.seeds import generator

CPU = torch.device("cpu")
CLEAN = victims(1)[0].update


def evidence(update: Update, **settings: Any) -> Evidence:
    return Evidence.of([update] * 2, **{"aware": True, **settings}, device=CPU, dtype=torch.float64)


def gradient(update: Update, factor: float = 1.0) -> dict[str, Tensor]:
    return {name: torch.stack([factor * value.double()] * 2) for name, value in update.values.items()}


def flat(update: Update) -> Tensor:
    return torch.cat([value.double().flatten() for value in update.values.values()])


@settings(max_examples=25, deadline=None)
@given(
    topk=st.sampled_from([None, "topk-50", "topk-90", "topk-99"]),
    rounding=st.sampled_from([None, "int2", "int3", "int8", "sign"]),
)
def test_the_truth_lies_in_the_intervals(topk: str | None, rounding: str | None) -> None:
    names = [name for name in (topk, rounding) if name]
    if not names or (topk and rounding == "sign"):
        return
    sent = create_defence("+".join(names)).apply(CLEAN)
    found = evidence(sent)
    assert float(found.distance(gradient(CLEAN)).max()) < 1e-10
    assert float(found.cosine(gradient(CLEAN)).abs().max()) < 1e-6
    naive = evidence(sent, aware=False)
    assert float(naive.distance(gradient(CLEAN)).min()) > 1e-6
    torch.testing.assert_close(naive.low["fc.bias"][0].float(), sent.values["fc.bias"])


def test_clipping_takes_only_the_scale_away() -> None:
    length = float(flat(CLEAN).norm())
    sent = create_defence(f"clip-{length / 3}").apply(CLEAN)
    assert float(flat(sent).norm()) == pytest.approx(length / 3, rel=1e-5)
    found = evidence(sent)
    assert bool(found.clipped.all())
    assert float(found.distance(gradient(CLEAN)).max()) < 1e-8
    assert float(found.cosine(gradient(CLEAN, 7.0)).max()) < 1e-8
    assert float(evidence(sent, aware=False).distance(gradient(CLEAN)).min()) > 0.1 * length
    untouched = create_defence(f"clip-{length * 2}").apply(CLEAN)
    assert not bool(evidence(untouched).clipped.any())


@pytest.mark.parametrize(("name", "mean"), [("gaussian-0.2", 0.2**2), ("laplace-0.2", 0.2)])
def test_noise_leaves_its_floor(name: str, mean: float) -> None:
    found = evidence(create_defence(name).apply(CLEAN))
    count = flat(CLEAN).numel()
    assert float(found.floor[0]) == pytest.approx(mean * count, rel=1e-6)
    assert float(found.distance(gradient(CLEAN))[0]) == pytest.approx(mean * count, rel=0.15)
    blind = evidence(create_defence(name).apply(CLEAN), aware=False)
    assert float(blind.floor[0]) == float(blind.temperature[0]) == 0


def test_laplace_noise_has_its_scale() -> None:
    noise = flat(create_defence("laplace-0.5").apply(CLEAN)) - flat(CLEAN)
    assert float(noise.abs().mean()) == pytest.approx(0.5, rel=0.1)
    assert float(noise.square().mean()) == pytest.approx(2 * 0.5**2, rel=0.25)


def test_top_k_keeps_the_largest() -> None:
    sent = create_defence("topk-90").apply(CLEAN)
    kept = flat(sent) != 0
    assert int(kept.sum()) == pytest.approx(0.1 * kept.numel(), abs=1)
    assert float(flat(CLEAN)[~kept].abs().max()) <= float(flat(CLEAN)[kept].abs().min())
    torch.testing.assert_close(flat(sent)[kept], flat(CLEAN)[kept])
    assert evidence(sent).equations.tolist() == [int(kept.sum())] * 2


def test_rounding_is_to_the_nearest_of_few_values() -> None:
    sent = create_defence("int3").apply(CLEAN)
    for name, value in sent.values.items():
        step = sent.treatment.steps[name]
        assert len(value.unique()) <= 7
        assert float((value - CLEAN.values[name]).abs().max()) <= step / 2 * (1 + 1e-5)


def test_a_stochastic_step_is_twice_as_wide() -> None:
    steps = {"fc.bias": 0.5}
    for stochastic, half in ((False, 0.25), (True, 0.5)):
        update = Update(**{**vars(CLEAN), "treatment": Treatment(steps=steps, stochastic=stochastic)})
        found = evidence(update)
        assert float((found.high["fc.bias"] - found.low["fc.bias"]).max()) == pytest.approx(2 * half)


def slow(found: Evidence, given: dict[str, Tensor], member: int) -> tuple[float, float]:
    """Distance and cosine, one value at a time."""
    total = product = length = other = 0.0
    for name, values in given.items():
        triples = zip(
            values[member].flatten().tolist(),
            found.low[name][member].flatten().tolist(),
            found.high[name][member].flatten().tolist(),
            strict=True,
        )
        for value, low, high in triples:
            nearest = min(max(value, low), high)
            gap = value - nearest
            total += abs(gap) if bool(found.laplace[member]) else gap * gap
            product += value * nearest
            length += value * value
            other += nearest * nearest
    return total, 1 - product / math.sqrt(length * other)


@pytest.mark.parametrize("name", ["int8", "topk-90", "topk-50+int3", "gaussian-0.1", "laplace-0.1", "sign"])
def test_distances_against_a_slow_oracle(name: str) -> None:
    found = evidence(create_defence(name).apply(CLEAN))
    torch.manual_seed(0)
    given = {key: torch.randn_like(value) for key, value in gradient(CLEAN).items()}
    total, cosine = slow(found, given, 1)
    assert float(found.distance(given)[1]) == pytest.approx(total, rel=1e-9)
    assert float(found.cosine(given)[1]) == pytest.approx(cosine, rel=1e-9)


@pytest.mark.parametrize("kind", ["distance", "cosine"])
@pytest.mark.parametrize("name", ["int8", "topk-50+int3", "clip-0.1", "gaussian-0.1", "laplace-0.1", "sign"])
def test_slopes_against_finite_differences(name: str, kind: str) -> None:
    found = evidence(create_defence(name).apply(CLEAN))
    torch.manual_seed(0)
    point = {key: torch.randn_like(value).requires_grad_() for key, value in gradient(CLEAN).items()}
    along = {key: torch.randn_like(value) for key, value in point.items()}
    slopes = torch.autograd.grad(getattr(found, kind)(point).sum(), list(point.values()))
    expected = sum(float((slope * along[key]).sum()) for key, slope in zip(point, slopes, strict=True))
    width = 1e-5
    ahead, behind = (
        getattr(found, kind)({key: value.detach() + sign * along[key] for key, value in point.items()})
        for sign in (width, -width)
    )
    assert float((ahead - behind).sum()) / (2 * width) == pytest.approx(expected, rel=1e-4)


def test_defences_have_an_order() -> None:
    for name in ("topk-50+clip-1", "int8+gaussian-0.1", "topk-50+topk-60"):
        with pytest.raises(UsageError, match="comes too late"):
            create_defence(name).apply(CLEAN)
    full = create_defence("clip-1+gaussian-0.1+topk-50+int8").apply(CLEAN)
    assert full.treatment.clip == 1
    assert full.treatment.noise == "gaussian"
    assert full.treatment.sparse and full.treatment.steps


@pytest.mark.parametrize(
    "name", ["clip", "clip-0", "gaussian-x", "topk-100", "int1", "int17", "fp8", "topk-nan"]
)
def test_unknown_defences(name: str) -> None:
    with pytest.raises(UsageError, match="Unknown defence"):
        create_defence(name)


@pytest.mark.parametrize("name", ["clip-1", "gaussian-0.01", "laplace-1e-05", "topk-99.5", "int4", "sign"])
def test_defences_are_named_after_themselves(name: str) -> None:
    assert create_defence(name).name == name
    one, other = (create_defence(name).apply(CLEAN, seed=3) for _ in range(2))
    assert all(torch.equal(one.values[key], other.values[key]) for key in one.values)


def test_small_angles_are_exact_in_single_precision() -> None:
    """Also where one tensor outweighs the rest by far."""
    found = Evidence.of([CLEAN] * 2, aware=True, device=CPU, dtype=torch.float32)
    heavy = {
        name: (1e4 if name == "fc.bias" else 1.0) * value.double() for name, value in CLEAN.values.items()
    }
    found = replace(found, low={name: torch.stack([one.float()] * 2) for name, one in heavy.items()})
    found = replace(found, high=found.low)
    near = {
        name: one + 3e-4 * one.abs().mean() * torch.randn(one.shape, generator=generator(0, name))
        for name, one in heavy.items()
    }
    given = {name: torch.stack([one, 0 * one]).float() for name, one in near.items()}
    one, other = (torch.cat([value.flatten() for value in each.values()]) for each in (near, heavy))
    expected = 1 - float(one @ other / one.norm() / other.norm())
    assert 0 < expected < 1e-7
    cosine = found.cosine(given)
    assert float(cosine[0]) == pytest.approx(expected, rel=1e-2)
    assert float(cosine[1]) == 1
