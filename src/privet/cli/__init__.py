"""The command line: one verb a file, no logic that the Python API lacks."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence

from cyclopts import App, CycloptsError
from rich.console import Console
from rich.markup import escape

from privet.cli.audit import audit
from privet.cli.codec import codec
from privet.cli.doctor import doctor
from privet.cli.federate import federate
from privet.cli.invert import invert
from privet.cli.learn import learn
from privet.cli.license import license
from privet.cli.prior import prior
from privet.cli.protect import protect
from privet.cli.recover import recover
from privet.cli.show import show
from privet.errors import EXIT_CODES, INTERRUPTED, OK, InputError, OutputError, PrivetError, UsageError
from privet.version import VERSION

app = App(
    name="privet",
    help="Decide who can learn from your images: protect them, and see what the protection is worth.",
    version=VERSION,
    suppress_keyboard_interrupt=False,
    help_epilogue="Exit codes:\n\n" + "\n".join(f"- {code}: {words}" for code, words in EXIT_CODES.items()),
)
for verb in (protect, recover, prior, audit, invert, learn, federate, license, codec, show, doctor):
    app.command(verb)

messages = Console(stderr=True, highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; every error ends in one message."""
    # Pillow warns about oddities of files that are decoded, or skipped with a reason, all the same.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        result = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
        return int(result or OK)
    except CycloptsError as error:
        return _say(str(error), UsageError.exit_code)
    except PrivetError as error:
        return _say(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _say("Interrupted. The same command goes on where it stopped.", INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except OSError as error:  # writes end in an OutputError, unless the disk is full: then no file is named
        if error.filename is None:
            return _say(f"Cannot write: {error.strerror or error}.", OutputError.exit_code)
        return _say(f"Cannot read {error.filename}: {error.strerror}.", InputError.exit_code)
    except Exception as error:
        if os.environ.get("PRIVET_DEBUG"):
            raise
        return _say(
            f"privet failed in a way that it did not foresee ({type(error).__name__}: {error}). Set PRIVET_DEBUG=1 "
            "to see where, and please report it.",
            PrivetError.exit_code,
        )


def _say(message: str, code: int) -> int:
    messages.print(f"[bold red]privet:[/] {escape(message)}", soft_wrap=True)
    return code
