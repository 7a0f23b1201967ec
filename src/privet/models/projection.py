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


def with_projection(classifier: nn.Module, name: str) -> nn.Module:
    """Put a projection head in the place of a classifier's last layer, and return the network.

    Raises:
        UsageError: the network does not end in a linear layer.
    """
    linear = [path for path, module in classifier.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise UsageError(f"{PREFIX}{name}: expected a network that ends in a linear layer; {name} has none.")
    last = classifier.get_submodule(linear[-1])
    assert isinstance(last, nn.Linear)
    classifier.set_submodule(linear[-1], ProjectionHead(last.in_features))
    return classifier


def projection_head(model: nn.Module) -> tuple[str, ProjectionHead]:
    """Return where a network's projection head is, and the head."""
    heads = [(path, module) for path, module in model.named_modules() if isinstance(module, ProjectionHead)]
    return heads[0]


@contextlib.contextmanager
def other_head(model: nn.Module, head: nn.Module) -> Iterator[nn.Module]:
    """Give a network with a projection head another head for the block."""
    path, projection = projection_head(model)
    model.set_submodule(path, head)
    try:
        yield model
    finally:
        model.set_submodule(path, projection)
