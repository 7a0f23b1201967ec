"""Who takes part: the right number, fairly, and the same whoever asks in whatever order."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privet.errors import UsageError
from privet.federation import Cosine, Cyclic, Exponential, Linear, Sampler, Static, Step, Uniform, Weighted
from privet.federation.sampling import Schedule

CLIENTS = [f"client-{number}" for number in range(40)]
WEIGHTS = {name: 1.0 + number % 4 for number, name in enumerate(CLIENTS)}
SCHEDULES: dict[str, Schedule] = {
    "exponential": Exponential(1.0, 0.1, 0.05),
    "linear": Linear(0.8, 0.1, 20),
    "cosine": Cosine(0.8, 0.1, 20),
    "step": Step(1.0, 0.5, 5, 0.1),
    "static": Static(0.3),
}


def samplers(schedule: Schedule, seed: int = 0) -> list[Sampler]:
    return [
        Uniform(schedule=schedule, seed=seed),
        Cyclic(schedule=schedule, seed=seed),
        Weighted(schedule=schedule, seed=seed, weights=WEIGHTS),
    ]


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_sampler_draws_the_scheduled_number_whatever_the_order(name: str) -> None:
    for sampler in samplers(SCHEDULES[name]):
        for round in (0, 1, 7, 19, 60):
            drawn = sampler.sample(round, CLIENTS)
            wanted = max(2, math.floor(40 * SCHEDULES[name].fraction(round) + 0.5))
            assert len(drawn) == len(set(drawn)) == wanted
            assert drawn == tuple(sorted(drawn)) == sampler.sample(round, CLIENTS[::-1])
            assert set(drawn) <= set(CLIENTS)


def test_schedules_are_their_formulas() -> None:
    for t in range(50):
        assert Exponential(0.9, 0.03, 0.0).fraction(t) == pytest.approx(0.9 * math.exp(-0.03 * t))
        assert Exponential(1.0, 0.1, 0.2).fraction(t) == pytest.approx(max(0.2, math.exp(-0.1 * t)))
        assert Static(0.4).fraction(t) == 0.4
    assert [Linear(1.0, 0.5, 4).fraction(t) for t in range(6)] == [1.0, 0.875, 0.75, 0.625, 0.5, 0.5]
    assert [Cosine(1.0, 0.0, 4).fraction(t) for t in (0, 2, 4, 9)] == pytest.approx([1.0, 0.5, 0.0, 0.0])
    assert [Step(1.0, 0.5, 2, 0.3).fraction(t) for t in range(5)] == [1.0, 1.0, 0.5, 0.5, 0.3]


def test_seeds_and_rounds_differ_and_repeat() -> None:
    for first, again, other in zip(*(samplers(Static(0.2), seed) for seed in (1, 1, 2)), strict=True):
        rounds = [first.sample(round, CLIENTS) for round in range(4)]
        assert rounds == [again.sample(round, CLIENTS) for round in range(4)]
        assert rounds != [other.sample(round, CLIENTS) for round in range(4)]
        assert len(set(rounds)) == 4


def test_uniform_is_uniform_and_weighted_follows_weights() -> None:
    times = {kind: dict.fromkeys(CLIENTS, 0) for kind in ("uniform", "weighted")}
    rounds = 3000
    for round in range(rounds):
        for name in Uniform(schedule=Static(0.1)).sample(round, CLIENTS):
            times["uniform"][name] += 1
        for name in Weighted(schedule=Static(0.025), least=1, weights=WEIGHTS).sample(round, CLIENTS):
            times["weighted"][name] += 1
    expected = rounds * 0.1
    spread = sum((count - expected) ** 2 for count in times["uniform"].values()) / (expected * 0.9)
    assert 15 < spread < 75  # chi-squared with 39 degrees of freedom
    for weight in (1.0, 2.0, 3.0, 4.0):
        count = sum(times["weighted"][name] for name in CLIENTS if WEIGHTS[name] == weight)
        assert count / rounds == pytest.approx(weight / 10, abs=0.035)


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.3, 0.7, 1.0])
def test_what_was_drawn_by_weight_has_the_influence_of_its_weight(fraction: float) -> None:
    """Averaged by numbers of images over the chance of being drawn; by the numbers alone they would count twice."""
    sizes = {f"small-{number}": 10.0 for number in range(15)} | {
        f"large-{number}": 30.0 for number in range(15)
    }
    sizes |= {"huge": 300.0}
    sampler = Weighted(schedule=Static(fraction), weights=sizes)
    kinds = {"small": 150 / 900, "large": 450 / 900, "huge": 300 / 900}
    found, times, rounds = dict.fromkeys(kinds, 0.0), dict.fromkeys(sizes, 0), 3000
    for round in range(rounds):
        drawn, chances = sampler.sample(round, sizes), sampler.chances(round, sizes)
        assert len(drawn) == sampler.count(round, len(sizes))
        total = sum(sizes[name] / chances[name] for name in drawn)
        for name in drawn:
            times[name] += 1
            found[name.split("-")[0]] += sizes[name] / chances[name] / total / rounds
    assert found == pytest.approx(kinds, abs=0.02)
    assert sum(chances.values()) == pytest.approx(len(drawn))
    for name, chance in chances.items():
        assert times[name] / rounds == pytest.approx(chance, abs=0.05)


def test_others_are_all_as_likely() -> None:
    assert Uniform(schedule=Static(0.5)).chances(0, CLIENTS) == {}
    assert Cyclic(schedule=Static(0.5)).chances(0, CLIENTS) == {}


def test_newcomers_do_not_reshuffle_the_others() -> None:
    sampler = Uniform(schedule=Static(0.5))
    before, after = sampler.sample(3, CLIENTS), sampler.sample(3, [*CLIENTS, "new"])
    assert len(set(before) - set(after)) <= 1


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 30), st.floats(0.05, 1.0), st.integers(0, 1000))
def test_cyclic_lets_everybody_take_turns(clients: int, fraction: float, seed: int) -> None:
    names = CLIENTS[:clients]
    sampler = Cyclic(schedule=Static(fraction), seed=seed)
    times = dict.fromkeys(names, 0)
    for round in range(2 * clients):
        for name in sampler.sample(round, names):
            times[name] += 1
        assert max(times.values()) - min(times.values()) <= 2
    each = sampler.count(0, clients) * 2 * clients
    assert sum(times.values()) == each


def test_few_clients() -> None:
    for sampler in samplers(Static(0.01)):
        assert sampler.sample(0, []) == ()
        assert sampler.sample(0, CLIENTS[:1]) == ("client-0",)
        assert len(sampler.sample(0, CLIENTS)) == 2


@pytest.mark.parametrize(
    "make",
    [
        lambda: Exponential(start=0),
        lambda: Exponential(start=1.1),
        lambda: Exponential(rate=-1),
        lambda: Exponential(rate=math.nan),
        lambda: Exponential(rate=math.inf),
        lambda: Linear(rounds=0),
        lambda: Step(factor=0),
        lambda: Static(-0.5),
        lambda: Uniform(schedule=Static(0.5), least=0),
        lambda: Uniform(schedule=Static(0.5)).sample(-1, CLIENTS),
        lambda: Uniform(schedule=Static(0.5)).sample(0, ["a", "a"]),
        lambda: Weighted(schedule=Static(0.5), weights={"a": 1.0}).sample(0, ["a", "b"]),
        lambda: Weighted(schedule=Static(0.5), weights={"a": 1.0, "b": 0.0}).sample(0, ["a", "b"]),
    ],
)
def test_settings_that_cannot_work(make: object) -> None:
    with pytest.raises(UsageError, match="Expected"):
        make()  # type: ignore[operator]
