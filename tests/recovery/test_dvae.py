from __future__ import annotations

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
