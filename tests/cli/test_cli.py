"""The command line as its users meet it: exit codes, messages, and never a stack trace."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from tests.conftest import blobs
from tests.images.test_write import tree

import privet
from privet.cli import main
from privet.cli.protect import parse_settings
from privet.errors import EXIT_CODES, MissingExtraError, OutputError, UsageError
from privet.files import claim, released
from privet.images import open_images
from privet.learning import Runtime
from privet.protection import EM, SEM

Make = Callable[..., Path]
QUICK = [
    *("--method", "em", "--preset", "cpu", "--device", "cpu", "--precision", "float32"),
    *(
        "--set",
        "surrogate=cnn-w4",
        "--set",
        "max_rounds=2",
        "--set",
        "train-steps=2",
        "--set",
        "noise_steps=2",
    ),
]


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")


def test_auto_says_what_it_chose_every_time(
    tmp_path: Path, make_folder: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    protected, out = make_folder(blobs(12, size=(16, 16))), tmp_path / "recovered"
    told = []
    for _ in range(2):
        assert (
            main(["recover", str(protected), "--method", "auto", "--out", str(out), "--device", "cpu"]) == 0
        )
        told.append(capsys.readouterr().out)
    facts = json.loads((out / "run.json").read_text())["facts"]
    assert facts["chosen"] in facts["scores"]
    assert all(
        f"images recovered with auto, which chose {facts['chosen']}, and written to" in one for one in told
    )


def test_protect_learn_audit_show(
    tmp_path: Path, make_folder: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    clean, test = make_folder(blobs(40), "clean"), make_folder(blobs(24, seed=1), "test")
    protected, learner, report = tmp_path / "protected", tmp_path / "learner", tmp_path / "audit"
    assert main(["protect", str(clean), "--out", str(protected), *QUICK]) == 0
    told = capsys.readouterr().out
    assert "40 images protected with em and written to" in told
    assert f"{protected / 'surrogate.safetensors'} is private: it helps to undo the protection" in told
    assert json.loads((protected / "run.json").read_text())["settings"]["max_rounds"] == 2

    options = ["--epochs", "2", "--device", "cpu", "--no-flip"]
    assert (
        main(
            [
                "learn",
                str(protected),
                "--test",
                str(test),
                "--out",
                str(learner),
                "--architecture",
                "cnn-w4",
                "--distort",
                *options,
            ]
        )
        == 0
    )
    assert "on clean images after the last epoch" in capsys.readouterr().out
    assert (learner / "learner.safetensors").exists()
    assert json.loads((learner / "run.json").read_text())["learner"]["distort"] is True

    options += ["--recoveries", "none,jpeg-10", "--architectures", "cnn-w4,vgg11-w4", "--seeds", "1"]
    assert (
        main(["audit", str(clean), str(protected), "--test", str(test), "--out", str(report), *options]) == 0
    )
    out = capsys.readouterr().out
    assert "[12/12]" in out and f"Report: {report / 'report.html'}" in out
    assert "Doubt (one-seed)" in out

    assert main(["show", str(clean), str(protected), "--out", str(tmp_path / "s.png"), "--count", "3"]) == 0
    with Image.open(tmp_path / "s.png") as image:
        assert image.size == (32 * 12, 32 * 12)


def test_audit_and_show_take_splits_and_versions(
    tmp_path: Path, make_folder: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    train, _ = make_folder(blobs(40), "all/train"), make_folder(blobs(24, seed=1), "all/test")
    every, protected, versions = (str(tmp_path / name) for name in ("all", "protected", "versions"))
    method = ["--method", "random", "--limit", "30", "--device", "cpu"]
    assert main(["protect", every, "--split", "train", "--out", protected, *method]) == 0
    capsys.readouterr()
    show = ["show", every, "--split", "train", "--out", str(tmp_path / "s.png"), "--count", "30"]
    assert main([*show, protected, "--limit", "30"]) == 0
    assert capsys.readouterr().out.count("PSNR") == 30

    audit = [
        "audit",
        every,
        protected,
        "--split",
        "train",
        "--limit",
        "30",
        "--test",
        every,
        "--test-split",
        "test",
    ]
    options = ["--epochs", "1", "--architectures", "cnn-w4", "--seeds", "1", "--recoveries", "none"]
    out = tmp_path / "audit"
    assert main([*audit, "--out", str(out), "--device", "cpu", "--workers", "1", *options]) == 0
    found = json.loads((out / "report.json").read_text())
    assert (found["images"]["pairs"], found["images"]["unpaired"], found["images"]["test"]) == (30, 0, 24)
    assert not {flag["name"] for flag in found["flags"]} & {"test-overlap", "unpaired"}

    assert main(["recover", protected, "--method", "versions", "--out", versions, "--device", "cpu"]) == 0
    capsys.readouterr()
    assert main(["show", str(train), versions, "--out", str(tmp_path / "v.png"), "--count", "2"]) == 0
    told = capsys.readouterr().out
    assert "From left to right: original, jpeg-10, jpeg-10+grayscale" in told
    assert told.count("PSNR") == 4
    with Image.open(tmp_path / "v.png") as image:
        assert image.size == ((3 * 8 + 2 * 4) * 12, (2 * 8 + 4) * 12)


def test_skipped_files_are_told_and_give_exit_code_4(
    tmp_path: Path, make_folder: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    clean = make_folder(blobs(10))
    (clean / "0/broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    assert main(["protect", str(clean), "--out", str(tmp_path / "out"), *QUICK]) == 4
    out = capsys.readouterr().out
    assert "1 skipped:\n  0/broken.png: not an image of a kind that privet reads" in out
    assert len(open_images(tmp_path / "out")) == 10


ERRORS: dict[str, tuple[list[str], int, str]] = {
    "no command": (["fly"], 2, "fly"),
    "no source": (["protect", "--out", "{out}"], 2, "SOURCE"),
    "absent source": (["protect", "{tmp}/absent", "--out", "{out}"], 3, "There is no file or folder"),
    "empty source": (["protect", "{tmp}/empty", "--out", "{out}"], 3, "has no class folders"),
    "unknown method": (
        ["protect", "{clean}", "--out", "{out}", "--method", "em2"],
        2,
        "Unknown method 'em2'; expected one of em, sem, rem, tap, pil, ucl, tue, lsp, ar, ops, cuda, keyed-em, lock, uge, random",
    ),
    "a method that needs a key": (
        ["protect", "{clean}", "--out", "{out}", "--method", "keyed-em"],
        2,
        "keyed-em needs a vendor's key: protect with 'privet license protect'",
    ),
    "a key as an argument": (
        ["protect", "{clean}", "--out", "{out}", "--method", "keyed-em", "--set", "key=00"],
        2,
        "Expected --set NAME=VALUE with NAME one of",
    ),
    "unknown preset": (
        ["protect", "{clean}", "--out", "{out}", "--preset", "fast"],
        2,
        "Unknown preset 'fast'; sem has paper, cpu",
    ),
    "jpeg": (["protect", "{clean}", "--out", "{out}", "--format", "jpeg"], 2, "JPEG output is refused"),
    "unknown setting": (
        ["protect", "{clean}", "--out", "{out}", "--set", "x=1"],
        2,
        "Expected --set NAME=VALUE with NAME one of epsilon, radius",
    ),
    "wrong type": (
        ["protect", "{clean}", "--out", "{out}", "--set", "views=many"],
        2,
        "Expected views as int, got 'many'",
    ),
    "budget": (["protect", "{clean}", "--out", "{out}", "--epsilon", "0"], 2, "whole number from 1 to 127"),
    "not a number": (["protect", "{clean}", "--out", "{out}", "--epsilon", "few"], 2, "epsilon"),
    "inside": (["protect", "{clean}", "--out", "{clean}/out"], 7, "its images would be read as well"),
    "inside by another way": (
        ["protect", "{clean}", "--out", "{tmp}/empty/../clean/out"],
        7,
        "its images would be read as well",
    ),
    "inside by a link": (
        ["protect", "{clean}", "--out", "{tmp}/link/out"],
        7,
        "its images would be read as well",
    ),
    "metadata": (
        ["protect", "{clean}", "--out", "{out}", "--metadata", "strp"],
        2,
        "Unknown metadata 'strp'; expected keep or strip",
    ),
    "location of nothing": (
        ["recover", "{clean}", "--method", "coin", "--out", "{out}", "--metadata", "strip", "--keep-gps"],
        2,
        "Metadata that are stripped keep no location",
    ),
    "occupied": (["protect", "{clean}", "--out", "{tmp}"], 7, "holds other files"),
    "device": (["protect", "{clean}", "--out", "{out}", "--device", "tpu"], 2, "Unknown device 'tpu'"),
    "size": (["protect", "{clean}", "--out", "{out}", "--size", "0"], 2, "Expected a size of at least 4"),
    "limit": (
        ["protect", "{clean}", "--out", "{out}", "--limit", "0"],
        2,
        "Expected a limit of at least 1 image",
    ),
    "not finite": (
        ["protect", "{clean}", "--out", "{out}", "--set", "step_size=nan"],
        2,
        "sem needs step_size as a number of at least 0, got nan",
    ),
    "no step": (
        ["protect", "{clean}", "--out", "{out}", "--set", "step_size=0"],
        2,
        "sem needs a positive step_size, got 0",
    ),
    "surrogate": (
        ["protect", "{clean}", "--out", "{out}", "--surrogate", "{tmp}/none"],
        3,
        "There is no weights file",
    ),
    "learn": (
        ["learn", "{clean}", "--test", "{clean}", "--out", "{out}", "--architecture", "net"],
        2,
        "Unknown architecture 'net'",
    ),
    "audit": (
        ["audit", "{clean}", "{clean}", "--test", "{clean}", "--out", "{out}", "--recoveries", "jpeg-10"],
        2,
        "needs the recovery 'none'",
    ),
    "audit of nothing": (
        ["audit", "{clean}", "{clean}", "--test", "{clean}", "--out", "{out}"],
        3,
        "there is nothing to audit",
    ),
    "show": (["show", "{clean}", "{clean}", "--out", "{out}.jpg"], 2, "Expected a .png file to write"),
    "show none": (["show", "{clean}", "{clean}", "--count", "0"], 2, "Expected a count of at least 1"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_message_and_a_stable_code(
    case: str, tmp_path: Path, make_folder: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    clean = make_folder(blobs(6))
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(clean)
    places = {"tmp": tmp_path, "clean": clean, "out": tmp_path / "out"}
    before = tree(clean)
    arguments, code, message = ERRORS[case]
    assert main([argument.format(**places) for argument in arguments]) == code
    shown = capsys.readouterr()
    assert message in shown.err
    assert "Traceback" not in shown.err + shown.out
    assert shown.err.startswith("privet: ")
    assert tree(clean) == before
    assert not (tmp_path / "out").exists()
    assert code in EXIT_CODES


@pytest.mark.parametrize(
    "verb",
    [
        ["protect", "--method", "lsp"],
        ["recover", "--method", "jpeg-10"],
        ["learn", "--test", "missing"],
        ["prior", "train"],
    ],
    ids=lambda verb: verb[0],
)
def test_an_occupied_folder_is_refused_before_images_are_read(
    verb: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_text("")
    assert main([*verb, str(tmp_path / "missing"), "--out", str(tmp_path)]) == OutputError.exit_code
    assert "holds other files. Choose an empty or a new folder." in capsys.readouterr().err


def test_after_a_typo_the_right_command_goes_through(tmp_path: Path, make_folder: Make) -> None:
    images, test, out = (
        make_folder(blobs(12), "clean"),
        make_folder(blobs(6, seed=1), "test"),
        tmp_path / "out",
    )
    protect = ["protect", str(images), "--out", str(out), *QUICK]
    learn = ["learn", str(images), "--test", str(test), "--out", str(tmp_path / "learner"), "--device", "cpu"]
    for command, wrong, right in (
        (protect, ["--set", "surrogate=cn-w4"], ["--set", "surrogate=cnn-w4"]),
        (learn, ["--architecture", "cn-w4"], ["--architecture", "cnn-w4", "--epochs", "1"]),
    ):
        folder = Path(command[command.index("--out") + 1])
        assert main([*command, *wrong]) == 2
        assert not folder.exists()
        assert main([*command, *right]) == 0


@pytest.mark.parametrize(
    "command",
    [
        ["audit", "{clean}", "{clean}", "--test", "{clean}"],
        ["audit", "leakage", "{clean}", "--architecture", "lenet"],
        ["invert", "{clean}", "--architecture", "lenet"],
        ["federate", "{clean}", "--test", "{clean}"],
    ],
)
def test_the_work_of_one_process_is_refused_to_several(
    command: list[str],
    tmp_path: Path,
    make_folder: Make,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    clean, out = make_folder(blobs(12), "clean"), tmp_path / "out"
    several = Runtime(device=torch.device("cpu"), world=2)
    monkeypatch.setattr(Runtime, "find", lambda *_, **__: several)
    assert main([*(part.format(clean=clean) for part in command), "--out", str(out)]) == 2
    assert "is one process's work, but 2 were started" in " ".join(capsys.readouterr().err.split())
    assert not out.exists()


@pytest.mark.parametrize("verb", ["protect", "audit"])
def test_no_work_is_done_by_no_workers(
    verb: str, tmp_path: Path, make_folder: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    clean = str(make_folder(blobs(3)))
    more = [clean, "--test", clean] if verb == "audit" else []
    assert main([verb, clean, *more, "--out", str(tmp_path / "out"), "--workers", "0"]) == 2
    assert "--workers" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_refusal_keeps_what_was_done(tmp_path: Path) -> None:
    claim(tmp_path / "out", {"a": 1})
    with pytest.raises(UsageError, match="too late"), released(tmp_path / "out"):
        (tmp_path / "out/.privet/checkpoint.safetensors").write_bytes(b"hours")
        raise UsageError("too late")
    assert (tmp_path / "out/.privet/checkpoint.safetensors").exists()
    with pytest.raises(
        OutputError, match=r"holds an unfinished run with other settings: a was 1 and is 2 now\."
    ):
        claim(tmp_path / "out", {"a": 2})


def test_a_missing_extra_gives_the_folder_back(tmp_path: Path) -> None:
    claim(tmp_path / "out", {"a": 1})
    with pytest.raises(MissingExtraError), released(tmp_path / "out"):
        raise MissingExtraError("A prior", "diffusion")
    assert not (tmp_path / "out").exists()


def test_another_run_is_told_by_what_differs(tmp_path: Path) -> None:
    claim(tmp_path, {"plan": {"rounds": 3, "names": ["x" * 99]}, "kept": 1})
    with pytest.raises(OutputError) as refusal:
        claim(tmp_path, {"plan": {"rounds": 4, "names": []}, "kept": 1, "new": "n"})
    cut = '["' + "x" * 55 + "..."
    assert (
        f'other settings: new was null and is "n" now; plan.names was {cut} and is [] now; plan.rounds was 3 and is 4 now. '
        "Repeat" in str(refusal.value)
    )


def test_unforeseen_errors_ask_for_a_report(
    tmp_path: Path, make_folder: Make, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise LookupError("lost")

    monkeypatch.setattr("privet.images.open_images", broken)
    arguments = ["protect", str(make_folder(blobs(3))), "--out", str(tmp_path / "out")]
    assert main(arguments) == 1
    assert "did not foresee (LookupError: lost). Set PRIVET_DEBUG=1" in capsys.readouterr().err
    monkeypatch.setenv("PRIVET_DEBUG", "1")
    with pytest.raises(LookupError):
        main(arguments)


def test_interruption_has_its_own_code(
    tmp_path: Path, make_folder: Make, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("privet.images.open_images", interrupted)
    assert main(["protect", str(make_folder(blobs(3))), "--out", str(tmp_path / "out")]) == 130
    assert "The same command goes on where it stopped" in capsys.readouterr().err


def test_full_disks_are_one_error(
    tmp_path: Path, make_folder: Make, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    assert main(["protect", str(make_folder(blobs(3))), "--out", str(tmp_path / "out"), *QUICK]) == 7
    assert "No space left on device" in capsys.readouterr().err


def test_what_cannot_be_read_is_the_input_s_fault(
    tmp_path: Path, make_folder: Make, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def locked(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "locked.png")

    monkeypatch.setattr("privet.images.open_images", locked)
    assert main(["protect", str(make_folder(blobs(3))), "--out", str(tmp_path / "out"), *QUICK]) == 3
    assert "Cannot read locked.png: Permission denied." in capsys.readouterr().err


def test_every_verb_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["protect"], ["audit"], ["learn"], ["show"], ["doctor"]):
        assert main([*arguments, "--help"]) == 0
        assert "Usage: privet" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == privet.__version__


def test_doctor_finds_torch(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    precision = Runtime.find().precision
    for word in ("python", f"{torch.__version__}", precision, "memory", "disk", "privet[timm]"):
        assert word in out


def test_settings_are_read_by_their_types() -> None:
    assert parse_settings(EM, ["mode=class", "step-size=0.4", "max_rounds = 3", "flip=no"]) == {
        "mode": "class",
        "step_size": 0.4,
        "max_rounds": 3,
        "flip": False,
    }
    assert parse_settings(SEM, ["train_views=2", "warm_start=true"]) == {"train_views": 2, "warm_start": True}
    assert parse_settings(SEM, ["train_views=none"]) == {"train_views": None}
    for wrong in ("views", "=3", "flip=perhaps", "views=1.5"):
        with pytest.raises(UsageError):
            parse_settings(SEM, [wrong])


def test_there_is_one_budget() -> None:
    assert parse_settings(SEM, ["views=1", "views=2"], epsilon=5.0) == {"views": 2, "epsilon": 5}
    assert parse_settings(SEM, ["epsilon=5"]) == {"epsilon": 5}
    with pytest.raises(UsageError, match="The budget is given twice"):
        parse_settings(SEM, ["epsilon=5"], epsilon=6.0)


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, privet.cli; privet.cli.main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
