from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from privet.images import compare, compare_all
from privet.images import similarity as module


def test_known_answers() -> None:
    before = np.full((16, 16, 3), 100, np.uint8)
    same = compare(before, before)
    assert (same.linf, same.psnr) == (0, None)
    assert same.ssim == pytest.approx(1)
    after = before.copy()
    after[0, 0, 0] += 16
    found = compare(before, after)
    assert found.linf == 16
    # mean squared error 16^2 / (16 * 16 * 3) = 1/3
    assert found.psnr == pytest.approx(10 * np.log10(255**2 * 3))


def test_ssim_against_its_definition() -> None:
    random = np.random.default_rng(0)
    before = random.integers(0, 256, (24, 20, 3)).astype(np.uint8)
    after = np.clip(before + random.integers(-20, 21, before.shape), 0, 255).astype(np.uint8)

    def mean(image: NDArray[np.float64]) -> NDArray[np.float64]:
        return gaussian_filter(image, (1.5, 1.5, 0), truncate=5 / 1.5, mode="mirror")

    x, y = before.astype(np.float64), after.astype(np.float64)
    variance_x, variance_y = mean(x * x) - mean(x) ** 2, mean(y * y) - mean(y) ** 2
    covariance = mean(x * y) - mean(x) * mean(y)
    a, b = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    whole = (2 * mean(x) * mean(y) + a) * (2 * covariance + b)
    whole /= (mean(x) ** 2 + mean(y) ** 2 + a) * (variance_x + variance_y + b)
    assert compare(before, after).ssim == pytest.approx(whole.mean(), abs=1e-5)


def test_small_images_have_no_ssim() -> None:
    pixels = torch.zeros(2, 3, 10, 40, dtype=torch.uint8)
    assert [one.ssim for one in compare_all(pixels, pixels)] == [None, None]


def test_batches_and_tiles_change_nothing_but_the_borders_of_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(1)
    before = torch.from_numpy(random.integers(0, 256, (3, 3, 64, 64)).astype(np.uint8))
    after = (before.short() + torch.from_numpy(random.integers(-9, 10, before.shape)).short()).clamp(0, 255)
    expected = compare_all(before, after.byte())
    monkeypatch.setattr(module, "BATCH_PIXELS", 64 * 64)
    assert compare_all(before, after.byte()) == expected
    monkeypatch.setattr(module, "TILE", 32)
    for tiled, whole in zip(compare_all(before, after.byte()), expected, strict=True):
        assert (tiled.linf, tiled.psnr) == (whole.linf, whole.psnr)
        assert tiled.ssim == pytest.approx(whole.ssim, abs=0.01)
