"""Size, error and speed of every codec, on updates of real training.

    python benchmarks/codec.py --data ../shared/data

Updates are recorded by benchmarks/updates.py and kept in benchmarks/work. Every message is made and read back; its
size is the length of its bytes. Speed is that of one core, in processor time, the best of several repeats, so that
other jobs on the machine disturb it little; the megabytes are those of the model in float32. Writes
benchmarks/results/codec.json and codec.md.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy is loaded

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from privet.federation import (
    DHQ,
    EDEN,
    FP16,
    QSGD,
    STC,
    Codec,
    DeadZone,
    Int8,
    Lloyd,
    MeanSplit,
    ScaledSign,
    Schema,
    SenderState,
    TernGrad,
    TopK,
    decode,
    inspect,
)
from privet.federation import fast as module
from privet.federation.inspection import WORDS, Inspection
from privet.federation.wire import Section
from privet.files import write_bytes, write_json
from updates import RECIPES, error, recorded

HERE = Path(__file__).parent
REPEATS, SECONDS = 7, 3.0  # at most, of each timing

# Name, codec, budget.
ROWS: list[tuple[str, Codec, str | None]] = [
    ("dhq", DHQ(), "1%"),
    ("dhq, Rice only", DHQ(context=False), "1%"),
    ("dhq, Lloyd", DHQ(quantiser=Lloyd(2)), "1%"),
    ("dhq, dead zone", DHQ(quantiser=DeadZone()), "1%"),
    ("dhq, depth 0", DHQ(quantiser=MeanSplit(0)), "1%"),
    ("stc", STC(), "1%"),
    ("topk", TopK(), "1%"),
    ("dhq", DHQ(), "5%"),
    ("dhq, Rice only", DHQ(context=False), "5%"),
    ("stc", STC(), "5%"),
    ("topk", TopK(), "5%"),
    ("eden, 1 bit", EDEN(bits=1), None),
    ("eden, 2 bits", EDEN(bits=2), None),
    ("sign", ScaledSign(), None),
    ("qsgd, 4 levels", QSGD(levels=4), None),
    ("terngrad", TernGrad(), None),
    ("int8", Int8(), None),
    ("fp16", FP16(), None),
]


def main() -> None:
    """Measure everything and write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("PRIVET_DATA", "../shared/data")))
    parser.add_argument("--networks", default=",".join(RECIPES))
    arguments = parser.parse_args()
    found: dict[str, Any] = {"machine": machine(), "networks": {}}
    for name in arguments.networks.split(","):
        update = recorded(name, arguments.data, HERE / "work")
        schema = Schema.of(update)
        images, epochs, local, local_epochs = RECIPES[name]
        entry: dict[str, Any] = {
            "values": sum(array.size for array in update.values()),
            "compressed values": schema.size,
            "recipe": f"{images} images, {epochs} epochs; then a client's {local} images, {local_epochs} epochs",
            "rows": [measure(*row, update, schema) for row in ROWS],
            "shuffled": shuffled(update, schema),
            "fourth message": fourth(update, schema),
        }
        found["networks"][name] = entry
    found["machine"]["load average after"] = os.getloadavg()
    write_json(HERE / "results" / "codec.json", found)
    write_bytes(HERE / "results" / "codec.md", table(found).encode())


def measure(
    name: str, codec: Codec, budget: str | None, update: dict[str, Any], schema: Schema
) -> dict[str, Any]:
    """Return one row: size, error, and speed with whatever state the codec keeps."""
    blob = codec.encode(update, schema=schema, budget=budget)
    inspection = inspect(blob, schema)
    state = SenderState()

    def encode() -> None:
        state.residual = None  # each timing encodes the same, then stores a residual
        codec.encode(update, schema=schema, budget=budget, state=state)

    megabytes = 4 * schema.size / 1e6
    row = {
        "codec": name,
        "budget": budget,
        "bytes": len(blob),
        "bits a value": 8 * len(blob) / schema.size,
        "times smaller than float32": 4 * sum(array.size for array in update.values()) / len(blob),
        "normalised squared error": error(decode(blob, schema), update, schema),
        "of independent entropy": of_entropy(inspection),
        "parts": {part.what: part.bytes for part in inspection.parts},
        "encode MB/s": megabytes / best(encode),
        "decode MB/s": megabytes / best(lambda: decode(blob, schema)),
    }
    print(
        f"{name:>16} {budget or '':>4} {len(blob):>10,} B {row['bits a value']:8.4f} bits, error "
        f"{row['normalised squared error']:.3f}, of entropy {row['of independent entropy'] or 0:.3f}, "
        f"{row['encode MB/s']:,.0f} / {row['decode MB/s']:,.0f} MB/s",
        flush=True,
    )
    return row


def shuffled(update: dict[str, Any], schema: Schema) -> dict[str, Any]:
    """Return the message's size against independent entropy after all compressed values changed places."""
    values, plain = schema.flatten(update)
    mixed = np.random.default_rng(0).permutation(values)
    blob = DHQ().encode(
        {
            name: plain[name] if name in plain else array.astype(update[name].dtype)
            for name, array in schema.unflatten(mixed, plain).items()
        },
        schema=schema,
    )
    return {"of independent entropy": of_entropy(inspect(blob, schema))}


def of_entropy(found: Inspection) -> float | None:
    """Return a message's size, without the dense tensors, over the entropy of its positions and signed levels."""
    dense = sum(part.bytes for part in found.parts if part.what == WORDS[Section.DENSE])
    return 8 * (found.bytes - dense) / found.independent if found.independent else None


def fourth(update: dict[str, Any], schema: Schema) -> dict[str, Any]:
    """Return size against independent entropy when the same update came four times, with error feedback."""
    state = SenderState()
    for number in range(4):
        state.begin(round=number, accepted=number - 1 if number else None)
        blob = DHQ().encode(update, schema=schema, state=state)
    return {"bytes": len(blob), "of independent entropy": of_entropy(inspect(blob, schema))}


def best(work: Callable[[], object]) -> float:
    """Return the least processor time of several runs, in seconds."""
    work()  # compile, and warm the caches
    times: list[float] = []
    while len(times) < REPEATS and sum(times) < SECONDS:
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return min(times)


def machine() -> dict[str, Any]:
    """Return what the speeds depend on."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    cpu = next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    return {
        "processor": cpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "numba": getattr(module.numba, "__version__", None),
        "load average before": os.getloadavg(),
    }


def table(found: dict[str, Any]) -> str:
    """Return the results as markdown."""
    here = found["machine"]
    before, after = (
        tuple(round(each, 1) for each in here[f"load average {when}"]) for when in ("before", "after")
    )
    lines = [
        "# Codecs on updates of real training",
        "",
        "CIFAR-10, a client whose classes follow a Dirichlet distribution (0.3), SGD 0.05 in batches of 32; one "
        "message, without an earlier residual. Bytes are the length of the whole message, with header, batch norm's "
        "statistics and all; error is ‖u − decoded‖² / ‖u‖² of the compressed values. *Of entropy* is the message's "
        "size, without the tensors that go as they are, against the i.i.d. entropy of its own positions and signed "
        "levels.",
        "",
        f"One core of {here['processor']} ({here['cores']} cores), Python {here['python']}, numpy {here['numpy']}, "
        f"Numba {here['numba']}. Speed in MB of float32 model a second of *processor* time, the best of up to "
        f"{REPEATS} runs; codecs with error feedback store a residual, but have none to add to this first "
        "message. Other jobs ran on the machine (load average "
        f"{before} before, {after} after).",
    ]
    for name, entry in found["networks"].items():
        lines += [
            "",
            f"## {name}: {entry['values']:,} values, {entry['compressed values']:,} of them compressed",
            "",
            f"Server's model: {entry['recipe']}. Shuffled, DHQ at 1 % takes "
            f"{entry['shuffled']['of independent entropy']:.3f} of the entropy; the fourth message when the same "
            f"update comes four times, with error feedback, {entry['fourth message']['bytes']:,} bytes and "
            f"{entry['fourth message']['of independent entropy']:.3f} of it.",
            "",
            "| codec | budget | bytes | bits a value | times smaller | error | of entropy | encode MB/s "
            "| decode MB/s |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for row in entry["rows"]:
            share = row["of independent entropy"]
            lines.append(
                f"| {row['codec']} | {row['budget'] or ''} | {row['bytes']:,} | {row['bits a value']:.4f} | "
                f"{row['times smaller than float32']:,.1f} | {row['normalised squared error']:.3f} | "
                f"{'' if share is None else f'{share:.3f}'} | {row['encode MB/s']:,.0f} | {row['decode MB/s']:,.0f} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
