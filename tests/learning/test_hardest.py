from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.conftest import blobs

from privet.images.distort import distort
from privet.learning import Learner, Runtime, learn
from privet.learning import hardest as module
from privet.learning.hardest import hardest
from privet.models import create_model

TINY = Learner(architecture="cnn-w4", epochs=4, batch_size=8, distort=True, draws=3, hard_share=0.5)


def test_the_highest_loss_is_chosen(runtime: Runtime) -> None:
    model = create_model("cnn-w8", classes=3, size=(12, 12)).eval().requires_grad_(False)
    x, labels = torch.rand(9, 3, 12, 12), torch.arange(9) % 3
    draws = torch.Generator().manual_seed(5)
    distortions = [distort(x, draws) for _ in range(4)]
    expected, positions = [], []
    for index in range(9):
        losses = [
            float(F.cross_entropy(model(one[index : index + 1]), labels[index : index + 1]))
            for one in distortions
        ]
        positions.append(losses.index(max(losses)))
        expected.append(distortions[positions[-1]][index])
    assert len(set(positions)) > 1
    found = hardest(model, x, labels, draws=4, generator=torch.Generator().manual_seed(5), runtime=runtime)
    assert torch.equal(found, torch.stack(expected))


def test_one_draw_asks_no_network(runtime: Runtime) -> None:
    x = torch.rand(3, 3, 8, 8)
    found = hardest(
        torch.nn.Module(),
        x,
        torch.zeros(3),
        draws=1,
        generator=torch.Generator().manual_seed(1),
        runtime=runtime,
    )
    assert torch.equal(found, distort(x, torch.Generator().manual_seed(1)))


def test_only_the_first_epochs_draw_several(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def count(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return distort(x, generator)

    monkeypatch.setattr(module, "distort", count)
    learn(blobs(16), blobs(9), TINY, runtime=runtime)
    assert calls == 2 * (3 + 3 + 1 + 1)  # two steps an epoch
