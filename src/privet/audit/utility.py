"""What a defence costs in accuracy: a network trained by clients who all defend what they send."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict

import torch
from torch import Tensor, nn

from privet.audit.leakage_plan import Clients
from privet.images import ImageSet
from privet.leakage.defences import Defence
from privet.leakage.moments import batch_norms
from privet.leakage.victims import Victim, simulate
from privet.learning import Runtime
from privet.learning.train import accuracy
from privet.learning.update import short
from privet.progress import Progress, silent
from privet.seeds import derive

LEARNING_RATE = 1e-3


def defended_accuracy(
    model: nn.Module,
    images: ImageSet,
    test: ImageSet,
    *,
    architecture: str,
    clients: Clients,
    defence: Defence | None,
    rounds: int,
    seed: int,
    runtime: Runtime,
    progress: Progress = silent,
) -> float:
    """Return the accuracy of a network that learned from defended updates alone.

    In every round clients with new images send what the attacked ones send, and the server applies
    the mean with Adam (FedAdam, Reddi et al., arXiv 2003.00295), to which the length of updates means
    nothing: whoever clips or sends signs needs no learning rate of its own. Batch norm's buffers are
    the clients' mean, undefended.

    Args:
        model: where it starts; left as it is.
        images: the clients' images, drawn anew every round.
        test: with the same classes.
        architecture: the network's name.
        clients: as they are attacked.
        defence: what each does before it sends, or None.
        rounds: steps of the server.
        seed: of the images that are drawn, and of the defence.
        runtime: where accuracy is measured; clients compute on the processor.
        progress: told about rounds.
    """
    trained = copy.deepcopy(model).cpu().train()
    parameters = {short(name): value for name, value in trained.named_parameters()}
    buffers = {short(name): value for name, value in trained.named_buffers()}
    server = torch.optim.Adam(parameters.values(), LEARNING_RATE)
    told = {**asdict(clients), "statistics": bool(batch_norms(trained))}
    for number in range(rounds):
        drawn = derive(seed, "round", number)
        sent = simulate(trained, images, architecture=architecture, defence=defence, seed=drawn, **told)
        gradients = [one.update.as_gradient()[0] for one in sent]
        for name, value in parameters.items():
            value.grad = _mean([one[name] for one in gradients])
        server.step()
        _take_over(buffers, sent)
        progress(f"training with {defence.name}" if defence else "training", number + 1, rounds)
    return accuracy(trained.to(runtime.device), test, runtime=runtime)


def _take_over(buffers: dict[str, Tensor], sent: Sequence[Victim]) -> None:
    """Give batch norm's buffers the mean of what the clients sent."""
    for name in sent[0].update.statistics:
        buffers[name].copy_(_mean([one.update.statistics[name] for one in sent]))


def _mean(values: Sequence[Tensor]) -> Tensor:
    return torch.stack([value.float() for value in values]).mean(0)
