"""What batch norm's buffers say of a client's batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tests.leakage.victims import victims
from torch import Tensor, nn

from privet.errors import UsageError
from privet.leakage import GRNN, IG
from privet.leakage.client import Client, network_of
from privet.leakage.moments import disagreement, mismatch, sent_moments
from privet.leakage.problem import Problem
from privet.leakage.victims import Victim
from privet.learning import Runtime

NETWORK = "resnet8-sigmoid-w4"


def sending(**settings: object) -> Victim:
    return victims(1, architecture=NETWORK, batch_size=3, statistics=True, **settings)[0]


@pytest.mark.parametrize("momentum", [0.1, 0.3, None])
def test_the_moments_of_the_batch_come_out(momentum: float | None) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, momentum=momentum))
    for _ in range(3):
        network(torch.rand(4, 3, 8, 8))
    victim = sending()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    x = torch.rand(2, 3, 8, 8) ** 2
    seen = network[0](x)
    network(x)
    update = replace(
        victim.update,
        weights=before,
        values={"0.bias": torch.zeros(5)},
        statistics={name: value for name, value in network.state_dict().items() if "running" in name},
    )
    (found,) = sent_moments(update, network).values()
    expected = torch.stack((seen.mean((0, 2, 3)), seen.transpose(0, 1).flatten(1).var(1)))
    torch.testing.assert_close(found.float(), expected, atol=1e-5, rtol=1e-4)


def test_the_client_s_own_images_have_the_moments_that_it_sent() -> None:
    victim = sending()
    assert victim.images is not None
    network = network_of(victim.update)
    client = Client.of([victim.update] * 2, network, device=torch.device("cpu"), dtype=torch.float64)
    y = F.one_hot(torch.tensor([victim.labels] * 2), 3).double()
    sent = {name: torch.stack([one] * 2) for name, one in sent_moments(victim.update, network).items()}
    assert len(sent) == sum(isinstance(part, nn.BatchNorm2d) for part in network.modules())

    def apart(x: Tensor) -> Tensor:
        return mismatch(client.simulate(torch.stack([x.double()] * 2), y)[1], sent)

    assert float(apart(victim.images).max()) < 1e-6
    assert float(apart(victim.images.roll(1, 1)).min()) > 1e-2
    # The moments of what nobody sent are not computed.
    silent = replace(victim.update, statistics={})
    client = Client.of([silent] * 2, network, device=torch.device("cpu"), dtype=torch.float64)
    assert client.simulate(torch.stack([victim.images.double()] * 2), y)[1] == {}


def test_the_mismatch_is_in_units_of_the_variance() -> None:
    sent = {"a": torch.tensor([[[0.0, 0.0], [4.0, 2.0]]])}
    found = {"a": torch.tensor([[[2.0, 0.0], [4.0, 6.0]]])}
    # First channel: mean off by one standard deviation; second: variance three times as large.
    assert float(mismatch(found, sent)) == pytest.approx((1 + 4) / 2)


def test_what_says_nothing_certain_is_not_used() -> None:
    network = network_of(sending().update)
    assert sent_moments(sending(local_steps=2).update, network) == {}
    assert sent_moments(sending(mode="eval").update, network) == {}
    silent = victims(1, architecture=NETWORK, batch_size=3)[0].update
    assert silent.statistics == {}
    assert sent_moments(silent, network) == {}


@pytest.mark.parametrize(
    ("inversion", "weight"), [(IG(steps=40), 1.0), (GRNN(steps=40, polish=0), 10.0)], ids=["ig", "grnn"]
)
def test_attacks_use_them(inversion: IG | GRNN, weight: float, runtime: Runtime) -> None:
    """The moments of what comes out are nearer to those that were sent than without the term."""
    victim = sending()
    network = network_of(victim.update)
    client = Client.of([victim.update] * 2, network, device=torch.device("cpu"), dtype=torch.float32)
    sent = {
        name: torch.stack([one] * 2).float() for name, one in sent_moments(victim.update, network).items()
    }

    def apart(batch_norm: float) -> float:
        result = replace(inversion, batch_norm=batch_norm).invert([victim.update], runtime=runtime)[0]
        y = F.one_hot(torch.stack([result.labels] * 2), 3).float()
        return float(mismatch(client.simulate(torch.stack([result.images] * 2), y)[1], sent)[0])

    assert apart(weight) < 0.8 * apart(0.0)


def test_a_network_without_batch_norm_has_none_to_send() -> None:
    with pytest.raises(UsageError, match="lenet has no batch norm"):
        victims(1, architecture="lenet", statistics=True)


def test_disagreement_is_that_of_a_victim_s_own_restarts() -> None:
    torch.manual_seed(0)
    x = torch.rand(5, 2, 3, 4, 4, dtype=torch.float64)
    found = disagreement(x, torch.tensor([7, 2, 7, 2, 7]))
    for own in ([0, 2, 4], [1, 3]):
        for i in own:
            mean = sum(x[j] for j in own) / len(own)
            expected = sum(float((x[i] - mean).square()[k].sum()) for k in range(2)) / x[i].numel()
            assert float(found[i]) == pytest.approx(expected)
    assert float(disagreement(x[:2], torch.tensor([0, 1])).abs().max()) == 0


def test_members_that_are_done_have_no_say() -> None:
    x = torch.rand(4, 2, 3, 4, 4, dtype=torch.float64)
    broken = x.clone()
    broken[1] = torch.nan
    victims, counted = torch.tensor([0, 0, 0, 1]), torch.tensor([True, False, True, False])
    found = disagreement(broken, victims, counted)
    torch.testing.assert_close(found[[0, 2]], disagreement(x[[0, 2]], victims[[0, 2]]))
    assert bool(torch.isfinite(found[3]))


def test_a_group_does_not_depend_on_who_leaves_when(runtime: Runtime) -> None:
    """A restart that is done stays beside the last one of a victim alone, and leaves the stack of several."""

    class Early(IG):
        def _floor(self, problem: Problem) -> Tensor:
            return torch.tensor([1e9 if start == 0 else 0.0 for start in problem.starts])

    sent = [one.update for one in victims(2, architecture=NETWORK, batch_size=2, statistics=True)]
    inversion = Early(steps=30, restarts=2, group=5.0)
    together = inversion.invert(sent, runtime=runtime)
    for update, beside in zip(sent, together, strict=True):
        alone = inversion.invert([update], runtime=runtime)[0]
        assert alone.distances == beside.distances
        assert torch.equal(alone.images, beside.images)


@pytest.mark.parametrize("inversion", [IG(steps=12, restarts=3), GRNN(steps=12, restarts=3, polish=0)])
def test_restarts_come_closer_in_a_group(inversion: IG | GRNN, runtime: Runtime) -> None:
    """And whatever other victims are attacked beside it changes nothing; without statistics nor does the group."""
    update, other = (one.update for one in victims(2, architecture=NETWORK, batch_size=2, statistics=True))
    grouped = replace(inversion, group=1.0)
    alone = grouped.invert([update], runtime=runtime)[0]
    beside = grouped.invert([other, update], runtime=runtime, together=4)[1]
    assert torch.equal(alone.images, beside.images)
    assert alone.distances == beside.distances
    plain = inversion.invert([update], runtime=runtime)[0]
    assert not torch.equal(alone.images, plain.images)
    unsent = replace(update, statistics={})
    same = [one.invert([unsent], runtime=runtime)[0].images for one in (inversion, grouped)]
    assert torch.equal(*same)


def test_the_threat_model_says_that_they_were_sent() -> None:
    from privet.leakage.victims import threat_model

    assert "batch norm's statistics after the step" in threat_model(sending().update, aware=True)[1]
    assert "(not used)" in threat_model(sending(local_steps=2).update, aware=True)[1]
    assert "batch norm" not in threat_model(replace(sending().update, statistics={}), aware=True)[1]
