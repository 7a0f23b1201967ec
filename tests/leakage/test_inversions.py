"""What every inversion must pass. Adding an inversion is adding a row to TABLE."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.conftest import stop_after
from tests.leakage.victims import victims
from torch import Tensor, nn

from privet.errors import UsageError
from privet.leakage import DLG, GRNN, IG, INVERSIONS, Analytic, Inversion, Reconstruction
from privet.leakage.lbfgs import LBFGS
from privet.leakage.measure import psnr
from privet.learning import Runtime, Treatment, Update
from privet.models import create_model

TABLE: dict[str, Inversion] = {
    "grnn": GRNN(steps=60, polish=20),
    "grnn-joint": GRNN(steps=60, polish=20, labels="joint"),
    "grnn-faithful": GRNN.preset("faithful", steps=120, width=8),
    "dlg": DLG(steps=150),
    "idlg": DLG(steps=150, labels="infer"),
    "ig": IG(steps=80),
}
DEFENCES = ("topk-90", "int4", "gaussian-0.01", "laplace-0.01", "clip-0.5", "sign", "clip-1+topk-50+int8")
FIELDS = ("images", "labels", "distance", "distances", "end", "steps", "history", "equations")


def updates(count: int = 2, **settings: Any) -> list[Update]:
    return [victim.update for victim in victims(count, **settings)]


def same(one: Reconstruction, other: Reconstruction) -> None:
    for name in FIELDS:
        first, second = getattr(one, name), getattr(other, name)
        assert torch.equal(first, second) if isinstance(first, Tensor) else first == second, name


def test_the_table_is_complete() -> None:
    assert {inversion.name for inversion in TABLE.values()} | {"analytic"} == set(INVERSIONS)


@pytest.mark.parametrize("name", TABLE)
class TestEveryInversion:
    def test_images_and_labels_come_out(self, name: str, runtime: Runtime) -> None:
        found = victims(2)
        results = TABLE[name].invert([victim.update for victim in found], runtime=runtime)
        for victim, result in zip(found, results, strict=True):
            assert victim.images is not None
            assert result.images.shape == victim.images.shape
            assert 0 <= float(result.images.min()) <= float(result.images.max()) <= 1
            assert tuple(result.labels.tolist()) == victim.labels
            assert result.distance < 0.1
            grey = psnr(torch.full_like(victim.images, 0.5), victim.images)
            assert float(psnr(result.images, victim.images)) > float(grey)
            assert not result.failed
            assert result.equations == sum(value.numel() for value in victim.update.values.values())

    def test_the_result_does_not_depend_on_others(self, name: str, runtime: Runtime) -> None:
        inversion = replace(TABLE[name], steps=6, restarts=2)
        three = updates(3)
        together = inversion.invert(three, runtime=runtime)
        for index, update in enumerate(three):
            same(inversion.invert([update], runtime=runtime)[0], together[index])
        for one, other in zip(inversion.invert(three, runtime=runtime, together=3), together, strict=True):
            same(one, other)
        assert together[0].distances[0] != together[0].distances[1]
        assert together[0].distance == min(together[0].distances)

    def test_killed_anywhere_it_ends_with_the_same_result(
        self, name: str, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Killed in each pass, in the descent and in the polish; one member leaves the stack early."""
        inversion = replace(TABLE[name], steps=52, restarts=2)
        plain, other = updates(2)
        members = [plain, said_to_be_noisy(other)]
        whole = inversion.invert(members, runtime=runtime, together=3)
        searched = LBFGS.step
        searches = 0

        def step(self: LBFGS) -> None:
            nonlocal searches
            searches += 1
            if searches % 6 == 0:
                raise KeyboardInterrupt
            searched(self)

        monkeypatch.setattr(LBFGS, "step", step)
        kills, again = 0, None
        while again is None:
            try:
                again = inversion.invert(
                    members,
                    runtime=runtime,
                    together=3,
                    workspace=tmp_path,
                    checkpoint_seconds=0,
                    progress=stop_after(20),
                )
            except KeyboardInterrupt:
                kills += 1
        assert kills > 2
        for result, expected in zip(again, whole, strict=True):
            same(result, expected)
        assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors"}

    def test_it_does_not_see_the_truth(self, name: str, runtime: Runtime) -> None:
        """Same record, other images behind it: nothing else can reach the attack."""
        inversion = replace(TABLE[name], steps=4)
        update = updates(1)[0]
        same(*(inversion.invert([update], runtime=runtime)[0] for _ in range(2)))

    def test_batches_grey_images_and_known_labels(self, name: str, runtime: Runtime) -> None:
        found = victims(2, batch_size=3, grey=True, labels_known=True)
        results = replace(TABLE[name], steps=4).invert([one.update for one in found], runtime=runtime)
        for victim, result in zip(found, results, strict=True):
            assert result.images.shape == (3, 1, 16, 16)
            assert tuple(result.labels.tolist()) == victim.labels

    def test_what_is_not_finite_fails_alone(self, name: str, runtime: Runtime) -> None:
        inversion = replace(TABLE[name], steps=30)
        sound, other = updates(2)
        huge = {
            key: torch.full_like(value, 1e308, dtype=torch.float64) for key, value in sound.weights.items()
        }
        broken = replace(other, weights=huge)
        results = inversion.invert([sound, broken, sound], runtime=runtime)
        assert results[1].failed
        assert "not finite" in results[1].end
        assert results[1].distance == torch.inf
        assert bool(torch.isfinite(results[1].images).all())
        same(results[0], inversion.invert([sound], runtime=runtime)[0])
        same(results[2], results[0])

    @pytest.mark.parametrize("defence", DEFENCES)
    def test_treated_updates(self, name: str, runtime: Runtime, defence: str) -> None:
        treated = updates(2, defence=defence)
        for aware in (True, False):
            for result in replace(TABLE[name], steps=3, aware=aware).invert(treated, runtime=runtime):
                assert not result.failed
                assert torch.isfinite(torch.tensor(result.distance))

    def test_several_local_steps(self, name: str, runtime: Runtime) -> None:
        found = victims(2, batch_size=2, local_steps=3, learning_rate=0.2)
        results = replace(TABLE[name], steps=10).invert([one.update for one in found], runtime=runtime)
        assert all(result.distance < result.history[0][1] * 1.01 for result in results)


def test_exact_after_a_linear_layer(runtime: Runtime) -> None:
    class Linear(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Flatten(), nn.Linear(3 * 64, 20), nn.Sigmoid(), nn.Linear(20, 5))

    torch.manual_seed(0)
    model, x, labels = Linear(), torch.rand(1, 3, 8, 8), torch.tensor([3])
    gradient = torch.autograd.grad(F.cross_entropy(model(x), labels), list(model.parameters()))
    update = Update.of(model, gradient, architecture="mine", classes=5, size=(8, 8), batch_size=1)
    result = Analytic().invert([update], runtime=runtime, network=model)[0]
    torch.testing.assert_close(result.images, x, atol=1e-5, rtol=0)
    assert result.labels.tolist() == [3]
    assert result.distance < 1e-8
    with pytest.raises(UsageError, match="Unknown architecture 'mine'"):
        Analytic().invert([update], runtime=runtime)
    with pytest.raises(UsageError, match="one image and one step"):
        Analytic().invert([replace(update, batch_size=2, images=2)], runtime=runtime, network=model)
    with pytest.raises(UsageError, match="linear first layer"):
        Analytic().invert(updates(1), runtime=runtime)


def test_noise_stops_the_search(runtime: Runtime) -> None:
    noisy = said_to_be_noisy(updates(1)[0])
    for inversion in (GRNN(steps=60), IG(steps=60), DLG(steps=60)):
        result = inversion.invert([noisy], runtime=runtime)[0]
        assert result.end == "noise floor"
        assert result.steps < inversion.steps
        assert 0 < result.distance <= result.floor
    blind = GRNN(steps=2, aware=False).invert([noisy], runtime=runtime)[0]
    assert blind.floor == 0


@pytest.mark.parametrize("defence", ["gaussian-0.01+sign", "gaussian-0.02+int4", "laplace-0.02+int3"])
def test_noise_that_rounding_absorbed_stops_no_search(defence: str, runtime: Runtime) -> None:
    for inversion in (GRNN(steps=8, polish=0), IG(steps=8), DLG(steps=4, labels="infer")):
        for result in inversion.invert(updates(2, defence=defence), runtime=runtime):
            assert (result.end, result.steps) == ("steps", inversion.steps)


def said_to_be_noisy(update: Update) -> Update:
    return replace(update, treatment=Treatment(noise="gaussian", noise_scale=0.1))


def test_members_that_are_done_leave_the_others_alone(runtime: Runtime) -> None:
    """A noisy member ends early and is taken out of the stack; the others go on to the same bytes."""
    inversion = GRNN(steps=60, polish=10)
    plain, other = updates(2)
    noisy = said_to_be_noisy(plain)
    together = inversion.invert([plain, noisy, other], runtime=runtime)
    assert together[1].end == "noise floor"
    same(together[0], inversion.invert([plain], runtime=runtime)[0])
    same(together[1], inversion.invert([noisy], runtime=runtime)[0])
    same(together[2], inversion.invert([other], runtime=runtime)[0])


def test_signs_alone_are_worth_a_search(runtime: Runtime) -> None:
    for inversion in (GRNN(steps=30, polish=0), IG(steps=30)):
        result = inversion.invert(updates(1, defence="sign"), runtime=runtime)[0]
        assert result.distance < result.history[0][1]


def test_settings_that_cannot_work() -> None:
    for make, words in (
        (lambda: GRNN(steps=0), "at least one step"),
        (lambda: IG(labels="guess"), "infer or joint"),
        (lambda: GRNN(keep="first"), "keep to be best or last"),
        (lambda: IG(learning_rate=0), "learning rate above 0"),
        (lambda: DLG.preset("faithful"), "dlg has no preset 'faithful'; it has default"),
    ):
        with pytest.raises(UsageError, match=words):
            make()


def test_updates_that_do_not_fit(runtime: Runtime) -> None:
    one = updates(1)[0]
    with pytest.raises(UsageError, match="attack those that are alike together"):
        IG(steps=1).invert([one, updates(1, batch_size=2)[0]], runtime=runtime)
    wrong = replace(one, architecture="lenet-strided-sigmoid-w5")
    with pytest.raises(UsageError, match="do not fit lenet-strided-sigmoid-w5"):
        IG(steps=1).invert([wrong], runtime=runtime)
    assert IG(steps=1).invert([], runtime=runtime) == []


def test_no_memory_is_taken_for_what_a_record_does_not_hold(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[nn.Module] = []

    def make(*given: Any, **named: Any) -> nn.Module:
        made.append(create_model(*given, **named))
        return made[-1]

    monkeypatch.setattr("privet.leakage.client.create_model", make)
    wrong = replace(updates(1)[0], architecture="resnet8-w64")
    with pytest.raises(UsageError, match="do not fit resnet8-w64"):
        IG(steps=1).invert([wrong], runtime=runtime)
    assert made and all(weight.is_meta for model in made for weight in model.parameters())


@pytest.mark.parametrize("name", ["grnn", "ig"])
def test_labels_that_were_counted_wrong_come_right(
    name: str, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if it is killed after the change, and whatever is attacked beside it."""
    found = victims(2, architecture="lenet-strided", batch_size=4)
    sent = [one.update for one in found]
    right = {id(one.update): sorted(one.labels) for one in found}
    monkeypatch.setattr(
        "privet.leakage.base.infer_labels",
        lambda update, _, aware: torch.tensor(
            [(label + 1) % 3 for label in right[id(update)][:1]] + right[id(update)][1:]
        ),
    )
    inversion = replace(TABLE[name], steps=100)
    results = inversion.invert(sent, runtime=runtime)
    for update, result in zip(sent, results, strict=True):
        assert sorted(result.labels.tolist()) == right[id(update)]
        same(inversion.invert([update], runtime=runtime)[0], result)
    again = None
    while again is None:
        with suppress(KeyboardInterrupt):
            again = inversion.invert(
                sent, runtime=runtime, workspace=tmp_path, checkpoint_seconds=0, progress=stop_after(30)
            )
    for result, expected in zip(again, results, strict=True):
        same(result, expected)


def test_the_iterate_with_the_least_distance_counts(runtime: Runtime) -> None:
    """Steps that are far too long go up and down; what counts is the best of them, unless it is the last."""
    result = IG(steps=30, learning_rate=0.5).invert(updates(1), runtime=runtime)[0]
    values = [value for _, value in result.history]
    assert values == sorted(values, reverse=True)
    assert result.distance == pytest.approx(values[-1], rel=1e-4)
    last = GRNN(steps=30, polish=0, learning_rate=0.01, keep="last").invert(updates(1), runtime=runtime)[0]
    values = [value for _, value in last.history]
    assert values != sorted(values, reverse=True)


def test_noise_beside_none(runtime: Runtime) -> None:
    """Only what holds no noise is polished, whatever stands beside it in the stack."""
    mixed = [*updates(1), *updates(1, defence="gaussian-0.01")]
    inversion = GRNN(steps=12, polish=6)
    beside = inversion.invert(mixed, runtime=runtime)
    for update, result in zip(mixed, beside, strict=True):
        same(result, inversion.invert([update], runtime=runtime)[0])
    assert beside[0].steps > 12 >= beside[1].steps


@pytest.mark.parametrize(
    "inversion", [IG(steps=1), GRNN(steps=4, polish=0, keep="last")], ids=["first", "again"]
)
def test_an_aware_attack_counts_labels_of_clipped_batches(inversion: Inversion, runtime: Runtime) -> None:
    """Before the search, and again along the way. A naive one takes the small gradient for a hint of all classes."""
    found = victims(4, batch_size=2, defence="clip-0.01")
    for aware in (True, False):
        sent = [one.update for one in found]
        results = replace(inversion, aware=aware).invert(sent, runtime=runtime)
        right = [
            sorted(result.labels.tolist()) == sorted(one.labels)
            for one, result in zip(found, results, strict=True)
        ]
        assert all(right) == aware


def test_ten_times_the_budget() -> None:
    assert IG(steps=7, restarts=2).lasting(10) == IG(steps=70, restarts=2)
    assert GRNN(steps=7, polish=3).lasting(10) == GRNN(steps=70, polish=30)
