"""The app of `flwr run` on nodes with folders of their own: everybody means the same by a label."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, RecordDict
from tests.conftest import blobs

from privet.errors import UsageError
from privet.federation.flower import LocalGrid, app
from privet.federation.flower.link import KEY, Request
from privet.federation.flower.mod import classes_of
from privet.images import ImageSet

Make = Callable[..., Path]
ANIMALS = ("cat", "dog", "fox")


def animals(
    count: int, kept: tuple[str, ...] = ANIMALS, *, seed: int = 0, like: dict[str, str] | None = None
) -> ImageSet:
    """Return images of these animals; `like` writes them under other names."""
    images = blobs(count, seed=seed)
    images = images.subset(
        [index for index, label in enumerate(images.labels.tolist()) if ANIMALS[label] in kept]
    )
    words = [ANIMALS[label] for label in images.labels.tolist()]
    return replace(
        images, names=tuple(f"{(like or {}).get(word, word)}/{index:04d}" for index, word in enumerate(words))
    )


def config(test: Path, out: Path, **more: Any) -> dict[str, Any]:
    return {
        "test": str(test),
        "out": str(out),
        "nodes": 3,
        "clients": 3,
        "rounds": 2,
        "fraction": 1.0,
        "architecture": "cnn-w4",
        "batch-size": 8,
        "budget": "10%",
        "download-budget": "10%",
        "augment": False,
        "device": "cpu",
        "precision": "float32",
        **more,
    }


def run(settings: dict[str, Any], nodes: list[dict[str, Any]]) -> LocalGrid:
    """Run the app, and return its nodes."""
    grid = LocalGrid(app.client, nodes, run_config=settings)
    app.serve(grid, Context(1, 0, {}, RecordDict(), settings))
    return grid


def report_of(settings: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(settings["out"]) / "federation.json").read_text())
    return found


def test_nodes_that_lack_classes_learn_the_server_s(make_folder: Make, tmp_path: Path) -> None:
    settings = config(
        make_folder(animals(30, seed=1), "test"), tmp_path / "out", rounds=12, **{"learning-rate": 0.1}
    )
    kept = {"a": ("cat", "dog"), "b": ("dog", "fox"), "c": ("fox",)}
    nodes = [
        {"name": name, "data": str(make_folder(animals(60, some, seed=2), name))}
        for name, some in kept.items()
    ]
    grid = run(settings, nodes)
    for context, some in zip(grid.contexts.values(), kept.values(), strict=True):
        images = app._images(context)
        assert images.class_names == ANIMALS
        assert {ANIMALS[label] for label in images.labels.tolist()} == set(some)
    report = report_of(settings)
    assert not any(one["refused"] for one in report["rounds"])
    assert report["accuracy"]["last"] > 0.8  # of three classes: all nodes mean the same by a label


def test_a_node_with_a_class_of_its_own_is_left_out(
    make_folder: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = config(make_folder(animals(30, seed=1), "test"), tmp_path / "out")
    folders = [make_folder(animals(30, seed=seed), f"node{seed}") for seed in (2, 3)]
    folders.append(make_folder(animals(30, seed=4, like={"fox": "wolf"}), "node4"))
    nodes = [{"name": str(number), "data": str(folder)} for number, folder in enumerate(folders)]
    run(settings, nodes)
    for one in report_of(settings)["rounds"]:
        assert list(one["accepted"]) == ["0", "1"] and not one["refused"]
    words = "classes that the others lack: wolf. Expected only cat, dog, fox."
    assert words in caplog.text
    settings |= {"out": str(tmp_path / "other"), "nodes": 1}
    with pytest.raises(UsageError, match="lack: wolf. Expected only cat, dog, fox"):
        run(settings, nodes[2:])


def test_parts_of_everybody_s_images(make_folder: Make, tmp_path: Path) -> None:
    test = make_folder(animals(30, seed=1), "test")
    data = make_folder(animals(90, ("dog", "fox"), seed=2), "data")
    settings = config(test, tmp_path / "out", data=str(data), alpha=0.0)
    grid = run(settings, [{"partition-id": number} for number in range(3)])
    parts = [app._images(context) for context in grid.contexts.values()]
    assert all(part.class_names == ANIMALS for part in parts)
    assert sum(len(part) for part in parts) == 60
    assert not any(one["refused"] for one in report_of(settings)["rounds"])


def test_classes_travel_once_and_again_to_a_node_that_lost_them(make_folder: Make, tmp_path: Path) -> None:
    told: list[tuple[int, int, list[str]]] = []

    class Watched(LocalGrid):
        def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
            messages = list(messages)
            for message in messages:
                request = Request.of(message.content.config_records[KEY])
                told.append((request.round, message.metadata.dst_node_id, request.classes))
                if request.round == 2 and message.metadata.dst_node_id == 1:
                    self.contexts[1].state = RecordDict()
            return super().send_and_receive(messages)

    settings = config(make_folder(animals(30, seed=1), "test"), tmp_path / "out", rounds=3)
    folder = make_folder(animals(30, seed=2), "node")
    nodes = [{"name": str(number), "data": str(folder)} for number in range(3)]
    grid = Watched(app.client, nodes, run_config=settings)
    app.serve(grid, Context(1, 0, {}, RecordDict(), settings))
    assert [where for *where, classes in told if classes] == [[0, 1], [0, 2], [0, 3], [3, 1]]
    assert all(classes in ([], list(ANIMALS)) for *_, classes in told)
    assert [list(one["refused"]) for one in report_of(settings)["rounds"]] == [[], ["0"], []]
    assert classes_of(grid.contexts[1]) == list(ANIMALS)
    assert np.isfinite(report_of(settings)["accuracy"]["last"])
