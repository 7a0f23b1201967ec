"""Denoisers against their loops as one writes them down, and what else a slip would leave unnoticed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from tests.conftest import blobs
from torch import Tensor

from privet.errors import UsageError
from privet.images import ImageSet
from privet.learning import Job, Runtime
from privet.recovery import (
    AVATAR,
    COIN,
    DVAE,
    JCDP,
    PriorTraining,
    Projection,
    Purify,
    create_recovery,
    noise_error,
    prior_training,
    restore,
    train_prior,
)
from privet.recovery.base import Recovery
from privet.recovery.diffusion import ImageNoise, to_pixels, to_unit
from privet.recovery.prior import Prior, predict_noise


class Third(torch.nn.Module):
    """Takes a third of what it sees for noise."""

    config = SimpleNamespace(
        block_out_channels=(1,), down_block_types=("Block",), up_block_types=("Block",), sample_size=None
    )

    def forward(self, noisy: Tensor, time: Tensor) -> Any:
        return SimpleNamespace(sample=noisy / 3)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Have recoveries denoise with `Third`, and return the shares of the image that its times leave."""
    kept = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    prior = Prior(model=Third(), kept=kept, max_t=1000, about={}, images=frozenset())
    monkeypatch.setattr("privet.recovery.diffusion.load_prior", lambda *_, **__: prior)
    monkeypatch.setattr("privet.recovery.diffusion.weigh", lambda _: 1)
    return [float(share) for share in kept]


def walk(
    z: Tensor,
    kept: list[float],
    time: int,
    noise: Callable[[], Tensor],
    shift: Callable[[Tensor, int, float], Tensor] | None = None,
) -> Tensor:
    """Walk back from a time step by step (Ho et al. 2020, equation 7), each mean moved by a shift."""
    for t in range(time - 1, -1, -1):
        share, before = kept[t], kept[t - 1] if t else 1.0
        beta = 1 - share / before
        clean = ((z - (1 - share) ** 0.5 * z / 3) / share**0.5).clamp(-1, 1)
        mean = before**0.5 * beta / (1 - share) * clean
        mean = mean + (1 - beta) ** 0.5 * (1 - before) / (1 - share) * z
        if shift is not None:
            mean = mean - beta * shift(z, t, share)
        z = mean + beta**0.5 * noise() if t else mean
    return z


def near(found: Tensor, expected: Tensor) -> bool:
    return int((found.short() - to_pixels(expected).short()).abs().max()) <= 1


def test_avatar_is_its_loop(kept: list[float], runtime: Runtime) -> None:
    images = blobs(2)
    x, noise = to_unit(images.pixels, runtime.device), ImageNoise(images.pixels, 0, runtime.device)
    z = kept[60] ** 0.5 * x + (1 - kept[60]) ** 0.5 * noise()
    found = AVATAR(prior="x", time=60).recover(images, Job(runtime=runtime)).pixels
    assert near(found, walk(z, kept, 60, noise))


def test_jcdp_is_its_loop(kept: list[float], runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "privet.recovery.jcdp.perceptual_gradient", lambda model, one, other, job: 0.05 * (one - other)
    )
    images = blobs(2)
    x, noise = to_unit(images.pixels, runtime.device), ImageNoise(images.pixels, 0, runtime.device)

    def shift(z: Tensor, t: int, share: float) -> Tensor:
        apart = z - (share**0.5 * x + (1 - share) ** 0.5 * noise())
        gradient = 2 / 192 * apart if t > 10 else 0.05 * apart
        scale: float = ((1 - share) / share) ** 0.5 * 3 * 7e6 / (16 / 255) / 500
        moved: Tensor = scale * gradient
        return moved

    y = x
    for _ in range(2):
        z = kept[14] ** 0.5 * y + (1 - kept[14]) ** 0.5 * noise()
        y = walk(z, kept, 14, noise, shift)
    method = JCDP(prior="x", rounds=2, time=14, guide=7e6)
    assert near(method.recover(images, Job(runtime=runtime)).pixels, y)


def test_purify_is_its_loop(kept: list[float], runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "privet.recovery.purify.perceptual_gradient", lambda model, one, other, job: one - other
    )
    images = blobs(2)
    x, noise = to_unit(images.pixels, runtime.device), ImageNoise(images.pixels, 0, runtime.device)
    y = x
    for _ in range(2):
        e = noise()
        for level in (100, 50):
            share = kept[level]
            z = share**0.5 * y + (1 - share) ** 0.5 * e
            y = ((z - (1 - share) ** 0.5 * z / 3) / share**0.5).clamp(-1, 1)
            e = (z - share**0.5 * y) / (1 - share) ** 0.5
        y = y + 0.25 * (x - y)  # down the gradient
    found = Purify(prior="x", perceptual=0.25).recover(images, Job(runtime=runtime)).pixels
    assert near(found, y)


@pytest.mark.parametrize("time", [0, 1000])
@pytest.mark.usefixtures("kept")
def test_times_that_no_step_leads_back_from_are_refused(runtime: Runtime, time: int) -> None:
    with pytest.raises(UsageError, match="trained for times below 1000"):
        AVATAR(prior="x", time=time).recover(blobs(2), Job(runtime=runtime))


def test_a_prior_learns_its_own_times_and_no_mirrored_images(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, plain = blobs(8), predict_noise
    seen: list[tuple[Tensor, Tensor]] = []

    def spy(network: Any, noisy: Tensor, time: Tensor, **rest: Any) -> Tensor:
        seen.append((noisy.detach(), time))
        return plain(network, noisy, time, **rest)

    monkeypatch.setattr(prior_training, "predict_noise", spy)
    training = PriorTraining(scale="tiny", steps=6, batch_size=8, max_t=1, flip=False)
    train_prior(images, training, tmp_path / "out", runtime=runtime)
    x = to_unit(images.pixels, runtime.device)
    assert len(seen) >= 6
    for noisy, time in seen:
        assert int(time.max()) == 0  # where hardly any noise is added
        assert float((noisy[:, None] - x).abs().amax((2, 3, 4)).amin(1).max()) < 0.1


def test_half_of_the_images_are_mirrored_and_the_other_half_is_not(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = learned(blobs(16, size=(8, 6)), 8, runtime, tmp_path, monkeypatch, flip=True)
    x = to_unit(blobs(16, size=(8, 6)).pixels, runtime.device)
    plain, mirrored = ((seen[:, None] - one).abs().amax((2, 3, 4)).amin(1) < 0.1 for one in (x, x.flip(3)))
    assert bool((plain ^ mirrored).all())
    assert 0.3 < float(mirrored.float().mean()) < 0.7


def test_crops_come_from_everywhere(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, columns = torch.meshgrid(torch.arange(70), torch.arange(80), indexing="ij")
    pixels = torch.stack((3 * rows, 3 * columns, 0 * rows)).expand(16, 3, 70, 80).to(torch.uint8)
    images = ImageSet.from_arrays(pixels, torch.zeros(16, dtype=torch.int64))
    seen = (learned(images, 4, runtime, tmp_path, monkeypatch, flip=False) + 1) * 127.5 / 3
    steps = torch.arange(64.0)
    top = (seen[:, 0] - steps.view(64, 1)).mean((1, 2))
    left = (seen[:, 1] - steps).mean((1, 2))
    for found, most in ((top, 6), (left, 16)):
        assert float((found - found.round()).abs().max()) < 0.1  # whole rows and columns, in their order
        assert set(found.round().int().tolist()) <= set(range(most + 1))
        assert len(found.round().unique()) > most / 2
        assert float(found.min()) < most / 6 and float(found.max()) > most * 5 / 6
    assert abs(float(torch.corrcoef(torch.stack((top, left)))[0, 1])) < 0.5


def learned(
    images: ImageSet,
    steps: int,
    runtime: Runtime,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    flip: bool,
) -> Tensor:
    """Return what a prior learns from, all images in every step, hardly noised."""
    seen: list[Tensor] = []

    def spy(network: Any, noisy: Tensor, time: Any, **rest: Any) -> Tensor:
        if isinstance(time, Tensor):  # else it is asked, and no longer taught
            seen.append(noisy.detach())
        return predict_noise(network, noisy, time, **rest)

    monkeypatch.setattr(prior_training, "predict_noise", spy)
    training = PriorTraining(scale="tiny", steps=steps, batch_size=len(images), max_t=1, flip=flip)
    train_prior(images, training, tmp_path / "out", runtime=runtime)
    assert len(seen) == steps
    return torch.cat(seen)


def test_the_average_of_the_weights_is_kept(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers.training_utils import EMAModel

    steps: list[list[Tensor]] = []
    plain = EMAModel.step

    def spy(self: Any, weights: Any) -> None:
        weights = list(weights)
        steps.append([weight.detach().clone() for weight in weights])
        plain(self, weights)

    monkeypatch.setattr(EMAModel, "step", spy)
    training = PriorTraining(scale="tiny", steps=5, batch_size=8, learning_rate=0.1)
    prior = train_prior(blobs(8), training, tmp_path / "out", runtime=runtime)
    expected = steps[0]
    for number, now in enumerate(steps[1:], 2):
        decay = min(0.999, 1 - number**-0.75)
        expected = [decay * old + (1 - decay) * new for old, new in zip(expected, now, strict=True)]
    found = [weight.detach() for weight in prior.model.parameters()]
    assert not all(torch.allclose(*pair, atol=1e-6) for pair in zip(found, steps[-1], strict=True))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-3)


def test_a_prior_s_error_is_over_its_own_times(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0)
    times: list[int] = []

    def noise(self: Prior, noisy: Tensor, time: int, runtime: Runtime) -> Tensor:
        times.append(time)
        return noisy

    monkeypatch.setattr(Prior, "noise", noise)
    prior = Prior(model=Third(), kept=kept, max_t=250, about={}, images=frozenset())
    noise_error(prior, blobs(80), Job(runtime=runtime))
    assert times == [25, 75, 125, 175, 225]


def test_blur_is_pillow_s(runtime: Runtime) -> None:
    images = blobs(1, size=(16, 16))
    picture = Image.fromarray(images.pixels[0].permute(1, 2, 0).contiguous().numpy())
    expected = torch.from_numpy(np.array(picture.filter(ImageFilter.GaussianBlur(1.5)))).permute(2, 0, 1)
    found = create_recovery("blur-1.5").recover(images, Job(runtime=runtime)).pixels
    assert torch.equal(found[0], expected)


@pytest.mark.parametrize("recovery", [DVAE(width=4, epochs=2), COIN()], ids=["dvae", "coin"])
def test_a_workspace_changes_nothing(recovery: Recovery, runtime: Runtime, tmp_path: Path) -> None:
    one, other = (
        recovery.recover(blobs(10), Job(runtime=runtime, workspace=workspace)).pixels
        for workspace in (None, tmp_path)
    )
    assert torch.equal(one, other)


def test_restore_hands_its_seed_on(runtime: Runtime, tmp_path: Path) -> None:
    runs = [restore(blobs(3), COIN(), tmp_path / str(seed), runtime=runtime, seed=seed) for seed in (0, 7)]
    assert [run.run["seed"] for run in runs] == [0, 7]
    one, other = ([record["sha256_after"] for record in run.written.records] for run in runs)
    assert one != other


def test_the_second_autoencoder_learns_what_the_first_left(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Tensor] = []
    plain: Any = DVAE._train

    def spy(self: DVAE, images: Any, job: Job, number: int) -> Any:
        given.append(images.pixels.clone())
        return plain(self, images, job, number)

    monkeypatch.setattr(DVAE, "_train", spy)
    images = blobs(6)
    DVAE(width=4, epochs=2).recover(images, Job(runtime=runtime))
    assert torch.equal(given[0], images.pixels) and not torch.equal(given[1], images.pixels)


def test_the_straight_line_is_fitted_ever_more_slowly(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    plain: Any = torch.optim.SGD.step

    def spy(self: torch.optim.SGD, *rest: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return plain(self, *rest)

    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    Projection(epochs=8, batch_size=4).recover(blobs(6), Job(runtime=runtime))
    assert rates == pytest.approx(8 * [0.1] + 4 * [0.01] + 4 * [0.001])  # two steps an epoch
