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
            # Windows' editors begin a file with a mark that nobody types.
            found = file.read_text("utf-8-sig").partition("\n")[0]
        except OSError as error:
            raise InputError(f"Cannot read a passphrase from {file}: {error.strerror or error}.") from error
        except UnicodeDecodeError:  # whose text shows some of the file
            raise InputError(f"Cannot read a passphrase from {file}: it is not UTF-8 text.") from None
    elif not sys.stdin.isatty():
        raise UsageError("There is no terminal to ask for a passphrase; give a file that holds it.")
    else:
        found = getpass.getpass(f"{prompt}: ")
        if twice and getpass.getpass("Once more: ") != found:
            raise UsageError("The two passphrases differ.")
    if not found:
        raise UsageError("Expected a passphrase, got an empty one.")
    return found
