"""Record real updates: what clients of a federation would send, for benchmarks of codecs.

A network learns from some CIFAR-10 images, as the server's model has after some rounds. Then one client trains it for a
few local epochs on images whose classes are drawn from a Dirichlet distribution, and the difference is recorded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import nn

from privet.federation import Schema
from privet.images import ImageSet, open_images
from privet.models import create_model
from privet.seeds import derive, generator

Update = dict[str, NDArray[np.generic]]


def error(told: Mapping[str, NDArray[Any]], update: Mapping[str, NDArray[Any]], schema: Schema) -> float:
    """Return the squared error of the compressed values, relative to their squares."""
    values, _ = schema.flatten(update)
    found, _ = schema.flatten({**update, **{name: told[name].astype(update[name].dtype) for name in told}})
    return float(np.sum((found - values) ** 2, dtype=float) / np.sum(values**2, dtype=float))


# Name, images and epochs of the server's model, images and epochs of the client.
RECIPES = {
    "mlp": (4000, 6, 500, 3),
    "lenet": (4000, 8, 500, 3),
    "resnet8-w32": (4000, 4, 500, 3),
    "resnet18": (1500, 3, 300, 2),
}
ALPHA = 0.3
BATCH = 32
RATE = 0.05


def network(name: str) -> nn.Module:
    """Return a network for CIFAR-10: LeNet-5 with ReLU, an MLP of three layers, or one of privet's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "mlp":
            return nn.Sequential(
                nn.Flatten(),
                nn.Linear(3072, 512),
                nn.ReLU(),
                nn.Linear(512, 256),
                nn.ReLU(),
                nn.Linear(256, 10),
            )
        if name == "lenet":
            features = (
                nn.Conv2d(3, 6, 5),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Conv2d(6, 16, 5),
                nn.ReLU(),
                nn.MaxPool2d(2),
            )
            head = (nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10))
            return nn.Sequential(*features, nn.Flatten(), *head)
    return create_model(name, classes=10, size=(32, 32))


def recorded(name: str, data: Path, work: Path) -> Update:
    """Return the update of this network, recording it first if that was not done before."""
    path = work / f"update-{name}.safetensors"
    if not path.exists():
        work.mkdir(parents=True, exist_ok=True)
        save_file({key: np.ascontiguousarray(value) for key, value in _record(name, data).items()}, path)
    return load_file(path)


def _record(name: str, data: Path) -> Update:
    images, epochs, local, local_epochs = RECIPES[name]
    pool = open_images(data / "cifar10" / "train.parquet", limit=images + 4000)
    model = network(name)
    _train(model, pool, torch.arange(images), epochs, seed=1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    _train(model, pool, _client(pool.labels[images:], local) + images, local_epochs, seed=2)
    return {key: (value - before[key]).numpy() for key, value in model.state_dict().items()}


def _client(labels: torch.Tensor, count: int) -> torch.Tensor:
    """Draw images whose classes follow a Dirichlet distribution."""
    random = np.random.default_rng(derive(0, "client"))
    wanted = np.floor(random.dirichlet(np.full(10, ALPHA)) * count).astype(int)
    return torch.cat(
        [torch.nonzero(labels == label).flatten()[:number] for label, number in enumerate(wanted)]
    )


def _train(model: nn.Module, images: ImageSet, index: torch.Tensor, epochs: int, *, seed: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    model.train()
    for epoch in range(epochs):
        order = index[torch.randperm(len(index), generator=generator(seed, "order", epoch))]
        for batch in order.split(BATCH):
            if len(batch) < 2:
                continue
            x = images.pixels[batch].float() / 255 - (0.5 if isinstance(model, nn.Sequential) else 0)
            loss = F.cross_entropy(model(x), images.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
