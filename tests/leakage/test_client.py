"""The client's computation, batched, against plain PyTorch; and the optimiser against others."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from tests.leakage.victims import victims
from torch import Tensor, nn

from privet.leakage.base import Inversion
from privet.leakage.client import Client, network_of
from privet.leakage.dlg import DLG
from privet.leakage.grnn import GRNN, NOISE, draw
from privet.leakage.ig import IG
from privet.leakage.lbfgs import LBFGS
from privet.leakage.objective import Evidence
from privet.leakage.problem import GUESSES, Problem, guess
from privet.leakage.regularise import NEIGHBOURS
from privet.learning import Treatment, Update

CPU = torch.device("cpu")


def client_of(updates: list[Update], dtype: torch.dtype = torch.float64) -> Client:
    return Client.of(updates, network_of(updates[0]), device=CPU, dtype=dtype)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(
    "architecture", ["lenet", "lenet-strided-sigmoid-w4", "resnet8-w4", "resnet8-sigmoid-w4", "vit-w16"]
)
def test_gradients_are_the_client_s(architecture: str, mode: str) -> None:
    """In double precision: with ReLU, a rounding error can switch a unit, and much with it."""
    found = victims(2, architecture=architecture, mode=mode, batch_size=3)
    x = torch.stack([victim.images.double() for victim in found if victim.images is not None])
    labels = torch.tensor([victim.labels for victim in found])
    # Other weights for the second member.
    second = {
        name: value * 1.1 if value.is_floating_point() else value
        for name, value in found[1].update.weights.items()
    }
    updates = [found[0].update, replace(found[1].update, weights=second)]
    gradient = client_of(updates).gradient(x, F.one_hot(labels, 3).double())
    for index, update in enumerate(updates):
        model = loaded(update).double().train(mode == "train")
        loss = F.cross_entropy(model(x[index]), labels[index])
        slopes = torch.autograd.grad(loss, list(model.parameters()))
        for (name, _), slope in zip(model.named_parameters(), slopes, strict=True):
            torch.testing.assert_close(gradient[name.removeprefix("network.")][index], slope)


def loaded(update: Update) -> nn.Module:
    model = network_of(update)
    model.load_state_dict(
        {name: update.weights[name.removeprefix("network.")] for name in model.state_dict()}
    )
    return model


@pytest.mark.parametrize(("steps", "images"), [(3, 2), (4, 6)])
def test_local_steps_are_followed(steps: int, images: int) -> None:
    victim = victims(1, batch_size=images, local_steps=steps, learning_rate=0.5)[0]
    update = victim.update
    if images == 6:  # a third of the images in each step, round and round
        update = by_hand(replace(update, batch_size=2), victim.images, victim.labels)
    x = torch.stack([victim.images.double()] * 2)  # type: ignore[union-attr]
    y = F.one_hot(torch.tensor([victim.labels] * 2), 3).double()
    gradient = client_of([update, update]).gradient(x, y)
    values, _ = update.as_gradient()
    for name, value in values.items():
        torch.testing.assert_close(gradient[name][1].float(), value, atol=1e-5, rtol=1e-3)


def by_hand(update: Update, images: Tensor | None, labels: tuple[int, ...]) -> Update:
    """Train with torch.optim.SGD on a copy of the network."""
    assert images is not None and update.learning_rate is not None
    model = loaded(update)
    optimizer = torch.optim.SGD(model.parameters(), update.learning_rate)
    for step in range(update.local_steps):
        index = [(2 * step + i) % 6 for i in range(2)]
        optimizer.zero_grad()
        F.cross_entropy(model(images[index]), torch.tensor(labels)[index]).backward()
        optimizer.step()
    after = {name.removeprefix("network."): value.detach() for name, value in model.named_parameters()}
    return replace(update, values={name: after[name] - update.weights[name] for name in after})


def test_grey_networks() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(4 * 196, 3))
    x, labels = torch.rand(2, 1, 16, 16), torch.tensor([0, 1])
    gradient = torch.autograd.grad(F.cross_entropy(model(x), labels), list(model.parameters()))
    update = Update.of(
        model, gradient, architecture="mine", classes=3, size=(16, 16), batch_size=2, channels=1
    )
    client = Client.of([update] * 2, model, device=CPU, dtype=torch.float32)
    found = client.gradient(torch.stack([x] * 2), F.one_hot(torch.stack([labels] * 2), 3).float())
    torch.testing.assert_close(found["3.bias"][0], update.values["3.bias"])


@pytest.mark.parametrize(
    ("side", "parameters"), [(32, 710_988), (64, 1_825_868), (128, 5_235_276), (256, 16_772_684)]
)
def test_the_generator_is_the_released_one(side: int, parameters: int) -> None:
    weights = GRNN.preset("faithful")._start(problem(side, members=1))
    assert sum(value.numel() for value in weights.values()) == parameters


def problem(side: int, *, members: int, grey: bool = False, known: bool = True) -> Problem:
    update = victims(1)[0].update
    update = replace(update, size=(side, side), grey=grey, batch_size=2, images=2)
    client = Client(module=nn.Identity(), parameters={}, buffers={}, sent={}, update=update)
    evidence = Evidence.of([update] * members, aware=True, device=CPU, dtype=torch.float32)
    labels = torch.zeros(members, 2, dtype=torch.int64) if known else None
    starts = tuple(range(members))
    return Problem(
        client=client,
        evidence=evidence,
        unit=evidence.energy,
        known=labels,
        bias=None,
        victims=torch.arange(members),
        starts=starts,
        seed=0,
    )


def sent_with(defence: str) -> tuple[Problem, Tensor, Tensor]:
    """Return the problem that ig makes of an update, the true gradient, and what was sent."""
    true, update = victims(1)[0].update, victims(1, defence=defence)[0].update
    task = IG()._problem(
        [update] * 2,
        network_of(update),
        known=[torch.tensor([0])] * 2,
        victims=torch.zeros(2),
        starts=(0, 0),
        seed=0,
        device=CPU,
    )
    gradient, sent = (
        torch.cat([value.double().flatten() for value in one.values.values()]) for one in (true, update)
    )
    return task, gradient, sent


@pytest.mark.parametrize("defence", ["gaussian-0.004", "laplace-0.003", "laplace-0.01", "gaussian-0.02"])
def test_the_floor_of_ig_is_the_angle_that_noise_leaves(defence: str) -> None:
    task, gradient, sent = sent_with(defence)
    angle = 1 - float(F.cosine_similarity(gradient, sent, dim=0))
    assert float(IG()._floor(task)[0]) == pytest.approx(angle, rel=0.15)


@pytest.mark.parametrize(("defence", "variance"), [("gaussian-0.02", 4e-4), ("laplace-0.01", 2e-4)])
def test_ig_under_noise_looks_for_the_most_probable_image(defence: str, variance: float) -> None:
    """Its distance and its smoothing are in the proportion of minus the two log-probabilities."""
    task, _, sent = sent_with(defence)
    torch.manual_seed(0)
    apart = torch.randn(len(sent), dtype=torch.float64)
    apart -= sent * (apart @ sent) / (sent @ sent)
    apart *= 1e-2 * sent.norm() / apart.norm()
    likelihood = float(apart.square().sum()) / (2 * variance)
    sizes = [value[0].numel() for value in task.evidence.low.values()]
    parts = zip(task.evidence.low.items(), (sent + apart).split(sizes), strict=True)
    found = {name: torch.stack([part.view(value[0].shape)] * 2).float() for (name, value), part in parts}
    distance = IG()._distance(task, found)
    x = torch.rand(2, 1, 3, 16, 16)
    down, across = x[0].diff(dim=2), x[0].diff(dim=3)
    neighbours = float(down.square().sum() + across.square().sum())
    prior = neighbours / (2 * NEIGHBOURS**2)
    smooth = IG(total_variation=0)._loss(task, x, torch.zeros(2))
    assert float(smooth[0]) / prior == pytest.approx(float(distance[0]) / likelihood, rel=0.1)


def test_the_unit_of_distances_is_what_random_images_leave() -> None:
    """It is the same for a victim's restarts, and does not depend on what else is attacked."""
    updates = [victim.update for victim in victims(2)]

    def units(which: list[int], labels: str = "infer") -> Tensor:
        chosen = [updates[i] for i in which]
        known = [torch.tensor(update.labels) if update.labels else torch.tensor([1]) for update in chosen]
        made = IG(labels=labels)._problem(
            chosen,
            network_of(updates[0]),
            known=known if labels == "infer" else [None] * len(chosen),
            victims=torch.tensor(which),
            starts=tuple(range(len(which))),
            seed=0,
            device=CPU,
        )
        slow = torch.zeros(len(which))
        for number in range(GUESSES):
            x, y = guess(made, number)
            assert x.shape == (len(which), 1, 3, 16, 16) and bool(torch.equal(x[0], x[-1]))
            found = made.client.gradient(x, y)
            for name, value in found.items():
                slow += (value - made.evidence.low[name]).flatten(1).square().sum(1) / GUESSES
        torch.testing.assert_close(made.unit, slow)
        return made.unit

    both = units([0, 1, 0, 1])
    assert float(both[0]) == float(both[2]) != float(both[1]) == float(both[3])
    torch.testing.assert_close(units([1, 1])[0], both[1])
    assert bool((units([0, 1], "joint") > 0).all())


def test_tensors_that_hardly_depend_on_the_image_are_not_heard() -> None:
    """Behind saturated units the last layer's gradient is large and always the same."""
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(784, 8), nn.Sigmoid(), nn.Linear(8, 3)
    )
    with torch.no_grad():
        network[3].bias.fill_(14.0)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    slope = F.cross_entropy(network(images), torch.tensor([0, 1]))
    values = dict(
        zip(
            dict(network.named_parameters()),
            torch.autograd.grad(slope, list(network.parameters())),
            strict=True,
        )
    )
    update = Update.of(
        network, values, architecture="own", classes=3, size=(16, 16), batch_size=2, labels=(0, 1)
    )

    def made(inversion: Inversion, noise: float = 0.0) -> Problem:
        sent = replace(
            update, treatment=Treatment(noise="gaussian", noise_scale=noise) if noise else Treatment()
        )
        labels = torch.tensor([0, 1])
        return inversion._problem(
            [sent] * 2, network, known=[labels] * 2, victims=torch.zeros(2), starts=(0, 0), seed=0, device=CPU
        )

    heard = {name: value.tolist() for name, value in made(GRNN()).evidence.heard.items()}
    deaf = [name for name, value in heard.items() if value == [0.0, 0.0]]
    assert sorted(deaf) == ["5.bias", "5.weight"] and heard["0.weight"] == [1.0, 1.0]
    for other in (made(DLG()), made(GRNN(), noise=0.1), made(GRNN.preset("faithful"))):
        assert all(value.tolist() == [1.0, 1.0] for value in other.evidence.heard.values())


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize(("side", "whole"), [(16, 16), (32, 32), (20, 32)])
def test_the_generator_against_torch_s_layers(side: int, whole: int, grey: bool) -> None:
    """One member at a time, made of ConvTranspose2d, Upsample, Conv2d, BatchNorm2d and GLU."""
    task = problem(side, members=2, grey=grey)
    weights = GRNN(width=4, coded=False)._start(task)
    coded = GRNN(width=4)._start(task)
    z = task.draw("z", 2, NOISE)
    drawn = draw(weights, z, (side, side))
    assert drawn.shape == (2, 2, 1 if grey else 3, side, side)
    torch.testing.assert_close(draw(coded, z, (side, side)), drawn)
    assert "first" not in coded
    for member in range(2):
        own = {name: value[member] for name, value in weights.items()}
        first = nn.ConvTranspose2d(NOISE, len(own["bias"]), 4)
        first.weight.data = own["first"].view(NOISE, -1, 4, 4)
        first.bias.data = own["bias"]  # type: ignore[union-attr]
        u = nn.GLU(1)(first(z[member, :, :, None, None]))
        for block in range(int(np.log2(whole)) - 2):
            weight = own[f"conv{block}"]
            conv = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1, bias=False)
            conv.weight.data = weight
            u = nn.GLU(1)(nn.BatchNorm2d(len(weight))(conv(nn.Upsample(scale_factor=2)(u))))
        cut = (whole - side) // 2
        expected = u.sigmoid()[:, :, cut : cut + side, cut : cut + side]
        torch.testing.assert_close(drawn[member], expected, atol=1e-5, rtol=1e-4)


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[:, 1:] - x[:, :-1] ** 2) ** 2 + (1 - x[:, :-1]) ** 2).sum(1)


def test_l_bfgs_finds_minima_one_by_one() -> None:
    def value(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        loss = rosenbrock(x)
        return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]

    start = torch.tensor([[-1.2, 1.0, 0.5], [2.0, -1.0, 0.0], [torch.nan, 0.0, 0.0]], dtype=torch.float64)
    search = LBFGS(value, start)
    alone = LBFGS(value, start[1:2])
    assert search.active.tolist() == [True, True, False]
    for _ in range(80):
        before = search.loss.clone()
        search.step()
        alone.step()
        assert bool((search.loss[:2] <= before[:2]).all())
    torch.testing.assert_close(search.point[:2], torch.ones(2, 3, dtype=torch.float64))
    torch.testing.assert_close(search.point[1], alone.point[0], atol=1e-9, rtol=0)
    scipy = minimize(lambda x: float(rosenbrock(torch.tensor(x)[None])), start[0].numpy(), method="L-BFGS-B")
    assert float(search.loss[0]) <= scipy.fun


def test_l_bfgs_stops_at_a_jump() -> None:
    """Left of 0 the loss jumps up: no step along the gradient is better than the point just right of it."""

    def value(x: Tensor) -> tuple[Tensor, Tensor]:
        loss = torch.where(x < 0, x + 5, x).sum(1)
        return loss, torch.ones_like(x)

    search = LBFGS(value, torch.tensor([[0.0]], dtype=torch.float64))
    for _ in range(3):
        search.step()
    assert not bool(search.active[0])
    assert float(search.point[0, 0]) == 0
