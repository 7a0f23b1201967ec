"""An image set in memory: uint8 pixels with labels, never augmented, never normalised."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from privet.errors import InputError
from privet.images.source import Skip


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """Where an image came from.

    Attributes:
        file: its path in the source, with forward slashes.
        sha256: of the file's bytes.
        size: height and width of the picture, upright.
        read: returns those bytes, or raises PictureError.
    """

    file: str
    sha256: str
    size: tuple[int, int]
    read: Callable[[], bytes]


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageSet:
    """Images with labels, all seen at one size.

    Attributes:
        pixels: uint8, (images, 3, height, width), RGB; may be backed by a memory-mapped file.
        labels: int64, (images,), an index into `class_names`.
        class_names: what the labels mean.
        names: one unique name for each image (its path without folder of the set and suffix);
            the same image has the same name in the clean and in the protected set.
        grey: bool, (images,): the original has one channel, so a perturbation must leave R = G = B.
        files: where each image came from, at its own size; empty for a set made of tensors.
        skipped: what was found beside these images and could not be used.
    """

    pixels: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    names: tuple[str, ...]
    grey: Tensor
    files: tuple[SourceFile, ...] = ()
    skipped: tuple[Skip, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        count = len(self.pixels)
        if self.pixels.dtype != torch.uint8 or self.pixels.ndim != 4 or self.pixels.shape[1] != 3:
            raise InputError(
                "Expected uint8 pixels of shape (images, 3, height, width), got "
                f"{self.pixels.dtype} {tuple(self.pixels.shape)}."
            )
        if len(self.labels) != count or len(self.names) != count or len(self.grey) != count:
            raise InputError(
                f"Expected a label, a name and a grey flag for each of {count} images, got "
                f"{len(self.labels)}, {len(self.names)} and {len(self.grey)}."
            )
        if count and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < self.classes:
            raise InputError(
                f"Labels must lie in 0 to {self.classes - 1}, got {int(self.labels.min())} to "
                f"{int(self.labels.max())}."
            )

    @classmethod
    def from_arrays(
        cls,
        pixels: Tensor,
        labels: Tensor,
        *,
        class_names: Sequence[str] | None = None,
        names: Sequence[str] | None = None,
    ) -> Self:
        """Make an image set of tensors.

        Args:
            pixels: uint8, (images, 3, height, width) or, for grey images, (images, 1, height, width).
            labels: integers, (images,).
            class_names: defaults to the numbers 0, 1, ...
            names: defaults to the positions 000000, 000001, ...
        """
        if class_names is None:
            class_names = [str(label) for label in range(int(labels.max()) + 1 if len(labels) else 0)]
        if pixels.ndim == 4 and pixels.shape[1] == 1:
            grey = torch.ones(len(pixels), dtype=torch.bool)
            pixels = pixels.expand(-1, 3, -1, -1)
        else:
            grey = torch.zeros(len(pixels), dtype=torch.bool)
        return cls(
            pixels=pixels.contiguous(memory_format=torch.channels_last) if pixels.ndim == 4 else pixels,
            labels=labels.to(torch.int64),
            class_names=tuple(class_names),
            names=tuple(names) if names is not None else tuple(f"{i:06d}" for i in range(len(pixels))),
            grey=grey,
        )

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def classes(self) -> int:
        return len(self.class_names)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return int(self.pixels.shape[2]), int(self.pixels.shape[3])

    @cached_property
    def digest(self) -> str:
        """SHA-256 over pixels, labels, names and class names, in order."""
        about = repr((self.size, self.class_names, self.names))
        digest = hashlib.sha256(about.encode("utf-8", "surrogateescape"))
        for start in range(0, len(self), 1024):
            chunk = self.pixels[start : start + 1024].permute(0, 2, 3, 1).contiguous()
            digest.update(chunk.numpy().tobytes())
        digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()

    def subset(self, indices: Tensor | Sequence[int]) -> Self:
        """Return the images at these positions, in this order."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        return replace(
            self,
            pixels=self.pixels[index],
            labels=self.labels[index],
            names=tuple(self.names[i] for i in index.tolist()),
            grey=self.grey[index],
            files=tuple(self.files[i] for i in index.tolist()) if self.files else (),
        )

    def without_files(self) -> Self:
        """Return the same images without the means to read their files again, to be sent to other processes."""
        return replace(self, files=(), skipped=())

    def with_pixels(self, pixels: Tensor) -> Self:
        """Return the same images with other pixels (protected or recovered ones)."""
        return replace(self, pixels=pixels)
