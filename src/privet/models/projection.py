"""Networks whose last layer is exchanged: SimCLR's projection head, and features without a head."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from privet.errors import UsageError

PREFIX = "simclr:"
WIDTH = 128  # of a projection


class ProjectionHead(nn.Module):
    """Two linear layers that map features to the projections which contrastive learning compares."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(features, features), nn.Linear(features, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Map features, (batch, features), to projections, (batch, WIDTH)."""
        return self.fc2(F.relu(self.fc1(x)))  # type: ignore[no-any-return]


def with_projection(classifier: nn.Module) -> nn.Module:
    """Put a projection head in the place of a classifier's last layer, and return the network.

    Raises:
        UsageError: as `last_layer`.
    """
    path, layer = last_layer(classifier)
    assert isinstance(layer, nn.Linear)
    classifier.set_submodule(path, ProjectionHead(layer.in_features))
    return classifier


def last_layer(model: nn.Module) -> tuple[str, nn.Module]:
    """Return what turns features into a network's output, a projection head or a linear layer, and where it is.

    Raises:
        UsageError: the network has neither, or several side by side, as DeiT's distilled form has.
    """
    layers = list(model.named_modules())
    told = getattr(getattr(model, "network", None), "get_classifier", None)
    if told is not None:  # timm's, whose last layer is not always registered last
        end = told()
        inside = list(end.modules()) if isinstance(end, nn.Module) else []
        layers = [(path, layer) for path, layer in layers if layer in inside]
    for kind in (ProjectionHead, nn.Linear):
        found = [(path, layer) for path, layer in layers if isinstance(layer, kind)]
        if found and (told is None or len(found) == 1):
            return found[-1]
    raise UsageError(
        "Expected a network that ends in a linear layer, got one without any at its end, or with several side by "
        "side. Choose another architecture."
    )


@contextlib.contextmanager
def other_head(model: nn.Module, head: nn.Module) -> Iterator[nn.Module]:
    """Exchange a network's last layer for the block."""
    path, layer = last_layer(model)
    model.set_submodule(path, head)
    try:
        yield model
    finally:
        model.set_submodule(path, layer)
