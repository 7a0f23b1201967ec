"""Find the images and labels in what a user has: folders, tables of paths, Parquet, a hub's id."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from privet.errors import InputError
from privet.files import RUN, WORKSPACE
from privet.images.picture import PictureError

MANIFEST = "manifest.jsonl"
TABLES = tuple(f"{stem}.{kind}" for stem in ("metadata", "labels") for kind in ("csv", "jsonl"))
PATH_COLUMNS = ("path", "file", "file_name", "filename", "image", "img")
LABEL_COLUMNS = ("label", "labels", "class", "category", "target", "fine_label")
SUFFIXES = frozenset(
    ".png .jpg .jpeg .jpe .jfif .webp .tif .tiff .bmp .gif .ppm .pgm .pbm .avif .jp2 .tga .ico .heic".split()
)
CLUTTER = frozenset(("thumbs.db", "desktop.ini"))
SIDECAR = ".xmp"  # metadata that photo editors put beside an image
LOOSE = "not inside a class folder, so its label is unknown"
MOST_CLASSES = 1 << 16  # where labels are numbers below it, missing ones are classes without images, too
# Folders of these names are no classes if they hold folders themselves: the hub's names for its splits.
SPLITS = frozenset("train training test testing val valid validation dev eval evaluation".split())


@dataclass(frozen=True, kw_only=True)
class Skip:
    """Something that was not used, and why."""

    file: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Item:
    """One image of a source, not yet read.

    Attributes:
        file: what it is called there: a relative path with forward slashes.
        name: its unique name, where the source gives one.
        label: an index into the source's class names.
        read: returns the file's bytes, or raises PictureError.
    """

    file: str
    name: str = ""
    label: int
    read: Callable[[], bytes]


@dataclass(frozen=True, kw_only=True)
class Source:
    """What was found, before anything is decoded."""

    items: tuple[Item, ...]
    class_names: tuple[str, ...]
    skipped: tuple[Skip, ...] = ()


def find_images(source: str | Path, *, split: str | None = None, labelled: bool = True) -> Source:
    """List the images and labels of a source.

    Args:
        source: a folder with one folder for each class; a folder that privet wrote; a folder with
            metadata.csv or .jsonl, or such a file itself (columns path and label); a Parquet file
            or a folder of them; or the id of a data set on the Hugging Face hub.
        split: which split of a hub data set or of a folder of Parquet files ("train" if left out), or which folder of
            a folder: that is read as if it were the source.
        labelled: whether classes are needed; if not, a folder may hold images however they lie, all of one class, and
            the source may be one image.

    Raises:
        InputError: there is nothing there, or no labels can be found; the message says what to do.
    """
    path = Path(source)
    if not labelled and _loose(path):
        found = _unlabelled(path)
    elif path.is_dir():
        found = _folder(path, split)
    elif path.exists():
        _refuse_split(path, split)
        kind = path.suffix.lower()
        if kind in (".csv", ".jsonl"):
            found = _table(path)
        elif kind == ".parquet":
            found = _parquet([path])
        else:
            raise InputError(
                f"{path} is a file of a kind that holds no image set. Expected a folder, a .csv or .jsonl of "
                "paths and labels, a .parquet file, or a hub id."
            )
    elif _looks_like_hub_id(str(source)):
        found = _hub(str(source), split or "train")
    else:
        raise InputError(f"There is no file or folder {path}.")
    if not found.items:
        reasons = "; ".join(f"{skip.file}: {skip.reason}" for skip in found.skipped[:3])
        raise InputError(f"There is no image in {path}." + (f" Skipped: {reasons}." if reasons else ""))
    return found


def _folder(path: Path, split: str | None) -> Source:
    if (path / WORKSPACE / RUN).is_file():
        raise InputError(
            f"{path} holds an unfinished run: images may be missing. Give its command again, and it goes on."
        )
    if split and (path / split).is_dir():
        return _folder(path / split, None)
    if (path / MANIFEST).is_file():
        return _written(path, split)
    for name in TABLES:
        if (path / name).is_file():
            _refuse_split(path, split)
            return _table(path / name)
    parquet = sorted(path.rglob("*.parquet"))
    if parquet:
        wanted = split or "train"
        named = [file for file in parquet if file.name.startswith(wanted) or file.parent.name == wanted]
        if split and not named:
            raise InputError(
                f"{path} has no Parquet file of the split {split!r}; it has {_few(f.name for f in parquet)}."
            )
        return _parquet(named or parquet)
    folders = [entry for entry in _entries(path) if entry.is_dir()]
    if split:
        raise InputError(
            f"{path} has no folder of the split {split!r}; it has {_few(entry.name for entry in folders) or 'none'}."
        )
    if folders and all(entry.name.casefold() in SPLITS and _holds_folders(entry) for entry in folders):
        raise InputError(
            f"{path} has splits in place of classes: {_few(entry.name for entry in folders)}. Name one with "
            "--split, or give its folder."
        )
    return _classes(path)


def _refuse_split(path: Path, split: str | None) -> None:
    if split:
        raise InputError(f"{path} has no splits, but the split {split!r} was asked for: leave it out.")


def _holds_folders(folder: Path) -> bool:
    try:
        return any(entry.is_dir() for entry in _entries(folder))
    except OSError:
        return False


def _classes(path: Path) -> Source:
    """One folder for each class, with whatever folders below it."""
    items, skipped = [], []
    labels: dict[str, int] = {}
    for entry in _entries(path):
        if entry.is_dir():
            files = list(_walk(entry, entry.name, {_identity(entry), _identity(path)}))
            if any(reason is None for _, _, reason in files):
                label = labels.setdefault(entry.name, len(labels))
            for file, place, reason in files:
                if reason is None:
                    items.append(Item(file=file, label=label, read=_reader(place)))
                else:
                    skipped.append(Skip(file=file, reason=reason))
        elif entry.suffix.lower() in SUFFIXES:
            skipped.append(Skip(file=entry.name, reason=LOOSE))
        elif entry.is_symlink() and not entry.exists():  # to a class, maybe
            skipped.append(Skip(file=entry.name, reason="a symbolic link to nothing"))
    if not items:
        count = sum(skip.reason == LOOSE for skip in skipped)
        loose = f" It has {count} loose images, of which nobody knows the class." if count else ""
        raise InputError(
            f"{path} has no class folders with images in them.{loose} Expected {path}/CLASS/image.png, or a "
            "metadata.csv with the columns path and label."
        )
    return Source(items=tuple(items), class_names=tuple(labels), skipped=tuple(skipped))


def _loose(path: Path) -> bool:
    """Say whether images lie there as files of their own, and not in a table."""
    if path.is_dir():
        return next(path.rglob("*.parquet"), None) is None
    return path.exists() and path.suffix.lower() not in (".csv", ".jsonl", ".parquet")


def _unlabelled(path: Path) -> Source:
    """Every file in a folder and below it, or one file, all of one class."""
    files = _walk(path, path.name, {_identity(path)}) if path.is_dir() else [(path.name, path, None)]
    items, skipped = [], []
    for file, place, reason in files:
        if reason is None:
            items.append(Item(file=file, label=0, read=_reader(place)))
        else:
            skipped.append(Skip(file=file, reason=reason))
    return Source(items=tuple(items), class_names=("unlabelled",), skipped=tuple(skipped))


def _walk(folder: Path, prefix: str, above: set[tuple[int, int]]) -> Iterator[tuple[str, Path, str | None]]:
    """Yield each file below a folder as (relative path, path, reason to skip it or None)."""
    try:
        entries = _entries(folder)
    except OSError as error:
        yield prefix, folder, f"unreadable folder: {error.strerror}"
        return
    for entry in entries:
        file = f"{prefix}/{entry.name}"
        try:
            mode = entry.stat().st_mode
        except OSError as error:
            yield file, entry, _why(entry, error)
            continue
        if stat.S_ISDIR(mode):
            if _identity(entry) in above:
                yield file, entry, "a symbolic link that loops: it leads back to a folder above it"
            else:
                yield from _walk(entry, file, above | {_identity(entry)})
        elif not stat.S_ISREG(mode):
            yield file, entry, "not a regular file"
        elif entry.name.casefold() not in CLUTTER and entry.suffix.lower() != SIDECAR:
            yield file, entry, None


def _why(entry: Path, error: OSError) -> str:
    """Say why a folder's entry cannot be looked at."""
    if entry.is_symlink() and error.errno == errno.ELOOP:
        return "a symbolic link that loops"
    if entry.is_symlink() and error.errno == errno.ENOENT:
        return "a symbolic link to nothing"
    return f"unreadable: {error.strerror}"


def _entries(folder: Path) -> list[Path]:
    """Return what a folder shows, in an order that depends on the names alone."""
    return sorted(
        (entry for entry in folder.iterdir() if not entry.name.startswith(".")),
        key=lambda e: os.fsencode(e.name),
    )


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _written(folder: Path, split: str | None) -> Source:
    """A folder or Parquet set that privet wrote, by its manifest; the latter is the split "train"."""
    try:
        lines = (folder / MANIFEST).read_text("utf-8").split("\n")
        records = [record for record in map(json.loads, filter(str.strip, lines)) if record["status"] == "ok"]
        classes = sorted({(int(record["label"]), str(record["class"])) for record in records})
        files = [(str(record["file"]), str(record["name"]), str(record["class"])) for record in records]
        # Whoever made the folder must not say where files of ours go.
        if bad := next((text for file, name, _ in files for text in (file, name) if not _safe(text)), None):
            raise ValueError(f"{bad!r} is not a path inside the folder")
        if len({name.casefold() for _, name, _ in files}) < len(files):
            raise ValueError("two images have one name")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder / MANIFEST} is damaged: {error!r}. Delete it to read the folder by its class folders."
        ) from error
    if files and ".parquet#" in files[0][0]:
        _refuse_split(folder, None if split == "train" else split)
        return _parquet(sorted(folder.glob("*.parquet")))
    _refuse_split(folder, split)
    labels = {name: index for index, (_, name) in enumerate(classes)}
    items = (
        Item(file=file, name=name, label=labels[label], read=_reader(folder / file))
        for file, name, label in files
    )
    return Source(items=tuple(items), class_names=tuple(labels))


def _table(path: Path) -> Source:
    """A .csv or .jsonl of paths and labels; paths are relative to the file."""
    rows: list[tuple[str, str]] = []
    skipped: list[Skip] = []
    for number, row in _rows(path, skipped):
        file, label = _column(row, PATH_COLUMNS, path), _column(row, LABEL_COLUMNS, path)
        if file in (None, "") or label in (None, ""):
            skipped.append(Skip(file=f"{path.name}:{number}", reason="a row without path or label"))
        else:
            rows.append((str(file), str(label)))
    return _listed(path.parent, rows, skipped)


def _rows(path: Path, skipped: list[Skip]) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"Cannot read {path} as UTF-8 text: {error}.") from error
    if path.suffix.lower() == ".csv":
        try:
            yield from enumerate(csv.DictReader(io.StringIO(text, newline="")), start=2)
        except csv.Error as error:
            raise InputError(f"{path} is not a CSV file: {error}.") from error
        return
    for number, line in enumerate(text.split("\n"), start=1):  # a caption may hold other line ends
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            yield number, row
        else:
            skipped.append(Skip(file=f"{path.name}:{number}", reason="not a JSON object"))


def _column(row: dict[str, Any], names: tuple[str, ...], path: Path) -> Any:
    for name in names:
        if name in row:
            return row[name]
    raise InputError(f"{path} has the columns {_few(map(str, row))}; expected one of {', '.join(names)}.")


def _listed(folder: Path, rows: list[tuple[str, str]], skipped: list[Skip]) -> Source:
    """Turn paths and class names into a source; absolute paths are named from their common folder."""
    found = {label for _, label in rows}
    numbers = all(label.lstrip("-").isdecimal() for label in found)
    class_names = tuple(sorted(found, key=lambda label: (int(label) if numbers else 0, label)))
    labels = {name: index for index, name in enumerate(class_names)}
    places = [Path(os.path.abspath(folder / file)) for file, _ in rows]  # noqa: PTH100 (resolve() would follow links)
    root = Path(os.path.abspath(folder))  # noqa: PTH100
    if any(not place.is_relative_to(root) for place in places):
        root = Path(os.path.commonpath([root, *(place.parent for place in places)]))
    items: dict[str, Item] = {}
    for place, (_, label) in zip(places, rows, strict=True):
        file = place.relative_to(root).as_posix()
        if file in items:
            same = items[file].label == labels[label]
            skipped.append(
                Skip(
                    file=file,
                    reason="listed twice" if same else "listed with two labels; the first was used",
                )
            )
            continue
        items[file] = Item(file=file, label=labels[label], read=_reader(place))
    return Source(items=tuple(items.values()), class_names=class_names, skipped=tuple(skipped))


def _reader(path: Path) -> Callable[[], bytes]:
    def read() -> bytes:
        try:
            if not path.is_file():  # opening a pipe would wait for ever
                raise PictureError("there is no such file" if not path.exists() else "not a regular file")
            return path.read_bytes()
        except OSError as error:
            raise PictureError(f"unreadable: {error.strerror or error}") from error

    return read


def _parquet(files: list[Path]) -> Source:
    """Parquet in the hub's layout: a column of image files, a column of labels."""
    import datasets

    quiet(datasets)
    try:
        table = datasets.Dataset.from_parquet([str(file) for file in files])
    except Exception as error:  # the library wraps whatever went wrong in errors of its own
        cause = error.__cause__ or error
        raise InputError(f"Cannot read {files[0]} as Parquet: {' '.join(str(cause).split())}") from error
    return _rows_of(table, str(files[0]))


def _hub(name: str, split: str) -> Source:
    import datasets

    quiet(datasets)
    offline, endpoint = datasets.config.HF_HUB_OFFLINE, datasets.config.HF_ENDPOINT
    answers = offline or _answers(endpoint)
    try:
        # Without an answer it would ask for half a minute before it looks into its cache.
        datasets.config.HF_HUB_OFFLINE = offline or not answers
        table = datasets.load_dataset(name, split=split)
    except Exception as error:
        cached = "" if answers else f" from the cache ({endpoint} does not answer)"
        raise InputError(
            f"There is no file or folder {name}, and the hub's data set {name!r} (split {split!r}) could not be "
            f"loaded{cached}: {' '.join(str(error).split())}"
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = offline
    return _rows_of(table, name)


def _answers(endpoint: str) -> bool:
    """Say whether a hub can be reached, by one request, through whatever proxy its library uses."""
    from huggingface_hub.utils import get_session

    try:
        get_session().head(endpoint, timeout=10)
    except Exception:  # the library's client is now of one package and now of another
        return False
    return True


def _rows_of(table: Any, name: str) -> Source:
    import datasets

    images = [column for column, kind in table.features.items() if _holds_images(kind)]
    labels = [column for column in LABEL_COLUMNS if column in table.features]
    if len(images) != 1 or not labels:
        raise InputError(
            f"{name} has the columns {_few(table.features)}; expected exactly one of images and one of labels "
            f"({', '.join(LABEL_COLUMNS)})."
        )
    image, label = images[0], labels[0]
    table = table.select_columns([image, label])
    if isinstance(table.features[image], datasets.Image):
        table = table.cast_column(image, datasets.Image(decode=False))
    kind = table.features[label]
    if not isinstance(kind, datasets.ClassLabel | datasets.Value):
        raise InputError(f"{name} has no single label for an image in its column {label!r}, but {kind}.")
    values = list(table[label])
    if isinstance(kind, datasets.ClassLabel):
        class_names = tuple(kind.names)
    else:
        present = {value for value in values if value is not None}
        numbers = all(isinstance(value, int) for value in present)
        ordered = (
            list(range(max(present) + 1))
            if numbers and present and 0 <= min(present) <= max(present) < MOST_CLASSES
            else sorted(present)
        )
        class_names = tuple(map(str, ordered))
        lookup = {value: index for index, value in enumerate(ordered)}
        values = [lookup.get(value, -1) for value in values]
    files = _file_names(table, image, values, class_names)
    items, skipped = [], []
    for row, (file, value) in enumerate(zip(files, values, strict=True)):
        if value is None or not 0 <= value < len(class_names):
            skipped.append(Skip(file=file, reason="a row without label"))
        else:
            items.append(Item(file=file, label=value, read=_row_reader(table, image, row)))
    return Source(items=tuple(items), class_names=class_names, skipped=tuple(skipped))


def _file_names(table: Any, image: str, labels: list[Any], class_names: tuple[str, ...]) -> list[str]:
    """Return the paths that the rows give, if they are safe and distinct, or CLASS/NUMBER."""
    paths = [
        row.get("path") if isinstance(row, dict) else None for row in _column_without_bytes(table, image)
    ]
    safe = [path for path in paths if path and _safe(path)]
    if len(safe) == len(paths) == len({path.casefold() for path in safe}):
        return [PurePosixPath(path).as_posix() for path in safe]
    width = len(str(len(labels)))
    names = [
        name if _safe(name) and "/" not in name else f"class-{index}"
        for index, name in enumerate(class_names)
    ]
    return [
        f"{names[label] if label is not None and 0 <= label < len(names) else 'unlabelled'}/{row:0{width}d}.png"
        for row, label in enumerate(labels)
    ]


def _column_without_bytes(table: Any, image: str) -> list[Any]:
    import pyarrow as pa

    column = table.data.column(image)
    if not pa.types.is_struct(column.type) or column.type.get_field_index("path") < 0:
        return [None] * len(table)
    import pyarrow.compute as pc

    paths = pc.struct_field(column, "path").to_pylist()
    order = table._indices.column(0).to_pylist() if table._indices is not None else range(len(paths))
    return [{"path": paths[index]} for index in order]


def _row_reader(table: Any, image: str, row: int) -> Callable[[], bytes]:
    def read() -> bytes:
        value = table[row][image]
        if isinstance(value, dict):
            if value.get("bytes") is None and value.get("path"):
                return _reader(Path(value["path"]))()
            value = value.get("bytes")
        if not isinstance(value, bytes):
            raise PictureError("a row without image")
        return value

    return read


def _holds_images(kind: Any) -> bool:
    import datasets

    if isinstance(kind, datasets.Image):
        return True
    if isinstance(kind, dict):
        return "bytes" in kind
    return isinstance(kind, datasets.Value) and kind.dtype in ("binary", "large_binary")


def _safe(name: str) -> bool:
    """Say whether a name from a file can become a path below the output folder."""
    path = PurePosixPath(name)
    return (
        not path.is_absolute()
        and ".." not in path.parts
        and "\\" not in name
        and "\0" not in name
        and bool(path.name)
    )


def _looks_like_hub_id(name: str) -> bool:
    parts = name.split("/")
    return len(parts) <= 2 and all(part and part[0].isalnum() for part in parts) and not Path(name).suffix


def quiet(datasets: Any) -> None:
    """Keep the datasets library from printing bars and advice."""
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()


def _few(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
