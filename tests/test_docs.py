"""What the documents say must be so."""

from __future__ import annotations

import ast
import dataclasses
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import privet
from privet.cli import app
from privet.errors import EXIT_CODES
from privet.leakage import INVERSIONS, Inversion
from privet.models import create_model
from privet.protection import METHODS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)


def blocks(language: str) -> list[str]:
    return [text for page in PAGES for kind, text in BLOCK.findall(page.read_text()) if kind == language]


COMMANDS = [
    line.split("privet ", 1)[1]
    for block in blocks("")
    for line in block.splitlines()
    if line.startswith(("privet ", "accelerate launch -m privet "))
]


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_is_understood(line: str) -> None:
    app.parse_args(shlex.split(line), exit_on_error=False, print_error=False)


def test_commands_are_found() -> None:
    assert len(COMMANDS) >= 6


@pytest.mark.parametrize("code", blocks("python"))
def test_every_name_in_python_exists(code: str) -> None:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "privet":
            assert hasattr(privet, node.attr)


def test_every_link_leads_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_method_table_is_complete() -> None:
    rows = {
        name: set(re.findall(r"`(\w+)`", settings))
        for name, settings in re.findall(
            r"^\| `([\w-]+)` \|[^|]*\|[^|]*\|([^|]*)\|$", (ROOT / "docs/methods.md").read_text(), re.MULTILINE
        )
    }
    assert set(rows) == set(METHODS)
    for name, written in rows.items():
        named = {field.name for field in dataclasses.fields(METHODS[name])} - {"epsilon", "key"}
        as_another = {
            "rem": {"sem"},
            "tue": {"ucl", "separation"},
            "keyed-em": {"em", "group", "tile", "grey"},
            "lock": {"em"},
        }
        expected = as_another.get(name, named | ({"class", "sample"} if name == "em" else set()))
        assert written == expected, name


def test_the_table_of_inversions_is_complete() -> None:
    text = (ROOT / "docs/leakage.md").read_text()
    rows = re.findall(r"^\| `([\w-]+)` \|[^|]*\| `(\w+)` \|([^|]*)\|$", text, re.MULTILINE)
    common = {field.name for field in dataclasses.fields(Inversion)}
    assert [name for name, _, _ in rows] == list(INVERSIONS)
    for name, labels, written in rows:
        named = {field.name for field in dataclasses.fields(INVERSIONS[name])} - common
        assert set(re.findall(r"`(\w+)`", written)) == named, name
        assert INVERSIONS[name]().labels == labels, name


def test_the_networks_exist() -> None:
    section = (ROOT / "docs/methods.md").read_text().split("## Networks")[1]
    for name in re.findall(r"`((?:resnet|vgg|densenet|mobilenet|vit|cnn|lenet)[\w-]*)`", section):
        create_model(name, classes=2, size=(32, 32))


def test_exit_codes_are_documented() -> None:
    text = (ROOT / "docs/files.md").read_text()
    assert [int(code) for code in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)] == list(EXIT_CODES)


def test_the_example_of_two_lines_runs() -> None:
    path = ROOT / "examples/two_lines.py"
    done = subprocess.run(
        [sys.executable, path], capture_output=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    found = re.match(r"([\d.]+)% right; ([\d,]+) bytes moved in 15 rounds", done.stdout.decode())
    assert found is not None
    assert float(found[1]) > 80  # of ten digits, after fifteen rounds
    assert int(found[2].replace(",", "")) < 15 * 5 * 2 * 38_000 / 3  # a third of whole models
