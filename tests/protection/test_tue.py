from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from privet.errors import UsageError
from privet.images import ImageSet
from privet.learning import Job, Runtime
from privet.models import create_model
from privet.protection import TUE, UCL
from privet.protection.tue import SMALLEST, class_separation


def slow_separation(points: np.ndarray, labels: list[int]) -> float:  # type: ignore[type-arg]
    """The plain version: one pair of classes after the other."""
    groups = [points[[label == one for label in labels]] for one in sorted(set(labels))]
    ratios = []
    for i, first in enumerate(groups):
        for j, second in enumerate(groups):
            if i != j:
                spreads = [
                    np.mean([np.linalg.norm(point - group.mean(0)) for point in group])
                    for group in (first, second)
                ]
                distance = np.linalg.norm(first.mean(0) - second.mean(0))
                ratios.append(sum(spreads) / max(distance, SMALLEST))
    return float(np.mean(ratios)) if ratios else 0.0


@settings(deadline=None, max_examples=60)
@given(
    labels=st.lists(st.sampled_from([0, 1, 2, 7]), min_size=1, max_size=12),
    width=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
def test_separation_is_the_plain_version(labels: list[int], width: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(labels), 3, width, 2, dtype=torch.float64, generator=random)
    found = float(class_separation(noise, torch.tensor(labels)))
    assert found == pytest.approx(slow_separation(noise.flatten(1).numpy(), labels), rel=1e-6, abs=1e-9)


def test_the_gradient_counts_spreads_and_distances() -> None:
    noise = torch.randn(7, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 0, 1, 2, 1, 2, 2])
    assert torch.autograd.gradcheck(lambda delta: class_separation(delta, labels), noise.requires_grad_())


def test_the_loss_is_the_contrastive_one_and_the_separation(runtime: Runtime) -> None:
    random = torch.Generator().manual_seed(1)
    delta, views = (torch.rand(count, 3, 8, 8, generator=random) for count in (6, 12))
    labels, model = torch.arange(6) % 2, create_model("simclr:cnn-w4", classes=2, size=(8, 8)).eval()
    found = TUE(separation=0.5)._loss(model, views, delta, labels, Job(runtime=runtime))
    plain = UCL()._loss(model, views, delta, labels, Job(runtime=runtime))
    expected = float(plain.detach()) + 0.5 * slow_separation(delta.flatten(1).numpy(), labels.tolist())
    assert float(found.detach()) == pytest.approx(expected, rel=1e-5)


def test_separation_ignores_the_unit() -> None:
    noise, labels = torch.randn(12, 3, 4, 4, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 3
    assert float(class_separation(noise / 255, labels)) == pytest.approx(
        float(class_separation(noise, labels)), rel=1e-4
    )


@pytest.mark.parametrize("noise", [torch.zeros(6, 3, 2, 2), torch.eye(6).view(6, 6, 1, 1)])
def test_gradients_are_finite_where_points_or_centres_meet(noise: torch.Tensor) -> None:
    noise = noise.clone().requires_grad_()
    class_separation(noise, torch.tensor([0, 0, 1, 1, 2, 3])).backward()  # type: ignore[no-untyped-call]
    assert noise.grad is not None
    assert bool(torch.isfinite(noise.grad).all())


@pytest.mark.parametrize("kind", [TUE, UCL])
def test_noise_tells_its_class_and_contrastive_noise_alone_does_not(
    runtime: Runtime, kind: type[UCL]
) -> None:
    random = torch.Generator().manual_seed(1)
    pixels = torch.randint(20, 230, (60, 3, 8, 8), dtype=torch.uint8, generator=random)
    images = ImageSet.from_arrays(pixels, torch.arange(60) % 3)  # which show nothing of their class
    method = kind(
        surrogate="cnn-w4",
        class_rounds=0,
        rounds=2,
        train_steps=2,
        batch_size=30,
        noise_steps=8,
        step_size=1.6,
    )
    noise = (method.protect(images, Job(runtime=runtime)).pixels.float() - pixels.float()).flatten(1)
    train, test = torch.arange(60) < 30, torch.arange(60) >= 30
    centres = torch.stack([noise[train & (images.labels == label)].mean(0) for label in range(3)])
    nearest = torch.cdist(noise[test], centres).argmin(1)
    right = float((nearest == images.labels[test]).float().mean())
    assert right == 1.0 if kind is TUE else right < 0.7


def test_a_weight_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="tue needs a positive weight of the separation, got 0"):
        TUE(separation=0)
