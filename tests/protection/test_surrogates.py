"""What surrogates learn, and what noise does to them."""

from __future__ import annotations

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
from privet.protection import AR, EM, LSP, REM, SEM, TUE, UCL, Protection, em, objective, publish, sem, ucl
from privet.protection.minimise import Batches
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


@pytest.mark.parametrize("method", [LSP(), AR()], ids=["lsp", "ar"])
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
    ],
    ids=["em", "sem", "ucl"],
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
