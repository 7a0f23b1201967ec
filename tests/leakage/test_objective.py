"""Intervals and distances, against slow oracles; and what each defence leaves of the truth."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
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


@pytest.mark.parametrize(
    "name", ["clip-0.5+int4", "clip-0.5+topk-90", "clip-0.0001", "clip-0.0001+topk-50+int8"]
)
def test_the_truth_fits_what_was_clipped_and_reduced(name: str) -> None:
    """However much it was clipped: nobody knows the factor, but there is one that fits."""
    found = evidence(create_defence(name).apply(CLEAN))
    assert float((found.distance(gradient(CLEAN)) / found.energy).max()) < 1e-10
    assert float(found.cosine(gradient(CLEAN)).max()) < 1e-10
    other = {key: value.roll(1, -1) for key, value in gradient(CLEAN).items()}
    assert float((found.distance(other) / found.energy).min()) > 1e-3


@pytest.mark.parametrize("name", ["clip-0.5", "clip-0.5+int3", "clip-0.5+topk-90", "clip-0.01+topk-50+int4"])
def test_the_best_scale_against_a_slow_search(name: str) -> None:
    found = evidence(create_defence(name).apply(CLEAN))
    free = replace(found, clipped=torch.zeros_like(found.clipped))
    torch.manual_seed(0)
    near = {key: value + 0.02 * torch.randn_like(value) for key, value in gradient(CLEAN).items()}

    def scaled(factor: float) -> float:
        return float(free.distance({key: factor * value for key, value in near.items()})[0])

    best = minimize_scalar(scaled, bounds=(0, 1), method="bounded", options={"xatol": 1e-12})
    assert float(found.distance(near)[0]) == pytest.approx(best.fun, rel=1e-9)
    assert best.fun < 0.99 * scaled(1.0)


def test_the_best_scale_does_not_depend_on_others() -> None:
    """To the last bit, also beside members whose intervals are no points."""
    points, wide = (create_defence(name).apply(CLEAN) for name in ("clip-0.5", "clip-0.5+int4"))
    mixed = Evidence.of([points, wide], aware=True, device=CPU, dtype=torch.float32)
    given = {key: 3 * value.float() for key, value in gradient(CLEAN).items()}
    for index, update in enumerate((points, wide)):
        alike = Evidence.of([update] * 2, aware=True, device=CPU, dtype=torch.float32)
        assert torch.equal(mixed.distance(given)[index], alike.distance(given)[index])


def test_signs_beside_what_was_clipped_have_slopes() -> None:
    sent = [create_defence(name).apply(CLEAN) for name in ("sign", "clip-0.5+int4")]
    found = Evidence.of(sent, aware=True, device=CPU, dtype=torch.float64)
    point = {key: value.roll(1, -1).requires_grad_() for key, value in gradient(CLEAN).items()}
    for kind in (found.distance, found.cosine):
        slopes = torch.autograd.grad(kind(point).sum(), list(point.values()))
        assert all(bool(torch.isfinite(slope).all()) for slope in slopes)


def test_clipped_signs_are_signs() -> None:
    """They have no size that a scale could change, and with a scale of zero any gradient would fit them."""
    one, other = (evidence(create_defence(name).apply(CLEAN)) for name in ("sign", "clip-0.5+sign"))
    assert not bool(other.clipped.any())
    given = gradient(CLEAN, -1.0)
    assert float(other.distance(given)[0]) == float(one.distance(given)[0]) > 0


@pytest.mark.parametrize(("name", "mean"), [("gaussian-0.2", 0.2**2), ("laplace-0.2", 0.2)])
def test_noise_leaves_its_floor(name: str, mean: float) -> None:
    found = evidence(create_defence(name).apply(CLEAN))
    count = flat(CLEAN).numel()
    assert float(found.floor[0]) == pytest.approx(mean * count, rel=1e-6)
    assert float(found.distance(gradient(CLEAN))[0]) == pytest.approx(mean * count, rel=0.15)
    blind = evidence(create_defence(name).apply(CLEAN), aware=False)
    assert float(blind.floor[0]) == float(blind.temperature[0]) == 0


@pytest.mark.parametrize("noise", ["gaussian-0.05", "laplace-0.05"])
@pytest.mark.parametrize("rounding", ["int3", "int4", "int8", "sign"])
def test_rounding_absorbs_noise(noise: str, rounding: str) -> None:
    """The floor is no more than what noise leaves of the truth, or searches would stop too early."""
    found = evidence(create_defence(f"{noise}+{rounding}").apply(CLEAN))
    # What is said is a mean over noise, which a single draw of Laplace's may miss by a tenth.
    assert float(found.floor[0]) < 1.1 * float(found.distance(gradient(CLEAN))[0])
    squared = replace(found, laplace=torch.zeros_like(found.laplace)).distance(gradient(CLEAN))
    assert float(found.noise[0]) < 1.1 * float(squared[0])
    if rounding == "sign":
        assert float(found.floor[0]) == float(found.noise[0]) == 0
    elif rounding == "int8":  # steps so small that there is something left to say
        assert float(found.floor[0]) > 0.1 * float(found.distance(gradient(CLEAN))[0])


@pytest.mark.parametrize(("kind", "power"), [("gaussian", 2), ("laplace", 1), ("laplace", 2)])
@pytest.mark.parametrize("step", [0.5, 1.0, 3.0])
def test_what_noise_leaves_beyond_a_step(kind: str, power: int, step: float) -> None:
    """Against a mean over drawn numbers."""
    torch.manual_seed(0)
    drawn = torch.randn(1_000_000, dtype=torch.float64)
    if kind == "laplace":
        drawn = torch.empty(2, 1_000_000, dtype=torch.float64).exponential_().diff(dim=0)[0]
    expected = float(((0.3 * drawn).abs() - 0.3 * step).clamp_min(0).pow(power).mean())
    treatment = Treatment(noise=kind, noise_scale=0.3, steps=dict.fromkeys(CLEAN.values, 0.3 * step))
    found = evidence(replace(CLEAN, treatment=treatment))
    left = found.noise if power == 2 else found.floor
    assert float(left[0]) / flat(CLEAN).numel() == pytest.approx(expected, rel=0.02)
    assert float(found.variance[0]) == pytest.approx(0.09 * (2 if kind == "laplace" else 1))


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
    for aware in (True, False):  # what was dropped did not arrive, whatever the attack takes it for
        assert evidence(sent, aware=aware).equations.tolist() == [int(kept.sum())] * 2


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
@pytest.mark.parametrize(
    "name",
    [
        "int8",
        "topk-50+int3",
        "clip-0.1",
        "clip-0.1+int4",
        "clip-0.1+topk-50",
        "gaussian-0.1",
        "laplace-0.1",
        "sign",
    ],
)
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
