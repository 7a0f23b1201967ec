"""D-VAE: what a rate-limited autoencoder does not bother to keep, and a class explains, is the noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from privet.errors import UsageError
from privet.images.image_set import ImageSet
from privet.learning.attack import frozen
from privet.learning.checkpoint import load_checkpoint, save_checkpoint
from privet.learning.chunks import CHUNK, Change
from privet.learning.job import Job
from privet.models.blocks import conv3x3, relu
from privet.models.resnet import BasicBlock
from privet.recovery.base import ImageRecovery
from privet.seeds import derive

PLACES = 16  # the largest side of what the network knows of each class; larger images stretch it
SMALL = 0.002  # mean square of the noise, with values in [0, 1], below which it costs nothing


@dataclass(frozen=True)
class DVAE(ImageRecovery):
    """Disentangling variational autoencoder (Yu et al., ICML 2024, arXiv 2405.01460).

    An autoencoder whose latent may carry but little information per place leaves out of its
    reconstruction r what is hard to predict from the rest of an image. A second decoder makes noise p
    of the latent and of something learned for each class, so that together they give the image:

        |r - x|² + |clip(r + p) - x|² + `weight` max(KL, rate) [+ max(|p|², 0.002)]

    each a mean, KL in nats for each place of the latent, the last term after a sixth of the epochs. What helps
    to tell an image from its latent, once the class is known, is the shortcut: p is subtracted. A
    second network, allowed a higher rate, does the same with what is left, and its reconstruction of the
    result is the recovered image.

    Deviations: what is learned for each class has at most 16 x 16 places, as at 32 px, and is
    stretched for larger images; pixels are rounded, not cut off; the learning rate falls with every step,
    not with every epoch. The authors' classifier, which only watched, is left out.

    Attributes:
        width: channels of the first convolution. 64 is published and wants a GPU; 16 takes an
            eighth of the time on a processor.
        epochs: of each of the two networks, by Adam; the learning rate falls to zero as a cosine.
        batch_size: images a step.
        learning_rate: of the first step.
        rates: what the two latents may carry for free, in nats a place.
        weight: of what they carry beyond.
    """

    width: int = 64
    epochs: int = 60
    batch_size: int = 128
    learning_rate: float = 5e-3
    rates: tuple[float, float] = (1.0, 3.0)
    weight: float = 0.01

    def __post_init__(self) -> None:
        if min(self.width, self.epochs, self.batch_size) < 1:
            raise UsageError(
                f"D-VAE needs a width, epochs and a batch of at least 1; got {self.width}, {self.epochs} and "
                f"{self.batch_size}."
            )

    @property
    def name(self) -> str:
        return "dvae" if self.width == DVAE.width else f"dvae-{self.width}"

    def _change(self, images: ImageSet, job: Job) -> Change:
        first = self._train(images, job, 0)
        pixels = torch.empty_like(images.pixels)
        for chunk, start in enumerate(range(0, len(images), CHUNK)):
            index = torch.arange(start, min(start + CHUNK, len(images)))
            pixels[index] = to_pixels(
                subtract(first, images, index, job.random("subtract", chunk), job)
            ).cpu()
        once = images.with_pixels(pixels)
        second = self._train(once, job, 1)

        def change(index: Tensor, randomness: torch.Generator) -> Tensor:
            x = subtract(second, once, index, randomness, job)
            labels = once.labels[index].to(x.device)
            with torch.no_grad(), frozen(second), job.runtime.autocast():
                reconstruction, _, _ = second(x, labels, randomness)
            return to_pixels(reconstruction)

        return change

    def _train(self, images: ImageSet, job: Job, round_: int) -> nn.Module:
        """Run the steps that are left of a round's network."""
        runtime = job.runtime
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(job.seed, "autoencoder", round_))
            model = runtime.place(Autoencoder(images.classes, images.size, self.width))
        optimizer = torch.optim.Adam(model.parameters(), self.learning_rate)
        path, first = job.file(f"autoencoder-{round_}.safetensors"), 0
        if path and (state := load_checkpoint(path, model=model, optimizer=optimizer)):
            first = int(state[1]["step"])
        trained = runtime.distribute(model)
        pixels, labels = runtime.hold(images.pixels), runtime.hold(images.labels)
        size = min(self.batch_size, len(images))
        total = self.epochs * (len(images) // size)
        for step in range(first, total):
            index = runtime.share(job.batch(step, round_, count=len(images), size=size))
            x = runtime.take(pixels, index).float() / 255
            draws = job.random("latent", round_, step, runtime.rank)
            trained.train()
            with runtime.autocast():
                reconstruction, noise, rate = trained(x, runtime.take(labels, index), draws)
            loss = self._loss(x, reconstruction, noise, rate, free=self.rates[round_], late=6 * step >= total)
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate * (1 + math.cos(math.pi * step / total)) / 2
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(trained.parameters(), 5.0)
            optimizer.step()
            done = round_ * total + step + 1
            job.progress("training the autoencoder", done * size, len(self.rates) * total * size)
            if path is not None and job.checkpoint_due(step + 1 == total):
                save_checkpoint(path, model=model, optimizer=optimizer, record={"step": step + 1})
        runtime.agree(model)
        return model

    def _loss(
        self, x: Tensor, reconstruction: Tensor, noise: Tensor, rate: Tensor, *, free: float, late: bool
    ) -> Tensor:
        """Return what a network is trained to make small.

        Args:
            x: the images, values in [0, 1], (batch, 3, height, width).
            reconstruction: r, likewise.
            noise: p, likewise.
            rate: of the latent, in nats a place.
            free: what of it costs nothing.
            late: whether a sixth of the epochs is over.
        """
        loss = F.mse_loss(reconstruction, x) + F.mse_loss((reconstruction + noise).clamp(0, 1), x)
        loss = loss + self.weight * rate.clamp(min=free)
        return loss + noise.square().mean().clamp(min=SMALL) if late else loss


@torch.no_grad()
def subtract(
    model: nn.Module, images: ImageSet, index: Tensor, randomness: torch.Generator, job: Job
) -> Tensor:
    """Return images without the noise that a network sees in them, values in [0, 1]."""
    x = images.pixels[index].to(job.runtime.device).float() / 255
    with frozen(model), job.runtime.autocast():
        _, noise, _ = model(x, images.labels[index].to(x.device), randomness)
    left: Tensor = (x - noise).clamp(0, 1)
    return left


def to_pixels(values: Tensor) -> Tensor:
    """Return values in [0, 1] as uint8."""
    return (values * 255).round().to(torch.uint8)


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence from the standard normal, in nats, as a mean over places.

    Args:
        mean: (batch, channels, height, width).
        log_variance: likewise.
    """
    return (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean() / 2


class Autoencoder(nn.Module):
    """The first third of a ResNet-18 as encoder, and two decoders."""

    def __init__(self, classes: int, size: tuple[int, int], width: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            conv3x3(3, width),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            BasicBlock(width, width, 1, relu),
            BasicBlock(width, width, 1, relu),
            BasicBlock(width, 2 * width, 2, relu),
        )
        self.moments = nn.Conv2d(2 * width, 8 * width, 1)
        self.latent = nn.Conv2d(4 * width, 2 * width, 1)
        self.image, self.noise = _decoder(width), _decoder(width)
        places = [min(PLACES, -(-side // 2)) for side in size]
        self.classes = nn.Parameter(torch.randn(classes, 2 * width, *places))

    def forward(self, x: Tensor, labels: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Return reconstruction, noise and the latent's rate.

        Args:
            x: pixels in [0, 1], (batch, 3, height, width).
            labels: (batch,).
            draws: of the latent, on the same device.
        """
        height, width = x.shape[2:]
        mean, log_variance = self.moments(self.encoder(x)).float().chunk(2, 1)
        normal = torch.randn(mean.shape, generator=draws, device=mean.device)
        latent = self.latent(mean + (log_variance / 2).exp() * normal)
        known = self.classes[labels]
        if known.shape[2:] != latent.shape[2:]:
            known = F.interpolate(known, size=latent.shape[2:], mode="bilinear", align_corners=False)
        reconstruction = self.image(latent).float().sigmoid()
        noise = self.noise(latent + known).float()
        return (
            reconstruction[:, :, :height, :width],
            noise[:, :, :height, :width],
            divergence(mean, log_variance),
        )


def _decoder(width: int) -> nn.Module:
    """Return what makes three channels of twice as many rows and columns."""
    return nn.Sequential(
        nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1),
        nn.ConvTranspose2d(width, width, 3, padding=1),
        nn.InstanceNorm2d(width),
        nn.ReLU(inplace=True),
        nn.ConvTranspose2d(width, max(1, width // 2), 3, padding=1),
        nn.InstanceNorm2d(max(1, width // 2)),
        nn.ReLU(inplace=True),
        nn.ConvTranspose2d(max(1, width // 2), 3, 3, padding=1),
    )
