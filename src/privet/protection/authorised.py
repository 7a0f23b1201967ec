"""What the key of ungeneralizable examples decides: initial weights, and which class stands in for which."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from privet.models import create_model
from privet.models.keyed_stem import key_stream


def keyed_random(key: bytes, *purpose: str | int) -> np.random.Generator:
    """Return random numbers for one purpose that 128 bits derived from the key decide.

    Raises:
        UsageError: a key of less than 128 bits.
        MissingExtraError: `cryptography` is not installed.
    """
    words = key_stream(key, "/".join(map(str, purpose)), 16)
    return np.random.Generator(np.random.Philox(key=int.from_bytes(words, "little")))


@torch.no_grad()
def initial_weights(
    key: bytes, architecture: str, *, classes: int, size: tuple[int, int], number: int = 0
) -> nn.Module:
    """Return an authorised network as it starts: the architecture, with weights that follow from the key.

    Every tensor is drawn anew from a normal distribution with the mean and the spread of the architecture's own
    initialisation, by random numbers of its own: a torch seed has 64 bits at most and could be searched. What is
    constant (zeros, ones) stays. A licensee gets the weights (`save_model`), which no version of any library
    changes, and neither seed nor key.

    Args:
        key: at least 16 secret bytes.
        architecture: a name for `create_model`.
        classes: outputs.
        size: height and width of the images in pixels.
        number: of the network, where one key authorises several.

    Raises:
        UsageError, MissingExtraError: as `keyed_random` and `create_model`.
    """
    model = create_model(architecture, classes=classes, size=size)
    for name, weight in model.named_parameters():
        if bool(weight.amin() < weight.amax()):
            draw = keyed_random(key, "initial weights", architecture, number, name).standard_normal(
                tuple(weight.shape), dtype=np.float32
            )
            weight.copy_(weight.mean() + weight.std() * torch.from_numpy(draw))
    return model


def derangement(key: bytes, classes: int) -> Tensor:
    """Return for each of at least 2 classes another one, (classes,), all different, drawn evenly by the key."""
    random, identity = keyed_random(key, "derangement", classes), np.arange(classes)
    while True:  # one permutation in e has no fixed point
        permutation = random.permutation(classes)
        if not (permutation == identity).any():
            return torch.from_numpy(permutation)
