"""What surrogates learn, and what noise does to them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.conftest import blobs
from torch import Tensor

from privet.errors import OutputError
from privet.images import ImageSet, augment, open_images
from privet.learning import Job, Runtime
from privet.models import create_model, load_model
from privet.protection import (
    AR,
    EM,
    LSP,
    PIL,
    REM,
    SEM,
    TAP,
    TUE,
    UCL,
    Protection,
    em,
    minimise,
    objective,
    pil,
    publish,
    sem,
    tap,
    ucl,
)
from privet.protection.minimise import Batches, pack, unpack
from privet.protection.objective import Objective
from privet.protection.trajectory import Point

SMALL: dict[str, Any] = {"surrogate": "cnn-w8", "train_steps": 6, "batch_size": 16, "noise_steps": 4}
TINY: dict[str, Any] = {"surrogate": "cnn-w4", "batch_size": 4, "noise_steps": 1}
ONE: dict[str, Any] = {"views": 1, "attack_steps": 1}
MINIMISING = {
    "em": EM(max_rounds=3, **SMALL),
    "em class-wise": EM(mode="class", max_rounds=6, **SMALL),
    "sem": SEM(views=2, attack_steps=1, radius=1, **SMALL),
    "rem": REM(views=2, attack_steps=1, radius=1, **SMALL),
}


@pytest.mark.parametrize("name", MINIMISING)
def test_the_surrogate_errs_less_on_protected_files(name: str, runtime: Runtime, tmp_path: Path) -> None:
    images = blobs(24)
    publish(images, MINIMISING[name], tmp_path / "out", runtime=runtime)
    model, _ = load_model(tmp_path / "out/surrogate.safetensors")
    protected = open_images(tmp_path / "out")
    before = images.subset([images.names.index(one) for one in protected.names])
    with torch.no_grad():
        first, last = (
            float(F.cross_entropy(model(one.pixels / 255), one.labels)) for one in (before, protected)
        )
    assert last < max(0.8 * first, first - 0.01)  # a plain surrogate hardly errs at all, a robust one often


@pytest.mark.parametrize(
    ("module", "method"),
    [(em, EM(max_rounds=2, **SMALL)), (sem, SEM(radius=0, **ONE, **SMALL))],
    ids=["em", "sem"],
)
def test_the_surrogate_learns_noisy_images(
    module: ModuleType, method: Protection, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    flat = ImageSet.from_arrays(torch.full((16, 3, 8, 8), 128, dtype=torch.uint8), torch.arange(16) % 2)
    changes: list[float] = []
    plain = module.training_step

    def spy(model: Any, optimizer: Any, x: Tensor, y: Tensor, **rest: Any) -> Any:
        changes.append(float((x * 255 - 128)[x > 0.1].abs().max()))  # not of the black that a shift brings
        return plain(model, optimizer, x, y, **rest)

    monkeypatch.setattr(module, "training_step", spy)
    method.protect(flat, Job(runtime=runtime))
    assert 1 < changes[-1] <= 8.01


def flat(count: int) -> ImageSet:
    """Return images of one colour: what is black in a view of them came in from outside."""
    return ImageSet.from_arrays(torch.full((count, 3, 8, 8), 128, dtype=torch.uint8), torch.arange(count) % 2)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (EM(views=2, max_rounds=2, **SMALL), [2] * 8),
        (SEM(views=3, attack_steps=1, **{**SMALL, "train_steps": 2}), [3] * 12),
        (
            SEM(views=3, train_views=1, train_noise_steps=2, attack_steps=1, **{**SMALL, "train_steps": 2}),
            [1] * 4 + [3] * 4,
        ),
        (REM(views=3, attack_steps=1, **{**SMALL, "train_steps": 2}), [3] * 12),
        (TAP(surrogate="cnn-w8", epochs=1, views=2, restarts=2, noise_steps=3), [2] * 6),
    ],
    ids=["em", "sem", "sem, less while it trains", "rem", "tap"],
)
def test_each_descent_sees_as_many_random_views_as_asked(
    method: Protection, expected: list[int], runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    plain = minimise.input_gradient

    def spy(model: Any, x: Tensor, labels: Tensor, **rest: Any) -> Tensor:
        assert not model.training
        seen.append(len(x) // 16)
        assert int((x < 0.1).flatten(1).any(1).sum()) > len(x) / 2  # black, which a shift brings
        return plain(model, x, labels, **rest)

    monkeypatch.setattr(minimise, "input_gradient", spy)
    method.protect(flat(16), Job(runtime=runtime))
    assert seen == expected


@pytest.mark.parametrize(
    ("module", "method"),
    [
        (em, EM(views=1, max_rounds=1, **SMALL)),
        (sem, SEM(**ONE, **SMALL)),
        (tap, TAP(surrogate="cnn-w4", epochs=3, noise_steps=1, restarts=1)),
    ],
    ids=["em", "sem", "tap"],
)
def test_the_surrogate_learns_random_views(
    module: ModuleType, method: Protection, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares: list[float] = []
    monkeypatch.setattr(
        module,
        "training_step",
        lambda _, __, x, *___, **____: shares.append(float((x < 0.1).flatten(1).any(1).float().mean())),
    )
    method.protect(flat(16), Job(runtime=runtime))
    assert min(shares) > 0.5


@pytest.mark.parametrize(
    ("module", "step", "method"),
    [
        (tap, "training_step", TAP(surrogate="cnn-w4", epochs=4, batch_size=4, noise_steps=1, restarts=1)),
        (pil, "training_step", PIL(epochs=4, batch_size=4, noise_steps=1)),
        (ucl, "contrastive_step", UCL(class_rounds=0, rounds=2, train_steps=4, **TINY)),
    ],
    ids=["tap", "pil", "ucl"],
)
def test_the_rate_falls_to_nothing(
    module: ModuleType, step: str, method: Protection, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []

    def spy(*_: Any, rate: float, **__: Any) -> Tensor:
        rates.append(rate)
        return torch.zeros(())

    monkeypatch.setattr(module, step, spy)
    method.protect(blobs(8), Job(runtime=runtime))
    falling = rates[rates.index(max(rates)) :]
    assert falling == sorted(falling, reverse=True) and len(falling) >= 7
    assert falling[-1] < 0.2 * falling[0]


@pytest.mark.parametrize(
    "method",
    [
        SEM(train_steps=1, views=1, attack_steps=1, surrogate="cnn-w4"),
        TAP(surrogate="cnn-w4", epochs=1, restarts=1),
        PIL(epochs=1),
    ],
    ids=["sem", "tap", "pil"],
)
def test_descents_start_anywhere_in_the_budget(method: Any, runtime: Runtime) -> None:
    images = blobs(9)
    perturb = replace(method, noise_steps=1, step_size=1e-6)._perturb(images, Job(runtime=runtime))
    start = perturb(torch.arange(9), torch.Generator().manual_seed(0)) / method.epsilon
    assert abs(float(start.mean())) < 0.05 and float(start.std()) == pytest.approx(3**-0.5, abs=0.03)
    assert float((torch.corrcoef(start.flatten(1)) - torch.eye(9)).abs().max()) < 0.4  # each from its own


@pytest.mark.parametrize("mode", ["sample", "class"])
def test_em_s_noise_goes_on_from_where_a_round_left_it(mode: str, runtime: Runtime) -> None:
    """Some value moves the same way in every descent; it shows how many there were, and that they began at 0."""
    method = EM(mode=mode, epsilon=40, max_rounds=3, step_size=3, stop_error=0, **{**SMALL, "noise_steps": 2})
    noise = method._perturb(flat(16), Job(runtime=runtime))(torch.arange(16), torch.Generator())
    descents = 3 * (2 if mode == "sample" else 1)
    assert float(noise.abs().max()) == pytest.approx(3 * descents, abs=1)


def test_em_stops_when_the_surrogate_has_learned_the_noise(runtime: Runtime) -> None:
    for share, rounds in ((2.0, 1), (0.0, 3)):
        job = Job(runtime=runtime)
        EM(max_rounds=3, stop_error=share, **SMALL).protect(blobs(16), job)
        assert job.facts["rounds"] == rounds


def test_em_counts_the_surrogate_s_errors_on_noisy_images(runtime: Runtime, tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (32, 3, 8, 8), dtype=torch.uint8, generator=random)
    images = ImageSet.from_arrays(pixels, torch.arange(32) % 2)  # which show nothing of their class
    method = EM(max_rounds=2, epsilon=16, step_size=2, **SMALL)
    done = publish(images, method, tmp_path / "out", runtime=runtime)
    model, _ = load_model(tmp_path / "out/surrogate.safetensors")
    protected = open_images(tmp_path / "out")
    with torch.no_grad():
        clean, noisy = (
            float((model(one.pixels / 255).argmax(1) != one.labels).float().mean())
            for one in (images, protected)
        )
    assert clean > noisy + 0.2
    assert done.run["facts"]["surrogate_error"] == pytest.approx(noisy, abs=0.05)


def test_em_trains_one_surrogate_in_all_rounds(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = list[Tensor](), list[Tensor]()
    plain = em.training_step

    def spy(model: Any, *given: Any, **rest: Any) -> Any:
        before.append(next(model.parameters()).detach().clone())
        plain(model, *given, **rest)
        after.append(next(model.parameters()).detach().clone())

    monkeypatch.setattr(em, "training_step", spy)
    EM(max_rounds=3, stop_error=0, **SMALL).protect(blobs(16), Job(runtime=runtime))
    assert len(before) == 3 * SMALL["train_steps"]
    assert all(torch.equal(*pair) for pair in zip(before[1:], after[:-1], strict=True))


def test_class_wise_em_is_the_mean_of_what_its_images_ask_for(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(em, "CHUNK", 4)
    images = blobs(10).subset([0, 3, 6, 9, 1, 4, 7, 2, 5, 8])  # class by class: no chunk has all three
    method, job = EM(mode="class", step_size=0.8), Job(runtime=runtime)
    model = create_model("cnn-w8", classes=3, size=(8, 8)).eval()
    found = torch.zeros(3, 3, 8, 8, dtype=torch.int8)
    method._improve_stored(model, images, Batches(images, runtime), found, 0, "", job)
    expected = torch.zeros_like(found)
    for chunk in torch.arange(10).split(4):
        wanted: dict[int, list[Tensor]] = {}
        for place in chunk.tolist():
            label = images.labels[place : place + 1]
            before = unpack(expected[label], 8 / 255)
            noise = before.clone().requires_grad_()
            seen = (images.pixels[place : place + 1] / 255 + noise).clamp(0, 1)
            (gradient,) = torch.autograd.grad(F.cross_entropy(model(seen), label), noise)
            wanted.setdefault(int(label), []).append(before - 0.8 / 255 * gradient.sign())
        for one, noises in wanted.items():
            expected[one] = pack(torch.cat(noises).mean(0), 8 / 255)
    assert bool(found.flatten(1).any(1).all())
    near = (found.int() - expected.int()).abs() <= 1
    assert float(near.float().mean()) > 0.99  # signs of gradients near 0 may differ


def seen_by_a_robust_surrogate(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, **changes: Any
) -> tuple[Tensor, float]:
    """Return what the surrogate learns first, and its loss on that; the noise is the same for all changes."""
    seen: list[tuple[Tensor, float]] = []

    def spy(model: Any, _: Any, x: Tensor, labels: Tensor, **__: Any) -> None:
        with torch.no_grad():
            seen.append((x, float(F.cross_entropy(model.eval()(x), labels))))

    monkeypatch.setattr(sem, "training_step", spy)
    monkeypatch.setattr(SEM, "_disturb", lambda self, model, views, *_: views)
    method = SEM(surrogate="cnn-w8", train_steps=1, batch_size=32, noise_steps=1, views=1, **changes)
    method.protect(blobs(32), Job(runtime=runtime))
    return seen[0]


def test_sem_s_surrogate_learns_adversarial_views(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, least = seen_by_a_robust_surrogate(runtime, monkeypatch, radius=0)
    disturbed, less = seen_by_a_robust_surrogate(runtime, monkeypatch, radius=16, attack_steps=0)
    attacked, most = seen_by_a_robust_surrogate(
        runtime, monkeypatch, radius=16, attack_steps=5, attack_step_size=6
    )
    for one in (disturbed, attacked):
        assert 15 < float((one - plain).abs().max()) * 255 < 16.01
    assert most - least > 3 * abs(less - least)
    assert most > least


@pytest.mark.parametrize("kind", [SEM, REM])
def test_disturbances_of_rem_alone_raise_the_loss(kind: type[SEM], runtime: Runtime) -> None:
    images = blobs(32)
    x, job = images.pixels / 255, Job(runtime=runtime)
    model = create_model("cnn-w8", classes=3, size=(8, 8)).eval()
    method = kind(radius=16, attack_steps=5, attack_step_size=6, epsilon=2)
    disturbed = method._disturb(model, x, images.labels, torch.Generator().manual_seed(0), job)
    assert 15 < float((disturbed - x).abs().max()) * 255 < 16.01
    assert 0 <= float(disturbed.min()) and float(disturbed.max()) <= 1
    with torch.no_grad():
        before, after = (
            F.cross_entropy(model(one), images.labels, reduction="none") for one in (x, disturbed)
        )
    harder = float((after > before).float().mean())
    assert harder == 1.0 if kind is REM else 0.1 < harder < 0.9


def test_sem_s_descents_see_disturbed_views(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    largest: list[float] = []
    plain = minimise.input_gradient

    def spy(model: Any, x: Tensor, labels: Tensor, **rest: Any) -> Tensor:
        largest.append(255 * float((x - 128 / 255)[x > 0.2].abs().max()))
        return plain(model, x, labels, **rest)

    monkeypatch.setattr(minimise, "input_gradient", spy)
    SEM(epsilon=2, radius=20, **ONE, **SMALL).protect(flat(16), Job(runtime=runtime))
    assert len(largest) == 7 * SMALL["noise_steps"] and min(largest) > 15


def test_warm_noise_is_where_the_last_pass_starts(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    images = blobs(8)
    stored = torch.randint(
        -127, 128, images.pixels.shape, dtype=torch.int8, generator=torch.Generator().manual_seed(1)
    )
    model = create_model("cnn-w4", classes=3, size=(8, 8))
    monkeypatch.setattr(SEM, "_train", lambda *_: (model, stored))
    method = SEM(warm_start=True, step_size=1e-6, **ONE, **TINY)
    noise = method._perturb(images, Job(runtime=runtime))(torch.arange(8).flip(0), torch.Generator())
    assert torch.allclose(noise, unpack(stored.flip(0), 8), atol=1e-4)


def test_sem_s_rate_falls_to_a_tenth(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    monkeypatch.setattr(sem, "training_step", lambda *_, rate, **__: rates.append(rate))
    SEM(train_steps=5, decay_steps=2, **ONE, **TINY).protect(blobs(6), Job(runtime=runtime))
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001])


def test_sem_disturbs_at_random_within_the_radius(runtime: Runtime) -> None:
    x = torch.full((2, 3, 8, 8), 0.5)
    given: Any = (None, x, None, torch.Generator().manual_seed(0), Job(runtime=runtime))
    moved = (SEM(radius=3)._disturb(*given) - x) * 255
    assert 2.9 < float(moved.abs().max()) <= 3.001 and abs(float(moved.mean())) < 0.5


def test_warm_noise_is_stored_at_every_visit(runtime: Runtime) -> None:
    images = blobs(8)
    method = SEM(warm_start=True, train_steps=2, step_size=1.6, **ONE, **TINY)
    _, stored = method._train(images, Batches(images, runtime), Job(runtime=runtime))
    assert stored is not None
    assert bool(stored.flatten(1).any(1).all()) and int(stored.abs().max()) == round(127 * 1.6 / 8)


@pytest.mark.parametrize("method", [LSP(), LSP(separation=0.0), AR()], ids=["lsp", "lsp, one centre", "ar"])
def test_l2_noise_uses_its_budget(method: LSP | AR, runtime: Runtime) -> None:
    grey = ImageSet.from_arrays(torch.full((6, 3, 32, 32), 128, dtype=torch.uint8), torch.arange(6) % 3)
    delta = (method.protect(grey, Job(runtime=runtime)).pixels.float() - 128) / 255
    assert 0.97 * method.epsilon < float(delta.flatten(1).norm(dim=1).min())


def aim(**changes: Any) -> Objective:
    settings: dict[str, Any] = {
        "matching": "cosine",
        "distance": "repel",
        "distance_weight": 1.0,
        "undistil": 0.0,
        "networks": [create_model("cnn-w4", classes=3, size=(8, 8))],
        "targets": torch.tensor([2, 0, 1]),
    }
    return Objective(**(settings | changes))


def value_of(made: Objective, *, late: bool) -> float:
    x, labels = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2])
    point = Point(state=made.networks[0].state_dict(), scale=1.0, late=late)
    loss = made(x.clone().requires_grad_(), x, labels, points=[point], weight=1.0)[0]
    return float(loss.detach())


@pytest.mark.parametrize("kind", ["surrogate", "permute"])
def test_unauthorised_encoders_are_led_to_the_key_s_class(kind: str) -> None:
    asked: list[list[int]] = []

    def led(x: Tensor, *labels: Tensor) -> Tensor:
        asked.append(labels[-1].tolist())
        return x.sum()

    value_of(aim(distance=kind, spaces=[SimpleNamespace(surrogate=led, permute=led)]), late=False)
    assert asked[0] == [2, 0, 1]


def test_undistillation_counts_late_and_by_its_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective, "undistillation", lambda *_: torch.tensor(1.0))
    made = aim(undistil=0.25, spaces=[SimpleNamespace(repel=lambda x, _: x.sum() * 0)])
    assert value_of(made, late=True) - value_of(made, late=False) == pytest.approx(0.25, abs=1e-5)


def test_another_surrogate_is_another_run(runtime: Runtime, tmp_path: Path) -> None:
    method, out = EM(max_rounds=1, train_steps=1, **TINY), tmp_path / "out"
    for seed in (0, 1):
        publish(blobs(6), method, tmp_path / str(seed), runtime=runtime, seed=seed)
    first, second = (tmp_path / f"{seed}/surrogate.safetensors" for seed in (0, 1))
    publish(blobs(6, seed=1), method, out, runtime=runtime, surrogate=first)
    with pytest.raises(OutputError, match="other settings: surrogate was"):
        publish(blobs(6, seed=1), method, out, runtime=runtime, surrogate=second)


def test_tue_weighs_the_separation(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ucl, "contrastive_loss", lambda *_, **__: torch.tensor(5.0))
    given: Any = (None, None, torch.randn(6, 3, 2, 2), torch.arange(6) % 2, Job(runtime=runtime))
    one, three = (float(TUE(separation=weight)._loss(*given)) - 5 for weight in (1.0, 3.0))
    assert three == pytest.approx(3 * one, rel=1e-4)


@pytest.mark.parametrize(
    "method",
    [
        EM(views=1, flip=False, max_rounds=1, **SMALL),
        SEM(flip=False, **ONE, **SMALL),
        UCL(class_rounds=0, rounds=1, train_steps=1, flip=False, **TINY),
        TAP(flip=False, epochs=1, restarts=1, **TINY),
    ],
    ids=["em", "sem", "ucl", "tap"],
)
def test_handwriting_is_never_mirrored(
    method: Protection, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    for kind in (augment.FlipCrop, augment.ResizedCrop):
        plain: Any = kind.draw

        def draw(self: Any, *given: Any, plain: Any = plain) -> Any:
            asked.append(self.flip)
            return plain(self, *given)

        monkeypatch.setattr(kind, "draw", draw)
    method.protect(blobs(16), Job(runtime=runtime))
    assert asked and not any(asked)


def test_steps_to_cross_the_budget() -> None:
    assert EM(epsilon=8).crossing(0.8) == 20 and EM(epsilon=8).crossing(3.0) == 6
