"""Files that are either whole or absent: atomic writes, append-only journals, hashes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from privet.errors import InputError, MissingExtraError, OutputError, UsageError

RUN = "run.json"
WORKSPACE = ".privet"
TEMPORARY = re.compile(r"\.[a-z0-9_]{8}\.tmp")  # what `atomic` names its files, of which a kill leaves one


@contextlib.contextmanager
def atomic(path: Path, *, private: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it over `path` if the block succeeds.

    A private file has mode 0600 from its first byte on.

    Raises:
        OutputError: the folder cannot be written (permission, no space, a file in its place).
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        yield temporary
        if not private:
            temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"Cannot write {path}: {error.strerror or error}.") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes, *, private: bool = False) -> None:
    """Write `data` to `path`, atomically; a private file has mode 0600."""
    with atomic(path, private=private) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; NaN is refused, for it is not JSON."""
    write_bytes(path, _json(value, indent=2))


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        InputError: it is not one.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a JSON file: {error}.") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object.")
    return value


def json_line(record: Mapping[str, Any]) -> bytes:
    """Return `record` as one line of JSON."""
    return _json(record)


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append `record` as one line, in one write, so that a kill leaves at most one torn last line."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(json_line(record))
    except OSError as error:
        raise OutputError(f"Cannot write {path}: {error.strerror or error}.") from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return a journal's records; a last line that a kill tore is cut off the file first."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    return [json.loads(line) for line in whole.splitlines() if line.strip()]


def claim(out: Path, run: Mapping[str, Any]) -> bool:
    """Make `out` the folder of this run, and say whether the run is finished already.

    A run is described by everything its bytes depend on. While it works, the description lies in
    `out/.privet`; `finish` moves it up. So a killed run is told from a finished one, and from
    another's.

    Raises:
        OutputError: the folder holds another run, or other files.
    """
    description = json.loads(json.dumps(run))
    for folder, state in ((out / WORKSPACE, "an unfinished"), (out, "a finished")):
        if not (folder / RUN).exists():
            continue
        try:
            earlier = json.loads((folder / RUN).read_text("utf-8"))
            earlier.pop("facts", None)
        except (OSError, ValueError, AttributeError) as error:
            raise OutputError(f"{folder / RUN} is damaged. Delete {out} or choose another folder.") from error
        if earlier != description:
            raise OutputError(
                f"{out} holds {state} run with other settings: {'; '.join(_differences(earlier, description))}. "
                "Repeat that run's arguments, delete the folder, or choose another."
            )
        return folder == out
    refuse_other_files(out)
    write_json(out / WORKSPACE / RUN, description)
    # Checkpoints hold what undoes a protection, or a licence's secret weights. Some file systems have no modes.
    with contextlib.suppress(OSError):
        (out / WORKSPACE).chmod(0o700)
    return False


def refuse_other_files(out: Path) -> None:
    """Refuse a folder that holds files and no run, which `claim` would refuse once it knows what the run is.

    Raises:
        OutputError: it does, or is a file.
    """
    if any((folder / RUN).exists() for folder in (out, out / WORKSPACE)):
        return
    if out.exists() and (not out.is_dir() or any(entry.name != WORKSPACE for entry in out.iterdir())):
        raise OutputError(f"{out} holds other files. Choose an empty or a new folder.")


@contextlib.contextmanager
def released(out: Path) -> Iterator[None]:
    """Give a claimed folder back if the block refuses the run before it has kept anything there.

    So the same command without the typo is not refused for another run's folder.
    """
    try:
        yield
    except (UsageError, InputError, MissingExtraError):
        with contextlib.suppress(OSError):
            kept = [entry.name for folder in (out, out / WORKSPACE) for entry in folder.iterdir()]
            if kept == [WORKSPACE, RUN]:
                shutil.rmtree(out / WORKSPACE)
                out.rmdir()
        raise


def finish(out: Path, run: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Mark the run as finished: write run.json with what was found out, drop the workspace and what kills left."""
    write_json(out / RUN, {**run, "facts": dict(facts)})
    for path in out.rglob(".*.tmp"):
        if TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)
    shutil.rmtree(out / WORKSPACE, ignore_errors=True)


def reserve(file: BinaryIO, size: int, path: Path) -> None:
    """Make a new file `size` bytes long, zeros all of them, for which the disk keeps room.

    For files that are written through memory: there a full disk is no error, but the end of the process.

    Args:
        file: open to be written.
        size: in bytes, at least 1.
        path: what the message calls it.

    Raises:
        OutputError: the disk has no room.
    """
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)
    except OSError as error:
        file.truncate(0)  # some of it may have been granted
        free = shutil.disk_usage(path.parent).free
        raise OutputError(
            f"Cannot write {path}: {error.strerror}. It takes {size / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free: "
            "make room, or choose a folder on another disk."
        ) from error


def sha256(data: bytes) -> str:
    """Return the SHA-256 of `data` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def _differences(earlier: Any, now: Any, place: str = "") -> list[str]:
    """Say in which places two descriptions of a run differ, as in "training.epochs was 60 and is 30 now"."""
    if not (isinstance(earlier, dict) and isinstance(now, dict)):
        if earlier == now:
            return []
        return [f"{place} was {_short(earlier)} and is {_short(now)} now"]
    return [
        words
        for key in sorted({*earlier, *now})
        for words in _differences(earlier.get(key), now.get(key), f"{place}.{key}" if place else key)
    ]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _json(value: Any, indent: int | None = None) -> bytes:
    try:
        text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
        return (text + "\n").encode()
    except UnicodeEncodeError:  # a file name that is not UTF-8
        return (json.dumps(value, indent=indent, allow_nan=False) + "\n").encode()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
