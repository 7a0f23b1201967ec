"""TAP: images that a network takes for the next class."""

from __future__ import annotations

from pathlib import Path

import torch
from tests.conftest import blobs

from privet.images import open_images
from privet.learning import Runtime, accuracy
from privet.models import load_model
from privet.protection import TAP, publish


def test_the_surrogate_takes_written_files_for_the_next_class(runtime: Runtime, tmp_path: Path) -> None:
    images = blobs(60)
    method = TAP(
        surrogate="cnn-w8",
        epochs=40,
        batch_size=16,
        noise_steps=20,
        step_size=4,
        epsilon=40,
        restarts=2,
        flip=False,
    )
    publish(images, method, tmp_path / "out", runtime=runtime)
    model, _ = load_model(tmp_path / "out/surrogate.safetensors")
    protected = open_images(tmp_path / "out")
    assert accuracy(model.eval(), images, runtime=runtime) > 0.9
    with torch.no_grad():
        taken_for = model(protected.pixels.float() / 255).argmax(1)
    assert float((taken_for == (protected.labels + 1) % 3).float().mean()) > 0.8


def test_the_best_of_several_attacks_is_kept(runtime: Runtime) -> None:
    """More restarts share the first attack's draws, so that no image can come out worse."""
    from privet.protection import Job

    images = blobs(20)
    losses = []
    for restarts in (1, 4):
        method = TAP(surrogate="cnn-w4", epochs=3, batch_size=8, noise_steps=2, restarts=restarts, flip=False)
        perturb = method._perturb(images, Job(runtime=runtime))
        delta = perturb(torch.arange(20), torch.Generator().manual_seed(0))
        model = method._train(images, _batches(images, runtime), Job(runtime=runtime))
        with torch.no_grad():
            logits = model(((images.pixels + delta) / 255).clamp(0, 1))
        losses.append(torch.nn.functional.cross_entropy(logits, (images.labels + 1) % 3, reduction="none"))
    assert bool((losses[1] <= losses[0] + 1e-5).all())
    assert bool((losses[1] < losses[0] - 1e-4).any())


def _batches(images, runtime):  # type: ignore[no-untyped-def]
    from privet.protection.minimise import Batches

    return Batches(images, runtime)
