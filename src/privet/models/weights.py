"""Networks as safetensors files that say what they are: nothing is unpickled."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from privet.errors import InputError
from privet.files import write_bytes

# The one metadata key: with two, safetensors writes them in an order that changes from run to run.
KEY = "privet-model-1"


@dataclass(frozen=True, kw_only=True)
class SavedModel:
    """What a weights file says of itself.

    Attributes:
        architecture: the name for `create_model`.
        class_names: what each output stands for.
        size: height and width of the images it was trained on, in pixels.
        notes: how it came about; free, for people and for checks (method, settings, seed).
    """

    architecture: str
    class_names: tuple[str, ...]
    size: tuple[int, int]
    notes: dict[str, Any] = field(default_factory=dict)


def save_model(path: Path, model: nn.Module, about: SavedModel, *, private: bool = False) -> None:
    """Write the weights and what they are, atomically; private ones with mode 0600."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in _state(model).items()}
    metadata = {KEY: json.dumps(asdict(about), ensure_ascii=False)}
    write_bytes(path, safetensors.torch.save(tensors, metadata), private=private)


def load_model(path: Path) -> tuple[nn.Module, SavedModel]:
    """Return the network of a file that `save_model` wrote, in evaluation mode, and what it is.

    Raises:
        InputError: not such a file, truncated, or its tensors do not fit its architecture.
    """
    from privet.models import create_model

    tensors, metadata = read_tensors(path)
    if KEY not in metadata:
        raise InputError(
            f"{path} holds weights, but does not say of which network. Expected a file that privet "
            "saved (for other weights, name the architecture and pass them as --weights)."
        )
    try:
        about = json.loads(metadata[KEY])
        about = SavedModel(
            architecture=str(about["architecture"]),
            class_names=tuple(map(str, about["class_names"])),
            size=(int(about["size"][0]), int(about["size"][1])),
            notes=dict(about["notes"]),
        )
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise InputError(f"{path} has a broken description of its network: {error!r}.") from error
    model = create_model(about.architecture, classes=len(about.class_names), size=about.size)
    missing = load_tensors(model, tensors, path)
    if missing:
        raise InputError(f"{path} lacks {len(missing)} tensors of {about.architecture}: {missing[0]}, ...")
    return model.eval(), about


def load_backbone(path: Path, model: nn.Module) -> list[str]:
    """Load all weights of a safetensors file that fit `model`, for fine-tuning.

    The head may differ (another number of classes): tensors whose names or shapes do not fit are
    left as they are and returned. Takes privet's own files and torchvision's names.

    Raises:
        InputError: the file cannot be read, or less than half of the network's weights are in it.
    """
    tensors, _ = read_tensors(path)
    state = _state(model)
    missing = load_tensors(model, tensors, path)
    kept = sum(state[name].numel() for name in missing)
    total = sum(value.numel() for value in state.values())
    if kept > total / 2:
        raise InputError(
            f"{path} does not fit this architecture: {len(missing)} of {len(state)} tensors are absent or of "
            f"another shape, {missing[0]} for one. Expected weights of the same network."
        )
    return missing


def _state(model: nn.Module) -> dict[str, Tensor]:
    """The state without the wrapper's prefix, so that names are the network's published ones."""
    return {name.removeprefix("network."): value for name, value in model.state_dict().items()}


@torch.no_grad()
def load_tensors(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> list[str]:
    """Put the tensors that fit into `model`, and return the names of its own that none fitted.

    Raises:
        InputError: NaN or infinity; the message names `path`.
    """
    missing = []
    for name, value in _state(model).items():
        given = tensors.get(name)
        if given is None or given.shape != value.shape:
            missing.append(name)
            continue
        if given.is_floating_point() and not torch.isfinite(given).all():
            raise InputError(f"{path} holds NaN or infinity in {name}; these weights are unusable.")
        value.copy_(given)
    return missing


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a safetensors file's tensors by name, and its metadata.

    Raises:
        InputError: it is not a whole one.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except FileNotFoundError as error:
        raise InputError(f"There is no weights file {path}.") from error
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is not a whole safetensors file: {error}.") from error
