from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from privet.learning import Runtime, frozen, input_gradient, pgd, uniform
from privet.learning.runtime import use_threads
from privet.models import create_model


def slow_pgd(
    model: nn.Module, x: Tensor, labels: Tensor, *, radius: float, step_size: float, steps: int, start: Tensor
) -> Tensor:
    """The definition, one image at a time, with autograd through the mean loss of one image."""
    results = []
    for image, label, begin in zip(x, labels, start, strict=True):
        adversarial = (image + begin).clamp(0, 1)
        for _ in range(steps):
            adversarial = adversarial.detach().requires_grad_()
            loss = F.cross_entropy(model(adversarial[None]), label[None])
            (gradient,) = torch.autograd.grad(loss, adversarial)
            moved = adversarial + step_size * gradient.sign()
            adversarial = (image + (moved - image).clamp(-radius, radius)).clamp(0, 1)
        results.append(adversarial.detach())
    return torch.stack(results)


@pytest.mark.parametrize("steps", [1, 4])
def test_pgd_is_its_definition(runtime: Runtime, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(0)
    model = create_model("resnet8-w4", classes=3, size=(8, 8)).double().eval()
    x = torch.rand(4, 3, 8, 8, dtype=torch.float64, generator=random)
    x[0] = 0  # the border of the pixel range
    labels = torch.tensor([0, 1, 2, 0])
    start = (torch.rand(x.shape, dtype=torch.float64, generator=random) - 0.5) * 0.1
    monkeypatch.setattr("privet.learning.attack.uniform", lambda *_: start)
    options = {"radius": 0.05, "step_size": 0.02, "steps": steps}
    got = pgd(model, x, labels, generator=random, runtime=runtime, **options)  # type: ignore[arg-type]
    expected = slow_pgd(model, x, labels, start=start, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(got, expected)


def test_pgd_stays_in_its_ball_and_raises_the_loss(runtime: Runtime) -> None:
    model = create_model("cnn-w4", classes=3, size=(8, 8)).eval()
    x, labels = torch.rand(6, 3, 8, 8), torch.arange(6) % 3
    attacked = pgd(
        model, x, labels, radius=0.1, step_size=0.03, steps=6, generator=torch.Generator(), runtime=runtime
    )
    assert float((attacked - x).abs().max()) <= 0.1 + 1e-6
    assert 0 <= float(attacked.min()) and float(attacked.max()) <= 1
    assert F.cross_entropy(model(attacked), labels) > F.cross_entropy(model(x), labels)
    same = pgd(model, x, labels, radius=0, step_size=1, steps=3, generator=torch.Generator(), runtime=runtime)
    assert same is x


def test_gradients_against_finite_differences(runtime: Runtime) -> None:
    model = create_model("cnn-w4", classes=3, size=(8, 8)).double().eval()
    x, labels = torch.rand(1, 3, 8, 8, dtype=torch.float64), torch.tensor([1])
    gradient = input_gradient(model, x, labels, runtime=runtime)
    model.requires_grad_(False)
    for place in ((0, 0, 0, 0), (0, 1, 4, 5), (0, 2, 7, 7)):
        step = torch.zeros_like(x)
        step[place] = 1e-6
        difference = F.cross_entropy(model(x + step), labels) - F.cross_entropy(model(x - step), labels)
        assert float(gradient[place]) == pytest.approx(float(difference) / 2e-6, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_gradients_do_not_depend_on_the_number_of_threads(precision: str) -> None:
    here = Runtime(device=torch.device("cpu"), precision=precision)
    model = here.place(create_model("resnet8-w8", classes=3, size=(16, 16))).eval()
    x, labels = torch.rand(150, 3, 16, 16), torch.arange(150) % 3
    found = []
    for threads in (1, 2, 3):
        with use_threads(threads):
            found.append(input_gradient(model, x, labels, runtime=here))
            assert torch.get_num_threads() == threads
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    # what stands beside an image in its batch changes its gradient by rounding at most
    alone = input_gradient(model, x[70:71], labels[70:71], runtime=here)
    tolerance = 1e-5 if precision == "float32" else 0.1
    torch.testing.assert_close(
        alone, found[0][70:71], rtol=tolerance, atol=tolerance * float(alone.abs().max())
    )


def test_uniform_fills_its_range() -> None:
    noise = uniform(torch.empty(50, 3, 20, 20), 0.25, torch.Generator().manual_seed(0))
    assert noise.shape == (50, 3, 20, 20)
    assert float(noise.min()) == -0.25
    assert float(noise.max()) == pytest.approx(0.25)
    assert abs(float(noise.mean())) < 0.01
    assert float(noise.std()) == pytest.approx(0.5 / 12**0.5, rel=0.01)
    assert len(noise.unique()) == 256


def test_frozen_gives_the_mode_back() -> None:
    model = nn.BatchNorm1d(2).train()
    with frozen(model):
        assert not model.training
    assert model.training
    with pytest.raises(ZeroDivisionError), frozen(model):
        raise ZeroDivisionError
    assert model.training


def test_bf16_agrees_on_most_signs() -> None:
    model = create_model("resnet8", classes=10, size=(16, 16)).eval()
    x, labels = torch.rand(16, 3, 16, 16), torch.arange(16) % 10
    exact, rough = (
        input_gradient(model, x, labels, runtime=Runtime(device=torch.device("cpu"), precision=precision))
        for precision in ("float32", "bf16")
    )
    assert exact.dtype == rough.dtype == torch.float32
    assert float((exact.sign() == rough.sign()).float().mean()) > 0.9
    large = exact.abs() > exact.abs().median()
    assert float((exact.sign() == rough.sign())[large].float().mean()) > 0.99
