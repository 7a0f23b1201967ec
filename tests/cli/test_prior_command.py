"""Priors on the command line: which are told to be worth little, and which are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.conftest import blobs

from privet.cli import main
from privet.learning import Runtime
from privet.protection import RandomNoise, publish
from privet.recovery import PriorTraining, train_prior

pytest.importorskip("diffusers", reason="the extra 'diffusion' is not installed")

Make = Callable[..., Path]
QUICK = ["--scale", "tiny", "--steps", "1", "--batch-size", "4", "--device", "cpu"]
BLIND = "Doubt: this prior is blind: its error is 1."


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")


@pytest.fixture
def prior(tmp_path: Path, runtime: Runtime) -> Path:
    training = PriorTraining(scale="tiny", steps=1, batch_size=4)
    train_prior(blobs(8), training, tmp_path / "prior", runtime=runtime)
    return tmp_path / "prior"


def recover(images: Path, method: str, prior: Path, out: Path) -> int:
    return main(
        [
            *("recover", str(images), "--method", method, "--prior", str(prior), "--out", str(out)),
            *("--device", "cpu"),
        ]
    )


def test_a_prior_that_knows_nothing_is_called_so_wherever_it_is_met(
    tmp_path: Path, make_folder: Make, prior: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = make_folder(blobs(6))
    assert main(["prior", "train", str(images), "--out", str(tmp_path / "new"), *QUICK]) == 0
    assert BLIND in capsys.readouterr().out
    assert main(["prior", "info", str(prior)]) == 0
    assert BLIND in capsys.readouterr().out
    assert recover(images, "versions", prior, tmp_path / "one") == 0
    assert BLIND in capsys.readouterr().out

    about = json.loads((prior / "prior.json").read_text())
    (prior / "prior.json").write_text(json.dumps({**about, "loss": 0.2}))
    assert main(["prior", "info", str(prior)]) == 0
    assert recover(images, "purify-1", prior, tmp_path / "two") == 0
    assert "Doubt" not in capsys.readouterr().out


@pytest.mark.parametrize("method", ["jpeg-10", "none", "projection+jpeg-75", "dvae-4"])
def test_a_prior_that_the_method_does_not_use_is_refused(
    tmp_path: Path, make_folder: Make, prior: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    assert recover(make_folder(blobs(6)), method, prior, tmp_path / "out") == 2
    assert f"{method} does not denoise with a prior: leave --prior out." in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_prior_of_protected_images_is_doubted(
    tmp_path: Path, make_folder: Make, runtime: Runtime, capsys: pytest.CaptureFixture[str]
) -> None:
    clean = make_folder(blobs(6))
    publish(blobs(6), RandomNoise(), tmp_path / "protected", runtime=runtime)
    words = "was protected with random: a prior that learns its noise takes none of it off"
    for images, expected in ((tmp_path / "protected", True), (clean, False)):
        out = tmp_path / f"prior of {images.name}"
        assert main(["prior", "train", str(images), "--out", str(out), *QUICK]) == 0
        assert (words in capsys.readouterr().out) is expected


def test_a_prior_of_no_numbers_recovers_nothing(
    tmp_path: Path, make_folder: Make, prior: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import safetensors.torch

    weights = prior / "unet/diffusion_pytorch_model.safetensors"
    state = safetensors.torch.load_file(weights)
    safetensors.torch.save_file(
        {name: torch.full_like(one, torch.nan) for name, one in state.items()}, weights
    )
    assert recover(make_folder(blobs(6)), "purify", prior, tmp_path / "out") == 3
    assert "holds values that are no numbers" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
