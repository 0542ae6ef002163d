"""A small run with sensitivities, finalists, a training and two verified exports whose figures are known."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from secateur.search.config import load_config
from secateur.search.export.verification import Cost, MeasuredLatency, Outputs, Verification, write_verification
from secateur.search.report.data import RunData, read_run
from secateur.search.report.page import render
from secateur.search.results.document import read_front
from secateur.search.run.search import search
from secateur.search.training.curve import EPOCH, EXPORTED, TRAINED, TRAINING, Curve, Stage

CONFIG = {
    "model": {"factory": "secateur:synthetic", "weights": "trained", "input": [3, 8, 8]},
    "data": {"name": "synthetic", "validation": 256, "train": "rest", "calibration": 64},
    "device": "configs/devices/arm_phone.json",
    "search": {"agent": "random", "evaluations": 14, "workers": 0, "precision": "float32"},
    "space": {"weight_bits": [4, 8], "activation_bits": [8]},
    "budgets": {"phone": {"macs": "<= 60%"}, "watch": {"macs": "<= 40%", "weight_bytes": "<= 20%"}},
    "finalize": {"top": 2, "verify": False},
}
PREDICTED, MEASURED = 0.5, 0.75


def config(folder: Path, name: str, **search_section):
    values = {**CONFIG, "search": {**CONFIG["search"], **search_section}, "output": {"root": str(folder), "name": name}}
    return load_config(values)


def verified(score: float) -> Verification:
    """A verification with this score of the exported file."""
    return Verification(
        "onnxruntime", "1.0", 1, {"processor": "test"}, "phone", {"model.onnx": 1},
        Outputs(100, 0.0, 0.0, 1.0, score, score, None, True, 0.0),
        (Cost("macs", 1.0, 1.0),),
        MeasuredLatency(MEASURED, 0.7, 0.8, 2.0, 1.9, 2.1, 10, PREDICTED, False),
        (), (), {"name": "top1"},
    )  # fmt: skip


@pytest.fixture(scope="session")
def run(tmp_path_factory, session_cache) -> Path:
    """The folder of the run. Its agent measures sensitivities."""
    folder = search(config(tmp_path_factory.mktemp("runs"), "first", agent="evopress"))
    final = read_front(folder)["final"]["points"][0]
    for name, score in ((final["budget"], 0.5), (f"{final['budget']}-trained", 0.625)):
        (folder / "exports" / name).mkdir(parents=True)
        write_verification(folder / "exports" / name, verified(score))
    curve = Curve(folder / TRAINING / f"{final['evaluation']}-2-epochs-abc")
    for epoch in (1, 2):
        curve.add(Stage(EPOCH, epoch=epoch, validation=0.25 * epoch))
    curve.add(Stage(TRAINED, epoch=2, validation=0.5, test=0.5625))
    curve.add(Stage(EXPORTED, budget=final["budget"], passed=True))
    return folder


@pytest.fixture(scope="session")
def other_run(tmp_path_factory, session_cache) -> Path:
    """A second run with the same budgets, by random search and without sensitivities."""
    return search(config(tmp_path_factory.mktemp("runs"), "second", evaluations=6, seed=1))


@pytest.fixture
def copy(run, tmp_path) -> Path:
    """A copy of the run that may be changed."""
    return Path(shutil.copytree(run, tmp_path / "copy"))


@pytest.fixture(scope="session")
def data(run) -> RunData:
    return read_run(run, "first")


@pytest.fixture(scope="session")
def page(data, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render([data]), encoding="utf-8")
    return path


@pytest.fixture
def unchecked(monkeypatch):
    """front.json is read without its schema, which refuses most names that could do harm: the page does not rely on it."""
    monkeypatch.setattr("secateur.search.results.document.check_document", lambda document, schema, path: None)
