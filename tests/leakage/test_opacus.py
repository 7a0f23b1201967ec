"""Records of steps that Opacus took."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tests.leakage.victims import SMALL, blocks
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from privet.errors import UsageError
from privet.leakage import GRNN
from privet.leakage.opacus import record_steps
from privet.learning import Runtime, Treatment, Update
from privet.models import create_model

pytest.importorskip("opacus", reason="the extra 'opacus' is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def steps(
    noise: float, norm: float, *, batch: int = 3, count: int = 1, reduction: str = "mean"
) -> tuple[nn.Module, list[Update], Tensor, Tensor]:
    """Train privately; return the network, the records, and the images and labels of all steps."""
    from opacus import PrivacyEngine

    images = blocks(12)
    x, labels = images.pixels[: batch * count].float() / 255, images.labels[: batch * count]
    model = create_model(SMALL, classes=3, size=(16, 16), seed=1)
    private, optimizer, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), 0.1),
        data_loader=DataLoader(TensorDataset(x, labels), batch_size=batch),
        noise_multiplier=noise,
        max_grad_norm=norm,
        poisson_sampling=False,
        loss_reduction=reduction,
    )
    found: list[Update] = []
    record_steps(private, optimizer, found.append, architecture=SMALL, classes=3, size=(16, 16))
    for some, theirs in loader:
        optimizer.zero_grad()
        F.cross_entropy(private(some), theirs, reduction=reduction).backward()
        optimizer.step()
    return private, found, x, labels


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_record_holds_the_mean_of_the_clipped_gradients(reduction: str) -> None:
    _, (update,), x, labels = steps(0.0, 0.5, reduction=reduction)
    model = create_model(SMALL, classes=3, size=(16, 16), seed=1)
    expected = [torch.zeros_like(one) for one in model.parameters()]
    for image, label in zip(x, labels, strict=True):
        slopes = torch.autograd.grad(
            F.cross_entropy(model(image[None]), label[None]), list(model.parameters())
        )
        norm = float(torch.cat([one.flatten() for one in slopes]).norm())
        assert norm > 0.5
        expected = [total + one * (0.5 / norm) / 3 for total, one in zip(expected, slopes, strict=True)]
    for (name, weight), value in zip(model.named_parameters(), expected, strict=True):
        name = name.removeprefix("network.")
        torch.testing.assert_close(update.values[name], value, atol=1e-5, rtol=1e-4)
        assert torch.equal(update.weights[name], weight)  # before the step
    assert update.treatment == Treatment(clip=0.5)
    assert update.batch_size == 3


def test_the_record_says_how_much_noise_there_is() -> None:
    _, (noisy,), _, _ = steps(2.0, 1e-6)
    assert noisy.treatment == Treatment(clip=1e-6, noise="gaussian", noise_scale=2.0 * 1e-6 / 3)
    values = torch.cat([value.flatten() for value in noisy.values.values()])
    assert float(values.std()) == pytest.approx(noisy.treatment.noise_scale, rel=0.1)


def test_every_step_is_recorded_and_can_be_attacked(runtime: Runtime) -> None:
    model, found, _, labels = steps(1e-4, 100.0, batch=1, count=2)
    assert len(found) == 2
    assert not torch.equal(found[0].weights["fc.weight"], found[1].weights["fc.weight"])
    after = {name.removeprefix("_module.network."): one for name, one in model.named_parameters()}
    assert not torch.equal(found[1].weights["fc.weight"], after["fc.weight"])
    for update, label in zip(found, labels.tolist(), strict=True):
        (result,) = GRNN(steps=60, polish=0).invert([update], runtime=runtime)
        assert result.labels.tolist() == [label]
        assert result.distance < 0.1


def test_steps_without_images_are_not_recorded() -> None:
    """Poisson sampling draws nobody now and then; the training goes on, and such a step is noise alone."""
    from opacus import PrivacyEngine

    images = blocks(12)
    model = create_model(SMALL, classes=3, size=(16, 16), seed=1)
    torch.manual_seed(0)
    private, optimizer, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), 0.1),
        data_loader=DataLoader(TensorDataset(images.pixels.float() / 255, images.labels), batch_size=1),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    found: list[Update] = []
    record_steps(private, optimizer, found.append, architecture=SMALL, classes=3, size=(16, 16))
    sizes = []
    for some, theirs in loader:
        optimizer.zero_grad()
        F.cross_entropy(private(some), theirs).backward()
        optimizer.step()
        sizes.append(len(some))
    assert 0 in sizes
    assert [one.batch_size for one in found] == [size for size in sizes if size]


def test_batches_in_pieces_are_refused() -> None:
    class Pieces:
        accumulated_iterations = 2

        def attach_step_hook(self, hook: Callable[[object], None]) -> None:
            hook(self)

    with pytest.raises(UsageError, match="came in 2 pieces"):
        record_steps(nn.Linear(1, 1), Pieces(), print)
