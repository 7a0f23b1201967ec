"""Read image files into an image set: every file decoded, or skipped with its reason."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from PIL import Image

from privet.errors import InputError, UsageError
from privet.files import reserve, sha256
from privet.images.image_set import ImageSet, SourceFile
from privet.images.picture import PictureError, decode, measure
from privet.images.source import Item, Skip, find_images
from privet.parallel import ordered
from privet.progress import Progress, silent

# Images of one size up to this side keep it; anything else is seen at this size by networks.
LARGEST_SIDE = 224
SMALLEST_SIDE = 4


def open_images(
    source: str | Path,
    *,
    size: int | tuple[int, int] | None = None,
    split: str | None = None,
    limit: int | None = None,
    labelled: bool = True,
    workers: int = 4,
    workspace: Path | None = None,
    progress: Progress = silent,
) -> ImageSet:
    """Open images and labels.

    The order of the result depends on the files' contents alone, not on how they are stored or
    listed. Files that cannot be used end up in `skipped`, each with its reason.

    Args:
        source: a folder of class folders, a .csv or .jsonl of paths and labels, Parquet, a hub id,
            or a folder that privet wrote.
        size: the side, in pixels, at which networks see the images; they are resized to a square
            (or to this height and width). Left out, images that all have one size of at most 224 px
            keep it, and others become 224 px. Files keep their own size whatever this is.
        split: of a hub data set or of a folder of Parquet files ("train" if left out); or which folder of a folder.
        limit: use only so many images, the first in the order above.
        labelled: whether classes are needed; if not, a folder may hold images however they lie, all of one class, and
            the source may be one image.
        workers: files decoded at a time.
        workspace: a folder for pixels that do not fit into memory.
        progress: told about images read.

    Raises:
        InputError: nothing can be used; the message says what was expected.
        UsageError: a limit below 1.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"Expected a limit of at least 1 image, got {limit}.")
    found = find_images(source, split=split, labelled=labelled)
    skipped = list(found.skipped)
    total = len(found.items)

    opened: list[tuple[Item, tuple[str, tuple[int, int]]]] = []
    for done, (item, header) in enumerate(ordered(_header, found.items, workers), start=1):
        progress("reading headers", done, total)
        if isinstance(header, Skip):
            skipped.append(header)
        else:
            opened.append((item, header))
    # Of images alone, so that a caption beside one does not change its name.
    names = _unique_names([item.file for item, _ in opened])
    headers = [
        (digest, item if item.name else replace(item, name=name), extent)
        for (item, (digest, extent)), name in zip(opened, names, strict=True)
    ]
    headers.sort(key=lambda entry: (entry[0], entry[1].name))
    headers = headers[:limit]
    shape = _working_size([entry[2] for entry in headers], size)

    pixels = _allocate(len(headers), shape, workspace)
    kept: list[int] = []
    grey: list[bool] = []
    for done, (_, image) in enumerate(ordered(lambda entry: _decoded(entry[1], shape), headers, workers)):
        progress("decoding", done + 1, len(headers))
        if isinstance(image, Skip):
            skipped.append(image)
        else:
            pixels[len(kept)] = image[0]  # closes the gaps that skipped files leave
            kept.append(done)
            grey.append(image[1])
    if not kept:
        reasons = "; ".join(f"{skip.file}: {skip.reason}" for skip in skipped[:3])
        raise InputError(f"None of the {total} files in {source} could be used. {reasons}.")
    items = [headers[index][1] for index in kept]
    return ImageSet(
        pixels=torch.from_numpy(pixels[: len(kept)]).permute(0, 3, 1, 2),
        labels=torch.tensor([item.label for item in items]),
        class_names=found.class_names,
        names=tuple(item.name for item in items),
        grey=torch.tensor(grey),
        files=tuple(
            SourceFile(file=item.file, sha256=headers[index][0], size=headers[index][2], read=item.read)
            for index, item in zip(kept, items, strict=True)
        ),
        skipped=tuple(sorted(skipped, key=lambda skip: (skip.file, skip.reason))),
    )


def _unique_names(files: list[str]) -> list[str]:
    """Return a name for each file, which no other has, even where upper and lower case are one.

    It is the path without suffix, or with it where that is not unique, or with a number where not even that is. A
    backslash, which parts folders elsewhere, becomes an underscore.
    """
    portable = {file: file.replace("\\", "_") for file in sorted(files)}
    stems = {file: str(PurePosixPath(path).with_suffix("")) for file, path in portable.items()}
    count = Counter(stem.casefold() for stem in stems.values())
    taken = Counter(path.casefold() for path in portable.values())
    names: dict[str, str] = {}
    used: set[str] = set()
    for file, path in portable.items():
        stem, number = stems[file], 1
        clash = count[stem.casefold()] > 1 or (stem != path and taken[stem.casefold()] > 0)
        name = path if clash else stem
        while name.casefold() in used:
            number += 1
            name = f"{path}-{number}"
        used.add(name.casefold())
        names[file] = name
    return [names[file] for file in files]


def align(images: ImageSet, class_names: Sequence[str]) -> ImageSet:
    """Return the same images with labels that count in another list of class names.

    Raises:
        InputError: the images have a class that is not in the list.
    """
    lookup = {name: index for index, name in enumerate(class_names)}
    used = {images.class_names[label] for label in torch.unique(images.labels).tolist()}
    if unknown := sorted(used - set(lookup)):
        raise InputError(
            f"These images have classes that the others lack: {', '.join(unknown[:5])}. "
            f"Expected only {', '.join(list(class_names)[:8])}."
        )
    table = torch.tensor([lookup.get(name, -1) for name in images.class_names])
    return replace(images, labels=table[images.labels], class_names=tuple(class_names))


def pair(clean: ImageSet, changed: ImageSet) -> tuple[ImageSet, ImageSet]:
    """Return the images that both sets have, in the order of the first.

    Raises:
        InputError: there is none, or one has another class in one set than in the other.
    """
    changed = align(changed, clean.class_names)
    position = {name: index for index, name in enumerate(changed.names)}
    pairs = [(index, position[name]) for index, name in enumerate(clean.names) if name in position]
    if not pairs:
        raise InputError(
            f"No image of the two sets has the same name (the one has {clean.names[0]}, the other {changed.names[0]}). "
            "Expected the same names in the same folders."
        )
    first, second = (
        clean.subset([one for one, _ in pairs]),
        changed.subset([other for _, other in pairs]),
    )
    if wrong := int((first.labels != second.labels).sum()):
        raise InputError(f"{wrong} images have another class in one set than in the other.")
    return first, second


def _header(item: Item) -> tuple[str, tuple[int, int]] | Skip:
    try:
        data = item.read()
        return sha256(data), measure(data)
    except PictureError as error:
        return Skip(file=item.file, reason=str(error))


def _decoded(item: Item, shape: tuple[int, int]) -> tuple[NDArray[np.uint8], bool] | Skip:
    try:
        picture = decode(item.read())
    except PictureError as error:
        return Skip(file=item.file, reason=str(error))
    return resized(picture.rgb, shape), picture.grey


def resized(rgb: NDArray[np.uint8], shape: tuple[int, int]) -> NDArray[np.uint8]:
    """Return pixels, (height, width, 3), at another size; bilinear with a low-pass filter."""
    if rgb.shape[:2] == shape:
        return rgb
    return np.asarray(Image.fromarray(rgb).resize((shape[1], shape[0]), Image.Resampling.BILINEAR))


def _working_size(sizes: list[tuple[int, int]], size: int | tuple[int, int] | None) -> tuple[int, int]:
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        if min(height, width) < SMALLEST_SIDE:
            raise UsageError(f"Expected a size of at least {SMALLEST_SIDE} pixels, got {min(height, width)}.")
        return height, width
    if len(set(sizes)) == 1 and max(sizes[0]) <= LARGEST_SIDE:
        return sizes[0]
    return LARGEST_SIDE, LARGEST_SIDE


def _allocate(count: int, shape: tuple[int, int], workspace: Path | None) -> NDArray[np.uint8]:
    """Return an array for the pixels: in memory, or in a file if it would take over half of it.

    The file has no name, so that no two processes share it, and it goes when the array goes.
    """
    full = (count, *shape, 3)
    if workspace is None or math.prod(full) < psutil.virtual_memory().available / 2:
        return np.empty(full, np.uint8)
    workspace.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=workspace) as file:
        reserve(file, math.prod(full), workspace / "pixels")
        return np.memmap(file, np.uint8, "r+", shape=full)
