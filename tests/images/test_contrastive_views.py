from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from privet.images.contrastive_views import LUMA, YIQ, ContrastiveViews, DrawnViews


def one_by_one(crops: Tensor, views: DrawnViews) -> Tensor:
    """The plain version: one image and one change of its colours after the other."""
    seen = []
    for number, crop in enumerate(crops.numpy()):
        x: NDArray[np.float64] = crop * float(views.brightness[number])
        contrast, saturation = float(views.contrast[number]), float(views.saturation[number])
        x = contrast * x + (1 - contrast) * luma(x).mean()
        x = saturation * x + (1 - saturation) * luma(x)
        y, i, q = np.einsum("kc,chw->khw", np.array(YIQ), x)
        chroma = (i + 1j * q) * np.exp(2j * np.pi * float(views.turn[number]))
        x = np.einsum("kc,chw->khw", np.linalg.inv(YIQ), np.stack([y, chroma.real, chroma.imag]))
        if views.grey[number]:
            x = np.repeat(luma(x), 3, 0)
        seen.append(np.clip(x, 0, 1))
    return torch.from_numpy(np.stack(seen)) if seen else crops


def luma(x: NDArray[np.float64]) -> NDArray[np.float64]:
    red, green, blue = x
    return (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue)[None]


@settings(deadline=None, max_examples=40)
@given(
    count=st.integers(0, 5),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    flip=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_views_are_the_plain_version(count: int, height: int, width: int, flip: bool, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 3, height, width, dtype=torch.float64, generator=random)
    views = ContrastiveViews(flip).draw(count, (height, width), random)
    torch.testing.assert_close(views.apply(x), one_by_one(views.crops.apply(x), views), rtol=1e-5, atol=1e-6)


def test_gradients_reach_the_image() -> None:
    random = torch.Generator().manual_seed(1)
    x = (0.3 + 0.2 * torch.rand(3, 3, 4, 4, dtype=torch.float64, generator=random)).requires_grad_()
    views = ContrastiveViews().draw(6, (4, 4), random)
    assert torch.autograd.gradcheck(views.apply, x)


def test_two_views_of_each_image_go_round() -> None:
    x = torch.rand(3, 3, 6, 6)
    views = ContrastiveViews().draw(6, (6, 6), torch.Generator().manual_seed(1))
    seen = views.apply(x)
    torch.testing.assert_close(seen, views.apply(x.repeat(2, 1, 1, 1)))
    assert not torch.allclose(seen[:3], seen[3:])


def test_the_draws_are_those_of_the_paper() -> None:
    views = ContrastiveViews().draw(4000, (8, 8), torch.Generator().manual_seed(0))
    changed = views.brightness != 1
    assert 0.77 < float(changed.float().mean()) < 0.83
    assert 0.17 < float(views.grey.float().mean()) < 0.23
    for factor in (views.brightness, views.contrast, views.saturation):
        assert 0.6 <= float(factor.min()) < 0.62
        assert 1.38 < float(factor.max()) <= 1.4
        assert torch.equal(factor != 1, changed)
    assert 0.095 < float(views.turn.abs().max()) <= 0.1
    # Brightness and contrast are drawn apart.
    assert (
        abs(float(torch.corrcoef(torch.stack((views.brightness, views.contrast))[:, changed])[0, 1])) < 0.06
    )


def test_grey_images_stay_grey_and_views_stay_pixels() -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.rand(50, 1, 8, 8, generator=random).expand(-1, 3, -1, -1)
    seen = ContrastiveViews().draw(50, (8, 8), random).apply(x)
    torch.testing.assert_close(seen[:, 0], seen[:, 2], atol=1e-3, rtol=0)
    assert float(seen.min()) >= 0
    assert float(seen.max()) <= 1
    assert seen.is_contiguous(memory_format=torch.channels_last)
