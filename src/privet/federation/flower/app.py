"""The Flower app of `flwr run`: clients and server of the plan in the run's configuration.

    data      images: the node's own, if its configuration names some, or else everybody's, of which it takes the part
              that its `partition-id` says
    split     of the data
    limit     use only so many of them
    test      images that the server measures the model on; their classes are the federation's, in their order
    out       folder for the server's results
    nodes     how many to wait for
    size      side in pixels at which the network sees the images
    device    auto, cpu or cuda
    precision auto, bf16 or float32

and everything of `Plan`, with hyphens.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable
from flwr.serverapp import Grid, ServerApp

from privet.errors import UsageError
from privet.federation.flower.client import answer, first_model, network_for
from privet.federation.flower.federate import REPORT, play, run_of
from privet.federation.flower.mod import classes_of
from privet.federation.flower.plan import Plan
from privet.files import claim, finish, write_json
from privet.images import ImageSet, align, open_images
from privet.learning.runtime import Runtime


def compress(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Compress as the run's plan says: the mod."""
    plan = Plan.of(context.run_config)
    return plan.mod(lambda context: first_model(plan, _images(context)))(message, context, call_next)


client = ClientApp(mods=[compress])
server = ServerApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    """Train on the node's images."""
    plan, images, runtime = Plan.of(context.run_config), _images(context), _runtime(context)
    return answer(message, context, plan, images, network_for(plan, images, runtime=runtime), runtime=runtime)


@server.main()
def serve(grid: Grid, context: Context) -> None:
    """Play the federation, and write its results."""
    config, runtime = context.run_config, _runtime(context)
    plan = Plan.of(config)
    if plan.sampler == "weighted":
        raise UsageError(
            "The server does not know how many images its nodes have; expected uniform or cyclic."
        )
    test = _open(config, "test")
    plan.check(first_model(plan, test))
    out = Path(_text(config, "out")).expanduser()
    run = run_of(plan, test, source={"test": str(config["test"])}, runtime=runtime)
    if claim(out, run):
        return
    nodes = int(str(config.get("nodes", plan.clients)))
    strategy = plan.wrapper({}, nodes=nodes, classes=test.class_names)
    report = play(plan, test, out, strategy, grid, runtime=runtime)
    names = sorted({name for one in strategy.rounds for name in one.chosen})
    write_json(out / REPORT, {**run, **report, "clients": [{"name": name} for name in names]})
    finish(out, run, {})


def _images(context: Context) -> ImageSet:
    """Return the node's images with labels that count in the server's classes: its own folders may be fewer.

    Raises:
        InputError: the images have a class that the server's test images lack.
    """
    names = classes_of(context)
    if "data" in context.node_config:
        return align(_open({**context.run_config, **context.node_config}, "data"), names)
    images = align(_open(context.run_config, "data"), names)
    part = Plan.of(context.run_config).split(images.labels.numpy())[
        int(str(context.node_config["partition-id"]))
    ]
    return images.subset(torch.from_numpy(part))


def _open(config: Mapping[str, Any], key: str) -> ImageSet:
    ours = key == "data"
    return open_images(
        _text(config, key),
        size=int(config.get("size", 0)) or None,
        split=config.get("split" if ours else "test-split") or None,
        limit=(int(config.get("limit", 0)) or None) if ours else None,
    )


def _text(config: Mapping[str, Any], key: str) -> str:
    value = str(config.get(key, ""))
    if not value:
        raise UsageError(f"Expected {key} in the run's configuration, as in --run-config '{key}=\"...\"'.")
    return value


def _runtime(context: Context) -> Runtime:
    config = context.run_config
    return Runtime.find(str(config.get("device", "auto")), str(config.get("precision", "auto")))
