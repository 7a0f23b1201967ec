"""Imports run one way: every room stands on the floors below it, and the method rooms do not know each other."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import privet

ROOT = Path(privet.__file__).parent
GROUND = {"images", "models"}
LEARNING = GROUND | {"learning"}
METHODS = ("protection", "recovery", "federation", "leakage")  # a tuple: every test worker must see one order
# Of each room, those that it may import.
BELOW = {
    "images": set[str](),
    "models": set[str](),
    "learning": GROUND,
    **dict.fromkeys(METHODS, LEARNING),
    "licensing": LEARNING | set(METHODS),
    "audit": LEARNING | set(METHODS) | {"licensing"},
    "report": LEARNING | set(METHODS) | {"licensing", "audit"},
    "cli": LEARNING | set(METHODS) | {"licensing", "audit", "report"},
}


def modules(path: Path) -> set[str]:
    """Return the modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def imported(path: Path) -> set[str]:
    """Return the rooms that a file imports."""
    return {name.split(".")[1] for name in modules(path) if name.startswith("privet.")} & BELOW.keys()


def test_every_room_is_known() -> None:
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} == BELOW.keys()


@pytest.mark.parametrize("room", BELOW)
def test_imports_run_downwards(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        assert imported(path) <= BELOW[room] | {room}, path


def test_one_folder_knows_flower() -> None:
    for path in ROOT.rglob("*.py"):
        if not path.is_relative_to(ROOT / "federation" / "flower"):
            assert not any(name.split(".")[0] == "flwr" for name in modules(path)), path
