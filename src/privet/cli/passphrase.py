"""Passphrases: from a file or the terminal, and never from the command line, which others can see."""

from __future__ import annotations

import getpass
import sys
from pathlib import Path

from privet.errors import InputError, UsageError


def read_passphrase(file: Path | None, prompt: str, *, twice: bool = False) -> str:
    """Return a passphrase from a file's first line or from the terminal; never from the command line."""
    if file is not None:
        try:
            lines = file.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"Cannot read a passphrase from {file}.") from error
        found = lines[0] if lines else ""
    elif not sys.stdin.isatty():
        raise UsageError("There is no terminal to ask for a passphrase; give a file that holds it.")
    else:
        found = getpass.getpass(f"{prompt}: ")
        if twice and getpass.getpass("Once more: ") != found:
            raise UsageError("The two passphrases differ.")
    if not found:
        raise UsageError("Expected a passphrase, got an empty one.")
    return found
