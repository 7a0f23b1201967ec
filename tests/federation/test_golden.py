"""Messages of format version 1 must be read for ever as they were read when it was frozen.

To add a codec: `python -m tests.federation.test_golden`, which writes what is absent and changes nothing.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tests.federation.common import BOTH, Update, network, numba
from tests.federation.test_codecs import TABLE

from privet.federation import Schema, SenderState, decode
from privet.federation.rans import lanes_for
from privet.federation.sparse import SparseCodec
from privet.federation.wire import Section, unpack

GOLDEN = Path(__file__).parent / "golden"
BUDGET = "55%"  # so that tensors have levels of their own, and symbols more than one lane
DRAWN = ("qsgd", "terngrad", "eden")  # their bytes depend on numpy's generators, which may change


def path_of(name: str) -> Path:
    return GOLDEN / f"v1-{name.replace(', ', '-').replace(' ', '-')}.bin"


def sender() -> SenderState:
    state = SenderState(seed=11)
    state.begin(round=3, base=2, accepted=None)
    return state


def message(name: str) -> bytes:
    budget = BUDGET if isinstance(TABLE[name], SparseCodec) else None
    return TABLE[name].encode(original(), budget=budget, state=sender())


def digest(update: Update) -> str:
    joined = b"".join(
        name.encode() + update[name].dtype.str.encode() + update[name].tobytes() for name in update
    )
    return hashlib.sha256(joined).hexdigest()


def original() -> Update:
    """Return the update that was encoded."""
    return load_file(GOLDEN / "update.safetensors")


@pytest.mark.parametrize("name", TABLE)
def test_old_messages_are_read_as_ever(name: str) -> None:
    expected = json.loads((GOLDEN / "decoded.json").read_text())
    schema = Schema.of(original())
    assert schema.hash.hex() == expected["schema"]
    for used in BOTH:
        with numba(used):
            assert digest(decode(path_of(name).read_bytes(), schema)) == expected[name]


@pytest.mark.parametrize("name", [name for name in TABLE if not name.startswith(DRAWN)])
def test_the_encoder_still_writes_them(name: str) -> None:
    assert message(name) == path_of(name).read_bytes()


def test_there_is_no_other() -> None:
    assert {path.name for path in GOLDEN.glob("*.bin")} == {path_of(name).name for name in TABLE}


def test_they_hold_every_kind_of_section() -> None:
    kinds = {name: unpack(path_of(name).read_bytes())[1] for name in TABLE}
    assert set().union(*kinds.values()) == set(Section)
    assert Section.CONTEXT in kinds["dhq"] and Section.RICE in kinds["dhq, rice"]
    told, _ = Schema.of(original()).flatten(decode(path_of("dhq").read_bytes(), Schema.of(original())))
    assert lanes_for(int((told != 0).sum())) > 1


def write() -> None:
    """Write golden files that are absent."""
    GOLDEN.mkdir(exist_ok=True)
    if not (GOLDEN / "update.safetensors").exists():
        update = network(scale=2)
        update["fc.weight"][::2] *= np.float32(1e-3)  # dead units, so that rows tell much
        save_file(update, GOLDEN / "update.safetensors")
    schema = Schema.of(original())
    listing = GOLDEN / "decoded.json"
    expected = json.loads(listing.read_text()) if listing.exists() else {"schema": schema.hash.hex()}
    for name in TABLE:
        if not path_of(name).exists():
            path_of(name).write_bytes(message(name))
            expected[name] = digest(decode(path_of(name).read_bytes(), schema))
    listing.write_text(json.dumps(expected, indent=2) + "\n")


if __name__ == "__main__":
    write()
