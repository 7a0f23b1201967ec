from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from privet.images import Augmentation, FlipCrop, ResizedCrop, augmentation_for
from privet.images.augment import _FlipCropViews


def one_by_one(x: Tensor, views: _FlipCropViews) -> Tensor:
    """The plain version: one image at a time, flip, pad, cut."""
    seen = []
    for image, flip, top, left in zip(x.numpy(), views.flip, views.top, views.left, strict=True):
        picture: NDArray[np.float64] = image[:, :, ::-1] if flip else image
        padded = np.pad(picture, ((0, 0), (views.pad, views.pad), (views.pad, views.pad)))
        seen.append(padded[:, top : top + x.shape[2], left : left + x.shape[3]])
    return torch.from_numpy(np.stack(seen)) if seen else x


@settings(deadline=None, max_examples=40)
@given(
    count=st.integers(0, 5),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    pad=st.integers(0, 4),
    flip=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_flip_crop_is_the_plain_version(
    count: int, height: int, width: int, pad: int, flip: bool, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, height, width, dtype=torch.float64, generator=random)
    views = FlipCrop(pad, flip).draw(count, (height, width), random)
    assert isinstance(views, _FlipCropViews)
    assert torch.equal(views.apply(x), one_by_one(x, views))


@settings(deadline=None, max_examples=40)
@given(
    count=st.integers(0, 4),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    kind=st.sampled_from(["shift", "resize"]),
    seed=st.integers(0, 1000),
)
def test_adjoint(count: int, height: int, width: int, kind: str, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    augmentation: Augmentation = FlipCrop(3) if kind == "shift" else ResizedCrop((5, 7))
    views = augmentation.draw(count, (height, width), random)
    x = torch.randn(count, 3, height, width, dtype=torch.float64, generator=random)
    seen = views.apply(x)
    g = torch.randn(seen.shape, dtype=torch.float64, generator=random)
    torch.testing.assert_close((seen * g).sum(), (x * views.adjoint(g)).sum())


@pytest.mark.parametrize("augmentation", [FlipCrop(2), ResizedCrop((6, 6))])
def test_adjoint_is_what_autograd_finds(augmentation: Augmentation) -> None:
    random = torch.Generator().manual_seed(1)
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    views = augmentation.draw(4, (6, 6), random)
    g = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    (expected,) = torch.autograd.grad((views.apply(x) * g).sum(), x)
    torch.testing.assert_close(views.adjoint(g), expected)


@pytest.mark.parametrize("augmentation", [FlipCrop(2), ResizedCrop((6, 6))])
def test_more_views_than_images_go_round(augmentation: Augmentation) -> None:
    x = torch.randn(3, 3, 6, 6, dtype=torch.float64)
    views = augmentation.draw(6, (6, 6), torch.Generator().manual_seed(1))
    assert torch.equal(views.apply(x), views.apply(x.repeat(2, 1, 1, 1)))


def test_resized_crop_of_everything_is_the_image() -> None:
    x = torch.randint(0, 256, (2, 3, 6, 6), dtype=torch.uint8)
    from privet.images.augment import _interpolation, _ResizedViews

    whole = _interpolation(torch.zeros(2), torch.full((2,), 6.0), 6, 6)
    assert torch.equal(_ResizedViews(whole, whole).apply(x), x)


def test_views_of_uint8_stay_pixels() -> None:
    x = torch.full((3, 3, 70, 70), 200, dtype=torch.uint8)
    seen = augmentation_for((70, 70)).draw(3, (70, 70), torch.Generator().manual_seed(0)).apply(x)
    assert seen.dtype == torch.uint8
    assert seen.unique().tolist() == [200]


def test_half_of_the_views_are_flipped_and_none_without_flip() -> None:
    random = torch.Generator().manual_seed(0)
    views = FlipCrop(1).draw(2000, (4, 4), random)
    assert isinstance(views, _FlipCropViews)
    assert 900 < int(views.flip.sum()) < 1100
    unflipped = FlipCrop(1, flip=False).draw(2000, (4, 4), random)
    assert isinstance(unflipped, _FlipCropViews)
    assert not unflipped.flip.any()
