"""A fixed first layer, derived from a key, that takes a secret part of an image away.

A key parts the values of every square tile of an image into small groups and gives each value of a
group a sign. All of a group that is taken away is its component along its signs s. So adding a whole
number a of s to a group, which no clipping disturbs while every value stays within 0 to 255, changes
the image for everybody but those who look through the stem: to them it is the same, bit for bit.

For a group x of n values let m = s . (x - 127.5) / n. The stem is the quotient by the integer moves
x + a s: of all images that differ by such moves it returns one, `x + clamp(-floor(m + 1/2), low, high) s`,
where low to high are the moves that stay within 0 to 255. It is an image again, the nearest in whole
numbers to the linear projection x - m s. Moving x by a moves m by a, and low and high by -a, so the result
stays. What it costs: one of n dimensions. Half of a group's signs are positive, so a group of one
colour has m = 0 and is left as it is.
"""

from __future__ import annotations

from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from privet.errors import InputError, MissingExtraError, UsageError

KEY_BYTES = 16  # a key has at least 128 bits
EXPANSION = 255 * 32  # bytes that one HKDF with SHA-256 gives
CHUNK = 1024  # images that `apply` takes at a time


def key_stream(key: bytes, purpose: str, length: int) -> bytes:
    """Return `length` bytes that depend on the key and the purpose: HKDF (RFC 5869) with SHA-256, in blocks.

    Raises:
        UsageError: a key of less than 128 bits.
        MissingExtraError: `cryptography` is not installed.
    """
    try:
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF
    except ImportError as error:
        raise MissingExtraError("A key", "licensing") from error
    if len(key) < KEY_BYTES:
        raise UsageError(f"Expected a key of at least {KEY_BYTES} bytes, got {len(key)}.")
    blocks = []
    for number, start in enumerate(range(0, length, EXPANSION)):
        info = f"privet/1/{number}/{purpose}".encode("utf-8", "surrogateescape")
        count = min(EXPANSION, length - start)
        blocks.append(HKDF(algorithm=SHA256(), length=count, salt=None, info=info).derive(key))
    return b"".join(blocks)


class KeyedStem(nn.Module):
    """The stem as a network layer and as a transform of stored images, before any augmentation.

    Its buffers are what a licensee gets; the key cannot be found from them.

    Attributes:
        group: int32, (3, tile, tile): to which of the tile's groups each value belongs.
        sign: int8, (3, tile, tile): 1 or -1.
    """

    group: Tensor
    sign: Tensor

    def __init__(self, group: Tensor, sign: Tensor) -> None:
        """Make a stem of a pattern; `from_key` draws one.

        Args:
            group: integers from 0, (3, tile, tile).
            sign: 1 or -1, of the same shape.

        Raises:
            InputError: no such pattern.
        """
        super().__init__()
        if group.ndim != 3 or group.shape[0] != 3 or group.shape[1] != group.shape[2] or not group.numel():
            raise InputError(f"Expected a stem's pattern as (3, tile, tile), got {tuple(group.shape)}.")
        if sign.shape != group.shape or not bool((sign.abs() == 1).all()):
            raise InputError("Expected a sign of 1 or -1 for each value of a stem's tile.")
        if group.is_floating_point() or not 0 <= int(group.min()) <= int(group.max()) < group.numel():
            raise InputError(f"Expected a stem's groups as integers from 0 to {group.numel() - 1}.")
        self.register_buffer("group", group.to(torch.int32))
        self.register_buffer("sign", sign.to(torch.int8))
        self._tables: dict[tuple[int, int, torch.device], tuple[Tensor, ...]] = {}

    @classmethod
    def from_key(cls, key: bytes, *, group: int = 4, tile: int = 8, grey: bool = False) -> Self:
        """Draw the pattern from a key.

        Args:
            key: at least 16 bytes.
            group: values in a group; even. The stem costs one of so many dimensions.
            tile: side of the tile in pixels. The pattern repeats from tile to tile, so that one stem fits
                images of every size; a tile as large as the image never repeats. Where the edge of the
                image cuts a group, what is left of it is a group.
            grey: group pixels, not values: the channels move together, as they must in grey files. A
                group then has three times as many values, and costs a third.

        Raises:
            UsageError: a size that makes no group, or a short key.
            MissingExtraError: `cryptography` is not installed.
        """
        if tile < 1 or group < 2 or group % 2 or group > tile * tile * (1 if grey else 3):
            raise UsageError(
                f"Expected an even group of at least 2 that fits into a tile, got {group} in {tile} x {tile}."
            )
        count = tile * tile * (1 if grey else 3)
        purpose = f"stem/{group}/{tile}/{'grey' if grey else 'colour'}"
        words = np.frombuffer(key_stream(key, purpose, 8 * count), "<u8")
        place = np.empty(count, np.int64)  # of each value in a random order
        place[np.argsort(words, kind="stable")] = np.arange(count)
        shape = (-1, tile, tile)
        groups = torch.from_numpy(place // group).reshape(shape)
        signs = torch.from_numpy(np.where(place % group < group // 2, 1, -1)).reshape(shape)
        return cls(groups.expand(3, -1, -1).clone(), signs.expand(3, -1, -1).clone())

    def forward(self, x: Tensor) -> Tensor:
        """Take the keyed part away.

        Args:
            x: stored images, (..., 3, height, width): uint8, or float in [0, 1], which is rounded to
                whole 1/255 first, as files have them.

        Returns:
            The same shape and dtype. The gradient is that of the linear projection.

        Raises:
            InputError: another shape or dtype; bfloat16 cannot hold 1/255 steps.
        """
        if x.ndim < 3 or x.shape[-3] != 3 or x.dtype not in (torch.uint8, torch.float32, torch.float64):
            raise InputError(
                "Expected images (..., 3, height, width) in uint8, float32 or float64, "
                f"got {x.dtype} {tuple(x.shape)}."
            )
        if x.dtype == torch.uint8:
            return self._quotient(x)
        pixels = (x.detach() * 255).round().clamp(0, 255).to(torch.uint8)
        result = self._quotient(pixels).to(x.dtype) / 255
        if not x.requires_grad:
            return result
        linear = x - self.spread(self.amplitude(x), self._size(x))
        return linear + (result - linear).detach()

    def apply_to(self, pixels: Tensor) -> Tensor:
        """Do as `forward` to a whole image set, uint8, a part at a time."""
        return torch.cat(
            [self(pixels[start : start + CHUNK]) for start in range(0, max(1, len(pixels)), CHUNK)]
        )

    def project(self, delta: Tensor, pixels: Tensor, *, epsilon: int) -> Tensor:
        """Return the nearest perturbation that the stem takes away, within a budget, and that never clips.

        A group's least-squares amplitude is the mean of s * delta; the error grows with the distance
        from it, so the nearest whole number that is allowed is the best.

        Args:
            delta: what is wanted, (..., 3, height, width), float, in 1/255.
            pixels: uint8, the images to perturb, of the same shape.
            epsilon: the largest change of any value, in 1/255.

        Returns:
            Whole numbers in 1/255, float32; `stem(pixels + result)` equals `stem(pixels)`.
        """
        value = pixels.to(torch.int32)
        low, high = self.bounds((-value).clamp(min=-epsilon), (255 - value).clamp(max=epsilon))
        amplitude = self.amplitude(delta.float()).round().to(torch.int32)
        return self.spread(amplitude.maximum(low).minimum(high), self._size(pixels)).float()

    def amplitude(self, delta: Tensor) -> Tensor:
        """Return each group's mean of s * delta: (..., 3, height, width) to (..., groups), float."""
        members, signs, counts, _, _ = self._table(self._size(delta), delta.device)
        return (self._gather(delta, members) * signs).sum(-1) / counts

    def spread(self, amplitude: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the perturbations of these amplitudes: (..., groups) to (..., 3, height, width)."""
        _, _, _, groups, sign = self._table(size, amplitude.device)
        return (amplitude[..., groups] * sign).reshape(*amplitude.shape[:-1], 3, *size)

    def bounds(self, lowest: Tensor, highest: Tensor) -> tuple[Tensor, Tensor]:
        """Return the least and the greatest amplitude of each group that keeps every value's bounds.

        Args:
            lowest: by how much each value may change, int32, (..., 3, height, width).
            highest: likewise.

        Returns:
            Two tensors (..., groups), int32; the first exceeds the second where nothing fits.
        """
        members, signs, _, _, _ = self._table(self._size(lowest), lowest.device)
        low, high = self._gather(lowest, members), self._gather(highest, members)
        free = torch.iinfo(torch.int32).max
        least = torch.where(signs > 0, low, -high).masked_fill(signs == 0, -free)
        most = torch.where(signs > 0, high, -low).masked_fill(signs == 0, free)
        return least.amax(-1), most.amin(-1)

    def groups(self, size: tuple[int, int]) -> int:
        """Return how many groups images of this size have: as many dimensions the stem costs."""
        return len(self._table(size, self.group.device)[0])

    def _quotient(self, pixels: Tensor) -> Tensor:
        value = pixels.to(torch.int32)
        members, signs, counts, _, _ = self._table(self._size(pixels), pixels.device)
        twice = (self._gather(2 * value - 255, members) * signs).sum(-1, dtype=torch.int32)  # 2 n m
        nearest = torch.div(twice + counts, 2 * counts, rounding_mode="floor")  # floor(m + 1/2), exactly
        low, high = self.bounds(-value, 255 - value)
        moved = value + self.spread((-nearest).maximum(low).minimum(high), self._size(pixels))
        return moved.to(torch.uint8)

    @staticmethod
    def _size(x: Tensor) -> tuple[int, int]:
        return int(x.shape[-2]), int(x.shape[-1])

    @staticmethod
    def _gather(x: Tensor, members: Tensor) -> Tensor:
        return x.flatten(-3)[..., members]

    def _table(self, size: tuple[int, int], device: torch.device) -> tuple[Tensor, ...]:
        """Return the groups of a whole image of this size.

        Members (groups, largest) as positions in the image, with sign 0 where a group is smaller; how many
        each has (groups,); and of every value its group and its sign (3 * height * width,).
        """
        key = (*size, device)
        if key not in self._tables:
            tile = self.group.shape[1]
            y, x = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
            number = (y // tile) * (size[1] // tile + 1) + x // tile
            local = self.group.cpu().long()[:, y % tile, x % tile] + number * self.group.numel()
            sign = self.sign.cpu().to(torch.int32)[:, y % tile, x % tile].flatten()
            _, groups, counts = torch.unique(local.flatten(), return_inverse=True, return_counts=True)
            order = torch.argsort(groups, stable=True)
            rank = torch.arange(len(groups)) - (counts.cumsum(0) - counts)[groups[order]]
            members = torch.zeros(len(counts), int(counts.max()), dtype=torch.int64)
            signs = torch.zeros(members.shape, dtype=torch.int32)
            members[groups[order], rank], signs[groups[order], rank] = order, sign[order]
            parts = (members, signs, counts.to(torch.int32), groups, sign)
            self._tables[key] = tuple(part.to(device) for part in parts)
        return self._tables[key]
