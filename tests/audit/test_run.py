from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.conftest import blobs
from tests.images.test_write import shifted, tree

from privet.audit import Cell, Plan, RunStore, run_audit
from privet.cli import main
from privet.errors import InputError, OutputError
from privet.images import compare_all, open_images, pair, write_images
from privet.learning import Job, Learner, Runtime
from privet.protection import AR, CUDA, EM, OPS, Protection, RandomNoise
from privet.protection.publication import publish
from privet.recovery import JPEG, VERSIONS, PriorTraining, create_recovery, restore, train_prior
from privet.report import write_report

Make = Callable[..., Path]

TERMINAL = """
import os, signal, sys
from privet.audit.store import RunStore
from privet.cli import main
add = RunStore.add
def interrupted(*arguments, **options):
    add(*arguments, **options)
    os.killpg(0, signal.SIGINT)  # Ctrl-C as soon as one learner is kept
if __name__ == "__main__":
    RunStore.add = interrupted
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell takes from what it runs behind
    sys.exit(main(sys.argv[1:]))
"""
PLAN = Plan(
    recoveries=("none", "jpeg-50", "adversarial-2"),
    architectures=("cnn-w4", "simclr:resnet8-w4"),
    seeds=(0, 1),
    learner=Learner(epochs=2, batch_size=16, attack_steps=2),
)


@pytest.fixture
def sets(make_folder: Make, runtime: Runtime, tmp_path: Path) -> tuple[Path, Path, Path]:
    clean, test = make_folder(blobs(48), "clean"), make_folder(blobs(30, seed=1), "test")
    method = EM(surrogate="cnn-w4", train_steps=3, noise_steps=2, batch_size=16, max_rounds=2)
    publish(open_images(clean), method, tmp_path / "protected", runtime=runtime)
    return clean, tmp_path / "protected", test


def test_every_cell_is_run_on_files_and_kept(
    sets: tuple[Path, Path, Path], runtime: Runtime, tmp_path: Path
) -> None:
    clean, protected, test = sets
    told = []
    audit = run_audit(
        clean,
        protected,
        test=test,
        out=tmp_path / "out",
        plan=PLAN,
        runtime=runtime,
        finished=lambda cell, result, done, total: told.append((done, total)),
    )
    lines = [json.loads(line) for line in (tmp_path / "out/cells.jsonl").read_text().splitlines()]
    assert {Cell(**line["cell"]) for line in lines} == set(PLAN.cells()) == set(audit.results)
    assert told == [(number, 36) for number in range(1, 37)]
    assert all(len(line["result"]["history"]) == 2 for line in lines)
    assert audit.material.facts.linf == 3
    assert audit.material.facts.paired == 48
    protection = audit.material.facts.protection
    assert protection is not None and protection["method"] == "em"
    original, control = pair(audit.material.clean, open_images(tmp_path / "out/control"))
    change = (control.pixels.short() - original.pixels.short()).abs()
    assert int(change.max()) == 3
    assert (tmp_path / "out/run.json").exists() and not (tmp_path / "out/.privet").exists()


def test_of_versions_the_page_gets_all(
    sets: tuple[Path, Path, Path], runtime: Runtime, tmp_path: Path
) -> None:
    clean, protected, test = sets
    plan = replace(PLAN, recoveries=("none", "versions", "jpeg-10"), architectures=("cnn-w4",), seeds=(0,))
    audit = run_audit(clean, protected, test=test, out=tmp_path / "out", plan=plan, runtime=runtime)
    shown, images = list(audit.material.shown), audit.material.protected
    parts = [create_recovery(name).recover(images, Job(runtime=runtime)) for name in VERSIONS[:2]]
    assert audit.examples.keys() == {"versions", "jpeg-10"}
    epochs = {(cell.recovery, len(result["history"])) for cell, result in audit.results.items()}
    assert epochs == {("none", 2), ("versions", 1), ("jpeg-10", 2)}  # as many steps
    assert torch.equal(audit.examples["versions"], torch.cat([part.pixels[shown] for part in parts]))
    assert torch.equal(audit.examples["jpeg-10"], parts[0].pixels[shown])


def untimed(out: Path) -> dict[str, bytes]:
    """Return the files of an audit, less the seconds that it took."""
    files = {
        file: data for file, data in tree(out).items() if file not in ("cells.jsonl", "recoveries.jsonl")
    }
    report = json.loads(files["report.json"])
    for one in report["recoveries"]:
        del one["seconds_per_1000"]
    page = re.sub(rb'<td class="number">(\d+\.\d\d|interrupted)</td>', b"", files["report.html"])
    return files | {"report.json": json.dumps(report).encode(), "report.html": page}


def test_results_do_not_depend_on_workers_or_interruptions(
    sets: tuple[Path, Path, Path], runtime: Runtime, tmp_path: Path
) -> None:
    clean, protected, test = sets
    plan = replace(PLAN, recoveries=("none", "jpeg-50"), seeds=(0,))

    def run(name: str, workers: int = 1, stop_after: int | None = None) -> dict[str, bytes]:
        cells = 0

        def stop(*_: object) -> None:
            nonlocal cells
            cells += 1
            if cells == stop_after:
                raise KeyboardInterrupt

        out = tmp_path / name
        audit = run_audit(
            clean, protected, test=test, out=out, plan=plan, runtime=runtime, workers=workers, finished=stop
        )
        write_report(audit, out)
        return untimed(out)

    whole = run("whole")
    assert "report.json" in whole and "report.html" in whole
    assert run("two", workers=2) == whole
    for stop_after in (1, 4):
        with pytest.raises(KeyboardInterrupt):
            run("parts", stop_after=stop_after)
    assert run("parts") == whole
    cells = (tmp_path / "parts/cells.jsonl").read_bytes()
    assert run("parts") == whole  # finished: nothing is trained again
    assert (tmp_path / "parts/cells.jsonl").read_bytes() == cells


def test_ctrl_c_in_a_terminal_keeps_finished_cells_and_the_next_run_goes_on(
    sets: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    clean, protected, test = map(str, sets)
    options = ["--device", "cpu", "--epochs", "10", "--seeds", "1", "--recoveries", "none,jpeg-50"]
    options += ["--architectures", "cnn-w4,resnet8-w4"]

    def command(out: str, workers: int) -> list[str]:
        places = ["audit", clean, protected, "--test", test, "--out", str(tmp_path / out)]
        return [*places, *options, "--workers", str(workers)]

    cells = tmp_path / "parts/cells.jsonl"
    script = tmp_path / "audit.py"
    script.write_text(TERMINAL)
    audit = subprocess.Popen(
        [sys.executable, script, *command("parts", 2)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        _, errors = audit.communicate(timeout=200)
    finally:
        audit.kill()
    assert audit.returncode == 130
    assert "Traceback" not in errors
    kept = cells.read_bytes()
    assert 1 <= kept.count(b"\n") < 12
    for out in ("parts", "whole"):
        assert main(command(out, 1)) == 0
    assert cells.read_bytes().startswith(kept) and cells.read_bytes().count(b"\n") == 12
    assert untimed(tmp_path / "parts") == untimed(tmp_path / "whole")


def test_sets_that_do_not_belong_together(
    sets: tuple[Path, Path, Path], runtime: Runtime, tmp_path: Path, make_folder: Make
) -> None:
    clean, protected, test = sets

    def run(*sources: Path, out: str = "out") -> None:
        run_audit(sources[0], sources[1], test=sources[2], out=tmp_path / out, plan=PLAN, runtime=runtime)

    with pytest.raises(
        InputError, match="The protected images equal the clean ones: there is nothing to audit"
    ):
        run(clean, clean, test, out="a")
    with pytest.raises(InputError, match="No image of the two sets has the same name"):
        run(clean, make_folder(replace(blobs(3), names=("0/x", "1/y", "2/z")), "other"), test, out="b")
    with pytest.raises(InputError, match="have classes that the others lack: 3"):
        run(clean, protected, make_folder(blobs(8, classes=4), "more"), out="c")
    swapped = replace(blobs(48), labels=(blobs(48).labels + 1) % 3)
    write_images(swapped, shifted(swapped), tmp_path / "swapped")
    with pytest.raises(InputError, match="48 images have another class in one set than in the other"):
        run(clean, tmp_path / "swapped", test, out="d")


def test_another_audit_s_folder_is_left_alone(
    sets: tuple[Path, Path, Path], runtime: Runtime, tmp_path: Path
) -> None:
    clean, protected, test = sets
    plan = replace(PLAN, recoveries=("none",), seeds=(0,), architectures=("cnn-w4",))
    run_audit(clean, protected, test=test, out=tmp_path / "out", plan=plan, runtime=runtime)
    with pytest.raises(
        OutputError, match=r"holds a finished run with other settings: plan\.seeds was \[0\] and is \[1\] now"
    ):
        run_audit(
            clean, protected, test=test, out=tmp_path / "out", plan=replace(plan, seeds=(1,)), runtime=runtime
        )


def test_overlap_of_test_and_training_images_is_found(
    sets: tuple[Path, Path, Path], runtime: Runtime, tmp_path: Path
) -> None:
    clean, protected, _ = sets
    plan = replace(PLAN, recoveries=("none",), seeds=(0,), architectures=("cnn-w4",))
    audit = run_audit(clean, protected, test=clean, out=tmp_path / "out", plan=plan, runtime=runtime)
    assert audit.material.facts.overlap == 48
    assert audit.verdict.grade == "inconclusive"


def test_a_torn_last_line_is_run_again(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "cells.jsonl", Cell)
    cells = PLAN.cells()[:2]
    for cell in cells:
        store.add(cell, {"last": 0.5}, seconds=1.0)
    whole = (tmp_path / "cells.jsonl").read_bytes()
    (tmp_path / "cells.jsonl").write_bytes(whole[:-5])
    again = RunStore(tmp_path / "cells.jsonl", Cell)
    assert list(again.results) == cells[:1]
    again.add(cells[1], {"last": 0.5}, seconds=1.0)
    assert (tmp_path / "cells.jsonl").read_bytes() == whole


def test_a_damaged_store_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "cells.jsonl").write_text('{"cell": {"colour": 1}}\n')
    with pytest.raises(OutputError, match=r"cells.jsonl is damaged: .* Delete it to run its cells again"):
        RunStore(tmp_path / "cells.jsonl", Cell)


@pytest.mark.parametrize(
    ("method", "norm"), [(OPS(), "l0"), (AR(), "l2"), (CUDA(), "l2"), (RandomNoise(epsilon=5), "linf")]
)
def test_the_control_is_noise_of_the_protection_s_norm(
    make_folder: Make, runtime: Runtime, tmp_path: Path, method: Protection, norm: str
) -> None:
    clean, test = make_folder(blobs(24), "clean"), make_folder(blobs(12, seed=1), "test")
    publish(open_images(clean), method, tmp_path / "protected", runtime=runtime, seed=1)
    plan = replace(PLAN, recoveries=("none",), architectures=("cnn-w4",), seeds=(0,))
    audit = run_audit(
        clean, tmp_path / "protected", test=test, out=tmp_path / "out", plan=plan, runtime=runtime
    )
    assert not [flag for flag in audit.flags if flag.name == "over-budget"]
    settings = json.loads((tmp_path / "out/control/run.json").read_text())["settings"]
    assert settings["norm"] == norm
    control = compare_all(*(one.pixels for one in pair(audit.material.clean, audit.material.random)))
    worst, largest = (
        max(getattr(one, norm) for one in changes) for changes in (control, audit.material.similarities)
    )
    assert 0.85 * largest <= worst <= largest * 1.000001


def test_pixels_are_counted_in_the_files_whatever_size_networks_see(
    make_folder: Make, runtime: Runtime, tmp_path: Path
) -> None:
    clean = make_folder(blobs(24, size=(20, 20)), "clean")
    test = make_folder(blobs(12, seed=1, size=(20, 20)), "test")
    publish(open_images(clean, size=8), OPS(), tmp_path / "protected", runtime=runtime, seed=1)
    plan = replace(PLAN, recoveries=("none",), architectures=("cnn-w4",), seeds=(0,))

    def flags(out: str) -> list[str]:
        audit = run_audit(
            clean, tmp_path / "protected", test=test, out=tmp_path / out, plan=plan, runtime=runtime, size=8
        )
        assert max(one.l0 for one in audit.material.similarities) > 1  # the block of a pixel, made smaller
        return [flag.says for flag in audit.flags if flag.name == "over-budget"]

    assert flags("whole") == []
    path = sorted((tmp_path / "protected").glob("*/*.png"))[0]
    changed = np.array(Image.open(path))
    changed[::2] ^= 1
    Image.fromarray(changed).save(path)
    (says,) = flags("changed")
    assert "pixels; the budget is 9 that run.json claims" in says
    Image.fromarray(changed[:12]).save(path)
    (says,) = flags("cut")
    assert "its size (12 x 20, not 20 x 20); the budget is 1 (l0)" in says


def test_single_pixels_that_leave_the_budget_are_found_in_the_files(
    make_folder: Make, runtime: Runtime, tmp_path: Path
) -> None:
    clean = make_folder(blobs(24, size=(32, 32)), "clean")
    test = make_folder(blobs(12, seed=1, size=(32, 32)), "test")
    publish(open_images(clean, size=8), RandomNoise(epsilon=3), tmp_path / "protected", runtime=runtime)
    path = sorted((tmp_path / "protected").glob("*/*.png"))[0]
    changed = np.array(Image.open(path))
    changed[9, 9] ^= 16
    Image.fromarray(changed).save(path)
    plan = replace(PLAN, recoveries=("none",), architectures=("cnn-w4",), seeds=(0,))
    audit = run_audit(
        clean, tmp_path / "protected", test=test, out=tmp_path / "out", plan=plan, runtime=runtime, size=8
    )
    assert max(one.linf for one in audit.material.similarities) <= 3  # made smaller, it is smoothed away
    (says,) = [flag.says for flag in audit.flags if flag.name == "over-budget"]
    assert re.search(r"1[3-9]/255; the budget is 3/255", says)


def test_a_refused_audit_gives_its_folder_back(
    sets: tuple[Path, Path, Path], make_folder: Make, runtime: Runtime, tmp_path: Path
) -> None:
    clean, protected, test = sets
    plan = replace(PLAN, recoveries=("none",), architectures=("cnn-w4",), seeds=(0,))
    other = make_folder(blobs(8, classes=5, seed=1), "other")
    with pytest.raises(InputError, match="class"):
        run_audit(clean, protected, test=other, out=tmp_path / "out", plan=plan, runtime=runtime)
    assert not (tmp_path / "out").exists()
    run_audit(clean, protected, test=test, out=tmp_path / "out", plan=plan, runtime=runtime)


def test_files_of_unknown_origin_and_odd_names_still_get_their_page(
    make_folder: Make, runtime: Runtime, tmp_path: Path
) -> None:
    clean, test = make_folder(blobs(24), "clean"), make_folder(blobs(12, seed=1), "test")
    for path in sorted(clean.glob("*/*.png")):
        path.rename(path.with_name(os.fsdecode(b"caf\xe9-" + path.name.encode())))
    publish(open_images(clean), RandomNoise(), tmp_path / "protected", runtime=runtime)
    restore(open_images(tmp_path / "protected"), JPEG(50), tmp_path / "recovered", runtime=runtime)
    plan = replace(PLAN, recoveries=("none",), architectures=("cnn-w4",), seeds=(0,))
    audit = run_audit(
        clean, tmp_path / "recovered", test=test, out=tmp_path / "out", plan=plan, runtime=runtime
    )
    assert "surrogate-unknown" in [flag.name for flag in audit.flags]  # its run.json tells of a recovery
    assert b"caf" in write_report(audit, tmp_path / "out").read_bytes()


def test_files_that_leave_the_claimed_budget_are_flagged(
    sets: tuple[Path, Path, Path], runtime: Runtime, tmp_path: Path
) -> None:
    clean, protected, test = sets
    run = json.loads((protected / "run.json").read_text())
    run["budget"]["amount"] = 2
    (protected / "run.json").write_text(json.dumps(run))
    plan = replace(PLAN, recoveries=("none",), architectures=("cnn-w4",), seeds=(0,))
    audit = run_audit(clean, protected, test=test, out=tmp_path / "out", plan=plan, runtime=runtime)
    run["budget"] = {"norm": "l9", "size": 2}
    (protected / "run.json").write_text(json.dumps(run))
    with pytest.raises(InputError, match=r"The run.json of the protected images states no budget"):
        run_audit(clean, protected, test=test, out=tmp_path / "broken", plan=plan, runtime=runtime)
    (flag,) = [flag for flag in audit.flags if flag.name == "over-budget"]
    assert flag.grave and "3/255; the budget is 2/255" in flag.says
    assert audit.verdict.grade == "inconclusive"


def test_a_recovery_with_a_prior_is_audited_and_what_it_saw_is_flagged(
    sets: tuple[Path, Path, Path], runtime: Runtime, tmp_path: Path
) -> None:
    pytest.importorskip("diffusers", reason="the extra 'diffusion' is not installed")
    clean, protected, test = sets
    training = PriorTraining(scale="tiny", steps=2, batch_size=8)
    # At another size than the audit's: files are known again all the same.
    train_prior(open_images(test, limit=5, size=16), training, tmp_path / "prior", runtime=runtime)
    plan = replace(
        PLAN,
        recoveries=("none", "purify+grayscale"),
        architectures=("cnn-w4",),
        seeds=(0,),
        prior=str(tmp_path / "prior"),
    )
    audit = run_audit(clean, protected, test=test, out=tmp_path / "out", plan=plan, runtime=runtime)
    assert len(audit.results) == 6
    assert audit.costs["purify+grayscale"]["facts"] == {"0-purify": {"evaluations": 4}}
    assert audit.costs["purify+grayscale"]["seconds"] > 0
    (shown,) = audit.examples.values()
    assert shown.shape == (8, 3, 8, 8) and torch.equal(shown[:, 0], shown[:, 1])  # grey by now
    again = run_audit(clean, protected, test=test, out=tmp_path / "out", plan=plan, runtime=runtime)
    assert (again.costs, list(again.examples)) == (audit.costs, ["purify+grayscale"])
    flags = {flag.name: flag.says for flag in audit.flags}
    assert "5 of the 30 images" in flags["prior-saw-test"]
    page = write_report(audit, tmp_path / "out").read_text()
    assert "purification by a diffusion prior and then grayscale" in page
