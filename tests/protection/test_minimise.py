from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from privet.images import FlipCrop
from privet.images.augment import _FlipCropViews
from privet.learning import Runtime, uniform
from privet.models import create_model
from privet.protection.minimise import Batch, minimise, pack, unpack


class Recorded:
    """An augmentation that hands out views drawn beforehand, all in one batch."""

    def __init__(self, drawn: list[_FlipCropViews]) -> None:
        self.drawn = iter(drawn)

    def draw(self, count: int, size: tuple[int, int], generator: torch.Generator) -> _FlipCropViews:
        return next(self.drawn)


def slowly(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    noise: Tensor,
    views: list[_FlipCropViews],
    disturbances: list[Tensor],
    *,
    draws: int,
    grey: Tensor,
    epsilon: float,
    step_size: float,
) -> Tensor:
    """The definition: one image, one view and one pass at a time, gradients by autograd."""
    count = len(x)
    for drawn, disturbance in zip(views, disturbances, strict=True):
        updated = []
        for image in range(count):
            delta = noise[image].clone().requires_grad_()
            total = torch.zeros((), dtype=x.dtype)
            for draw in range(draws):
                place = draw * count + image
                seen = (x[image] + delta).clamp(0, 1)
                if drawn.flip[place]:
                    seen = seen.flip(2)
                top, left, pad = int(drawn.top[place]), int(drawn.left[place]), drawn.pad
                seen = F.pad(seen, (pad, pad, pad, pad))[:, top : top + x.shape[2], left : left + x.shape[3]]
                disturbed = (seen + disturbance[place]).clamp(0, 1)
                seen = seen + (disturbed - seen).detach()  # the gradient passes straight through
                total = total + F.cross_entropy(model(seen[None]), labels[image : image + 1])
            (gradient,) = torch.autograd.grad(total, delta)
            if grey[image]:
                gradient = gradient.sum(0, keepdim=True).expand_as(gradient)
            updated.append((noise[image] - step_size * gradient.sign()).clamp(-epsilon, epsilon))
        noise = torch.stack(updated)
    return noise


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("architecture", ["resnet8-w4", "vgg11-w4"])
def test_one_folded_batch_is_one_image_and_view_at_a_time(architecture: str, draws: int) -> None:
    random = torch.Generator().manual_seed(0)
    count, size, steps, epsilon = 4, (8, 8), 3, 8 / 255
    model = create_model(architecture, classes=3, size=size, seed=1).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics that folding must not ignore
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(generator=random)
            module.running_var.uniform_(0.5, 2, generator=random)
    model.eval()
    x = torch.rand(count, 3, *size, dtype=torch.float64, generator=random)
    x[0, :, :3] = 0  # where the clip is active
    grey = torch.tensor([True, False, False, True])
    x[grey] = x[grey, :1].expand(-1, 3, -1, -1)
    labels = torch.randint(0, 3, (count,), generator=random)
    start = (torch.rand(count, 3, *size, dtype=torch.float64, generator=random) * 2 - 1) * epsilon
    start[grey] = start[grey, :1].expand(-1, 3, -1, -1)
    views = [FlipCrop(2).draw(draws * count, size, random) for _ in range(steps)]
    disturbances = [
        (torch.rand(draws * count, 3, *size, dtype=torch.float64, generator=random) * 2 - 1) * 4 / 255
        for _ in range(steps)
    ]
    assert all(isinstance(one, _FlipCropViews) for one in views)
    remaining = iter(disturbances)
    got = minimise(
        model,
        Batch(x, labels, grey),
        start,
        epsilon=epsilon,
        step_size=1.6 / 255,
        steps=steps,
        augmentation=Recorded(views),  # type: ignore[arg-type]
        views=draws,
        disturb=lambda seen, y, generator: (seen + next(remaining)).clamp(0, 1),
        generator=random,
        runtime=Runtime(device=torch.device("cpu"), precision="float32"),
    )
    expected = slowly(
        model,
        x,
        labels,
        start,
        views,  # type: ignore[arg-type]
        disturbances,
        draws=draws,
        grey=grey,
        epsilon=epsilon,
        step_size=1.6 / 255,
    )
    torch.testing.assert_close(got, expected)


def test_the_loss_falls(runtime: Runtime) -> None:
    random = torch.Generator().manual_seed(0)
    model = create_model("resnet8-w8", classes=4, size=(16, 16)).eval()
    x = torch.rand(8, 3, 16, 16, generator=random)
    labels = torch.arange(8) % 4
    epsilon = 8 / 255
    noise = minimise(
        model,
        Batch(x, labels, torch.zeros(8, dtype=torch.bool)),
        uniform(x, epsilon, random),
        epsilon=epsilon,
        step_size=epsilon / 5,
        steps=10,
        augmentation=FlipCrop(2),
        views=2,
        generator=random,
        runtime=runtime,
    )
    assert float(noise.abs().max()) <= epsilon * (1 + 1e-6)
    for views in (None, FlipCrop(2).draw(8, (16, 16), random)):
        before, after = (
            (x, (x + noise).clamp(0, 1))
            if views is None
            else (views.apply(x), views.apply((x + noise).clamp(0, 1)))
        )
        assert F.cross_entropy(model(after), labels) < F.cross_entropy(model(before), labels)


def test_descents_stay_in_the_directions_they_are_confined_to(runtime: Runtime) -> None:
    random = torch.Generator().manual_seed(0)
    allowed = torch.rand(1, 3, 8, 8, generator=random) < 0.5
    x = torch.rand(2, 3, 8, 8, generator=random) / 2 + 0.25
    noise = minimise(
        create_model("cnn-w4", classes=2, size=(8, 8)).eval(),
        Batch(x, torch.tensor([0, 1]), torch.tensor([True, False])),
        torch.zeros_like(x),
        epsilon=0.1,
        step_size=0.05,
        steps=1,
        confine=lambda gradient: gradient * allowed,
        generator=random,
        runtime=runtime,
    )
    assert torch.equal(noise != 0, allowed.expand_as(noise))


def test_the_start_is_left_alone(runtime: Runtime) -> None:
    model = create_model("cnn-w4", classes=2, size=(8, 8)).eval()
    start = torch.zeros(2, 3, 8, 8)
    minimise(
        model,
        Batch(torch.rand(2, 3, 8, 8), torch.tensor([0, 1]), torch.zeros(2, dtype=torch.bool)),
        start,
        epsilon=0.1,
        step_size=0.05,
        steps=2,
        generator=torch.Generator(),
        runtime=runtime,
    )
    assert not start.any()


def test_stored_noise_loses_at_most_half_a_step() -> None:
    epsilon = 8 / 255
    noise = (torch.rand(1000) * 2 - 1) * epsilon
    stored = pack(noise, epsilon)
    assert stored.dtype == torch.int8
    assert float((unpack(stored, epsilon) - noise).abs().max()) <= epsilon / 254 * (1 + 1e-5)
    assert math.isclose(float(unpack(pack(torch.tensor([epsilon]), epsilon), epsilon)), epsilon, rel_tol=1e-6)
