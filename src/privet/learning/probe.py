"""A linear probe: what a straight line makes of the features of a frozen encoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from privet.images.image_set import ImageSet
from privet.learning.attack import frozen
from privet.learning.runtime import Runtime
from privet.models.projection import last_layer, other_head

BATCH = 512
STEPS = 100  # of L-BFGS at most; it usually ends sooner
PENALTY = 1e-3  # on the squared weights of standardised features


def probe(model: nn.Module, images: ImageSet, *, runtime: Runtime) -> tuple[nn.Linear, float]:
    """Return the last layer that tells an encoder's features of labelled images apart, and its accuracy on them.

    Logistic regression on standardised features of the images themselves, solved by L-BFGS: it needs no
    learning rate and no schedule, draws nothing at random, and takes little more than one look at every image.
    The papers train the same layer by SGD on random crops.

    Args:
        model: a network, whose last layer is left aside.
        images: labelled images.
        runtime: where and how precisely features are computed.
    """
    x = features(model, images, runtime=runtime)
    labels = images.labels.to(runtime.device)
    mean, scale = x.mean(0), x.std(0).clamp(min=1e-6)
    x = (x - mean) / scale
    weight = x.new_zeros(images.classes, x.shape[1], requires_grad=True)
    bias = x.new_zeros(images.classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(x @ weight.T + bias, labels) + PENALTY / 2 * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        right = ((x @ weight.T + bias).argmax(1) == labels).float().mean()
        layer = nn.Linear(x.shape[1], images.classes, device=x.device)
        layer.weight.copy_(weight / scale)
        layer.bias.copy_(bias - layer.weight @ mean)
    return layer, float(right)


@torch.no_grad()
def features(model: nn.Module, images: ImageSet, *, runtime: Runtime) -> Tensor:
    """Return what a network's last layer would get, (images, features), float32."""
    rows = []
    with other_head(model, nn.Identity()), frozen(model), runtime.autocast():
        for start in range(0, len(images), BATCH):
            x = images.pixels[start : start + BATCH].to(runtime.device).float() / 255
            rows.append(model(x).float())
    return torch.cat(rows)


def with_probe(model: nn.Module, layer: nn.Linear) -> nn.Module:
    """Exchange a network's last layer for a probe for good, and return the classifier."""
    model.set_submodule(last_layer(model)[0], layer)
    return model
