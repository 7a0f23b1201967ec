"""What a keyed stem takes from images, and what it leaves to a perturbation.

    python benchmarks/stem.py        the first 512 images of CIFAR-10: a minute on a core

Random noise far above the budget is projected to 8/255. Every row is one line of results/stem.jsonl, for one key. The
data are Parquet in the hub's layout, in the folder that PRIVET_DATA names.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from privet.files import json_line, write_bytes
from privet.images import open_images
from privet.models import KeyedStem
from privet.seeds import generator

RESULTS = Path(__file__).parent / "results" / "stem.jsonl"
EPSILON = 8


def main() -> None:
    """Measure every row and write them."""
    pixels = open_images(Path(os.environ["PRIVET_DATA"]) / "cifar10/train.parquet", limit=512).pixels
    values = pixels.float()
    variance = (values - values.mean((2, 3), keepdim=True)).square().mean()
    wanted = 1000 * torch.randn(values.shape, generator=generator(0, "noise"))
    rows = []
    for tile in (8, 32):
        for group in (2, 4, 8, 16):
            stem = KeyedStem.from_key(bytes(range(32)), group=group, tile=tile)
            moved = stem(pixels).float() - values
            delta = stem.project(wanted, pixels, epsilon=EPSILON)
            low, high = stem.bounds(
                (-pixels.int()).clamp(min=-EPSILON), (255 - pixels.int()).clamp(max=EPSILON)
            )
            rows.append(
                {
                    "tile": tile,
                    "group": group,
                    "dimensions": stem.groups((32, 32)),
                    "energy moved, share of variance": round(float(moved.square().mean() / variance), 4),
                    "rms of delta": round(float(delta.square().mean().sqrt()), 3),
                    "groups frozen by clipping": round(float((low == high).float().mean()), 4),
                }
            )
    write_bytes(RESULTS, b"".join(map(json_line, rows)))


if __name__ == "__main__":
    main()
