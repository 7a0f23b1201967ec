"""Networks by name, and their weights as safetensors.

A name is an architecture with an optional width: `resnet18`, `resnet8-w32`, `vgg16`. Every network
takes pixels in [0, 1], (batch, 3, height, width), and returns logits. With `simclr:` before its name its
last layer is SimCLR's projection head instead.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from privet.errors import MissingExtraError, UsageError
from privet.models import cnn, densenet, lenet, mobilenetv2, resnet, transformers_vision, vgg, vit
from privet.models.blocks import Scaled, relu
from privet.models.keyed_stem import KeyedStem
from privet.models.projection import PREFIX, with_projection
from privet.models.weights import SavedModel, describe_model, load_backbone, load_model, save_model

__all__ = [
    "ARCHITECTURES",
    "KeyedStem",
    "SavedModel",
    "create_model",
    "describe_model",
    "family",
    "is_pretrained",
    "load_backbone",
    "load_model",
    "placeless",
    "save_model",
]

# What ImageNet weights expect; networks without the ImageNet stem use 0.5 and 0.25.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Up to this side a DenseNet or MobileNetV2 keeps the full resolution in its stem.
THUMBNAIL = 64

LENETS = ("lenet", "lenet-strided")
# Behind a name: sigmoids in place of ReLUs, as inversions of gradients are mostly tried on.
SIGMOID = "-sigmoid"

ARCHITECTURES: tuple[str, ...] = (
    *resnet.DEPTHS,
    *(f"{name}-imagenet" for name in ("resnet18", "resnet34", "resnet50")),
    *vgg.DEPTHS,
    *densenet.DEPTHS,
    "mobilenetv2",
    "vit",
    "cnn",
    *LENETS,
    *(f"{name}{SIGMOID}" for name in (*LENETS, "resnet8", "resnet20", "resnet18")),
)


def create_model(name: str, *, classes: int, size: tuple[int, int], seed: int = 0) -> nn.Module:
    """Build a network with freshly initialised weights, or a pretrained one with a fresh last layer.

    Args:
        name: one of `ARCHITECTURES`, with `-wN` behind it for another width, `timm:NAME`, or `transformers:FOLDER`
            for a pretrained vision model; `simclr:` before any of them for its encoder with a projection head.
        classes: number of outputs.
        size: height and width of the images in pixels.
        seed: of the initial weights.

    Raises:
        UsageError: no such network, or none that can have a projection head.
        InputError: a folder without a model of transformers.
        MissingExtraError: a network of timm or transformers, and the library is not installed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name.startswith(PREFIX):
            name = name.removeprefix(PREFIX)
            if name.startswith(PREFIX):
                raise UsageError(f"Expected {PREFIX} once before a network's name, got it more often.")
            encoder = create_model(name, classes=classes, size=size, seed=seed)
            return with_projection(encoder)
        if name.startswith("timm:"):
            return _timm(name.removeprefix("timm:"), classes=classes, size=size)
        if is_pretrained(name):
            return transformers_vision.build(
                Path(name.removeprefix(transformers_vision.PREFIX)), classes=classes
            )
        base, width = _split(name)
        stem = "imagenet" if base.endswith("-imagenet") else "3x3"
        if stem == "imagenet":
            network: nn.Module = resnet.build(
                base.removesuffix("-imagenet"), classes=classes, width=width, stem=stem
            )
            return Scaled(network, mean=IMAGENET_MEAN, std=IMAGENET_STD)
        activation = F.sigmoid if base.endswith(SIGMOID) else relu
        base = base.removesuffix(SIGMOID)
        if base in resnet.DEPTHS:
            network = resnet.build(base, classes=classes, width=width, stem=stem, activation=activation)
        elif base in LENETS:
            network = lenet.build(base, size=size, classes=classes, width=width, activation=activation)
        elif base in vgg.DEPTHS:
            network = vgg.build(base, classes=classes, width=width)
        elif base == "cnn":
            network = cnn.build(classes=classes, width=width)
        elif base == "vit":
            network = vit.build(size=size, classes=classes, width=width)
        else:
            stem = "3x3" if min(size) <= THUMBNAIL else "imagenet"
            if base in densenet.DEPTHS:
                network = densenet.build(base, classes=classes, width=width, stem=stem)
            else:
                network = mobilenetv2.build(classes=classes, width=width, stem=stem)
        return Scaled(network)


def is_pretrained(name: str) -> bool:
    """Say whether the network of this name has learned something before."""
    return name.startswith(transformers_vision.PREFIX)


def placeless(name: str) -> str:
    """Return the name by which a network is recorded: of a pretrained one the hash, not the folder."""
    if name.startswith(PREFIX):
        return PREFIX + placeless(name.removeprefix(PREFIX))
    if not is_pretrained(name):
        return name
    folder = Path(name.removeprefix(transformers_vision.PREFIX))
    return transformers_vision.PREFIX + transformers_vision.fingerprint(folder)


def family(name: str) -> str:
    """Return the kind of network that a name stands for, whatever its depth, width and head."""
    name = name.removeprefix(PREFIX)
    match = re.match(r"(timm:)?([a-z]+)", name)
    return match.group(2) if match else name


def _split(name: str) -> tuple[str, int | None]:
    match = re.fullmatch(r"(.+?)(?:-w([1-9]\d{0,3}))?", name)
    if match is None or match.group(1) not in ARCHITECTURES:
        raise UsageError(
            f"Unknown architecture {name!r:.80}. Known: {', '.join(ARCHITECTURES)}; "
            "add -wN for another width (resnet8-w32), or write timm:NAME for one of timm's, or transformers:FOLDER."
        )
    return match.group(1), int(match.group(2)) if match.group(2) else None


def _timm(name: str, *, classes: int, size: tuple[int, int]) -> nn.Module:
    try:
        import timm
    except (
        ImportError,
        RuntimeError,
    ) as error:  # a torchvision that does not fit raises RuntimeError
        raise MissingExtraError(f"timm:{name}", "timm") from error
    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name[:6]}*")[:6]) or "none with a similar name"
        raise UsageError(f"timm has no model {name!r}; it has {near}.")
    options = {"num_classes": classes}
    try:
        network = timm.create_model(name, img_size=size, **options)
    except TypeError:  # convolutional networks take any size and no such argument
        network = timm.create_model(name, **options)
    config = network.default_cfg
    return Scaled(network, mean=tuple(config["mean"]), std=tuple(config["std"]))
