from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.conftest import blobs
from torch import Tensor

from privet.errors import UsageError
from privet.images import ImageSet
from privet.images.contrastive_views import ContrastiveViews
from privet.learning import Job, Runtime, frozen
from privet.learning.contrastive import contrastive_loss
from privet.models import create_model
from privet.protection import UCL, ucl
from privet.protection.minimise import Batch, Batches, unpack
from privet.protection.ucl import Noise
from privet.seeds import generator

METHOD = UCL(surrogate="cnn-w8", epsilon=16, batch_size=16, step_size=1.6)


def loss(model: torch.nn.Module, images: ImageSet, noise: Noise, runtime: Runtime) -> float:
    """Return the mean contrastive loss of noisy images over some draws that no descent has seen."""
    batch = Batches(images, runtime)[torch.arange(len(images))]
    delta = unpack(noise.stored[noise.rows], METHOD.epsilon / 255)
    draws = (METHOD._views(batch, delta, generator(5, "draw", number)) for number in range(8))
    with frozen(model), torch.no_grad():
        return sum(float(contrastive_loss(model, views, runtime=runtime)) for views in draws) / 8


def test_an_image_is_seen_in_two_different_views_of_what_is_delivered(runtime: Runtime) -> None:
    images = blobs(8)
    grey = torch.arange(8) % 2 == 0
    white = replace(images, pixels=torch.full_like(images.pixels, 255), grey=grey)
    coloured = (torch.rand(8, 3, 8, 8, generator=generator(1, "noise")) * 2 - 1) * 16 / 255
    for one in (images, white):
        batch = Batches(replace(one, grey=grey), runtime)[torch.arange(8)]
        views = METHOD._views(batch, coloured, generator(2, "views"))
        assert len(views) == 16
        assert float((views[:8] - views[8:]).abs().flatten(1).amax(1).min()) > 0.05
        tied = torch.where(grey.view(-1, 1, 1, 1), coloured.mean(1, keepdim=True), coloured)
        rest = batch._replace(x=(batch.x + tied).clamp(0, 1), grey=torch.zeros_like(grey))
        delivered = METHOD._views(rest, torch.zeros_like(tied), generator(2, "views"))
        assert torch.allclose(views, delivered, atol=1e-6)


def mirrored(method: UCL, batch: Batch, delta: Tensor, randomness: object) -> Tensor:
    """Return two views that no draw and no order of images changes."""
    seen = (batch.x + delta).clamp(0, 1)
    return torch.cat((seen, 1 - seen.flip(3)))


@pytest.mark.parametrize("mode", ["sample", "class"])
def test_a_descent_follows_the_gradient_of_the_shared_noise(
    runtime: Runtime, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(UCL, "_views", mirrored)
    images, job = blobs(12), Job(runtime=runtime)
    model = create_model("simclr:cnn-w8", classes=3, size=(8, 8), seed=1).eval()
    noise = METHOD._start(images, mode, job)
    before = unpack(noise.stored, 16 / 255).requires_grad_()
    batch = Batches(images, runtime)[torch.arange(12)]
    views = mirrored(METHOD, batch, before[noise.rows], None)
    (gradient,) = torch.autograd.grad(contrastive_loss(model, views, runtime=runtime), before)
    expected = (before - 1.6 / 255 * gradient.sign()).clamp(-16 / 255, 16 / 255)
    METHOD._improve(model, Batches(images, runtime), noise, 0, 1, "", job)
    near = (unpack(noise.stored, 16 / 255) - expected).abs() < 0.2 / 255
    assert float(near.float().mean()) > 0.99  # signs of gradients near 0 may differ


def test_the_surrogate_learns_noisy_images_in_views_of_their_own(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    flat = ImageSet.from_arrays(torch.full((8, 3, 8, 8), 128, dtype=torch.uint8), torch.arange(8) % 2)
    brightness, roughness = list[Tensor](), list[float]()
    draw, step = ContrastiveViews.draw, ucl.contrastive_step

    def spy_draw(self: ContrastiveViews, *given: Any) -> Any:
        drawn = draw(self, *given)
        brightness.append(drawn.brightness)
        return drawn

    def spy_step(model: Any, optimizer: Any, views: Tensor, **rest: Any) -> Tensor:
        roughness.append(float(views.flatten(2).std(2).min()))
        return step(model, optimizer, views, **rest)

    monkeypatch.setattr(ContrastiveViews, "draw", spy_draw)
    monkeypatch.setattr(ucl, "contrastive_step", spy_step)
    method = UCL(
        surrogate="cnn-w4",
        class_rounds=2,
        class_steps=2,
        rounds=2,
        train_steps=2,
        noise_steps=2,
        batch_size=8,
    )
    method.protect(flat, Job(runtime=runtime))
    assert len(roughness) == 8 and min(roughness) > 1e-3  # flat without noise
    changed = torch.cat(brightness)
    changed = changed[changed != 1]  # a fifth of the views keep their colours
    assert len(changed.unique()) == len(changed)


def test_class_wise_noise_descends_once_for_each_of_a_few_batches(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[Tensor]()

    def spy(method: UCL, model: object, views: Tensor, delta: Tensor, labels: Tensor, job: object) -> Tensor:
        asked.append(labels)
        return delta.sum()

    monkeypatch.setattr(UCL, "_loss", spy)
    settings = {"surrogate": "cnn-w4", "batch_size": 8, "class_rounds": 2, "rounds": 0}
    for steps, batches in ((2, 2), (9, 3)):
        asked.clear()
        UCL(class_steps=steps, noise_steps=3, **settings).protect(blobs(24), Job(runtime=runtime))  # type: ignore[arg-type]
        assert len(asked) == 2 * batches
        assert all(len(labels.unique()) > 1 for labels in asked)
        # Other images meet in the second round.
        assert not torch.equal(torch.cat(asked[:batches]), torch.cat(asked[batches:]))


def test_images_meet_others_in_each_round(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    dealt = list[set[int]]()

    def spy(method: UCL, model: object, views: Tensor, delta: Tensor, labels: Tensor, job: object) -> Tensor:
        dealt.append(set(labels.tolist()))
        return delta.sum()

    monkeypatch.setattr(UCL, "_loss", spy)
    images = ImageSet.from_arrays(blobs(24).pixels, torch.arange(24))
    UCL(surrogate="cnn-w4", batch_size=8, class_rounds=0, rounds=2, train_steps=1, noise_steps=1).protect(
        images, Job(runtime=runtime)
    )
    first, second = dealt[:3], dealt[3:]
    assert set().union(*first) == set().union(*second) == set(range(24))
    assert not any(one in first for one in second)


@pytest.mark.parametrize("mode", ["sample", "class"])
def test_descents_lower_the_loss_on_fresh_views(runtime: Runtime, mode: str) -> None:
    images = blobs(32, size=(16, 16))
    job, method = Job(runtime=runtime), replace(METHOD, class_steps=2)
    model = create_model("simclr:cnn-w8", classes=3, size=images.size, seed=1)
    noise = method._start(images, mode, job)
    before = loss(model, images, noise, runtime)  # chance: the network is untrained
    for round_ in range(5):
        method._improve(model, Batches(images, runtime), noise, round_, 4, "", job)
    assert loss(model, images, noise, runtime) < before - 0.003


def test_batches_are_dealt_across_classes(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of class folders a batch would hold one class, and an image would meet only its like."""
    images = ImageSet.from_arrays(
        torch.randint(0, 256, (60, 3, 4, 4), dtype=torch.uint8), torch.arange(60) // 20
    )
    seen = list[Tensor]()

    def spy(method: UCL, model: object, views: Tensor, delta: Tensor, labels: Tensor, job: object) -> Tensor:
        seen.append(labels)
        return delta.sum()

    monkeypatch.setattr(UCL, "_loss", spy)
    UCL(surrogate="cnn-w4", batch_size=16, class_rounds=0, rounds=1, train_steps=1).protect(
        images, Job(runtime=runtime)
    )
    assert all(len(labels.unique()) == 3 for labels in seen)
    assert sorted(len(labels) for labels in seen[:: METHOD.noise_steps]) == [15, 15, 15, 15]


def test_class_wise_noise_is_where_sample_wise_noise_starts(runtime: Runtime) -> None:
    images = ImageSet.from_arrays(
        torch.randint(40, 200, (12, 3, 8, 8), dtype=torch.uint8), torch.arange(12) % 3
    )
    settings = {"surrogate": "cnn-w4", "batch_size": 8, "class_steps": 2, "train_steps": 1}
    far = UCL(class_rounds=2, rounds=0, **settings).protect(images, Job(runtime=runtime))  # type: ignore[arg-type]
    near = UCL(class_rounds=2, rounds=1, noise_steps=1, **settings)  # type: ignore[arg-type]
    moved = near.protect(images, Job(runtime=runtime)).pixels.short() - far.pixels.short()
    assert 0 < int(moved.abs().max()) <= 1  # one descent of 0.8


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(UsageError, match="ucl needs noise_steps of at least 1, got 0"):
        UCL(noise_steps=0)
    with pytest.raises(
        UsageError, match="ucl needs at least 1 round, class-wise or sample-wise, got 0 and 0"
    ):
        UCL(class_rounds=0, rounds=0)
