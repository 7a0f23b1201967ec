"""privet codec inspect, and what the room may import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tests.federation.common import network
from tests.federation.test_codecs import TABLE

from privet.cli import main
from privet.errors import EXIT_CODES, CodecError
from privet.federation import DHQ, Schema, SenderState, inspect
from privet.federation.wire import frame_bytes, unpack


@pytest.mark.parametrize("name", TABLE)
def test_parts_add_up(name: str) -> None:
    update, state = network(), SenderState()
    state.begin(round=9, base=8, accepted=None)
    blob = TABLE[name].encode(update, state=state)
    found = inspect(blob)
    assert (found.codec, found.version, found.round, found.base) == (TABLE[name].name, 1, 9, 8)
    assert sum(part.bytes for part in found.parts) == found.bytes == len(blob)
    assert frame_bytes(unpack(blob)[1]) == len(blob)
    assert found.values is None and not found.tensors
    more = inspect(blob, Schema.of(update))
    assert more.parts == found.parts and more.values == Schema.of(update).size
    assert [tensor.name for tensor in more.tensors] == [
        "conv.weight",
        "fc.weight",
        "head.weight",
        "wide.bias",
    ]
    assert all(0 <= tensor.kept <= tensor.size for tensor in more.tensors)


def test_kept_values_are_counted() -> None:
    update = {"a": np.zeros(300, np.float32), "b": np.zeros((20, 20), np.float32)}
    update["a"][[3, 7]] = -2, 1
    update["b"][4, 4] = 0.5
    found = inspect(DHQ().encode(update, budget="1%"), Schema.of(update))
    assert [(tensor.kept, tensor.largest) for tensor in found.tensors] == [(2, 2.0), (1, 0.5)]


def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    update = network()
    blob = DHQ().encode(update)
    (tmp_path / "m.bin").write_bytes(blob)
    save_file(update, tmp_path / "model.safetensors")
    assert main(["codec", "inspect", str(tmp_path / "m.bin")]) == 0
    out = capsys.readouterr().out
    assert "dhq, format 1, round 0, base 0" in out and f"{len(blob)} B  100.0%" in out
    assert "signs and levels, by rANS" in out
    assert (
        main(["codec", "inspect", str(tmp_path / "m.bin"), "--model", str(tmp_path / "model.safetensors")])
        == 0
    )
    out = capsys.readouterr().out
    assert "bits a value" in out and "of what independent positions and levels would take" in out
    assert "fc.weight [30, 50]" in out


@pytest.mark.parametrize(
    ("what", "code", "message"),
    [
        ("damaged", CodecError.exit_code, "checksum does not match"),
        ("empty", CodecError.exit_code, "Expected a message of at least 27 bytes, got 0"),
        ("absent", 3, "Cannot read"),
        ("other model", CodecError.exit_code, "made for a model with other tensors"),
        ("no safetensors", 3, "Expected safetensors in"),
        ("bfloat16", 3, "Expected safetensors with numbers that numpy has in"),
        ("8-bit floats", 3, "Expected safetensors with numbers that numpy has in"),
    ],
)
def test_errors_are_one_message(
    what: str,
    code: int,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    blob = bytearray(DHQ().encode(network()))
    if what == "damaged":
        blob[-9] ^= 1
    path, model = tmp_path / "m.bin", tmp_path / "model.safetensors"
    if what != "absent":
        path.write_bytes(b"" if what == "empty" else bytes(blob))
    save_file({"w": np.zeros(5, np.float32)}, model)
    if what == "no safetensors":
        model.write_bytes(b"nothing")
    kind = {"bfloat16": ("BF16", 2), "8-bit floats": ("F8_E4M3", 1)}.get(what)
    if kind is not None:
        head = json.dumps({"w": {"dtype": kind[0], "shape": [5], "data_offsets": [0, 5 * kind[1]]}}).encode()
        model.write_bytes(len(head).to_bytes(8, "little") + head + bytes(5 * kind[1]))
    needs = what == "other model" or what == "no safetensors" or kind is not None
    arguments = ["--model", str(model)] if needs else []
    assert main(["codec", "inspect", str(path), *arguments]) == code
    shown = capsys.readouterr()
    assert message in shown.err and shown.err.startswith("privet: ")
    assert code in EXIT_CODES


def test_the_room_needs_neither_torch_nor_numba_nor_flower() -> None:
    code = (
        "import sys; sys.modules['numba'] = None\n"
        "import numpy as np; from privet.federation import DHQ, Schema, decode\n"
        "u = {'w': np.arange(400, dtype=np.float32)}; decode(DHQ().encode(u), Schema.of(u))\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'flwr')))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
