"""Write a protected (or recovered) image set, and prove on the written bytes what was done to it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from privet.errors import BudgetError, UsageError
from privet.files import append_line, atomic, json_line, read_lines, sha256, write_bytes
from privet.images.budget import UNBOUNDED, Budget
from privet.images.image_set import ImageSet
from privet.images.picture import (
    FORMATS,
    METADATA,
    Picture,
    PictureError,
    check_format,
    decode,
    encode,
)
from privet.images.similarity import compare
from privet.images.source import MANIFEST, quiet
from privet.parallel import ordered
from privet.progress import Progress, silent

SHARD = 2048  # images in a Parquet file at most,
SHARD_PIXELS = 1 << 27  # and pixels, unless one image has more: a file is made in memory
LONGEST = 255  # bytes of a file's name, on most file systems


@dataclass(frozen=True, kw_only=True)
class Written:
    """What `write_images` did.

    Attributes:
        records: one for each image and each skipped file, as in manifest.jsonl.
    """

    records: tuple[dict[str, Any], ...]

    @property
    def ok(self) -> int:
        return sum(record["status"] == "ok" for record in self.records)

    @property
    def skipped(self) -> tuple[dict[str, Any], ...]:
        return tuple(record for record in self.records if record["status"] != "ok")


def check_writing(*, format: str, metadata: str, gps: bool) -> None:
    """Refuse what `write_images` could not do, or would not, before hours are spent on what it is to write.

    Raises:
        UsageError: a format that loses what was added, an unknown one, or metadata that are neither kept nor stripped,
            or stripped and kept.
    """
    if format != "parquet":
        check_format(format)
    if metadata not in METADATA:
        raise UsageError(f"Unknown metadata {metadata!r}; expected {' or '.join(METADATA)}.")
    if gps and metadata == "strip":
        raise UsageError(
            "Metadata that are stripped keep no location: choose metadata keep, or leave out keep-gps."
        )


def write_images(
    original: ImageSet,
    changed: ImageSet,
    out: Path,
    *,
    budget: Budget = UNBOUNDED,
    format: str = "png",
    metadata: str = "keep",
    gps: bool = False,
    workers: int = 4,
    progress: Progress = silent,
) -> Written:
    """Write images under their old names, with everything but their pixels as it was.

    The change of pixels, found at the size that networks see, is enlarged to each file's own size.
    Every file is read back, and its change is measured there. A killed call goes on where it was.

    Args:
        original: the images as opened; their files are read again at full size.
        changed: the same images with other pixels.
        out: folder to write: images, and manifest.jsonl with one line each.
        budget: what the written bytes must keep.
        format: "png", "webp" (lossless), or "parquet" (PNG bytes in the hub's layout).
        metadata: "keep" or "strip".
        gps: whether kept metadata include the location.
        workers: files encoded at a time.
        progress: told about images written.

    Raises:
        UsageError: as `check_writing`.
        BudgetError: a written image would differ by more than its budget; it is not written.
        OutputError: the folder cannot be written.
    """
    check_writing(format=format, metadata=metadata, gps=gps)
    journal = out / ".privet" / "written.jsonl"
    done = {record["name"]: record for record in read_lines(journal)}
    records: list[dict[str, Any]] = [
        {"file": skip.file, "status": "skipped", "reason": skip.reason} for skip in original.skipped
    ]

    def produce(index: int) -> tuple[dict[str, Any], bytes | None]:
        earlier = done.get(original.names[index])
        if earlier is not None and still_there(out, [earlier]):
            return earlier, None
        return _produce(original, changed, index, budget, format, metadata, gps)

    def finished(record: dict[str, Any]) -> None:
        if record["name"] not in done:
            append_line(journal, record)
        records.append(record)
        progress("writing", len(records), len(original) + len(original.skipped))

    order = sorted(range(len(original)), key=lambda index: original.names[index])
    if format == "parquet":
        for number, part in enumerate(_shards(original, order)):
            for record in _write_shard(original, part, number, out, done, produce, workers):
                finished(record)
    else:
        for _, (record, data) in ordered(produce, order, workers):
            if data is not None:
                write_bytes(out / record["file"], data)
            finished(record)
    records.sort(key=lambda record: (record.get("name") or record["file"], record.get("reason") or ""))
    write_bytes(out / MANIFEST, b"".join(map(json_line, records)))
    return Written(records=tuple(records))


def _produce(
    original: ImageSet,
    changed: ImageSet,
    index: int,
    budget: Budget,
    format: str,
    metadata: str,
    gps: bool,
) -> tuple[dict[str, Any], bytes | None]:
    """Return an image's record and the bytes to write, or None if it is skipped."""
    label = int(original.labels[index])
    source = original.files[index] if original.files else None
    record: dict[str, Any] = {
        "name": original.names[index],
        "file": original.names[index] + FORMATS.get(format, ".png"),
        "source": source.file if source else None,
        "label": label,
        "class": original.class_names[label],
        "status": "ok",
        "reason": None,
    }
    delta = changed.pixels[index].to(torch.int16) - original.pixels[index].to(torch.int16)
    try:
        if format != "parquet" and len(os.fsencode(Path(record["file"]).name)) > LONGEST:
            raise PictureError(f"it would get a name of more than {LONGEST} bytes; shorten the old one")
        if source is None:
            before = Picture(rgb=_rows(original.pixels[index]), grey=bool(original.grey[index]))
        else:
            data = source.read()
            if sha256(data) != source.sha256:
                raise PictureError("the file changed while it was being worked on")
            before = decode(data)
        picture = before.perturbed(_rows(budget.enlarge(delta, before.size)))
        data = encode(picture, format="webp" if format == "webp" else "png", metadata=metadata, gps=gps)
        after = decode(data)
    except PictureError as error:
        return {
            **record,
            "file": source.file if source else record["file"],
            "status": "skipped",
            "reason": str(error),
        }, None
    if not np.array_equal(after.rgb, picture.rgb) or not _same_alpha(before, after):
        raise BudgetError(f"{record['name']} did not come back from its {format} bytes as it was written.")
    similarity = compare(before.rgb, after.rgb)
    if excess := budget.excess(similarity, before.size, seen=original.size):
        raise BudgetError(f"{record['name']} would differ from its original by {excess}.")
    record.update(
        sha256_before=source.sha256 if source else None,
        sha256_after=sha256(data),
        **asdict(similarity),
        notes=list(before.notes),
    )
    return record, data


def _rows(image: torch.Tensor) -> NDArray[Any]:
    return np.ascontiguousarray(image.permute(1, 2, 0).numpy())


def _same_alpha(before: Picture, after: Picture) -> bool:
    if before.alpha is None or after.alpha is None:
        # A format may leave out an alpha channel that is opaque everywhere.
        return all(one is None or bool((one == 255).all()) for one in (before.alpha, after.alpha))
    return np.array_equal(before.alpha, after.alpha)


def still_there(out: Path, records: Sequence[dict[str, Any]]) -> bool:
    """Say whether the files of these records are what was written; what was skipped has none."""
    expected: dict[str, str] = {}
    for record in records:
        if "sha256_shard" in record:
            expected[record["file"].rpartition("#")[0]] = record["sha256_shard"]
        elif record["status"] == "ok":
            expected[record["file"]] = record["sha256_after"]
    return all(
        (out / file).is_file() and _sha256_of(out / file) == digest for file, digest in expected.items()
    )


def _sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file that may not fit into memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shards(original: ImageSet, order: Sequence[int]) -> Iterator[list[int]]:
    """Cut positions into the parts that become a Parquet file each."""
    part: list[int] = []
    pixels = 0
    for index in order:
        height, width = original.files[index].size if original.files else original.size
        if part and (len(part) == SHARD or pixels + height * width > SHARD_PIXELS):
            yield part
            part, pixels = [], 0
        part.append(index)
        pixels += height * width
    if part:
        yield part


def _write_shard(
    original: ImageSet,
    part: list[int],
    number: int,
    out: Path,
    done: dict[str, dict[str, Any]],
    produce: Callable[[int], tuple[dict[str, Any], bytes | None]],
    workers: int,
) -> Iterator[dict[str, Any]]:
    """Write one Parquet file and yield its records; a file that an earlier call wrote is kept if it is whole."""
    import datasets

    quiet(datasets)
    path = out / f"train-{number:05d}.parquet"
    earlier = [done[original.names[index]] for index in part if original.names[index] in done]
    if len(earlier) == len(part) and path.exists() and still_there(out, earlier):
        yield from earlier
        return
    for index in part:
        done.pop(original.names[index], None)
    rows: list[dict[str, Any]] = []
    records = []
    for _, (record, data) in ordered(produce, part, workers):
        if data is not None:
            rows.append({"image": {"bytes": data, "path": record["file"]}, "label": record["label"]})
            record = {**record, "file": f"{path.name}#{len(rows) - 1}"}
        records.append(record)
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=list(original.class_names)),
        }
    )
    with atomic(path) as temporary:
        columns = {"image": [row["image"] for row in rows], "label": [row["label"] for row in rows]}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(temporary)
    digest = _sha256_of(path)
    yield from (
        {**record, "sha256_shard": digest} if record["status"] == "ok" else record for record in records
    )
