"""Write scikit-learn's handwritten digits as class folders: real images that need no download.

    python examples/digits.py FOLDER

1,797 digits of 8 x 8 grey pixels, enlarged to 32 px: 1,297 into FOLDER/train, 500 into FOLDER/test. They are drawn in
pencil on grey paper, with the contrast of a photograph rather than of print: on pure black and pure white half of all
noise would be cut off.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

TEST = 500
SIDE = 32
PAPER, PENCIL = 160, 96  # levels of 255


def main(folder: Path) -> None:
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    for position, index in enumerate(order):
        split = "test" if position < TEST else "train"
        path = folder / split / str(digits.target[index]) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        ink = digits.images[index] / 16
        grey = Image.fromarray((PAPER + (PENCIL - PAPER) * ink).round().astype(np.uint8))
        grey.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(path)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("Expected the folder to write to: python examples/digits.py FOLDER")
    main(Path(sys.argv[1]))
