"""The prior: a diffusion model of what unprotected images look like, which recoveries denoise with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import privet
from privet.errors import InputError, MissingExtraError, UsageError
from privet.files import WORKSPACE, append_line, claim, finish, read_json, sha256, write_bytes, write_json
from privet.images.image_set import ImageSet
from privet.images.montage import montage, png
from privet.learning.checkpoint import load_checkpoint, save_checkpoint
from privet.learning.job import Job
from privet.learning.pieces import in_pieces
from privet.learning.runtime import Runtime, describe_device
from privet.progress import Progress, silent
from privet.recovery.base import ImageRecovery
from privet.seeds import derive, generator

ABOUT, CONFIG, WEIGHTS = "prior.json", "config.json", "diffusion_pytorch_model.safetensors"
SCHEDULE = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "num_train_timesteps": 1000}
RANGE = [-1.0, 1.0]
LARGE = 64  # images with a longer side are learned in crops of this side
LEVELS = (20, 60, 120, 200)  # of the denoising examples

# No attention but in the published network, so that a prior works at every size.
SCALES: dict[str, dict[str, Any]] = {
    "tiny": {"block_out_channels": [32, 32, 64], "layers_per_block": 1},
    "small": {"block_out_channels": [64, 128, 128], "layers_per_block": 2},
    "ddpm": {
        "block_out_channels": [128, 256, 256, 256],
        "layers_per_block": 2,
        "attention_level": 1,
        "dropout": 0.1,
    },
}


@dataclass(frozen=True, kw_only=True)
class Prior:
    """A trained noise predictor.

    Attributes:
        model: a UNet2DModel, frozen; takes values in [-1, 1] and the time, and returns the noise.
        kept: share of the signal's variance that is left at each time, (times,); "alpha bar".
        max_t: times from here on were never trained.
        about: what is known of its training: scale, steps, data, size.
        images: SHA-256 (first 16 digits) of each training image's pixels, or None if unknown.
    """

    model: Any = field(repr=False)
    kept: Tensor = field(repr=False)
    max_t: int
    about: Mapping[str, Any]
    images: frozenset[str] | None = field(default=None, repr=False)

    @torch.no_grad()
    def clean(self, noisy: Tensor, time: int, *, runtime: Runtime) -> Tensor:
        """Return the image that the prior sees behind a noisy one: one evaluation of the network.

        Args:
            noisy: sqrt(kept) image + sqrt(1 - kept) noise, (batch, 3, height, width).
            time: how noisy.
            runtime: gives the precision.

        Returns:
            The image, clipped to [-1, 1].
        """
        kept = float(self.kept[time])
        noise = self.noise(noisy, time, runtime=runtime)
        clean: Tensor = ((noisy - (1 - kept) ** 0.5 * noise) / kept**0.5).clamp_(-1, 1)
        return clean

    @torch.no_grad()
    def noise(self, noisy: Tensor, time: int, *, runtime: Runtime) -> Tensor:
        """Return the noise that the prior sees in an image."""
        height, width = noisy.shape[2:]
        unit = 2 ** (len(self.model.config.block_out_channels) - 1)
        padding = (0, -width % unit, 0, -height % unit)

        def predict(piece: Tensor) -> Tensor:
            padded = F.pad(piece, padding, mode="replicate") if any(padding) else piece
            with runtime.autocast():
                found: Tensor = self.model(padded, time).sample
            return found[:, :, :height, :width].float()

        return in_pieces(predict, noisy, size=16)

    def check(self, size: tuple[int, int], time: int) -> None:
        """Refuse images or times that the prior was not made for.

        Raises:
            UsageError: a time that it never saw.
            InputError: a network with attention, and images of another size than its own.
        """
        if not 0 < time < self.max_t:
            raise UsageError(
                f"This prior was trained for times below {self.max_t}, and is asked for {time}. Lower the level, or "
                f"train a prior with --max-t {time + 1}."
            )
        config = self.model.config
        attends = any("Attn" in block for block in (*config.down_block_types, *config.up_block_types))
        own = config.sample_size
        if attends and own is not None and size != (own, own):
            raise InputError(
                f"This prior has attention and knows images of {own} x {own} pixels only; these are {size[0]} x "
                f"{size[1]}. Open them with --size {own}, or train a prior without attention (tiny, small)."
            )


def load_prior(source: str | Path, *, runtime: Runtime) -> Prior:
    """Open a prior: a folder that `train_prior` or diffusers wrote, or a model of the hub.

    Only safetensors and JSON are read.

    Raises:
        InputError: it is absent, damaged, or not an unconditional noise predictor on [-1, 1].
        MissingExtraError: diffusers is not installed.
    """
    network, folder = locate(source)
    schedules = [
        path
        for path in (folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json")
        if path.is_file()
    ]
    if not schedules:
        raise InputError(f"{folder} has no scheduler_config.json, so its noise schedule is unknown.")
    about = read_json(folder / ABOUT) if (folder / ABOUT).is_file() else {}
    if about.get("range", RANGE) != RANGE:
        raise InputError(f"{folder} works on values in {about['range']}; expected {RANGE}.")
    kept = _schedule(read_json(schedules[0]), folder)
    model = _network(network)
    images = None
    if (listing := folder / "images.txt").is_file():
        images = frozenset(listing.read_text("ascii").split())
    return Prior(
        model=runtime.place(model.eval().requires_grad_(False)),
        kept=kept,
        max_t=int(about.get("max_t", len(kept))),
        about=about,
        images=images,
    )


def locate(source: str | Path) -> tuple[Path, Path]:
    """Return where the network of a prior lies, and the folder of the prior; a hub model is downloaded.

    Raises:
        InputError: there is no prior.
    """
    folder = Path(source)
    if not folder.exists():
        folder = _download(str(source))
    network = folder / "unet" if (folder / "unet" / CONFIG).is_file() else folder
    if not (network / CONFIG).is_file() or not (network / WEIGHTS).is_file():
        raise InputError(
            f"{folder} holds no prior: expected {CONFIG} and {WEIGHTS}, there or in 'unet'. Train one with "
            "'privet prior train'."
        )
    return network, folder


@dataclass(frozen=True, kw_only=True)
class PriorTraining:
    """How a prior is trained (Ho et al., arXiv 2006.11239, on its least noisy times).

    Attributes:
        scale: "tiny" (0.7 million weights, for processors), "small" (6 million) or "ddpm" (36 million,
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
        "privet": privet.__version__,
        "training": asdict(training),
        "seed": seed,
        "data": images.digest,
        "images": len(images),
        "size": list(images.size),
        "crop": side,
        "precision": runtime.precision,
        "device": describe_device(runtime.device, torch.get_num_threads()),
        "torch": torch.__version__,
    }
    finished = runtime.rank == 0 and claim(out, run)
    runtime.wait()
    if finished and (out / ABOUT).is_file() and runtime.world == 1:
        return load_prior(out, runtime=runtime)
    job = Job(
        runtime=runtime,
        seed=seed,
        workspace=out / WORKSPACE,
        checkpoint_seconds=checkpoint_seconds,
        progress=progress,
    )
    model, loss = _train(images, training, job, side)
    about = {
        **run,
        "max_t": training.max_t,
        "range": RANGE,
        "loss": loss,
        "parameters": sum(weight.numel() for weight in model.parameters()),
    }
    prior = Prior(
        model=model.eval().requires_grad_(False),
        kept=_kept(SCHEDULE),
        max_t=training.max_t,
        about=about,
        images=fingerprints(images),
    )
    if runtime.rank == 0:
        _write(prior, out)
        write_bytes(out / "denoised.png", png(examples(prior, images, job)))
        finish(out, run, {"loss": loss})
    return prior


def fingerprints(images: ImageSet) -> frozenset[str]:
    """Return a short hash of each image's pixels, by which two sets can be compared."""
    rows = (image.permute(1, 2, 0).contiguous().numpy().tobytes() for image in images.pixels)
    return frozenset(hashlib.sha256(row).hexdigest()[:16] for row in rows)


def fingerprint(source: str | Path) -> str:
    """Return the hash of a prior's weights, which tells priors apart wherever they lie."""
    return sha256((locate(source)[0] / WEIGHTS).read_bytes())


def renoise(clean: Tensor, noise: Tensor, kept: float) -> Tensor:
    """Return the noisy image of which `kept` is left."""
    noisy: Tensor = kept**0.5 * clean + (1 - kept) ** 0.5 * noise
    return noisy


@dataclass(frozen=True)
class DiffusionRecovery(ImageRecovery):
    """A recovery that denoises with a prior.

    Attributes:
        prior: a folder or a model of the hub, for `load_prior`.
    """

    prior: str

    def record(self) -> dict[str, Any]:
        """Return what the bytes depend on: the prior by the hash of its weights, wherever it lies."""
        return {"recovery": self.name, "settings": {**asdict(self), "prior": fingerprint(self.prior)}}

    def _open(self, images: ImageSet, times: Sequence[int], job: Job, *, evaluations: int) -> Prior:
        """Load the prior, and check that it can do what will be asked of it."""
        prior = load_prior(self.prior, runtime=job.runtime)
        for time in times:
            prior.check(images.size, time)
        job.facts.update(evaluations=evaluations)
        return prior


Guide = Callable[[Tensor, int], Tensor]
"""Maps a noisy image and its time to a shift of the next, less noisy one."""


def walk_back(
    prior: Prior,
    noisy: Tensor,
    time: int,
    *,
    noise: Callable[[], Tensor],
    runtime: Runtime,
    guide: Guide | None = None,
) -> Tensor:
    """Return what ancestral sampling makes of images noised up to `time`: one evaluation for each time.

    Ho et al., arXiv 2006.11239, algorithm 2, with the larger of their variances, beta.
    """
    for now in range(time - 1, -1, -1):
        kept, before = float(prior.kept[now]), float(prior.kept[now - 1]) if now else 1.0
        beta = 1 - kept / before
        clean = prior.clean(noisy, now, runtime=runtime)
        mean = (before**0.5 * beta * clean + (kept / before) ** 0.5 * (1 - before) * noisy) / (1 - kept)
        if guide is not None:
            mean = mean + beta * guide(noisy, now)
        noisy = mean + beta**0.5 * noise() if now else mean
    return noisy


class ImageNoise:
    """Normal noise for each image that depends on its pixels alone, not on what is recovered beside it."""

    def __init__(self, pixels: Tensor, seed: int, device: torch.device) -> None:
        self.shape, self.device = pixels.shape[1:], device
        self.draws = [
            generator(seed, "image", hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest())
            for image in pixels.permute(0, 2, 3, 1)
        ]

    def __call__(self) -> Tensor:
        """Return the next noise, (batch, 3, height, width)."""
        drawn = [torch.randn(self.shape, generator=draw) for draw in self.draws]
        return torch.stack(drawn).to(self.device, memory_format=torch.channels_last)


def to_unit(pixels: Tensor, device: torch.device) -> Tensor:
    """Return pixels, uint8, as values in [-1, 1] on the device."""
    return (pixels.to(device).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def to_pixels(values: Tensor) -> Tensor:
    """Return values in [-1, 1] as uint8."""
    return ((values + 1) * 127.5).round().clamp_(0, 255).to(torch.uint8)


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


def _train(images: ImageSet, training: PriorTraining, job: Job, side: int) -> tuple[nn.Module, float]:
    """Run the steps that are left; return the averaged network and its last loss."""
    from diffusers.training_utils import EMAModel

    runtime = job.runtime
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(job.seed, "prior"))
        model = runtime.place(_unet(training.scale, side))
    average = EMAModel(model.parameters(), decay=training.decay, use_ema_warmup=True, power=0.75)
    optimizer = torch.optim.AdamW(model.parameters(), training.learning_rate, weight_decay=0.0)
    kept = _kept(SCHEDULE).to(runtime.device)
    path, first = job.file("prior-checkpoint.safetensors"), 0
    journal = job.file("loss.jsonl")
    assert path is not None and journal is not None
    if state := load_checkpoint(path, model=model, optimizer=optimizer):
        first = average.optimization_step = int(state[1]["step"])
        average.shadow_params = [
            state[0][f"average/{index}"].to(runtime.device) for index in range(len(average.shadow_params))
        ]
    trained = runtime.distribute(model)
    held = runtime.hold(images.pixels)
    size = min(training.batch_size, len(images))
    per_epoch = len(images) // size
    total, seen = torch.zeros((), device=runtime.device), 0
    for step in range(first, training.steps):
        order = torch.randperm(len(images), generator=generator(job.seed, "order", step // per_epoch))
        index = runtime.share(order[step % per_epoch * size :][:size])
        draws = job.random("step", step, runtime.rank)
        x = to_unit(_crop(runtime.take(held, index), side, draws), runtime.device)
        if training.flip:
            mirrored = torch.rand(len(x), 1, 1, 1, generator=draws, device=draws.device) < 0.5
            x = torch.where(mirrored, x.flip(3), x)
        time = torch.randint(0, training.max_t, (len(x),), generator=draws, device=draws.device)
        noise = torch.randn(x.shape, generator=draws, device=draws.device)
        share = kept[time].view(-1, 1, 1, 1)
        trained.train()
        with runtime.autocast():
            found = trained(share.sqrt() * x + (1 - share).sqrt() * noise, time).sample
        loss = F.mse_loss(found.float(), noise)
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
            shadow = {f"average/{index}": value for index, value in enumerate(average.shadow_params)}
            save_checkpoint(path, model=model, optimizer=optimizer, tensors=shadow, record={"step": step + 1})
            append_line(journal, {"step": step + 1, "loss": float(total) / seen})
            total, seen = torch.zeros_like(total), 0
    average.copy_to(model.parameters())
    return model, evaluate(model, images, training, job, side)


@torch.no_grad()
def evaluate(model: nn.Module, images: ImageSet, training: PriorTraining, job: Job, side: int) -> float:
    """Return the mean squared error of the predicted noise on up to 512 training images."""
    runtime, kept = job.runtime, _kept(SCHEDULE).to(job.runtime.device)
    index = torch.linspace(0, len(images) - 1, min(512, len(images))).long()
    draws = job.random("evaluate")
    errors = []
    model.eval()
    for part in torch.split(index, 64):
        x = to_unit(_crop(images.pixels[part].to(draws.device), side, draws), runtime.device)
        time = torch.randint(0, training.max_t, (len(x),), generator=draws, device=draws.device)
        noise = torch.randn(x.shape, generator=draws, device=draws.device)
        share = kept[time].view(-1, 1, 1, 1)
        with runtime.autocast():
            found = model(share.sqrt() * x + (1 - share).sqrt() * noise, time).sample
        errors.append((found.float() - noise).square().mean((1, 2, 3)))
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


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise MissingExtraError("A diffusion prior", "diffusion") from error
    return diffusers


def _unet(scale: str, side: int) -> nn.Module:
    settings = dict(SCALES[scale])
    attention = settings.pop("attention_level", None)
    levels = len(settings["block_out_channels"])
    down = ["AttnDownBlock2D" if level == attention else "DownBlock2D" for level in range(levels)]
    unit = 2 ** (levels - 1)
    network: nn.Module = _diffusers().UNet2DModel(
        sample_size=-(-side // unit) * unit,
        down_block_types=tuple(down),
        up_block_types=tuple(name.replace("Down", "Up") for name in reversed(down)),
        add_attention=attention is not None,
        **settings,
    )
    return network


def _kept(schedule: Mapping[str, Any]) -> Tensor:
    kept: Tensor = _diffusers().DDPMScheduler(**schedule).alphas_cumprod
    return kept


def _schedule(config: Mapping[str, Any], folder: Path) -> Tensor:
    if config.get("prediction_type", "epsilon") != "epsilon":
        raise InputError(f"{folder} predicts {config['prediction_type']!r}; only noise predictors work here.")
    try:
        known = {name: config[name] for name in (*SCHEDULE, "trained_betas") if config.get(name) is not None}
        return _kept(known)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise InputError(f"{folder} has a noise schedule that diffusers does not know: {error}") from error


def _network(folder: Path) -> nn.Module:
    """Build the network of a folder and fill it, by safetensors alone."""
    import safetensors.torch

    config = read_json(folder / CONFIG)
    if (config.get("in_channels"), config.get("out_channels")) != (3, 3):
        raise InputError(
            f"{folder} is no noise predictor for colour images: it has {config.get('in_channels')} channels in and "
            f"{config.get('out_channels')} out; expected 3 and 3."
        )
    try:
        settings = {name: value for name, value in config.items() if not name.startswith("_")}
        model: nn.Module = _diffusers().UNet2DModel(**settings)
        model.load_state_dict(safetensors.torch.load_file(folder / WEIGHTS))
    except safetensors.SafetensorError as error:
        raise InputError(f"{folder / WEIGHTS} is not a whole safetensors file: {error}.") from error
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise InputError(f"{folder} does not fit its own {CONFIG}: {reason}") from error
    return model


def _write(prior: Prior, out: Path) -> None:
    """Write a prior as DDPMPipeline.from_pretrained reads it, with what we know beside it."""
    import safetensors.torch

    config = {"_class_name": "UNet2DModel", **dict(prior.model.config)}
    write_json(out / "unet" / CONFIG, {name: value for name, value in config.items() if _is_json(value)})
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


def _download(name: str) -> Path:
    """Return a hub model's files, safetensors and JSON only."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"There is no folder {name}, and the hub gives no such model: {reason}") from error
