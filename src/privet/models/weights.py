"""Networks as safetensors files that say what they are: nothing is unpickled."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from privet.errors import InputError, UsageError
from privet.files import write_bytes
from privet.models.projection import PREFIX

# The one metadata key: with two, safetensors writes them in an order that changes from run to run.
KEY = "privet-model-1"
# What a tensor may consist of; torch computes with others (8-bit floats) only in part, or drops half of them (complex).
DTYPES = frozenset(
    {
        *(torch.bool, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    }
)
LARGEST_SIDE = 1 << 14  # of the images of a network that is loaded, in pixels


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
        InputError: not such a file, truncated, its description is not of a network, or its tensors do not fit that.
        MissingExtraError: as `create_model`.
    """
    from privet.models import create_model

    tensors, metadata = read_tensors(path)
    about = _described(metadata, path)
    build = partial(create_model, about.architecture, classes=len(about.class_names), size=about.size)
    try:
        # A name of a few letters can ask for any amount of memory, so the tensors must be there before it is taken.
        # What timm and transformers build is not always possible without memory, but no name makes it wider.
        if ":" not in about.architecture.removeprefix(PREFIX):
            with torch.device("meta"):
                _refuse(_unfitted(build(), tensors), about, path)
        model = build()
    except UsageError as error:
        raise InputError(f"{path} describes a network that cannot be built: {error}") from error
    _refuse(load_tensors(model, tensors, path), about, path)
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


def describe_model(path: Path) -> SavedModel:
    """Return what a file that `save_model` wrote says of itself; its tensors are not read.

    Raises:
        InputError: not such a file, truncated, or its description is not of a network.
    """
    with _opened(path) as file:
        metadata = file.metadata() or {}
    return _described(metadata, path)


def _described(metadata: dict[str, str], path: Path) -> SavedModel:
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
    except (KeyError, IndexError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InputError(f"{path} has a broken description of its network: {error!r}.") from error
    if not about.class_names or not all(1 <= side <= LARGEST_SIDE for side in about.size):
        raise InputError(
            f"{path} has a broken description of its network: expected at least 1 class and sides between 1 and "
            f"{LARGEST_SIDE}, got {len(about.class_names)} and {about.size}."
        )
    return about


def _unfitted(model: nn.Module, tensors: dict[str, Tensor]) -> list[str]:
    """Return the names of the network's tensors that are not among the others, or of another shape there."""
    return [
        name
        for name, value in _state(model).items()
        if name not in tensors or tensors[name].shape != value.shape
    ]


def _refuse(missing: list[str], about: SavedModel, path: Path) -> None:
    if missing:
        raise InputError(f"{path} lacks {len(missing)} tensors of {about.architecture}: {missing[0]}, ...")


@torch.no_grad()
def load_tensors(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> list[str]:
    """Put the tensors that fit into `model`, and return the names of its own that none fitted.

    Raises:
        InputError: NaN or infinity, or numbers of a kind that is none of `DTYPES`; the message names `path`.
    """
    missing = _unfitted(model, tensors)
    for name, value in _state(model).items():
        if name in missing:
            continue
        given = tensors[name]
        if given.dtype not in DTYPES:
            raise InputError(
                f"{path} holds {given.dtype} in {name}; expected floats of 16 to 64 bits, integers or bool. Convert it."
            )
        if given.is_floating_point() and not torch.isfinite(given).all():
            raise InputError(f"{path} holds NaN or infinity in {name}; these weights are unusable.")
        value.copy_(given)
    return missing


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a safetensors file's tensors by name, and its metadata.

    Raises:
        InputError: it is not a whole one.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError as error:
        raise InputError(f"There is no weights file {path}.") from error
    except (safetensors.SafetensorError, OSError, ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"{path} is not a whole safetensors file: {error}.") from error
