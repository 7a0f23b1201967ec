"""Training a prior."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from privet.errors import InputError, UsageError
from privet.files import WORKSPACE, append_line, claim, finish, released, write_bytes, write_json
from privet.images.image_set import ImageSet
from privet.images.montage import montage, png
from privet.learning.checkpoint import load_checkpoint, save_checkpoint
from privet.learning.job import Job
from privet.learning.runtime import Runtime, describe_device
from privet.progress import Progress, silent
from privet.recovery.diffusion import ImageNoise, renoise, to_pixels, to_unit
from privet.recovery.prior import (
    ABOUT,
    CONFIG,
    RANGE,
    WEIGHTS,
    Prior,
    diffusers_library,
    fingerprints,
    kept_shares,
    load_prior,
    predict_noise,
)
from privet.seeds import derive, generator
from privet.version import VERSION

SCHEDULE = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_train_timesteps": 1000}
LARGE = 64  # images with a longer side are learned in crops of this side
LEVELS = (20, 60, 120, 200)  # of the denoising examples

# No attention but in the published network, so that a prior works at every size. Few groups in the smallest: with one
# channel each a group norm forgets how bright a channel is, and processors take twice as long for it.
SCALES: dict[str, dict[str, Any]] = {
    "tiny": {"block_out_channels": [16, 32, 64], "layers_per_block": 1, "norm_num_groups": 4},
    "small": {"block_out_channels": [64, 128, 128], "layers_per_block": 2},
    "ddpm": {
        "block_out_channels": [128, 256, 256, 256],
        "layers_per_block": 2,
        "attention_level": 1,
        "dropout": 0.1,
    },
}


@dataclass(frozen=True, kw_only=True)
class PriorTraining:
    """How a prior is trained (Ho et al., arXiv 2006.11239, on its least noisy times).

    Attributes:
        scale: "tiny" (0.6 million weights, for processors), "small" (6 million) or "ddpm" (36 million,
            the published network).
        steps: of the optimiser.
        batch_size: images a step.
        learning_rate: of AdamW.
        max_t: only times below are trained, of 1,000. A recovery never starts later, and what the network does
            not have to learn it cannot learn badly (Bhat et al., arXiv 2405.18627).
        decay: of the average of the weights that is kept in the end.
        flip: whether images are mirrored; no for handwriting.
    """

    scale: str = "small"
    steps: int = 20_000
    batch_size: int = 128
    learning_rate: float = 2e-4
    max_t: int = 250
    decay: float = 0.999
    flip: bool = True

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise UsageError(f"Unknown scale {self.scale!r}; expected one of {', '.join(SCALES)}.")
        if not 0 < self.learning_rate < math.inf:
            raise UsageError(f"A prior needs a positive learning rate, got {self.learning_rate}.")
        if min(self.steps, self.batch_size) < 1 or not 1 <= self.max_t <= 1000 or not 0 < self.decay < 1:
            raise UsageError(
                f"A prior needs at least 1 step and 1 image a step, times from 1 to 1000 and a decay below 1; got "
                f"{self.steps}, {self.batch_size}, {self.max_t} and {self.decay}."
            )


def train_prior(
    images: ImageSet,
    training: PriorTraining,
    out: Path,
    *,
    runtime: Runtime,
    seed: int = 0,
    checkpoint_seconds: float = 60.0,
    progress: Progress = silent,
) -> Prior:
    """Train a prior on unprotected images and write it to `out`, in diffusers' layout.

    The folder gets the network, its schedule, prior.json, the hashes of the training images (so that
    an audit can tell whether the prior has seen what it is asked to recover), the loss as it went,
    and a picture of what it makes of noisy images. A killed training goes on there.

    Raises:
        InputError: no image.
        PrivetError: as `claim`.
    """
    if len(images) == 0:
        raise InputError("There is no image to learn from.")
    side = min(max(images.size), LARGE)
    run: dict[str, Any] = {
        "privet": VERSION,
        "training": asdict(training),
        "seed": seed,
        "data": images.digest,
        "images": len(images),
        "size": list(images.size),
        "crop": side,
        "precision": runtime.precision,
        "compile": runtime.compile,
        "device": describe_device(runtime.device, torch.get_num_threads(), runtime.world),
        "torch": torch.__version__,
    }
    if runtime.told(runtime.rank == 0 and claim(out, run) and (out / ABOUT).is_file()):
        return load_prior(out, runtime=runtime)
    job = Job(
        runtime=runtime,
        seed=seed,
        workspace=out / WORKSPACE,
        checkpoint_seconds=checkpoint_seconds,
        progress=progress,
    )
    with released(out):
        model = _train(images, training, job, side).eval().requires_grad_(False)
    about = {
        **run,
        "max_t": training.max_t,
        "range": RANGE,
        "parameters": sum(weight.numel() for weight in model.parameters()),
    }
    prior = Prior(
        model=model,
        kept=kept_shares(SCHEDULE),
        max_t=training.max_t,
        about=about,
        images=frozenset().union(*fingerprints(images)),
    )
    loss = noise_error(prior, images, job)
    prior = replace(prior, about={**about, "loss": loss})
    if runtime.rank == 0:
        _write(prior, out)
        write_bytes(out / "denoised.png", png(examples(prior, images, job)))
        finish(out, run, {"loss": loss})
    return prior


def examples(prior: Prior, images: ImageSet, job: Job) -> Any:
    """Return a picture: images, and for each level the noisy image and what the prior makes of it."""
    shown = images.pixels[:6]
    x = to_unit(shown, job.runtime.device)
    noise = ImageNoise(shown, job.seed, job.runtime.device)
    columns = [shown]
    for time in (level for level in LEVELS if level < prior.max_t):
        noisy = renoise(x, noise(), float(prior.kept[time]))
        columns += [to_pixels(noisy).cpu(), to_pixels(prior.clean(noisy, time, runtime=job.runtime)).cpu()]
    return montage(list(zip(*columns, strict=True)))


def _train(images: ImageSet, training: PriorTraining, job: Job, side: int) -> nn.Module:
    """Run the steps that are left; return the averaged network."""
    from diffusers.training_utils import EMAModel

    runtime = job.runtime
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(job.seed, "prior"))
        model = runtime.place(_unet(training.scale, side))
    gpu = runtime.device.type == "cuda"  # where a loop over all weights waits for each
    average = EMAModel(model.parameters(), decay=training.decay, use_ema_warmup=True, power=0.75, foreach=gpu)
    optimizer = torch.optim.AdamW(model.parameters(), training.learning_rate, weight_decay=0.0)
    kept = kept_shares(SCHEDULE).to(runtime.device)
    path, first = job.file("prior-checkpoint.safetensors"), 0
    journal = job.file("loss.jsonl")
    assert path is not None and journal is not None
    if state := load_checkpoint(path, model=model, optimizer=optimizer):
        first = average.optimization_step = int(state[1]["step"])
        for number, shadow in enumerate(average.shadow_params):
            shadow.copy_(state[0][f"average/{number}"])
    trained, levels = runtime.distribute(model), len(SCALES[training.scale]["block_out_channels"])
    held = runtime.hold(images.pixels)
    size = min(training.batch_size, len(images))
    total, seen = torch.zeros((), device=runtime.device), 0
    for step in range(first, training.steps):
        index = runtime.share(job.batch(step, count=len(images), size=size))
        draws = job.random("step", step, runtime.rank)
        x = to_unit(_crop(runtime.take(held, index), side, draws), runtime.device)
        if training.flip:
            mirrored = torch.rand(len(x), 1, 1, 1, generator=draws, device=draws.device) < 0.5
            x = torch.where(mirrored, x.flip(3), x)
        time = torch.randint(0, training.max_t, (len(x),), generator=draws, device=draws.device)
        noise = torch.randn(x.shape, generator=draws, device=draws.device)
        share = kept[time].view(-1, 1, 1, 1)
        trained.train()
        # The largest network drops values at random, out of torch's own numbers.
        with runtime.drawing(derive(job.seed, "network", step, runtime.rank)), runtime.autocast():
            noisy = share.sqrt() * x + (1 - share).sqrt() * noise
            found = predict_noise(trained, noisy, time, levels=levels)
        loss = F.mse_loss(found, noise)
        for group in optimizer.param_groups:
            group["lr"] = training.learning_rate * min(1.0, (step + 1) / 500)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        average.step(model.parameters())
        total, seen = total + loss.detach(), seen + 1
        job.progress("training the prior", (step + 1) * size, training.steps * size)
        last = step + 1 == training.steps
        if job.checkpoint_due(last):
            if not math.isfinite(mean := float(total) / seen):
                raise UsageError(
                    f"The prior's loss is no number any more after {step + 1} steps, so that nothing can come of them: "
                    f"repeat them with a learning rate below {training.learning_rate:g}."
                )
            shadows = {f"average/{number}": value for number, value in enumerate(average.shadow_params)}
            save_checkpoint(
                path, model=model, optimizer=optimizer, tensors=shadows, record={"step": step + 1}
            )
            append_line(journal, {"step": step + 1, "loss": mean})
            total, seen = torch.zeros_like(total), 0
    average.copy_to(model.parameters())
    return model


def noise_error(prior: Prior, images: ImageSet, job: Job) -> float:
    """Return the mean squared error of the noise that a prior predicts, over its own times, on up to 256 images.

    On images like those it was trained on this is `about["loss"]`; on others it is larger.
    """
    index = torch.linspace(0, len(images) - 1, min(256, len(images))).long()
    draws = generator(job.seed, "evaluate")
    errors = []
    parts = torch.split(index, 16)
    for number, part in enumerate(parts):
        time = prior.max_t * (2 * number + 1) // (2 * len(parts))
        x = to_unit(_crop(images.pixels[part], prior.about.get("crop", LARGE), draws), job.runtime.device)
        noise = torch.randn(x.shape, generator=draws).to(x.device)
        found = prior.noise(renoise(x, noise, float(prior.kept[time])), time, runtime=job.runtime)
        errors.append((found - noise).square().mean((1, 2, 3)))
    return float(torch.cat(errors).mean())


def _crop(pixels: Tensor, side: int, draws: torch.Generator) -> Tensor:
    """Return a random square of each image, or the image itself if it is no larger."""
    height, width = pixels.shape[2:]
    if height <= side and width <= side:
        return pixels
    count, tall, wide = len(pixels), min(side, height), min(side, width)
    top = torch.randint(0, height - tall + 1, (count,), generator=draws, device=draws.device)
    left = torch.randint(0, width - wide + 1, (count,), generator=draws, device=draws.device)
    rows = (top.view(-1, 1) + torch.arange(tall, device=draws.device)).view(-1, 1, tall, 1)
    columns = (left.view(-1, 1) + torch.arange(wide, device=draws.device)).view(-1, 1, 1, wide)
    batch = torch.arange(count, device=draws.device).view(-1, 1, 1, 1)
    channel = torch.arange(3, device=draws.device).view(1, 3, 1, 1)
    return pixels.to(draws.device)[batch, channel, rows, columns]


def _unet(scale: str, side: int) -> nn.Module:
    settings = dict(SCALES[scale])
    attention = settings.pop("attention_level", None)
    levels = len(settings["block_out_channels"])
    down = ["AttnDownBlock2D" if level == attention else "DownBlock2D" for level in range(levels)]
    unit = 2 ** (levels - 1)
    network: nn.Module = diffusers_library().UNet2DModel(
        sample_size=-(-side // unit) * unit,
        down_block_types=tuple(down),
        up_block_types=tuple(name.replace("Down", "Up") for name in reversed(down)),
        add_attention=attention is not None,
        **settings,
    )
    return network


def _write(prior: Prior, out: Path) -> None:
    """Write a prior as DDPMPipeline.from_pretrained reads it, with what we know beside it."""
    import safetensors.torch

    # What is diffusers' own is no setting, and holds a set, whose order no two processes agree on.
    settings = {
        name: value for name, value in prior.model.config.items() if name[0] != "_" and _is_json(value)
    }
    write_json(out / "unet" / CONFIG, {"_class_name": "UNet2DModel", **settings})
    state = {name: value.detach().cpu().contiguous() for name, value in prior.model.state_dict().items()}
    write_bytes(out / "unet" / WEIGHTS, safetensors.torch.save(state, {"format": "pt"}))
    write_json(out / "scheduler" / "scheduler_config.json", {"_class_name": "DDPMScheduler", **SCHEDULE})
    index = {
        "_class_name": "DDPMPipeline",
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", "DDPMScheduler"],
    }
    write_json(out / "model_index.json", index)
    write_bytes(out / "images.txt", "".join(f"{one}\n" for one in sorted(prior.images or ())).encode())
    losses = out / WORKSPACE / "loss.jsonl"
    if losses.is_file():
        write_bytes(out / "loss.jsonl", losses.read_bytes())
    write_json(out / ABOUT, prior.about)


def _is_json(value: object) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True
