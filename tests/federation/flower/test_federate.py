"""Whole federations: killed and resumed, their pages, and their updates under attack."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.conftest import blobs, stop_after
from torch import Tensor

from privet.cli import main
from privet.errors import InputError, OutputError, UsageError
from privet.federation.flower import client
from privet.federation.flower.federate import federate
from privet.federation.flower.plan import CODEC_NAMES, Plan
from privet.leakage.client import Client, network_of
from privet.leakage.moments import sent_moments
from privet.leakage.victims import step
from privet.learning import Runtime, Update, load_update
from privet.report import write_federation
from privet.report.federation import render_federation
from privet.seeds import generator

Make = Callable[..., Path]
PLAN = Plan(
    architecture="cnn-w4",
    clients=5,
    alpha=1.0,
    rounds=4,
    fraction=0.6,
    batch_size=8,
    budget="5%",
    download_budget="5%",
    augment=False,
)
WHOLE: dict[str, Any] = {"codec": "none", "download": "none", "budget": "", "download_budget": ""}
TRAIN, TEST = blobs(120), blobs(30, seed=1)


def play(out: Path, runtime: Runtime, plan: Plan = PLAN, **more: Any) -> dict[str, Any]:
    return federate(TRAIN, TEST, plan, out, runtime=runtime, source={"train": "blobs"}, **more)


def test_it_learns_and_says_what_it_took(tmp_path: Path, runtime: Runtime) -> None:
    report = play(tmp_path, runtime, replace(PLAN, rounds=16, learning_rate=0.1))
    assert report["accuracy"]["last"] > 0.9  # of three classes
    assert [one["round"] for one in report["rounds"]] == list(range(1, 17))
    assert report["participations"] == 48
    moved = report["bytes"]
    assert moved["updates"] < moved["up"] and moved["whole_models"] == 2 * 48 * moved["model"]
    assert all(one["laws"].keys() == set(one["chosen"]) for one in report["rounds"])
    page = write_federation(report, tmp_path).read_text("utf-8")
    assert page.count("<svg") == 4 and "None was left out" in page and "mean of the last 10" in page
    assert f"on {report['tested']} test images: uncertain by up to ±" in page
    few = {**report, "rounds": report["rounds"][:8]}
    assert "mean of the last 8" in render_federation(few)


@pytest.mark.parametrize("strategy", ["fedavg", "fedavgm", "fedadam"])
@pytest.mark.parametrize("kills", [1, 2])
def test_killed_and_resumed(strategy: str, kills: int, tmp_path: Path, runtime: Runtime) -> None:
    plan = replace(PLAN, strategy=strategy, schedule="exponential", decay=0.2)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    play(whole, runtime, plan, record=2)
    for _ in range(kills):
        with pytest.raises(KeyboardInterrupt):
            play(parts, runtime, plan, record=2, progress=stop_after(1))
    play(parts, runtime, plan, record=2)
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    assert len(files) == 3 + 4
    for file in files:
        assert (whole / file).read_bytes() == (parts / file).read_bytes(), file


def test_a_folder_of_another_federation(tmp_path: Path, runtime: Runtime) -> None:
    play(tmp_path, runtime, replace(PLAN, rounds=1))
    with pytest.raises(OutputError, match=r"other settings: plan\.budget was .* and is \"2%\" now"):
        play(tmp_path, runtime, replace(PLAN, rounds=1, budget="2%"))


def test_a_damaged_checkpoint(tmp_path: Path, runtime: Runtime) -> None:
    with pytest.raises(KeyboardInterrupt):
        play(tmp_path, runtime, progress=stop_after(2))
    (tmp_path / ".privet" / "server.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match="damaged"):
        play(tmp_path, runtime)


def test_fewer_bytes_than_whole_models(tmp_path: Path, runtime: Runtime) -> None:
    whole = play(tmp_path / "whole", runtime, replace(PLAN, **WHOLE))
    few = play(tmp_path / "few", runtime)
    assert few["bytes"]["up"] < whole["bytes"]["up"] / 2
    assert few["bytes"]["down"] < whole["bytes"]["down"]


NO_NUMBERS = (math.nan, math.inf)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"codec": "zip"}, "Unknown codec 'zip'; expected one of none, dhq"),
        ({"strategy": "fedsgd"}, "Unknown strategy 'fedsgd'; expected one of fedavg"),
        ({"sampler": "best"}, "Unknown sampler"),
        ({"schedule": "slow"}, "Unknown schedule"),
        ({"budget": "much"}, "Expected a budget like 1%"),
        ({"download_budget": "0%"}, "budget above 0"),
        ({"codec": "int8", "budget": "1%"}, "int8 sends every value; give its budget in bytes, or none"),
        ({"download": "eden", "download_budget": "1%"}, "eden sends every value"),
        ({"codec": "none", "budget": "64KiB"}, "Whole models have no budget, got 64KiB"),
        ({"architecture": "simclr:cnn-w4"}, "simclr:cnn-w4 learns without labels"),
        ({"rounds": 0}, "1 round"),
        ({"fraction": 2.0}, "Expected fractions up to 1"),
        *(
            ({"alpha": alpha}, "Expected alpha above 0 and up to 1e\\+06")
            for alpha in (-1.0, 1e7, *NO_NUMBERS)
        ),
        *(({"learning_rate": rate}, "a finite learning rate above 0") for rate in (-1.0, 0.0, *NO_NUMBERS)),
        *(({"fraction": share}, "Expected fractions up to 1") for share in (-1.0, 0.0, *NO_NUMBERS)),
        *(({"decay": decay}, "Expected a finite decay of 0 or more") for decay in (-1.0, *NO_NUMBERS)),
        *(({"floor": floor}, "a floor from 0 to 1") for floor in (-1.0, 1.1, *NO_NUMBERS)),
    ],
)
def test_plans_that_cannot_be(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Plan(**settings)


def test_every_codec_has_a_plan_without_a_budget() -> None:
    for name in [*CODEC_NAMES, "none"]:
        assert Plan(codec=name, download=name).mod().budget is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"budget": "30B"}, "The budget is too small for cnn-w4. dhq needs"),
        ({"download_budget": "30B"}, "The download budget is too small for cnn-w4. dhq needs"),
        ({"codec": "fp16", "budget": "100B"}, "The budget is too small for cnn-w4. fp16 needs"),
    ],
)
def test_a_budget_that_is_too_small_for_the_model(
    settings: dict[str, Any], words: str, tmp_path: Path, runtime: Runtime
) -> None:
    """One error before anything is written, so that the same folder takes the next attempt."""
    with pytest.raises(UsageError, match=words):
        play(tmp_path, runtime, replace(PLAN, **settings))
    assert not list(tmp_path.iterdir())
    assert play(tmp_path, runtime, replace(PLAN, rounds=1, **WHOLE))["rounds"][0]["accepted"]


def test_drawn_by_numbers_of_images(tmp_path: Path, runtime: Runtime) -> None:
    report = play(tmp_path, runtime, replace(PLAN, sampler="weighted"))
    assert all(len(one["accepted"]) == 3 and not one["refused"] for one in report["rounds"])


def test_a_plan_in_a_run_configuration() -> None:
    assert Plan.of({"local-epochs": 3, "codec": "eden", "other": 1}) == Plan(local_epochs=3, codec="eden")


def test_recorded_updates_are_attacked(
    tmp_path: Path, make_folder: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    train, test, out = make_folder(TRAIN, "train"), make_folder(TEST, "test"), tmp_path / "out"
    few = ["--clients", "4", "--rounds", "2", "--alpha", "0", "--no-augment", "--batch-size", "30"]
    run = ["federate", str(train), "--test", str(test), "--out", str(out), "--architecture", "cnn-w4"]
    machine = ["--device", "cpu", "--precision", "float32"]
    assert main([*run, *few, "--record", "1", "--fraction", "0.5", *machine]) == 0
    (record,) = (out / "updates").iterdir()
    printed = " ".join(capsys.readouterr().out.split())
    assert "bytes moved" in printed and f"A record for privet invert: {record}" in printed
    assert "left out" not in printed
    assert (out / "report.html").exists()
    update = load_update(record)
    assert update.kind == "delta" and update.treatment.sparse and update.local_steps == 1
    assert update.images == 30 and update.notes == {"round": 2, "codec": "dhq-deadzone", "budget": ""}
    zero = sum(int((value == 0).sum()) for value in update.values.values())
    assert 0.5 < zero / sum(value.numel() for value in update.values.values()) < 1
    given = ["invert", str(record), "--method", "ig", "--set", "steps=2", "--out", str(tmp_path / "found")]
    assert main([*given, "--device", "cpu"]) == 0
    report = json.loads((tmp_path / "found" / "report.json").read_text())
    assert [one["aware"] for one in report["attacks"]] == [True, False]


def test_a_mistake_on_the_command_line(
    tmp_path: Path, make_folder: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    train = make_folder(TRAIN, "train")
    run = ["federate", str(train), "--test", str(train), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main([*run, "--budget", "much"]) == UsageError.exit_code
    assert "Expected a budget like 1%" in " ".join(capsys.readouterr().err.split())
    assert main([*run, "--clients", "500"]) == UsageError.exit_code
    assert "10 images for each client" in " ".join(capsys.readouterr().err.split())
    assert main([*run, "--clients", "2", "--record", "-1"]) == UsageError.exit_code
    assert "Expected 0 or more updates to keep" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
    assert torch.is_grad_enabled()


def test_a_federation_whose_every_update_is_refused_is_no_success(
    tmp_path: Path, make_folder: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    train, out = make_folder(TRAIN, "train"), tmp_path / "out"
    run = ["federate", str(train), "--test", str(train), "--out", str(out), "--architecture", "cnn-w4"]
    run += [
        "--clients",
        "4",
        "--rounds",
        "2",
        "--fraction",
        "0.5",
        "--alpha",
        "0",
        "--device",
        "cpu",
        "--batch-size",
        "8",
    ]
    for _ in range(2):  # the second is no resumption of the first
        assert main([*run, "--learning-rate", "1e30"]) == InputError.exit_code
        printed = " ".join(capsys.readouterr().err.split())
        assert "Not one of 4 updates could be used" in printed and "Expected finite float32 values" in printed
        assert not list(out.iterdir())
    assert main([*run, "--learning-rate", "0.1"]) == 0  # nothing is in the way


def test_how_many_updates_were_left_out(
    tmp_path: Path, make_folder: Make, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = client.train_locally

    def fails_once(*args: Any, **more: Any) -> float:
        if more["round"] == 2:
            raise RuntimeError("no power")
        return trained(*args, **more)

    monkeypatch.setattr(client, "train_locally", fails_once)
    train, out = make_folder(TRAIN, "train"), tmp_path / "out"
    run = ["federate", str(train), "--test", str(train), "--out", str(out), "--architecture", "cnn-w4"]
    run += ["--clients", "4", "--rounds", "2", "--fraction", "0.5", "--alpha", "0", "--device", "cpu"]
    assert main(run) == 0
    assert "2 of 4 updates were left out" in " ".join(capsys.readouterr().out.split())
    assert json.loads((out / "federation.json").read_text())["left_out"] == 2


def recorded(plan: Plan, out: Path, runtime: Runtime) -> tuple[Update, Tensor, Tensor]:
    """Return the record of a client's update in the first round, and its images and labels as it went through them."""
    images = blobs(112, size=(16, 16))
    federate(images, images, plan, out, runtime=runtime, source={}, record=1)
    (folder,) = (out / "updates").iterdir()
    mine = plan.split(images.labels.numpy())[int(folder.name)]
    order = torch.randperm(len(mine), generator=generator(plan.seed, "order", 1, folder.name)).numpy()
    return load_update(folder), images.pixels[mine[order]].float() / 255, images.labels[mine[order]]


def test_a_record_has_the_statistics_that_travelled(tmp_path: Path, runtime: Runtime) -> None:
    """Of one step on all of a client's images they are what a simulated client sends, and the attack hears them."""
    plan = replace(PLAN, architecture="resnet8-w4", clients=4, alpha=0.0, rounds=1, batch_size=28, **WHOLE)
    update, x, labels = recorded(plan, tmp_path, runtime)
    network = network_of(update).train()
    network.load_state_dict({f"network.{name}": value for name, value in update.weights.items()})
    _, expected = step(network, x, labels, local_steps=1, learning_rate=plan.learning_rate)
    assert update.local_steps == 1 and sent_moments(update, network)
    assert update.statistics.keys() == {one for one in expected if not one.endswith("num_batches_tracked")}
    for name, value in update.statistics.items():
        torch.testing.assert_close(value, expected[name])


def test_a_record_tells_what_the_client_did(tmp_path: Path, runtime: Runtime) -> None:
    """The leakage room's own client, on the same images in the same order, computes the recorded update."""
    plan = replace(
        PLAN,
        architecture="lenet-strided-sigmoid-w4",
        clients=4,
        alpha=0.0,
        rounds=1,
        fraction=0.5,
        local_epochs=2,
        batch_size=12,
        learning_rate=0.3,
        **WHOLE,
    )
    update, x, labels = recorded(plan, tmp_path, runtime)
    assert (update.images, update.batch_size, update.local_steps) == (28, 12, 6)
    y = F.one_hot(labels, 3).float()
    client = Client.of([update], network_of(update), device=torch.device("cpu"), dtype=torch.float32)
    expected, (found, _) = client.gradient(x[None], y[None]), update.as_gradient()
    for name, value in found.items():
        assert torch.allclose(value, expected[name][0], atol=1e-5, rtol=1e-3), name
