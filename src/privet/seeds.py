"""Random numbers that depend on what they are for, never on what was drawn before.

Each use names itself, `generator(seed, "noise", step)`, so a killed run that resumes at any step
draws the same numbers as one that was never killed, and so does any number of workers.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # codecs need seeds and no torch
    import torch


def derive(seed: int, *purpose: str | int) -> int:
    """Return a 63-bit seed for this purpose, by SHA-256."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, *purpose: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator on `device`, seeded for this purpose."""
    import torch

    return torch.Generator(device).manual_seed(derive(seed, *purpose))
