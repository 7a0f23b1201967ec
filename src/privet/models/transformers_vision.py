"""Vision models of the library transformers, from a folder on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from privet.errors import InputError, MissingExtraError
from privet.files import read_json, sha256

PREFIX = "transformers:"
CONFIG, PREPROCESSOR, WEIGHTS = "config.json", "preprocessor_config.json", "model*.safetensors"
USUAL_SIDE = 224


class TransformersVision(nn.Module):
    """A pretrained encoder and a fresh linear layer; takes pixels in [0, 1] of any size.

    Attributes:
        encoder: a vision model, or one of images and texts, such as CLIP; weights that its features do not
            depend on are frozen.
        head: maps its features to logits.
        side: of the square that the encoder sees.
        mean: of the channels that it expects.
        std: likewise.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, encoder: Any, *, classes: int, side: int, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.side = side
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        with torch.enable_grad():
            found = self.features(torch.zeros(1, 3, side, side))
        self.head = nn.Linear(found.shape[1], classes)
        # Weights that features do not depend on (CLIP's text tower, a mask's token) never get a gradient, and
        # averaging gradients over several processes would wait for them.
        learned = [weight for weight in encoder.parameters() if weight.requires_grad]
        for weight, slope in zip(
            learned, torch.autograd.grad(found.sum(), learned, allow_unused=True), strict=True
        ):
            weight.requires_grad_(slope is not None)

    def features(self, x: Tensor) -> Tensor:
        """Map pixels in [0, 1], (batch, 3, height, width), to features, (batch, width)."""
        if x.shape[2:] != (self.side, self.side):
            x = F.interpolate(x, (self.side, self.side), mode="bicubic", antialias=True).clamp(0, 1)
        x = (x - self.mean) / self.std
        see = getattr(self.encoder, "get_image_features", self.encoder)
        found = see(pixel_values=x)
        if not isinstance(found, Tensor):
            pooled = getattr(found, "pooler_output", None)
            found = found.last_hidden_state.mean(1) if pooled is None else pooled
        rows: Tensor = found.flatten(1)
        return rows

    def forward(self, x: Tensor) -> Tensor:
        """Map pixels in [0, 1], (batch, 3, height, width), to logits, (batch, classes)."""
        return self.head(self.features(x))  # type: ignore[no-any-return]


def build(folder: Path, *, classes: int) -> TransformersVision:
    """Load an encoder; only JSON and safetensors are read, and nothing is downloaded.

    Raises:
        InputError: the folder holds none.
        MissingExtraError: transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError(f"{PREFIX}{folder}", "transformers") from error
    transformers.utils.logging.disable_progress_bar()
    try:
        if not (folder / CONFIG).is_file() or not list(folder.glob(WEIGHTS)):
            raise InputError(
                f"{folder} holds no model of transformers: expected {CONFIG} and {WEIGHTS}, as save_pretrained writes "
                "them."
            )
        encoder = transformers.AutoModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
        told = read_json(folder / PREPROCESSOR) if (folder / PREPROCESSOR).is_file() else {}
        config = getattr(encoder.config, "vision_config", encoder.config)
        return TransformersVision(
            encoder.float(),  # it may be stored in 16 bits
            classes=classes,
            side=int(getattr(config, "image_size", None) or USUAL_SIDE),
            mean=tuple(told.get("image_mean", (0.5, 0.5, 0.5))),
            std=tuple(told.get("image_std", (0.5, 0.5, 0.5))),
        )
    except (
        safetensors.SafetensorError,
        OSError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RuntimeError,
    ) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{folder} holds no vision model that transformers can load: {reason}") from error


def fingerprint(folder: Path) -> str:
    """Return the hash of what an encoder computes with, which tells encoders apart wherever they lie.

    Raises:
        InputError: a file of it cannot be read.
    """
    files = [folder / CONFIG, folder / PREPROCESSOR, *sorted(folder.glob(WEIGHTS))]
    try:
        return sha256("".join(sha256(file.read_bytes()) for file in files if file.is_file()).encode())
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}.") from error
