"""The audit of updates: its grid, its store, what it says, and the command."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.leakage.victims import SMALL, blocks
from tests.report.test_report import Checker
from torch import nn

from privet.audit import Clients, LeakageAudit, LeakagePlan, audit_leakage
from privet.audit.leakage import gradient_errors, layers_of, needed_victims
from privet.audit.leakage_plan import Setting
from privet.audit.utility import defended_accuracy
from privet.cli import main
from privet.errors import CONTROL_FAILED, OVER_LIMIT, InputError, OutputError, UsageError
from privet.images import ImageSet
from privet.leakage import DLG, IG, Analytic, Embedder, Gallery
from privet.leakage.defences import Defence, create_defence
from privet.leakage.identify import Identified
from privet.leakage.measure import OUTCOMES, Success, psnr
from privet.leakage.victims import simulate
from privet.learning import Runtime
from privet.learning.confidence import clopper_pearson
from privet.models import create_model
from privet.report import write_leakage_report
from privet.seeds import derive, generator

Make = Callable[..., Path]
PLAN = LeakagePlan(inversions=(IG(steps=2),), defences=("topk-50",), clients=Clients(victims=2))


def audit(
    out: Path, runtime: Runtime, plan: LeakagePlan = PLAN, *, images: ImageSet | None = None, **more: Any
) -> LeakageAudit:
    images = images or blocks(6)
    model = create_model(SMALL, classes=3, size=(16, 16), seed=1).train()
    given: dict[str, Any] = {"source": {"source": "blocks"}, **more}
    return audit_leakage(model, images, architecture=SMALL, out=out, plan=plan, runtime=runtime, **given)


def test_the_grid_has_a_control_beside_every_defence() -> None:
    plan = LeakagePlan(inversions=(Analytic(), IG(), DLG()), defences=("int8", "none"))
    grid = plan.settings(["fc"])
    for one in grid:
        assert Setting(method=one.method) in grid
    assert len(grid) == len(set(grid)) == 3 + 3 * 2 + 1
    assert grid[-1] == Setting(
        method="ig", attacker="layer", layer="fc"
    )  # the closed form needs the first layer
    assert {one.attacker for one in grid if one.defence == "int8"} == {"aware", "naive"}
    assert len(replace(plan, layers=False).settings(["fc"])) == 9


def test_every_image_is_on_record(tmp_path: Path, runtime: Runtime) -> None:
    """Not the victims' alone: what a defence costs is measured with all."""
    audit(tmp_path, runtime)
    for index in range(6):
        pixels = blocks(6).pixels.clone()
        pixels[index] = 255 - pixels[index]
        with pytest.raises(OutputError, match="other settings: images was"):
            audit(tmp_path, runtime, images=blocks(6).with_pixels(pixels))


def test_grids_that_cannot_be() -> None:
    for broken, words in (
        ({"inversions": ()}, "at least one inversion"),
        ({"inversions": (IG(), IG())}, "each only once"),
        ({"inversions": (IG(),), "defences": ("int8", "int8")}, "at least one defence"),
        ({"inversions": (IG(),), "defences": ("clap-1",)}, "Unknown defence 'clap-1'"),
    ):
        with pytest.raises(UsageError, match=words):
            LeakagePlan(**broken)  # type: ignore[arg-type]


def test_layers_are_those_with_weights() -> None:
    assert layers_of(create_model(SMALL, classes=3, size=(16, 16))) == ["convs.0", "convs.1", "convs.2", "fc"]
    residual = layers_of(create_model("resnet8-w4", classes=3, size=(16, 16)))
    assert residual[0] == "conv1" and residual[-1] == "fc"
    assert not any("bn" in name for name in residual)


def test_single_layers_are_attacked_alone(tmp_path: Path, runtime: Runtime) -> None:
    found = audit(tmp_path, runtime)
    for layer, values in (("convs.0", 4 * 3 * 25 + 4), ("fc", 4 * 16 * 3 + 3)):
        cell = found.results[Setting(method="ig", attacker="layer", layer=layer)]
        for victim, true in zip(cell["victims"], found.victims["none"], strict=True):
            assert victim["equations"] == values
            assert victim["unknowns"] == 3 * 16 * 16  # the labels are told
            assert tuple(victim["labels"]) == true.labels
            assert [image["label"] for image in victim["images"]] == [None]


def test_every_setting_attacks_the_same_clients(tmp_path: Path, runtime: Runtime) -> None:
    found = audit(tmp_path, runtime)
    for plain, treated in zip(found.victims["none"], found.victims["topk-50"], strict=True):
        assert plain.images is not None and treated.images is not None
        assert torch.equal(plain.images, treated.images)
        assert treated.update.treatment.sparse and not plain.update.treatment.sparse
    assert found.judged == [
        Setting(method="ig", defence="topk-50", attacker=attacker) for attacker in ("aware", "naive")
    ]
    bounds = [found.results[one]["summary"]["bounds"][1] for one in found.judged]
    assert found.highest == max(bounds) == clopper_pearson(0, 2)[1]


def test_labels_that_were_told_are_not_counted(tmp_path: Path, runtime: Runtime) -> None:
    plan = replace(PLAN, clients=Clients(victims=2, labels_known=True), layers=False)
    report = write_leakage_report(audit(tmp_path, runtime, plan), tmp_path)
    for row in report["settings"]:
        assert row["labels_right"] is None
        assert row["outcomes"]["label only"] == 0
    assert '<td class="number">told</td>' in (tmp_path / "report.html").read_text()


def test_values_that_arrive_are_counted_alike_for_both_attackers(tmp_path: Path, runtime: Runtime) -> None:
    found = audit(tmp_path, runtime, replace(PLAN, layers=False))
    sent = found.victims["topk-50"][0].update.values
    values = sum(int(value.count_nonzero()) for value in sent.values())
    for attacker in ("aware", "naive"):
        cell = found.results[Setting(method="ig", defence="topk-50", attacker=attacker)]
        assert cell["victims"][0]["equations"] == values


def test_people_are_looked_for_and_pictures_are_in_order(tmp_path: Path, runtime: Runtime) -> None:
    """Two images in each update, which come out in any order."""
    plan = replace(PLAN, clients=Clients(victims=2, batch_size=2), layers=False)
    shifted = (blocks(6).pixels.int() + 9).clamp(0, 255).byte()
    photographs = ImageSet.from_arrays(shifted, blocks(6).labels)  # of the same "people", "0" to "2"
    gallery = Gallery(photographs=photographs, embedder=Embedder.pixels())
    found = audit(tmp_path, runtime, plan, gallery=gallery)
    private = torch.cat([one.images for one in found.victims["none"] if one.images is not None])
    for setting, cell in found.results.items():
        told = [image["psnr"] for victim in cell["victims"] for image in victim["images"]]
        assert psnr(found.images[setting].float() / 255, private).tolist() == pytest.approx(told, abs=0.05)
        ranks = [image["rank"] for victim in cell["victims"] for image in victim["images"]]
        assert cell["identification"]["rank1"]["count"] == ranks.count(1)
    report = write_leakage_report(found, tmp_path)
    assert report["identification"]["clean"]["images"] == 4
    words = " ".join((tmp_path / "report.html").read_text().split())
    assert "Whether people are recognised" in words
    assert "Among 3 people with 6 other photographs" in words


def test_settings_that_count_decide_the_bound(tmp_path: Path, runtime: Runtime) -> None:
    """A control that succeeds is no failure of a defence that holds it off."""
    found = audit(tmp_path, runtime)
    lost = {**found.results[Setting(method="ig")]["summary"], "bounds": [0.9, 1.0]}
    results = {**found.results, Setting(method="ig"): {"summary": lost}}
    assert replace(found, results=results).highest < 1
    assert found.control_failed
    won = {**lost, "victims_recovered": 1}
    assert not replace(found, results={**results, Setting(method="ig"): {"summary": won}}).control_failed
    both = replace(found, results=results, plan=replace(PLAN, defences=("none", "topk-50")))
    assert both.highest == 1.0


def test_a_finished_setting_is_never_repeated(
    tmp_path: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    from privet.audit import leakage

    whole = audit(tmp_path / "whole", runtime)
    expected = write_leakage_report(whole, tmp_path / "whole")
    attacked: list[str] = []
    attack_once = leakage.attack_once

    def once(victims: Any, inversion: Any, **settings: Any) -> Any:
        attacked.append("")
        if len(attacked) == 4:
            raise KeyboardInterrupt
        return attack_once(victims, inversion, **settings)

    monkeypatch.setattr(leakage, "attack_once", once)
    with pytest.raises(KeyboardInterrupt):
        audit(tmp_path / "killed", runtime)
    with (tmp_path / "killed" / "cells.jsonl").open("ab") as file:
        file.write(b'{"setting": {"meth')  # torn by the kill
    resumed = audit(tmp_path / "killed", runtime)
    assert len(attacked) == 1 + len(whole.results)
    assert write_leakage_report(resumed, tmp_path / "killed") == expected
    for name in ("report.json", "report.html", "run.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    for path in (tmp_path / "whole" / "cells").iterdir():
        assert path.read_bytes() == (tmp_path / "killed" / "cells" / path.name).read_bytes()
    audit(tmp_path / "killed", runtime)
    assert len(attacked) == 1 + len(whole.results)
    with pytest.raises(OutputError, match=r"other settings: plan\.seed was 0 and is 1 now"):
        audit(tmp_path / "killed", runtime, replace(PLAN, seed=1))
    shutil.rmtree(tmp_path / "killed" / "cells")  # lines without their images are measured again
    audit(tmp_path / "killed", runtime)
    assert len(attacked) == 1 + 2 * len(whole.results)


def test_a_refused_audit_gives_its_folder_back_unless_something_is_finished(
    tmp_path: Path, runtime: Runtime
) -> None:
    impossible = replace(PLAN, inversions=(Analytic(),), defences=("none",), layers=False)
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="linear first layer"):
        audit(out, runtime, impossible)
    assert not out.exists()
    half = replace(impossible, inversions=(IG(steps=1), Analytic()))
    with pytest.raises(UsageError, match="linear first layer"):
        audit(out, runtime, half)
    kept = (out / "cells.jsonl").read_bytes()
    with pytest.raises(UsageError, match="linear first layer"):
        audit(out, runtime, half)  # as it was left, not as "other files"
    assert (out / "cells.jsonl").read_bytes() == kept


def test_a_damaged_store(tmp_path: Path, runtime: Runtime) -> None:
    audit(tmp_path, runtime)
    (tmp_path / "cells.jsonl").write_text('{"setting": {"nonsense": 1}}\n')
    with pytest.raises(OutputError, match="is damaged"):
        audit(tmp_path, runtime)


def test_the_price_of_a_defence() -> None:
    """The error of the direction, which no learning rate mends, against a slow count."""
    images = blocks(6)
    model = create_model(SMALL, classes=3, size=(16, 16), seed=1).train()

    def made(defence: str | None) -> Any:
        chosen = None if defence is None else create_defence(defence)
        return simulate(model, images, architecture=SMALL, victims=3, defence=chosen)

    plain = made(None)
    assert gradient_errors(plain, plain) == {
        "one": pytest.approx(0, abs=1e-6),
        "mean": pytest.approx(0, abs=1e-6),
    }
    assert gradient_errors(plain, made("clip-0.001"))["one"] == pytest.approx(
        0, abs=1e-4
    )  # shorter, not other
    for defence in ("topk-90", "gaussian-1"):
        errors, sums = [], [0.0, 0.0]
        for one, other in zip(plain, made(defence), strict=True):
            true, sent = (
                torch.cat([value.double().flatten() for value in victim.update.values.values()])
                for victim in (one, other)
            )
            scale = (true @ sent) / (sent @ sent)
            errors.append(float((scale * sent - true).norm() / true.norm()))
            sums = [sums[0] + true, sums[1] + sent]
        found = gradient_errors(plain, made(defence))
        assert found["one"] == pytest.approx(sum(errors) / 3, rel=1e-6)
        scale = (sums[0] @ sums[1]) / (sums[1] @ sums[1])  # type: ignore[operator]
        assert found["mean"] == pytest.approx(
            float((scale * sums[1] - sums[0]).norm() / sums[0].norm()), rel=1e-6
        )  # type: ignore[attr-defined]


def plain_training(model: nn.Module, rounds: int, victims: int) -> nn.Module:
    """Train by the mean gradient of each round's images, as one would without clients."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for number in range(rounds):
        order = torch.randperm(6, generator=generator(derive(0, "round", number), "victims"))[:victims]
        x, y = blocks(6).pixels[order].float() / 255, blocks(6).labels[order]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("architecture", [SMALL, "resnet8-w4"])
def test_training_without_a_defence_is_plain_training(
    architecture: str, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all clients' images together; with batch norm of one client's, for its statistics are each client's own."""
    model = create_model(architecture, classes=3, size=(16, 16), seed=1).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained: list[nn.Module] = []

    def keep(model: nn.Module, images: ImageSet, *, runtime: Runtime) -> float:
        trained.append(model)
        return 0.5

    monkeypatch.setattr("privet.audit.utility.accuracy", keep)
    clients = Clients(victims=4) if architecture == SMALL else Clients(victims=1, batch_size=4)
    for defence in (None, create_defence("gaussian-1")):
        assert 0.5 == defended_accuracy(
            model,
            blocks(6),
            blocks(6),
            architecture=architecture,
            clients=clients,
            defence=defence,
            rounds=5,
            seed=0,
            runtime=runtime,
        )
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    expected = plain_training(copy.deepcopy(model), 5, 4).state_dict()
    plain, noisy = (one.state_dict() for one in trained)
    for name, value in expected.items():
        torch.testing.assert_close(plain[name], value, atol=1e-4, rtol=1e-4)
    assert any(not torch.allclose(noisy[name], value, atol=2e-3) for name, value in expected.items())


def test_what_defences_cost_is_measured_once(
    tmp_path: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str | None] = []

    def found(*given: Any, defence: Defence | None, **more: Any) -> float:
        asked.append(defence and defence.name)
        return 0.25 if defence else 0.75

    monkeypatch.setattr("privet.audit.leakage.defended_accuracy", found)
    for _ in range(2):
        report = write_leakage_report(audit(tmp_path, runtime, test=blocks(8)), tmp_path)
    assert asked == [None, "topk-50"]
    assert [one["accuracy"] for one in report["defences"]] == [0.75, 0.25]
    assert report["chance"] == 3 / 8
    words = " ".join((tmp_path / "report.html").read_text().split())
    assert "Naming the commonest class comes to 37.5 %" in words
    assert "not measured" not in words
    assert "nothing-learned" not in {doubt["name"] for doubt in report["doubts"]}
    (tmp_path / "accuracies.jsonl").write_text('{"defence": "none"}\n')
    with pytest.raises(OutputError, match="accuracies.jsonl is damaged"):
        audit(tmp_path, runtime, test=blocks(8))
    (tmp_path / "accuracies.jsonl").unlink()
    monkeypatch.setattr("privet.audit.leakage.defended_accuracy", lambda *given, **more: 0.4)
    report = write_leakage_report(audit(tmp_path, runtime, test=blocks(8)), tmp_path)
    assert "nothing-learned" in {doubt["name"] for doubt in report["doubts"]}


@pytest.mark.parametrize("limit", [0.5, 0.05])
def test_how_many_victims_a_limit_takes(limit: float) -> None:
    count = needed_victims(limit)
    assert clopper_pearson(0, count)[1] <= limit < clopper_pearson(0, count - 1)[1]


def test_the_page(tmp_path: Path, runtime: Runtime) -> None:
    public = blocks(6).pixels.float() / 255
    plan = replace(PLAN, success=Success(psnr=1.0))  # everything counts
    report = write_leakage_report(audit(tmp_path, runtime, plan, public=public), tmp_path)
    page = (tmp_path / "report.html").read_text()
    checker = Checker()
    checker.feed(page)
    assert not checker.open
    assert not checker.fetched
    words = " ".join(checker.text.split())
    assert "Images of 2 of 2 clients came out under topk-50" in words
    assert "private" in words
    for outcome in OUTCOMES:
        assert outcome in words.replace("\u00ad", "")
    assert [row["name"] for row in report["settings"]] == [
        "ig_none_plain",
        "ig_topk-50_aware",
        "ig_topk-50_naive",
    ]
    assert [row["judged"] for row in report["settings"]] == [False, True, True]
    assert all(row["control"]["victims_recovered"] == 2 for row in report["settings"])
    assert [one["defence"] for one in report["defences"]] == ["none", "topk-50"]
    assert report["defences"][0]["naive"] is None
    assert report["defences"][1]["accuracy"] is None
    assert "which was not measured" in words
    shown = [one["psnr"] for one in report["shown"]]
    assert shown == sorted(shown, reverse=True)
    assert {doubt["name"] for doubt in report["doubts"]} >= {"few-victims", "one-method"}
    assert report == json.loads((tmp_path / "report.json").read_text())


def test_private_images_can_be_left_out(tmp_path: Path, runtime: Runtime) -> None:
    found = audit(tmp_path, runtime)
    write_leakage_report(found, tmp_path)
    shown = (tmp_path / "report.html").read_text()
    write_leakage_report(found, tmp_path, hide=True)
    hidden = (tmp_path / "report.html").read_text()
    assert "<span>private</span>" in shown
    assert "<span>private</span>" not in hidden
    assert len(hidden) < len(shown)


def test_a_control_that_fails_is_said(tmp_path: Path, runtime: Runtime) -> None:
    plan = replace(PLAN, success=Success(psnr=99.0, ssim=1.0))
    report = write_leakage_report(audit(tmp_path, runtime, plan), tmp_path)
    names = [doubt["name"] for doubt in report["doubts"]]
    assert "control-failed" in names and "no-baseline" in names
    assert report["headline"].startswith(
        "No image of 2 clients came out by what was tried; that allows up to 84%"
    )
    assert report["worst"]["share"] == 0


def test_a_guess_that_counts_as_recovered_is_said(tmp_path: Path, runtime: Runtime) -> None:
    public = blocks(6).pixels[:4].float() / 255 * 0.99
    for limit, counts in ((20.0, True), (99.0, False)):
        plan = replace(PLAN, success=Success(psnr=limit, ssim=1.0), layers=False)
        out = tmp_path / str(limit)
        report = write_leakage_report(audit(out, runtime, plan, public=public), out)
        says = [one["says"] for one in report["doubts"] if one["name"] == "baseline-counts"]
        nearest = report["baselines"]["nearest"]["recovered"]
        assert bool(nearest) is counts
        assert (
            any(
                f"nearest, which saw no update, counts as recovered for {nearest} of 2" in one for one in says
            )
            is counts
        )


def test_people_who_are_recognised_from_what_was_not_recovered(
    tmp_path: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    def know_all(images: Any, people: Any, gallery: Any, **_: Any) -> Identified:
        own = torch.tensor([gallery.people.index(person) for person in people])
        return Identified(scores=torch.eye(len(gallery.people))[own], own=own)

    monkeypatch.setattr("privet.leakage.attack.identify", know_all)
    photographs = ImageSet.from_arrays(255 - blocks(6).pixels, blocks(6).labels)
    gallery = Gallery(photographs=photographs, embedder=Embedder.pixels())
    for victims, expected in ((2, 0), (5, 2)):  # 2 of 2 may well be chance among three people
        plan = replace(
            PLAN, success=Success(psnr=99.0, ssim=1.0), clients=Clients(victims=victims), layers=False
        )
        out = tmp_path / str(victims)
        report = write_leakage_report(audit(out, runtime, plan, gallery=gallery), out)
        found = [doubt["says"] for doubt in report["doubts"] if doubt["name"] == "recognised"]
        assert len(found) == expected
        if found:
            assert (
                "ig recovered 0 of 5 images under topk-50, but the gallery names the right person of 5."
                in found[0]
            )


def test_the_command(tmp_path: Path, make_folder: Make, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_folder(blocks(6))
    given = ["audit", "leakage", str(folder), "--architecture", SMALL, "--victims", "2", "--device", "cpu"]
    more = [
        "--methods",
        "ig,dlg",
        "--set",
        "steps=2",
        "--set",
        "ig.learning_rate=0.1",
        "--defences",
        "int8",
        "--no-layers",
        "--test",
        str(folder),
        "--rounds",
        "3",
    ]
    out = ["--out", str(tmp_path / "out")]
    assert main([*given, *more, *out]) == 0
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    settings = {one["inversion"]: one["settings"] for one in run["plan"]["inversions"]}
    assert settings["ig"]["learning_rate"] == 0.1
    assert settings["dlg"]["steps"] == 2
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert all(0 <= one["accuracy"] <= 1 for one in report["defences"])
    capsys.readouterr()
    # A limit is no part of the run: the same folder is judged again, and nothing is repeated.
    assert main([*given, *more, *out, "--fail-above", "0.05"]) == OVER_LIMIT
    printed = " ".join(capsys.readouterr().out.split())
    assert "it takes at least 72" in printed
    assert "Above the limit: the upper bound is 84.2%, not 5.0%" in printed
    # Within a limit that nobody could have exceeded: the attacks do not even work without a defence.
    assert main([*given, *more, *out, "--fail-above", "0.9"]) == CONTROL_FAILED
    assert "The control failed: no method recovered an image" in " ".join(capsys.readouterr().out.split())
    easy = ["--out", str(tmp_path / "easy"), "--psnr", "1", "--fail-above", "1"]
    assert main([*given, *more, *easy]) == 0


def test_commands_that_cannot_work(
    tmp_path: Path, make_folder: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_folder(blocks(6))
    given = [
        "audit",
        "leakage",
        str(folder),
        "--out",
        str(tmp_path / "out"),
        "--victims",
        "2",
        "--device",
        "cpu",
    ]
    named = ["--architecture", SMALL]
    for more, code, words in (
        ([], UsageError.exit_code, "give either --model or --architecture"),
        ([*named, "--methods", "guess"], UsageError.exit_code, "Unknown method 'guess'"),
        ([*named, "--set", "dlg.steps=2"], UsageError.exit_code, "not among --methods"),
        ([*named, "--rounds", "0"], UsageError.exit_code, "at least one round"),
        ([*named, "--test", str(tmp_path / "none")], InputError.exit_code, ""),
        ([*named, "--fail-above", "5"], UsageError.exit_code, "a share above 0 and at most 1"),
        ([*named, "--batch-size", "4"], UsageError.exit_code, "need 8 images, got 6"),
        ([*named, "--identified"], UsageError.exit_code, "takes a gallery"),
        ([*named, "--public", str(tmp_path / "none")], InputError.exit_code, ""),
    ):
        assert main([*given, *more]) == code, more
        assert words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out" / "report.json").exists()
    # The other audit is still there.
    assert main(["audit", str(folder), str(folder)]) == UsageError.exit_code
    assert "--test" in capsys.readouterr().err
