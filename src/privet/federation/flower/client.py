"""The ClientApp: a client that trains a network on its own images by plain SGD."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from privet.federation.flower.link import Arrays, arrays_of, only_arrays
from privet.federation.flower.mod import name_of
from privet.federation.flower.plan import Plan
from privet.images import ImageSet
from privet.images.augment import augmentation_for
from privet.learning.runtime import Runtime
from privet.models import create_model
from privet.seeds import derive, generator


def client_app(plan: Plan, images_of: Callable[[Context], ImageSet], *, runtime: Runtime) -> ClientApp:
    """Return the ClientApp of a federation in this process.

    Args:
        plan: of the federation.
        images_of: returns the images of the node with this context.
        runtime: where it trains.
    """
    app = ClientApp(mods=[plan.mod(lambda context: first_model(plan, images_of(context)))])
    networks: list[nn.Module] = []

    @app.train()
    def train(message: Message, context: Context) -> Message:
        images = images_of(context)
        if not networks:
            networks.append(network_for(plan, images, runtime=runtime))
        return answer(message, context, plan, images, networks[0], runtime=runtime)

    return app


def first_network(plan: Plan, images: ImageSet) -> nn.Module:
    """Return the network that a federation begins with; it follows from the plan, wherever it is made."""
    seed = derive(plan.seed, "weights")
    return create_model(plan.architecture, classes=images.classes, size=images.size, seed=seed)


def first_model(plan: Plan, images: ImageSet) -> Arrays:
    """Return the arrays of the first network."""
    return arrays_of(ArrayRecord(first_network(plan, images).state_dict()))


def network_for(plan: Plan, images: ImageSet, *, runtime: Runtime) -> nn.Module:
    """Return the network that clients with such images train, in its place."""
    return runtime.place(create_model(plan.architecture, classes=images.classes, size=images.size))


def answer(
    message: Message, context: Context, plan: Plan, images: ImageSet, network: nn.Module, *, runtime: Runtime
) -> Message:
    """Train on a client's images from the model in a message, and return what came of it.

    Args:
        message: with the model and the round.
        context: of the node.
        plan: says how to train.
        images: of the client.
        network: into which the model is put.
        runtime: where it trains.
    """
    key, arrays = only_arrays(message.content)
    network.load_state_dict(arrays.to_torch_state_dict())
    config = next(iter(message.content.config_records.values()))
    number = int(str(config["server-round"]))
    loss = train_locally(network, images, plan, round=number, name=name_of(context), runtime=runtime)
    metrics = MetricRecord({"num-examples": len(images), "loss": loss})
    content = RecordDict({key: ArrayRecord(network.state_dict()), "metrics": metrics})
    return Message(content, reply_to=message)


def steps_of(plan: Plan, images: int) -> tuple[int, int]:
    """Return a client's batch size, and how many steps it takes in a round."""
    batch = min(plan.batch_size, images)
    return batch, plan.local_epochs * -(-images // batch)


def train_locally(
    network: nn.Module, images: ImageSet, plan: Plan, *, round: int, name: str, runtime: Runtime
) -> float:
    """Train a network in place, and return its mean loss.

    The images are put into an order once a round, and gone through round and round in batches of one
    size, so that an update is told completely by batch size, steps and number of images.

    Args:
        network: on the runtime's device.
        images: of the client; there is at least one.
        plan: says how.
        round: from 1; it and the name seed the order and the views.
        name: of the client.
        runtime: where it trains.
    """
    count = len(images)
    batch, steps = steps_of(plan, count)
    pixels, labels = runtime.hold(images.pixels), runtime.hold(images.labels)
    order = torch.randperm(count, generator=generator(plan.seed, "order", round, name))
    randomness = generator(plan.seed, "views", round, name, device=runtime.device)
    augmentation = augmentation_for(images.size) if plan.augment else None
    torch.manual_seed(derive(plan.seed, "dropout", round, name))
    optimizer = torch.optim.SGD(network.parameters(), plan.learning_rate)
    network.train()
    total = torch.zeros((), device=runtime.device)
    for step in range(steps):
        index = order[torch.arange(step * batch, (step + 1) * batch) % count]
        x = runtime.take(pixels, index)
        if augmentation is not None:
            x = augmentation.draw(batch, images.size, randomness).apply(x)
        with runtime.autocast():
            loss = F.cross_entropy(network(x.float() / 255).float(), runtime.take(labels, index))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        total += loss.detach()
    return float(total) / steps
