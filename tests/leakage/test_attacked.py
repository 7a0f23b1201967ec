"""Whole attacks: naive and aware, reports, and the command line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tests.leakage.victims import SMALL, blocks, victims
from tests.models.test_transformers_vision import folder_of

from privet.cli import main
from privet.errors import InputError, OutputError, UsageError
from privet.images import ImageSet
from privet.images.montage import montage
from privet.leakage import DLG, GRNN, IG, Analytic, Inversion
from privet.leakage.attack import attack
from privet.leakage.client import Client
from privet.leakage.victims import Victim, simulate, threat_model
from privet.leakage.write import write_attack
from privet.learning import Runtime, save_update
from privet.models import create_model

Make = Callable[..., Path]
QUICK = ("--method", "ig", "--set", "steps=4", "--device", "cpu")


def test_what_was_treated_is_attacked_twice(runtime: Runtime) -> None:
    for defence, kinds in ((None, [True]), ("topk-50", [True, False])):
        runs = attack(victims(2, defence=defence), IG(steps=3), runtime=runtime)
        assert [run.aware for run in runs] == kinds
        assert all(len(run.found) == 2 for run in runs)
    assert len(attack(victims(2, defence="int8"), IG(steps=3, aware=False), runtime=runtime)) == 1


def test_a_finished_run_is_not_repeated(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, source = victims(1), {"source": "blocks"}
    first = write_attack(tmp_path, found, IG(steps=2), runtime=runtime, source=source)
    monkeypatch.setattr("privet.leakage.write.attack", lambda *_, **__: pytest.fail("repeated"))
    assert write_attack(tmp_path, found, IG(steps=2), runtime=runtime, source=source) == first


def test_a_folder_belongs_to_one_run(runtime: Runtime, tmp_path: Path) -> None:
    found, source = victims(1), {"source": "blocks"}
    write_attack(tmp_path, found, IG(steps=2), runtime=runtime, source=source)
    before = (tmp_path / "report.json").read_bytes()
    unseen = replace(found[0], images=None)
    dimmed = replace(found[0], images=found[0].images * 0.5)  # type: ignore[operator]
    others: list[tuple[list[Victim], int, dict[str, Any], str]] = [
        (found, 3, {}, "settings"),
        (found, 2, {"hide": True}, "hide"),
        (found, 2, {"public": blocks(2).pixels.float() / 255}, "victims"),
        (victims(2), 2, {}, "victims"),
        ([unseen], 2, {}, "victims"),
        ([dimmed], 2, {}, "victims"),
    ]
    for other, steps, changed, differs in others:
        with pytest.raises(OutputError, match=f"with other settings: {differs}"):
            write_attack(tmp_path, other, IG(steps=steps), runtime=runtime, source=source, **changed)
    assert (tmp_path / "report.json").read_bytes() == before


def test_a_refused_attack_gives_its_folder_back(runtime: Runtime, tmp_path: Path) -> None:
    convolutional = victims(1)
    with pytest.raises(UsageError, match="linear first layer"):
        write_attack(tmp_path / "out", convolutional, Analytic(), runtime=runtime, source={})
    assert not (tmp_path / "out").exists()
    write_attack(tmp_path / "out", convolutional, IG(steps=1), runtime=runtime, source={})


def test_columns_of_the_picture_are_named(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    drawn: list[tuple[int, list[str]]] = []

    def keep(rows: Any, titles: Any) -> Image.Image:
        drawn.append((len(rows[0]), list(titles)))
        return montage(rows, titles)

    monkeypatch.setattr("privet.leakage.write.montage", keep)
    treated, plain = victims(1, defence="int8"), victims(1)
    unseen = [replace(plain[0], images=None)]
    for number, (found, hide, titles) in enumerate(
        (
            (treated, False, ["private", "aware", "naive"]),
            (treated, True, ["aware", "naive"]),
            (plain, False, ["private", "reconstructed"]),
            (unseen, False, ["reconstructed"]),
        )
    ):
        out = tmp_path / str(number)
        write_attack(out, found, IG(steps=1), runtime=runtime, source={}, hide=hide)
        assert drawn[-1] == (len(titles), titles)


def test_the_threat_model_in_words() -> None:
    plain = " ".join(threat_model(victims(1)[0].update, aware=True))
    assert "the gradient of one step of one client, in the plain: 1,307 values" in plain
    several = victims(1, batch_size=2, local_steps=3, labels_known=True, defence="topk-90+int8")[0].update
    words = " ".join(threat_model(several, aware=False))
    for part in (
        "3 local steps",
        "plain SGD with learning rate 0.1",
        "labels",
        "reduced to the largest, then rounded",
    ):
        assert part in words
    assert "does not know that" in words


def test_what_a_naive_attack_was_sent_is_counted_as_it_is(runtime: Runtime) -> None:
    """Both attacks got too few values, and neither may call that a failure of its own."""
    for one in attack(victims(3, defence="topk-99"), IG(steps=1, labels="joint"), runtime=runtime):
        assert {result.equations for result in one.reconstructions} == {13}
        assert "attack failed" not in {found.outcome for victim in one.found for found in victim}


def test_labels_that_the_attacker_knew_are_no_success(runtime: Runtime) -> None:
    (one,) = attack(victims(3, labels_known=True), IG(steps=1), runtime=runtime)
    assert {(found.outcome, found.label) for victim in one.found for found in victim} == {
        ("attack failed", None)
    }


def test_grey_and_coloured_images_are_attacked_together(runtime: Runtime) -> None:
    """Grey is what is known of all images, not what one client's give away."""
    coloured, grey = blocks(6), torch.tensor([True, False] * 3)
    pixels = coloured.pixels.where(~grey[:, None, None, None], coloured.pixels[:, :1])
    mixed = replace(coloured, pixels=pixels, grey=grey)
    model = create_model(SMALL, classes=3, size=(16, 16), seed=1).train()
    found = simulate(model, mixed, architecture=SMALL, victims=4)
    results = IG(steps=2).invert([one.update for one in found], runtime=runtime)
    assert {tuple(result.images.shape) for result in results} == {(1, 3, 16, 16)}
    assert "1 image of 16 x 16 px" in threat_model(found[0].update, aware=True)[1]
    found = victims(1, grey=True, batch_size=2)
    assert "2 grey images of 16 x 16 px" in threat_model(found[0].update, aware=True)[1]


def test_every_client_draws_noise_of_its_own() -> None:
    """Noise that several clients share could be taken away by comparing them."""
    noises = [
        torch.cat(
            [(other.update.values[name] - value).flatten() for name, value in one.update.values.items()]
        )
        for one, other in zip(victims(2), victims(2, defence="gaussian-1"), strict=True)
    ]
    assert abs(float(torch.corrcoef(torch.stack(noises))[0, 1])) < 0.2
    assert torch.cat(noises).std() == pytest.approx(1, rel=0.1)


def test_too_few_images() -> None:
    model = create_model("lenet", classes=3, size=(16, 16))
    with pytest.raises(UsageError, match="5 clients with 3 images each need 15 images, got 12"):
        simulate(model, blocks(12), architecture="lenet", victims=5, batch_size=3)


@pytest.mark.parametrize(
    "settings",
    [
        {"victims": 0},
        {"batch_size": 0},
        {"local_steps": -1},
        *({"learning_rate": rate} for rate in (0.0, -1.0, math.nan, math.inf)),
    ],
)
def test_clients_that_cannot_be(settings: dict[str, Any]) -> None:
    model = create_model(SMALL, classes=3, size=(16, 16))
    with pytest.raises(
        UsageError, match="Expected at least 1 client, batches of 1, 1 local step and a finite"
    ):
        simulate(model, blocks(12), architecture=SMALL, **{"victims": 1, **settings})


def test_training_that_leaves_all_numbers() -> None:
    with pytest.raises(
        UsageError, match="2 steps with the learning rate 1e\\+300 lead to numbers that are not"
    ):
        victims(1, local_steps=2, learning_rate=1e300)


@pytest.mark.parametrize("kind", [GRNN, IG, DLG, Analytic])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, 1e300])
def test_settings_that_are_no_numbers(kind: type[Inversion], value: float) -> None:
    for field in fields(kind):
        if isinstance(field.default, int | float):
            settings: dict[str, Any] = {field.name: value}
            with pytest.raises(UsageError, match=f"{kind.name} needs {field.name} as a number from 0 to"):
                kind(**settings)


@pytest.mark.parametrize("local_steps", [1, 2])
@pytest.mark.parametrize("kind", ["clip", "dinov2"])
def test_parameters_without_a_part_in_the_logits_are_not_sent(
    kind: str, local_steps: int, tmp_path: Path, runtime: Runtime
) -> None:
    """CLIP's text tower, or the token of a mask; the network's own and the attacker's client agree on the others."""
    name = f"transformers:{folder_of(kind, tmp_path)}"
    model = create_model(name, classes=3, size=(16, 16))
    (victim,) = simulate(model, blocks(3), architecture=name, victims=1, local_steps=local_steps)
    idle = {one for one, weight in model.named_parameters() if not weight.requires_grad}
    assert idle and victim.update.values.keys() == {one for one, _ in model.named_parameters()} - idle
    assert victim.images is not None
    client = Client.of([victim.update], model, device=torch.device("cpu"), dtype=torch.float32)
    labels = F.one_hot(torch.tensor(victim.labels), 3).float()
    expected, (found, _) = client.gradient(victim.images[None], labels[None]), victim.update.as_gradient()
    for one, value in found.items():
        torch.testing.assert_close(expected[one][0], value, atol=1e-5, rtol=1e-3)
    (result,) = attack([victim], IG(steps=2), runtime=runtime, network=model)[0].reconstructions
    assert not result.failed


class TestCommandLine:
    def test_simulated_clients(
        self, tmp_path: Path, make_folder: Make, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder, out = make_folder(blocks(6)), tmp_path / "out"
        given = ["invert", str(folder), "--out", str(out), "--architecture", "lenet-strided-sigmoid-w4"]
        more = ["--victims", "3", "--defence", "topk-50", "--public", str(folder), *QUICK]
        assert main([*given, *more]) == 0
        report = json.loads((out / "report.json").read_text())
        assert [one["aware"] for one in report["attacks"]] == [True, False]
        total = report["attacks"][0]["summary"]
        assert total["victims"] == 3
        assert total["bounds"][1] > 0.5
        assert report["baselines"]["nearest"]["recovered"] == 3
        assert report["success"] == {"psnr": 20.0, "ssim": 0.6, "identified": False}
        with Image.open(out / "pairs.png") as picture:
            assert picture.height > picture.width * 0.5
        printed = capsys.readouterr().out
        assert "naive" in printed and "95 % bounds" in printed
        assert main([*given, *more]) == 0  # once more: nothing is in the way
        known = ["invert", str(folder), "--out", str(tmp_path / "known"), "--labels-known", *QUICK]
        assert main([*known, "--architecture", "lenet-strided-sigmoid-w4"]) == 0
        assert "labels were told" in " ".join(capsys.readouterr().out.split())

    def test_a_record(self, tmp_path: Path, make_folder: Make, capsys: pytest.CaptureFixture[str]) -> None:
        victim = victims(1)[0]
        save_update(tmp_path / "record", victim.update)
        given = ["invert", str(tmp_path / "record"), *QUICK]
        assert main([*given, "--out", str(tmp_path / "blind")]) == 0
        printed = " ".join(capsys.readouterr().out.split())
        assert "not known without the private images" in printed
        distance = json.loads((tmp_path / "blind" / "report.json").read_text())["attacks"][0]["victims"][0][
            "distance"
        ]
        assert f"(distance {distance:.3g})" in printed
        pixels = (victim.images * 255).round().byte()  # type: ignore[operator]
        private = ImageSet.from_arrays(pixels, torch.tensor([0]), names=["0/0"])
        folder = make_folder(private, "private")
        more = ["--private", str(folder), "--out", str(tmp_path / "seen"), "--hide"]
        assert main([*given, *more]) == 0
        report = json.loads((tmp_path / "seen" / "report.json").read_text())
        assert report["attacks"][0]["summary"]["images"] == 1
        two = make_folder(blocks(2), "two")
        assert main([*given, "--private", str(two), "--out", str(tmp_path / "x")]) == InputError.exit_code
        assert "the private images are 2 of 16 x 16 px" in " ".join(capsys.readouterr().err.split())

    def test_options_without_effect(
        self, tmp_path: Path, make_folder: Make, capsys: pytest.CaptureFixture[str]
    ) -> None:
        save_update(tmp_path / "record", victims(1)[0].update)
        given = ["invert", str(tmp_path / "record"), "--out", str(tmp_path / "out"), *QUICK]
        for more in (
            ["--victims", "5"],
            ["--defence", "int8"],
            ["--architecture", "lenet"],
            ["--labels-known"],
        ):
            assert main([*given, *more]) == UsageError.exit_code
            assert f"leave {more[0]} out" in " ".join(capsys.readouterr().err.split())
        folder = str(make_folder(blocks(3)))
        more = ["--architecture", "lenet", "--private", folder, "--out", str(tmp_path / "out"), *QUICK]
        assert main(["invert", folder, *more]) == UsageError.exit_code
        assert "leave --private out" in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "out").exists()

    def test_records_in_the_place_of_images(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """A federation, its folder of records, and a client whose update was not kept."""
        federation = tmp_path / "federation"
        for client in ("3", "5"):
            save_update(federation / "updates" / client, victims(1)[0].update)
        out = ["--out", str(tmp_path / "out"), "--device", "cpu"]
        for verb, place in (
            (["invert"], federation),
            (["invert"], federation / "updates"),
            (["invert"], federation / "updates" / "4"),
            (["audit", "leakage"], federation / "updates" / "3"),
        ):
            assert main([*verb, str(place), *out]) == UsageError.exit_code
            told = " ".join(capsys.readouterr().err.split())
            assert f"privet invert {federation / 'updates' / '3'}" in told

    @pytest.mark.parametrize(
        ("more", "words"),
        [
            (["--method", "magic"], "Unknown method 'magic'; expected one of grnn, dlg, ig, analytic"),
            (["--budget", "endless"], "Expected a budget default or long"),
            (["--preset", "faithful"], "ig has no preset 'faithful'"),
            (["--defence", "magic"], "Unknown defence 'magic'"),
            (["--set", "speed=3"], "Expected --set NAME=VALUE with NAME one of"),
            (["--set", "learning_rate=nan"], "ig needs learning_rate as a number from 0"),
            (["--architecture", "simclr:cnn-w4"], "simclr:cnn-w4 learns without labels"),
            (["--psnr", "nan"], "Expected psnr as a finite number above 0"),
            (["--batch-size", "0"], "batches of 1"),
            (
                ["--architecture", "lenet", "--model", "x.safetensors"],
                "give either --model or --architecture",
            ),
        ],
    )
    def test_mistakes(
        self,
        more: list[str],
        words: str,
        tmp_path: Path,
        make_folder: Make,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        folder = make_folder(blocks(3))
        given = ["invert", str(folder), "--out", str(tmp_path / "out"), "--method", "ig", "--device", "cpu"]
        architecture = [] if "--architecture" in more else ["--architecture", "lenet"]
        given = [one for one in given if "--method" not in more or one not in ("--method", "ig")]
        assert main([*given, *architecture, *more]) == UsageError.exit_code
        assert words in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "out").exists()

    def test_a_damaged_record(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        save_update(tmp_path / "record", victims(1)[0].update)
        (tmp_path / "record" / "update.safetensors").write_bytes(b"x")
        given = ["invert", str(tmp_path / "record"), "--out", str(tmp_path / "out"), *QUICK]
        assert main(given) == InputError.exit_code
        assert "is not the file that update.json describes" in " ".join(capsys.readouterr().err.split())
