"""Ours against NNCodec (ISO/IEC 15938-17) at equal bytes, on updates of real training.

    pip install nncodec && python benchmarks/nncodec_rival.py --data ../shared/data

NNCodec quantises every value and codes it arithmetically; its parameter says how coarsely. For each of several, ours
gets as many bytes as NNCodec took, and the errors are compared. NNCodec is not among privet's requirements, for it
needs torchvision and opencv; an environment of its own will do. Writes benchmarks/results/nncodec.md.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from privet.federation import DHQ, DeadZone, Schema, decode
from privet.files import write_bytes
from updates import error, recorded

HERE = Path(__file__).parent
NETWORKS = ("mlp", "lenet", "resnet8-w32")
STEPS = (-36, -32, -28, -24, -20)  # NNCodec's parameter of quantisation: higher is coarser


def rival() -> Any:
    """Return NNCodec's module for networks."""
    for name in ("nms", "qnms"):  # torchvision asks for them on import, and a CPU build of torch lacks them
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", "(Tensor a, Tensor b, float c) -> Tensor")
    from nncodec import nn

    return nn


def rows(name: str, data: Path) -> list[str]:
    """Measure one network's update."""
    update = recorded(name, data, HERE / "work")
    schema = Schema.of(update)
    floats = {key: value for key, value in update.items() if value.dtype == np.float32 and value.ndim}
    lines = []
    scrap = {"results": tempfile.mkdtemp(), "verbose": False}  # it writes files beside what it returns
    rival().encode({"few": np.ones((16, 16), np.float32)}, args=scrap)  # what happens once
    for step in STEPS:
        started = time.process_time()
        theirs = rival().encode(floats, args={**scrap, "qp": step, "nonweight_qp": step})
        spent = time.process_time() - started
        ours = DHQ(quantiser=DeadZone()).encode(update, schema=schema, budget=f"{len(theirs)}B")
        errors = [error(told, update, schema) for told in (rival().decode(theirs), decode(ours, schema))]
        speed = 4 * schema.size / 1e6 / spent
        lines.append(
            f"| {name} | {step} | {len(theirs):,} | {errors[0]:.3f} | {len(ours):,} | {errors[1]:.3f} | {speed:,.0f} |"
        )
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    """Measure everything and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("PRIVET_DATA", "../shared/data")))
    data = parser.parse_args().data
    torch.set_num_threads(1)
    text = [
        f"# Ours and NNCodec {version('nncodec')} at equal bytes",
        "",
        "The updates of codec.md; DHQ with uniform levels gets as many bytes as NNCodec took with this parameter of "
        "quantisation, for all tensors, and dependent quantisation. Error is ‖u − decoded‖² / ‖u‖² of the compressed "
        "values.",
        "",
        "| network | NNCodec's parameter | its bytes | its error | DHQ's bytes | DHQ's error | NNCodec encodes, MB/s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        *(line for name in NETWORKS for line in rows(name, data)),
        "",
    ]
    write_bytes(HERE / "results" / "nncodec.md", "\n".join(text).encode())


if __name__ == "__main__":
    main()
