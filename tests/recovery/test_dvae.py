from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.conftest import blobs

from privet.errors import UsageError
from privet.images import ImageSet
from privet.learning import Job, Runtime
from privet.protection import LSP, OPS
from privet.recovery import DVAE, create_recovery
from privet.recovery.dvae import Autoencoder, divergence


def test_the_rate_is_the_divergence_from_the_standard_normal() -> None:
    draws = torch.Generator().manual_seed(0)
    mean, log_variance = torch.randn(2, 5, 7, 3, 4, generator=draws)
    own = torch.distributions.Normal(mean, (log_variance / 2).exp())
    standard = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    for_each_place = torch.distributions.kl_divergence(own, standard).sum(1)
    torch.testing.assert_close(divergence(mean, log_variance), for_each_place.mean())
    assert divergence(torch.zeros(1, 2, 1, 1), torch.zeros(1, 2, 1, 1)) == 0


@pytest.mark.parametrize("size", [(8, 8), (9, 13), (40, 36)])
def test_the_network_keeps_the_size_and_the_class_moves_the_noise_alone(size: tuple[int, int]) -> None:
    model = Autoencoder(3, size, 4).eval().requires_grad_(False)
    x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1])
    one, noise, rate = model(x, labels, torch.Generator().manual_seed(1))
    other, moved, again = model(x, labels.flip(0), torch.Generator().manual_seed(1))
    assert one.shape == noise.shape == x.shape
    assert 0 <= float(one.min()) <= float(one.max()) <= 1
    assert torch.equal(one, other)
    torch.testing.assert_close(rate, again)
    assert not torch.allclose(noise, moved)
    assert model.classes.shape[2:] == tuple(min(16, -(-side // 2)) for side in size)


@pytest.mark.parametrize("method", [OPS(), LSP(epsilon=3.0, patch=4)], ids=["ops", "lsp"])
def test_class_wise_noise_is_subtracted(method: OPS | LSP, runtime: Runtime) -> None:
    draws = torch.Generator().manual_seed(0)
    coarse = torch.randint(60, 190, (600, 3, 2, 2), generator=draws).float()
    clean = F.interpolate(coarse, size=(8, 8), mode="bilinear").round()
    images = ImageSet.from_arrays(clean.to(torch.uint8), torch.arange(600) % 4)
    protected = method.protect(images, Job(runtime=runtime))

    def shortcut(some: ImageSet) -> float:
        """Return how far the classes' mean changes lie apart."""
        change = some.pixels.float() - clean
        means = torch.stack([change[some.labels == label].mean(0) for label in range(4)])
        return float((means - means.mean(0)).square().sum().sqrt())

    recovered = DVAE(width=8, epochs=8, batch_size=32).recover(protected, Job(runtime=runtime))
    assert shortcut(recovered) < 0.4 * shortcut(protected)
    similar = F.cosine_similarity(recovered.pixels.float().flatten(1) - 125, clean.flatten(1) - 125)
    assert float(similar.mean()) > 0.2  # what people see is on its way, after 150 steps


def test_the_loss_is_the_papers() -> None:
    draws = torch.Generator().manual_seed(0)
    x, reconstruction = torch.rand(2, 2, 3, 4, 5, generator=draws)
    noise = 0.2 * torch.randn(2, 3, 4, 5, generator=draws)
    method = DVAE(weight=0.3)
    together = np.clip(reconstruction.numpy() + noise.numpy(), 0, 1)
    errors = np.mean((reconstruction - x).numpy() ** 2) + np.mean((together - x.numpy()) ** 2)
    large, small = float((noise**2).mean()), torch.full_like(noise, 0.04)
    assert large > 0.002 > float((small**2).mean())
    for rate, free, carried in ((2.0, 1.5, 2.0), (1.0, 1.5, 1.5)):
        for late, penalty in ((False, 0.0), (True, large)):
            found = method._loss(x, reconstruction, noise, torch.tensor(rate), free=free, late=late)
            assert float(found) == pytest.approx(errors + 0.3 * carried + penalty, rel=1e-5)
    unpunished, punished = (
        method._loss(x, x, small, torch.tensor(0.0), free=0.0, late=late) for late in (False, True)
    )
    assert float(punished - unpunished) == pytest.approx(0.002, rel=1e-3)


def test_both_networks_are_trained_by_it(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[float, bool]] = []
    plain: Any = DVAE._loss

    def spy(self: DVAE, *given: Any, free: float, late: bool) -> Any:
        asked.append((free, late))
        return plain(self, *given, free=free, late=late)

    monkeypatch.setattr(DVAE, "_loss", spy)
    DVAE(width=4, epochs=6, batch_size=4, rates=(0.5, 2.5)).recover(blobs(8), Job(runtime=runtime))
    each = 2 * [False] + 10 * [True]  # two steps an epoch
    assert asked == [(free, late) for free in (0.5, 2.5) for late in each]


def test_names_and_settings() -> None:
    assert create_recovery("dvae") == DVAE()
    assert create_recovery("dvae-16") == DVAE(width=16)
    assert DVAE(width=16).name == "dvae-16"
    with pytest.raises(
        UsageError, match="D-VAE needs a width, epochs and a batch of at least 1; got 64, 0 and 128"
    ):
        DVAE(epochs=0)


def test_grey_images_and_one_image(runtime: Runtime) -> None:
    grey = DVAE(width=4, epochs=2).recover(blobs(3, grey=True), Job(runtime=runtime)).pixels
    assert torch.equal(grey[:, 0], grey[:, 2])
    assert len(DVAE(width=4, epochs=1).recover(blobs(1), Job(runtime=runtime))) == 1
