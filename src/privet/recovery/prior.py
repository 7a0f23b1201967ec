"""The prior: a diffusion model of what unprotected images look like, which recoveries denoise with."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from privet.errors import InputError, MissingExtraError, UsageError
from privet.files import read_json, sha256
from privet.images.image_set import ImageSet
from privet.learning.pieces import in_pieces
from privet.learning.runtime import Runtime

ABOUT, CONFIG, WEIGHTS = "prior.json", "config.json", "diffusion_pytorch_model.safetensors"
SCHEDULING = (
    "beta_schedule",
    "beta_start",
    "beta_end",
    "num_train_timesteps",
    "trained_betas",
    "rescale_betas_zero_snr",
)
# What diffusers called the parts of an attention until 2023, and calls them since.
ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
RANGE = [-1.0, 1.0]
TIMES = 100_000  # of a schedule, at most
# Mean squared error of the noise from which on a prior counts as blind. To see no noise at all has 1, for noise has
# variance 1; to know how pixels vary and nothing else has 0.6, on images of CIFAR-10 and times below 250.
BLIND = 0.9
PIECE = 16  # images that a core of a processor denoises together, at most


@dataclass(frozen=True, kw_only=True)
class Prior:
    """A trained noise predictor.

    Attributes:
        model: a UNet2DModel, frozen; takes values in [-1, 1] and the time, and returns the noise.
        kept: share of the signal's variance that is left at each time, (times,); "alpha bar".
        max_t: times from here on were never trained.
        about: what is known of its training, checked (scale, steps, data, size, loss), or nothing.
        images: `fingerprints` of all training images, or None if unknown.
    """

    model: Any = field(repr=False)
    kept: Tensor = field(repr=False)
    max_t: int
    about: Mapping[str, Any]
    images: frozenset[str] | None = field(default=None, repr=False)

    @property
    def blind(self) -> bool:
        """Whether it is known to take less than a tenth of the noise away, even from images like its own.

        A recovery with it adds noise and takes hardly any off again. Of a prior of unknown training nobody knows.
        """
        return bool(self.about.get("loss", 0.0) >= BLIND)

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
        levels = len(self.model.config.block_out_channels)

        def predict(piece: Tensor) -> Tensor:
            with runtime.autocast():
                return predict_noise(self.model, piece, time, levels=levels)

        return in_pieces(predict, noisy, size=piece(len(noisy)))

    def check(self, size: tuple[int, int], time: int) -> None:
        """Refuse images or times that the prior was not made for.

        Raises:
            UsageError: a time that it never saw.
            InputError: a network with attention, and images of another size than its own.
        """
        if not 0 < time < self.max_t:
            raise UsageError(
                f"This prior was trained for times below {self.max_t}, and is asked for {time}. Recover with a "
                f"--method that noises images less (jcdp, purify-gently), or train a prior with --max-t {time + 1}."
            )
        config = self.model.config
        attends = any("Attn" in block for block in (*config.down_block_types, *config.up_block_types))
        own = config.sample_size
        if attends and own is not None and size != (own, own):
            raise InputError(
                f"This prior has attention and knows images of {own} x {own} pixels only; these are {size[0]} x "
                f"{size[1]}. Open them with --size {own}, or train a prior without attention (tiny, small)."
            )


def piece(count: int) -> int:
    """Return how many of so many images a core of a processor takes through a network at a time."""
    return min(PIECE, -(-count // torch.get_num_threads()))


def predict_noise(network: nn.Module, noisy: Tensor, time: int | Tensor, *, levels: int) -> Tensor:
    """Return what a network makes of images of any size, (batch, 3, height, width), float32.

    It halves them `levels` - 1 times, so rows and columns are repeated at the end until that can be done.
    """
    height, width = noisy.shape[2:]
    unit = 2 ** (levels - 1)
    padding = (0, -width % unit, 0, -height % unit)
    padded = F.pad(noisy, padding, mode="replicate") if any(padding) else noisy
    found: Tensor = network(padded, time).sample
    return found[:, :, :height, :width].float()


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
    kept = _schedule(read_json(schedules[0]), folder)
    usable = int((kept > 0).sum())  # a schedule may end without any signal, from which nothing leads back
    about = _record(folder / ABOUT, usable)
    model = _network(network)
    images = None
    if (listing := folder / "images.txt").is_file():
        images = frozenset(listing.read_text("ascii", errors="replace").split())
    return Prior(
        model=runtime.place(model),
        kept=kept,
        max_t=about.get("max_t", usable),
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


def fingerprints(images: ImageSet) -> list[frozenset[str]]:
    """Return by what each image can be known again: short hashes of its pixels, at one size, and of its file."""
    rows = (image.permute(1, 2, 0).contiguous().numpy().tobytes() for image in images.pixels)
    pixels = [hashlib.sha256(row).hexdigest()[:16] for row in rows]
    files = [file.sha256[:16] for file in images.files] or pixels
    return [frozenset(marks) for marks in zip(pixels, files, strict=True)]


def fingerprint(source: str | Path) -> str:
    """Return the hash of a prior's weights, which tells priors apart wherever they lie."""
    weights = locate(source)[0] / WEIGHTS
    return _hash(weights, weights.stat().st_mtime_ns, weights.stat().st_size)


def weigh(source: str | Path) -> int:
    """Return how many bytes a prior's weights take."""
    return (locate(source)[0] / WEIGHTS).stat().st_size


@cache
def _hash(weights: Path, changed: int, size: int) -> str:
    return sha256(weights.read_bytes())


def _record(path: Path, times: int) -> dict[str, Any]:
    """Return what `train_prior` wrote of a training, or nothing if there is no such file.

    Args:
        path: the file.
        times: how many the schedule has.
    """
    if not path.is_file():
        return {}
    about = read_json(path)
    if about.get("range", RANGE) != RANGE:
        raise InputError(f"{path.parent} works on values in {about['range']}; expected {RANGE}.")
    try:
        training, loss = about["training"], about["loss"]
        height, width = about["size"]
        counts = (about["images"], about["max_t"], about["crop"], height, width)
        steps = (training["steps"], training["batch_size"])
        sound = (
            all(type(count) is int and count >= 1 for count in (*counts, *steps))
            and about["max_t"] <= times
            and isinstance(training["scale"], str)
            and type(loss) in (int, float)
            and 0 <= loss < math.inf
        )
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise InputError(f"{path} is not a record that 'privet prior train' wrote. Train it again.")
    return about


def _schedule(config: Mapping[str, Any], folder: Path) -> Tensor:
    if config.get("prediction_type", "epsilon") != "epsilon":
        raise InputError(f"{folder} predicts {config['prediction_type']!r}; only noise predictors work here.")
    if config.get("beta_schedule") is None and config.get("trained_betas") is None:
        raise InputError(
            f"{folder} has the noise schedule of {config.get('_class_name', 'an unknown kind')}, without betas; only "
            "priors that noise images as DDPM does work here."
        )
    known = {name: config[name] for name in SCHEDULING if config.get(name) is not None}
    times = known.get("num_train_timesteps", 1000)
    if type(times) is not int or not 1 <= times <= TIMES:
        raise InputError(f"{folder} has a noise schedule of {times!r} times; expected 1 to {TIMES:,}.")
    try:
        kept = kept_shares(known)
    except (ValueError, TypeError, RuntimeError, ArithmeticError, LookupError) as error:
        raise InputError(f"{folder} has a noise schedule that diffusers does not know: {error}") from error
    shares = kept.tolist() if kept.is_floating_point() and kept.ndim == 1 else []
    if not shares or not all(before > after >= 0 for before, after in pairwise((1.0, *shares))):
        raise InputError(
            f"{folder} has a noise schedule that makes no sense: expected betas between 0 and 1, so that ever less "
            "of an image is left."
        )
    return kept


def _network(folder: Path) -> Any:
    """Build the network of a folder, fill it, by safetensors alone, freeze it, and try it."""
    import safetensors.torch

    library = diffusers_library()
    config = read_json(folder / CONFIG)
    if (config.get("in_channels"), config.get("out_channels")) != (3, 3):
        raise InputError(
            f"{folder} is no noise predictor for colour images: it has {config.get('in_channels')} channels in and "
            f"{config.get('out_channels')} out; expected 3 and 3."
        )
    if config.get("num_class_embeds") is not None or config.get("class_embed_type") is not None:
        raise InputError(
            f"{folder} wants to be told a class with each image; only unconditional priors work here."
        )
    try:
        settings = {name: value for name, value in config.items() if not name.startswith("_")}
        with torch.device("meta"):  # a config of a few letters can ask for any amount of memory
            model = library.UNet2DModel(**settings)
        state = safetensors.torch.load_file(folder / WEIGHTS)
        old = re.compile(rf"(attentions\.\d+)\.({'|'.join(ATTENTION)})\.")
        model.load_state_dict({old.sub(_rename, name): value for name, value in state.items()}, assign=True)
        model.float().eval().requires_grad_(False)
        levels = len(model.config.block_out_channels)
        predict_noise(model, torch.zeros(1, 3, 2**levels, 2**levels), 0, levels=levels)
    except safetensors.SafetensorError as error:
        raise InputError(f"{folder / WEIGHTS} is not a whole safetensors file: {error}.") from error
    except Exception as error:  # diffusers checks little of a config, and stumbles over the rest
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
        raise InputError(f"{folder} does not fit its own {CONFIG}: {reason}") from error
    if bad := next((name for name, value in model.state_dict().items() if not value.isfinite().all()), None):
        raise InputError(
            f"{folder / WEIGHTS} holds values that are no numbers, in {bad}. Train or fetch it again."
        )
    return model


def _rename(match: re.Match[str]) -> str:
    return f"{match[1]}.{ATTENTION[match[2]]}."


def diffusers_library() -> Any:
    """Return the module, or say how to install it."""
    try:
        import diffusers
    except ImportError as error:
        raise MissingExtraError("A diffusion prior", "diffusion") from error
    return diffusers


def kept_shares(schedule: Mapping[str, Any]) -> Tensor:
    """Return the share of the signal's variance that is left at each time of a schedule, (times,)."""
    kept: Tensor = diffusers_library().DDPMScheduler(**schedule).alphas_cumprod
    return kept


@cache  # asked for several times a run, and each time the hub would be
def _download(name: str) -> Path:
    """Return a hub model's files, safetensors and JSON only."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"There is no folder {name}, and the hub gives no such model: {reason}") from error
