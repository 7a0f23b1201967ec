"""PIL against a slow version of what its paper says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tests.conftest import blobs
from torch import Tensor

from privet.errors import UsageError
from privet.images import ImageSet
from privet.learning import Runtime
from privet.protection import PIL, Job, pil
from privet.protection.minimise import Batches


def noise_of(images: ImageSet, method: PIL, runtime: Runtime) -> Tensor:
    """Return what was added, in whole steps of 1/255."""
    after = method.protect(images, Job(runtime=runtime))
    return (after.pixels.short() - images.pixels.short()).float()


def mid_range(count: int) -> ImageSet:
    """Return images that noise of the budget does not clip."""
    images = blobs(count)
    return images.with_pixels((images.pixels // 2 + 60).to(torch.uint8))


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("shortcut", [0.0, 0.3, 1.0])
def test_descents_follow_the_gradient_of_the_objective(runtime: Runtime, shortcut: float, grey: bool) -> None:
    images, job = blobs(6, grey=grey), Job(runtime=runtime)
    one = PIL(epochs=1, batch_size=4, noise_steps=1, step_size=0.3, shortcut=shortcut)
    weights = one._train(images, Batches(images, runtime), job)
    index = torch.arange(6)

    def draws() -> torch.Generator:
        return torch.Generator().manual_seed(1)

    start = -replace(one, step_size=1e-6)._perturb(images, job)(index, draws())
    moved = -one._perturb(images, job)(index, draws())
    delta = (start / 255).requires_grad_()
    shared = delta[:, :1].expand(-1, 3, -1, -1) if grey else delta
    clean = F.log_softmax((images.pixels.float() / 255 - shared).flatten(1) @ weights.T, 1)
    uniform = torch.full_like(clean, 1 / 3)
    loss = shortcut * F.cross_entropy(shared.flatten(1) @ weights.T, images.labels)
    loss = loss + (1 - shortcut) * F.kl_div(clean, uniform, reduction="batchmean")
    (gradient,) = torch.autograd.grad(loss, delta)
    if grey:
        gradient = gradient[:, :1].expand(-1, 3, -1, -1)
    expected = (start - 0.3 * gradient.sign()).clamp(-8, 8)
    sure = gradient.abs() > 1e-8
    assert float(sure.float().mean()) > 0.9
    assert torch.allclose(moved[sure], expected[sure], atol=1e-4)


def test_a_linear_surrogate_learns_and_its_noise_gives_the_class_away(runtime: Runtime) -> None:
    images = mid_range(120)
    method = PIL(epochs=30, batch_size=16)
    weights = method._train(images, Batches(images, runtime), Job(runtime=runtime))
    clean = images.pixels.float().flatten(1) / 255 @ weights.T
    assert float((clean.argmax(1) == images.labels).float().mean()) > 0.9
    lost = -noise_of(images, method, runtime).flatten(1) / 255 @ weights.T
    assert float((lost.argmax(1) == images.labels).float().mean()) == 1.0
    hidden = (clean - lost).softmax(1)
    hiding = -noise_of(images, replace(method, shortcut=0.0), runtime).flatten(1) / 255 @ weights.T
    flatter = (clean - hiding).softmax(1)
    own = torch.arange(len(images)), images.labels
    assert float(hidden[own].mean()) < float(clean.softmax(1)[own].mean())
    assert float(flatter.amax(1).mean()) < float(hidden.amax(1).mean())


def test_descents_stay_within_the_budget_on_their_way(runtime: Runtime) -> None:
    images, job = blobs(6), Job(runtime=runtime)
    method = PIL(epochs=1, noise_steps=60, shortcut=1.0)
    noise = method._perturb(images, job)(torch.arange(6), torch.Generator().manual_seed(1))
    assert float(noise.abs().max()) == pytest.approx(8, abs=1e-4)


@pytest.mark.parametrize("flip", [False, True])
def test_with_views_the_surrogate_answers_as_it_does_on_average(runtime: Runtime, flip: bool) -> None:
    weights = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = PIL(views=4000, flip=flip)._averaged(weights, Job(runtime=runtime))
    expected, count = torch.zeros_like(weights), 0
    padded = F.pad(weights, (1, 1, 1, 1))  # an image is shifted over black, so weights are shifted over none
    for y in range(3):
        for x in range(3):
            shifted = padded[:, :, y : y + 8, x : x + 8]
            for one in (shifted, shifted.flip(3)) if flip else (shifted,):
                expected, count = expected + one, count + 1
    assert torch.allclose(found, expected / count, atol=0.08)
    assert torch.equal(PIL(views=0)._averaged(weights, Job(runtime=runtime)), weights)


def test_the_surrogate_learns_the_clean_images(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    images = blobs(9)
    learned: list[tuple[Tensor, Tensor]] = []
    monkeypatch.setattr(pil, "training_step", lambda _, __, x, labels, **___: learned.append((x, labels)))
    PIL(epochs=1, batch_size=3, noise_steps=1).protect(images, Job(runtime=runtime))
    x, labels = (torch.cat(parts) for parts in zip(*learned, strict=True))
    distance = torch.cdist((x * 255).flatten(1), images.pixels.flatten(1).float())
    nearest = distance.min(1)
    assert sorted(nearest.indices.tolist()) == list(range(9)) and float(nearest.values.max()) < 0.1
    assert torch.equal(labels, images.labels[nearest.indices])


def test_with_views_the_surrogate_learns_from_them(runtime: Runtime) -> None:
    images, job = blobs(24), Job(runtime=runtime)
    plain = PIL(epochs=2, batch_size=8)
    same = replace(plain, views=1)

    class Still(PIL):
        def _averaged(self, weights: Tensor, job: Job) -> Tensor:
            return weights

    still = Still(**same.settings())
    batches = Batches(images, runtime)
    assert not torch.equal(still._train(images, batches, job), plain._train(images, batches, job))


def test_the_surrogate_s_training_counts(runtime: Runtime) -> None:
    images, job = blobs(24), Job(runtime=runtime)
    first = PIL(epochs=1, batch_size=8)._train(images, Batches(images, runtime), job)
    again = PIL(epochs=1, batch_size=8)._train(images, Batches(images, runtime), job)
    assert torch.equal(first, again) and first.shape == (3, 3 * 8 * 8)
    assert not torch.equal(first, PIL(epochs=2, batch_size=8)._train(images, Batches(images, runtime), job))


def test_settings_that_cannot_work() -> None:
    with pytest.raises(UsageError, match=r"pil needs a shortcut of 0 to 1, got 1\.5"):
        PIL(shortcut=1.5)
    for setting in ("epochs", "batch_size", "noise_steps"):
        with pytest.raises(UsageError, match=f"pil needs {setting} of at least 1, got 0"):
            PIL(**{setting: 0})  # type: ignore[arg-type]
