"""What a person sees of a long job, with a terminal and without."""

from __future__ import annotations

import pytest
from rich.console import Console

from privet.cli import screen


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(screen.time, "monotonic", lambda: now[0])
    return now


def test_a_line_now_and_then(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with screen.progress() as listen:
        for done in range(10):
            listen(f"rounds; accuracy {done}%", done, 20)
            clock[0] += 4
        listen("writing", 0, 100)
        clock[0] += 20
        listen("writing", 50, 100)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "rounds; accuracy 4%: 20%, 0.25/s, 64 s left",
        "rounds; accuracy 8%: 40%, 0.25/s, 48 s left",
        "writing: 50%, 2.5/s, 20 s left",
    ]


def test_no_rate_before_anything_is_done(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with screen.progress() as listen:
        listen("learning", 0, 10)
        clock[0] += 20
        listen("learning", 0, 10)
    assert capsys.readouterr().err == "learning: 0%\n"


def test_a_bar_that_goes_on_under_a_new_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def console(**settings: object) -> Console:
        return Console(force_terminal=True, width=100, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(screen, "Console", console)
    with screen.progress() as listen:
        for done in range(5):
            listen(f"rounds; accuracy {done}%", done, 20)
    shown = capsys.readouterr().err
    assert "rounds; accuracy 4%" in shown and "20 %" in shown


def test_only_the_first_process_says_anything(capsys: pytest.CaptureFixture[str]) -> None:
    with screen.progress(rank=1) as listen:
        listen("learning", 1, 2)
    assert capsys.readouterr().err == ""
