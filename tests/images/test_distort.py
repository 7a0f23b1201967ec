from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from privet.images.distort import OPERATIONS, distort, plasma
from privet.images.jpeg import jpeg


def picture(image: Tensor) -> Image.Image:
    return Image.fromarray((image * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy())


def tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


def smooth(count: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    """Return images of whole grey levels that look like photographs to JPEG: coarse with some grain."""
    draws = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=draws)
    x = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic")
    x = (x + 0.05 * torch.randn(count, 3, *size, generator=draws)).clamp(0, 1)
    return (x * 255).round() / 255


def coded(image: Tensor, quality: int) -> Tensor:
    buffer = io.BytesIO()
    picture(image).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return tensor(Image.open(buffer))


@settings(deadline=None, max_examples=25)
@given(quality=st.integers(10, 100), high=st.integers(1, 3), wide=st.integers(1, 3), seed=st.integers(0, 100))
def test_jpeg_of_grey_images_is_pillow_s(quality: int, high: int, wide: int, seed: int) -> None:
    x = smooth(24, (8 * high, 8 * wide), seed)[:, :1].expand(-1, 3, -1, -1)
    own = jpeg(x, torch.full((24,), float(quality)))
    difference = (own - torch.stack([coded(image, quality) for image in x])).abs() * 255
    # Only where a frequency lies on the border of two steps may it be rounded the other way.
    assert float((difference > 1.5).float().mean()) < 0.25
    assert float(difference.mean((1, 2, 3)).median()) < 0.75


@settings(deadline=None, max_examples=25)
@given(
    height=st.integers(5, 40),
    width=st.integers(5, 40),
    quality=st.integers(10, 100),
    seed=st.integers(0, 100),
)
def test_jpeg_is_pillow_s_but_for_rounding(height: int, width: int, quality: int, seed: int) -> None:
    x = smooth(24, (height, width), seed)
    own = jpeg(x, torch.tensor([float(quality)] * 23 + [100.0]))
    assert torch.equal(own[-1], jpeg(x[-1:], torch.tensor([100.0]))[0])  # each image by its own quality
    x, own = x[:-1], own[:-1]
    expected = torch.stack([coded(image, quality) for image in x])
    done = float((expected - x).abs().mean()) * 255
    assert float((own - expected).abs().mean((1, 2, 3)).median()) * 255 < 0.75 + 0.1 * done


def test_jpeg_of_no_image() -> None:
    assert jpeg(torch.zeros(0, 3, 8, 8), torch.zeros(0)).shape == (0, 3, 8, 8)


def test_operations_are_pillow_s() -> None:
    x = smooth(4, (12, 10)) * 0.7 + 0.1
    x = (x * 255).round() / 255
    strength = torch.tensor([-1.0, -0.3, 0.4, 1.0])
    for name, oracle, allowed in (
        ("auto contrast", lambda image, s: ImageOps.autocontrast(image), 1.01),
        ("posterize", lambda image, s: ImageOps.posterize(image, round(5 + 3 * s)), 0.01),
        ("solarize", lambda image, s: ImageOps.solarize(image, math.ceil(127.5 * (1 + s))), 0.01),
        ("brightness", lambda image, s: ImageEnhance.Brightness(image).enhance(1 + 0.9 * s), 1.01),
        ("contrast", lambda image, s: ImageEnhance.Contrast(image).enhance(1 + 0.9 * s), 2.01),
    ):
        done = OPERATIONS[name](x, strength.view(-1, 1, 1, 1)).clamp(0, 1)
        for image, own, s in zip(x, done, strength.tolist(), strict=True):
            assert float((own - tensor(oracle(picture(image), s))).abs().max()) * 255 <= allowed, (name, s)


def test_sharpness_is_pillow_s_away_from_the_edge() -> None:
    x = smooth(1, (12, 10)) * 0.5 + 0.25
    for s in (-1.0, 0.5):
        own = OPERATIONS["sharpness"](x, torch.full((1, 1, 1, 1), s))[0]
        expected = tensor(ImageEnhance.Sharpness(picture(x[0])).enhance(1 + 0.9 * s))
        assert float((own - expected)[:, 1:-1, 1:-1].abs().max()) * 255 < 2.5


def test_equalize_ranks_values() -> None:
    x = smooth(2, (7, 5))
    x[1, 2] = 0.2  # a channel of one value stays
    done = OPERATIONS["equalize"](x, torch.zeros(2, 1, 1, 1))
    for image, own in zip(x, done, strict=True):
        for before, after in zip(image.flatten(1).tolist(), own.flatten(1).tolist(), strict=True):
            least = sum(value <= min(before) for value in before)
            for value, result in zip(before, after, strict=True):
                rank = sum(other <= value for other in before)
                expected = value if least == 35 else (rank - least) / (35 - least)
                assert result == pytest.approx(expected, abs=1e-6)


def test_places_move_as_told() -> None:
    x = smooth(1, (16, 16))

    def done(name: str, s: float) -> Tensor:
        return OPERATIONS[name](x, torch.full((1, 1, 1, 1), s))[0]

    assert torch.allclose(done("translate x", 0.5)[:, :, :12], x[0, :, :, 4:], atol=1e-5)
    assert float(done("translate x", 0.5)[:, :, 12:].abs().max()) < 1e-6
    assert torch.allclose(done("translate y", -0.25)[:, 2:], x[0, :, :-2], atol=1e-5)
    for name in OPERATIONS:
        if name not in ("auto contrast", "equalize", "posterize", "solarize"):
            assert torch.allclose(done(name, 0.0), x[0], atol=1e-5), name


@pytest.mark.parametrize("size", [(16, 16), (16, 40)])
def test_turns_and_shears_are_pillows_on_images_of_any_shape(size: tuple[int, int]) -> None:
    x, full = smooth(1, size), torch.ones(1, 1, 1, 1)
    turned = tensor(picture(x[0]).rotate(30, Image.Resampling.BILINEAR))
    assert float((OPERATIONS["rotate"](x, full)[0] - turned).abs().mean()) < 0.02
    middle = (size[0] - 1) / 2
    shear = (1, 0.3, -0.3 * (middle + 0.5), 0, 1, 0)
    sheared = tensor(
        picture(x[0]).transform(size[::-1], Image.Transform.AFFINE, shear, Image.Resampling.BILINEAR)
    )
    assert float((OPERATIONS["shear x"](x, full)[0] - sheared).abs().mean()) < 0.02


def test_plasma_is_a_sum_of_ever_finer_grids() -> None:
    roughness = torch.tensor([0.3, 0.7]).view(2, 1, 1, 1)
    noise = plasma(torch.empty(2, 3, 5, 5), roughness, torch.Generator().manual_seed(3))
    draws, expected = torch.Generator().manual_seed(3), torch.zeros(2, 3, 5, 5)
    for level, cells in enumerate((1, 2, 4)):
        grid = torch.rand(2, 3, cells + 1, cells + 1, generator=draws)
        for row, column in np.ndindex(5, 5):
            y, x = row * cells / 4, column * cells / 4
            top, left = min(int(y), cells - 1), min(int(x), cells - 1)
            for down, right in np.ndindex(2, 2):
                weight = (1 - abs(y - top - down)) * (1 - abs(x - left - right))
                share = roughness.view(2, 1) ** level * weight
                expected[:, :, row, column] += share * grid[:, :, top + down, left + right]
    low, high = expected.amin((2, 3), keepdim=True), expected.amax((2, 3), keepdim=True)
    torch.testing.assert_close(noise, (expected - low) / (high - low))


@pytest.mark.parametrize("size", [(1, 1), (8, 13), (33, 16)])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_distortions_are_pixels_and_depend_on_the_draw_alone(count: int, size: tuple[int, int]) -> None:
    x = smooth(count, size) if count else torch.zeros(0, 3, *size)
    before = x.clone()
    first, second, other = (distort(x, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(x, before)
    assert torch.equal(first, second)
    assert first.shape == x.shape
    assert bool(((first >= 0) & (first <= 1)).all())
    if count == 5 and size != (1, 1):
        assert not torch.equal(first, other)


def test_some_are_left_alone_and_most_are_not() -> None:
    x = smooth(1, (8, 8)).repeat(400, 1, 1, 1)
    change = (distort(x, torch.Generator().manual_seed(0)) - x).abs().mean((1, 2, 3))
    assert float((change > 0.05).float().mean()) > 0.75
    assert len(change.unique()) > 350  # each image has its own
