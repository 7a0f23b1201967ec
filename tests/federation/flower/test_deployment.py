"""The real engine: a SuperLink and three SuperNodes on loopback, of which one dies and comes back, and one sends garbage."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import blobs

EXAMPLE = Path(__file__).parents[3] / "examples" / "flower"
APP = """
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from privet.federation.flower import app
from privet.federation.flower.app import server
from privet.federation.flower.link import pack


def garble(message: Message, context: Context, call_next):
    reply = call_next(message, context)
    if context.node_config["partition-id"] == 2 and reply.has_content() and "arrays" in reply.content:
        reply.content["arrays"] = pack([bytes(range(200))])
    return reply


__all__ = ["client", "server"]  # where Flower looks for them
client = ClientApp(mods=[garble, app.compress])
client.train()(app.train)
"""
PATIENCE = 420.0


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in found:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in found]


class Engine:
    """Processes that are ended by their ids, each with its own log."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port, *self.node_ports = free_ports(4)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        home = folder / "home"
        home.mkdir()
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{self.port}"\ninsecure = true\n'
        )
        self.environment = {
            **os.environ,
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }

    def start(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command, stdout=log, stderr=log, env=self.environment, start_new_session=True
            )

    def stop(self, name: str) -> None:
        process = self.processes.pop(name)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)

    def link(self) -> None:
        where = ("--insecure", "--host", "127.0.0.1", "--port", str(self.port))
        self.start("link", "flower-superlink", *where, "--disable-runtime-dependency-installation")
        url = f"http://127.0.0.1:{self.port}/health"

        def up() -> bool:
            try:
                return urllib.request.urlopen(url, timeout=2).status == 200
            except OSError:
                return False

        self.until(up, "the SuperLink answers")

    def node(self, number: int) -> None:
        where = ("--superlink", f"127.0.0.1:{self.port}", "--host", "127.0.0.1")
        port = str(self.node_ports[number])
        config = ("--node-config", f"partition-id={number}")
        self.start(f"node{number}", "flower-supernode", "--insecure", *where, "--port", port, *config)

    def until(self, true: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + PATIENCE
        while not true():
            logs = {
                path.name: path.read_text("utf-8", "replace")[-2000:] for path in self.folder.glob("*.log")
            }
            assert time.monotonic() < end, f"waited for: {what}; {logs}"
            time.sleep(0.2)

    def call(self, *command: str) -> str:
        done = subprocess.run(
            command, env=self.environment, capture_output=True, timeout=PATIENCE, check=True
        )
        return done.stdout.decode()


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    one = Engine(tmp_path)
    try:
        yield one
    finally:
        for name in list(one.processes):
            one.stop(name)


def configuration(**values: Any) -> str:
    return " ".join(
        f"{key.replace('_', '-')}={json.dumps(str(value) if isinstance(value, Path) else value)}"
        for key, value in values.items()
    )


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_node_dies_and_another_sends_garbage(
    engine: Engine, tmp_path: Path, make_folder: Callable[..., Path]
) -> None:
    app, out = tmp_path / "app", tmp_path / "out"
    (app / "federation").mkdir(parents=True)
    (app / "pyproject.toml").write_bytes((EXAMPLE / "pyproject.toml").read_bytes())
    (app / "federation" / "__init__.py").write_text("")
    (app / "federation" / "app.py").write_text(APP)
    config = configuration(
        data=make_folder(blobs(90), "train"),
        test=make_folder(blobs(30, seed=1), "test"),
        out=out,
        nodes=3,
        clients=3,
        alpha=0.0,
        rounds=4,
        architecture="cnn-w4",
        augment=False,
        device="cpu",
        precision="float32",
        budget="5%",
        download_budget="5%",
    )
    engine.link()
    for number in range(3):
        engine.node(number)
    engine.start("run", "flwr", "run", str(app), "here", "--stream", "--run-config", config)
    engine.until((out / ".privet" / "server.safetensors").exists, "the first round")
    engine.stop("node1")
    time.sleep(3)
    engine.node(1)
    engine.until((out / "run.json").exists, "the last round")
    report = json.loads((out / "federation.json").read_text())
    rounds = report["rounds"]
    assert len(rounds) == 4
    for one in rounds:
        assert "2" in one["refused"] and "0" in one["accepted"]
    assert "1" in rounds[0]["accepted"]
    assert any("1" in one["accepted"] for one in rounds[1:])

    (run,) = json.loads(engine.call("flwr", "list", "here", "--format", "json"))["runs"]
    traffic = run["network-traffic"]
    ways = (("down", traffic["outbound-bytes"]), ("up", traffic["inbound-bytes"]))
    apart = {way: sum(one[way] for one in rounds) / flowers for way, flowers in ways}
    assert all(0.94 < ratio < 1.06 for ratio in apart.values()), (apart, traffic)
