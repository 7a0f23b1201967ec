"""Feed every codec's decoder with damaged messages, and record what came of it.

    python benchmarks/fuzz_codec.py --cases 1000000

Each case takes a good message of a small model and damages it: bytes changed, bits flipped, parts cut, repeated,
swapped or filled with noise, sizes made huge. Nine in ten get the checksum that fits, so that the parts behind it are
reached. A case fails if anything but CodecError comes out, warnings included, if what is decoded is not a finite
update of the model's shapes, if Numba and numpy disagree (on one case in a hundred), or if it takes longer than a
second. Memory is watched: the process must not grow. Results go to benchmarks/results/fuzz-codec.json; a failing
message is written beside it.
"""

from __future__ import annotations

import argparse
import collections
import platform
import resource
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from privet.errors import CodecError
from privet.federation import CODECS, DHQ, EDEN, Codec, DeadZone, MeanSplit, Schema, decode
from privet.federation import fast as module
from privet.federation.wire import crc32c
from privet.files import write_bytes, write_json

RESULTS = Path(__file__).parent / "results"
SLOW_SECONDS = 1.0
TWICE = 100  # one case in so many is decoded without Numba too


def main() -> int:
    """Run so many cases and write what happened."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "fuzz-codec.json")
    arguments = parser.parse_args()
    warnings.simplefilter("error")
    draws = np.random.default_rng(arguments.seed)
    schema, messages = corpus()
    for blob in messages.values():
        decode(blob, schema)  # compile
    outcomes: dict[str, collections.Counter[str]] = {name: collections.Counter() for name in messages}
    before, started, slowest, names = _memory(), time.perf_counter(), 0.0, list(messages)
    for case in range(arguments.cases):
        name = names[case % len(names)]
        blob = damaged(messages[name], messages[names[int(draws.integers(len(names)))]], draws)
        begun = time.process_time()
        outcome = tried(blob, schema)
        slowest = max(slowest, time.process_time() - begun)
        if case % TWICE == 0 and not outcome.startswith("failed"):
            module._state["fast"] = False
            if tried(blob, schema) != outcome:
                outcome = "failed: Numba and numpy disagree"
            module._state["fast"] = module.numba is not None
        outcomes[name][outcome] += 1
        if outcome.startswith("failed") or slowest > SLOW_SECONDS:
            write_bytes(arguments.out.with_suffix(f".{case}.bin"), blob)
            print(f"case {case}, {name}: {outcome}, slowest {slowest:.2f} s", flush=True)
            return 1
        if case % 50_000 == 49_999:
            print(
                f"{case + 1:,} cases, {(case + 1) / (time.perf_counter() - started):,.0f} a second",
                flush=True,
            )
    write_json(
        arguments.out,
        {
            "cases": arguments.cases,
            "seed": arguments.seed,
            "outcomes": {name: dict(sorted(counter.items())) for name, counter in outcomes.items()},
            "slowest case in milliseconds of processor time": round(1000 * slowest, 1),
            "memory before and after in MiB": [before, _memory()],
            "values in the model": schema.size,
            "seconds": round(time.perf_counter() - started),
            "python": platform.python_version(),
            "numpy": np.__version__,
            "numba": getattr(module.numba, "__version__", None),
        },
    )
    return 0


def corpus() -> tuple[Schema, dict[str, bytes]]:
    """Return a small model's schema and a message of each codec."""
    draws = np.random.default_rng(7)

    def weight(*shape: int) -> Any:
        rows = np.exp(draws.normal(0, 1.2, (shape[0], *[1] * (len(shape) - 1))))
        return (rows * draws.standard_t(2, shape)).astype(np.float32)

    update = {
        "conv": weight(8, 6, 3, 3),
        "bias": weight(8),
        "running_mean": weight(8),
        "batches": np.array(12, np.int64),
        "fc": weight(20, 60),
    }
    codecs: dict[str, Codec] = {name: make() for name, make in CODECS.items()}
    codecs |= {
        "dhq with Rice": DHQ(context=False),
        "dhq with a dead zone": DHQ(quantiser=DeadZone()),
        "dhq of depth 0": DHQ(quantiser=MeanSplit(0)),
        "eden with 3 bits": EDEN(bits=3),
    }
    found = {name: codec.encode(update) for name, codec in codecs.items()}
    for name in ("dhq", "dhq with Rice", "stc", "topk"):
        found[f"{name}, 20 %"] = codecs[name].encode(update, budget="20%")
    return Schema.of(update), found


def damaged(blob: bytes, other: bytes, draws: np.random.Generator) -> bytes:
    """Return the message with one to four things wrong with it."""
    data = bytearray(blob)
    for _ in range(int(draws.integers(1, 5))):
        if len(data) < 8:
            break
        at = int(draws.integers(len(data)))
        # Most of what can go wrong is in front: sizes, counts, levels.
        if draws.random() < 0.5:
            at = min(len(data) - 1, 22 + int(draws.exponential(20)))
        length = 1 + int(draws.exponential(6))
        kind = int(draws.integers(9))
        if kind == 0:
            data[at] = int(draws.integers(256))
        elif kind == 1:
            data[at] ^= 1 << int(draws.integers(8))
        elif kind == 2:
            del data[at : at + length]
        elif kind == 3:
            data[at:at] = draws.bytes(length)
        elif kind == 4:
            data[at : at + length] = draws.bytes(length)
        elif kind == 5:
            data[at:at] = data[at : at + length]
        elif kind == 6:
            data[at : at + length] = other[at : at + length]
        elif kind == 7:
            data[at : at + length] = bytes([int(draws.choice([0, 1, 127, 128, 255]))]) * length
        else:
            del data[at:]
    if draws.random() < 0.9 and len(data) > 4:
        data[-4:] = crc32c(bytes(data[:-4])).to_bytes(4, "little")
    return bytes(data)


def tried(blob: bytes, schema: Schema) -> str:
    """Decode, and say what came of it."""
    try:
        update = decode(blob, schema)
    except CodecError:
        return "refused"
    except BaseException as error:
        return f"failed: {type(error).__name__}: {error}"
    for tensor in schema.tensors:
        array = update[tensor.name]
        if array.shape != tensor.shape or not np.isfinite(array).all():
            return "failed: no finite update of the model's shapes"
    return "decoded"


def _memory() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


if __name__ == "__main__":
    sys.exit(main())
