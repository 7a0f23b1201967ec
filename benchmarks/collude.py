"""How many licensees may pool their fingerprinted copies before tracing names none of them, or somebody else.

    python benchmarks/collude.py        CIFAR-10 and synthetic images: minutes on a core

Protected images carry noise of 8/255 inside a keyed stem (groups of 4 values in tiles of 8 pixels); 120 licensees have
copies, of whom so many pool theirs. A false accusation is allowed with a probability of 1e-6. Every row is one
line of results/collude.jsonl: how many of the guilty, and of the innocent, were named. One run a row.
The data are Parquet in the hub's layout, in the folder that PRIVET_DATA names.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from privet.files import json_line, write_bytes
from privet.images import open_images
from privet.licensing import mark, trace
from privet.models import KeyedStem
from privet.seeds import generator

RESULTS = Path(__file__).parent / "results" / "collude.jsonl"
LICENSEES = 120
POOLS = (1, 2, 3, 5, 10, 20, 50, 100)
Attack = Callable[[Tensor, torch.Generator], Tensor]


def rounded(values: Tensor) -> Tensor:
    return values.round().clamp(0, 255).to(torch.uint8)


def mix(copies: Tensor, random: torch.Generator) -> Tensor:
    """Return images whose every value comes from one of the copies."""
    chosen = torch.randint(0, len(copies), copies.shape[1:], generator=random)
    return copies.gather(0, chosen[None])[0]


def jpeg(pixels: Tensor) -> Tensor:
    result = []
    for image in pixels:
        file = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(file, "JPEG", quality=75)
        result.append(torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1))
    return torch.stack(result)


ATTACKS: dict[str, Attack] = {
    "average": lambda copies, _: rounded(copies.float().mean(0)),
    "median": lambda copies, _: copies.median(0).values,
    "middle of least and greatest": lambda copies, _: rounded(
        (copies.amin(0).float() + copies.amax(0).float()) / 2
    ),
    "mixture": mix,
    "average, noise of 2": lambda copies, random: rounded(
        copies.float().mean(0) + 2 * torch.randn(copies.shape[1:], generator=random)
    ),
    "average, jpeg-75": lambda copies, _: jpeg(rounded(copies.float().mean(0))),
}


def main() -> None:
    """Measure every row and write them."""
    cifar = open_images(Path(os.environ["PRIVET_DATA"]) / "cifar10/train.parquet", limit=50)
    grain = torch.randint(0, 256, cifar.pixels.shape, generator=generator(0, "grain"), dtype=torch.uint8)
    sets = {"cifar10": cifar, "synthetic": cifar.with_pixels(grain)}
    stem = KeyedStem.from_key(bytes(range(32)))
    keys = {f"{number:03d}": number.to_bytes(32, "big") for number in range(LICENSEES)}
    rows = []
    for name, clean in sets.items():
        noise = 20 * torch.randn(clean.pixels.shape, generator=generator(0, "noise"))
        delta = stem.project(noise, clean.pixels, epsilon=8)
        protected = clean.with_pixels((clean.pixels + delta).to(torch.uint8))
        for carrier in (stem, None):
            copies = torch.stack(
                [
                    mark(protected, clean, keys[f"{n:03d}"], epsilon=8, stem=carrier).pixels
                    for n in range(max(POOLS))
                ]
            )
            for count in (1, 10, 50) if name == "cifar10" else (10,):
                for attack, pool in ((attack, pool) for attack in ATTACKS for pool in POOLS):
                    random = generator(0, attack, pool, count)
                    pixels = ATTACKS[attack](copies[:pool, :count], random)
                    leaked = clean.subset(range(count)).with_pixels(pixels)
                    found = [
                        suspect for suspect in trace(leaked, protected, keys, stem=carrier) if suspect.guilty
                    ]
                    named = sum(int(suspect.copy) < pool for suspect in found)
                    rows.append(
                        {
                            "data": name,
                            "images": count,
                            "chips": "stem" if carrier else "pixels",
                            "attack": attack,
                            "pool": pool,
                            "guilty named": named,
                            "innocent named": len(found) - named,
                        }
                    )
                write_bytes(RESULTS, b"".join(map(json_line, rows)))


if __name__ == "__main__":
    main()
