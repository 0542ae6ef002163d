"""A search problem on the synthetic network, one policy of it, and its export."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from secateur.envs.assembler import Assembler
from secateur.envs.calibration import CalibrationConfig, calibrate
from secateur.envs.core import Budget, CompressionPolicy, Evaluation
from secateur.envs.model_graph import analyze
from secateur.envs.pruning.importance import IMPORTANCES
from secateur.envs.pruning.importance.core import DenseModel
from secateur.envs.quantization.quantizers import QUANTIZERS
from secateur.envs.recovery import RECOVERIES
from secateur.envs.tasks import synthetic
from secateur.envs.tasks.classification import Classification
from secateur.envs.tasks.models import load_model
from secateur.search.config import parse_config
from secateur.search.export.write import write_export

FACTORY = "secateur.envs.tasks.synthetic:synthetic_net"
BUDGET = Budget("phone", {"macs": 1e5}, metric_drop=0.02)
COSTS = {"macs": 9e4, "weight_bytes": 3e3}
VALIDATION, TEST = Evaluation(0.8, COSTS, images=256), Evaluation(0.7, COSTS, "final", images=768)


def plugin(registry: dict[str, tuple[type, type]], name: str) -> Any:
    config, made = registry[name]
    return made(config())


@pytest.fixture(scope="session")
def untrained() -> SimpleNamespace:
    """The parts of a problem that an export reads, with random weights."""
    torch.manual_seed(0)
    data, model = synthetic.load(), load_model(FACTORY)
    graph = analyze(model, (torch.zeros(1, 3, 8, 8),))
    images, labels = data.tensors(data.calibration)
    calibration = calibrate(model, graph, images, CalibrationConfig())
    dense_model = DenseModel(model, graph, calibration, images, labels, np.random.default_rng(0))
    scores = plugin(IMPORTANCES, "l1_norm").scores(dense_model)
    recoveries = [plugin(RECOVERIES, name) for name in ("least_squares", "batch_norm")]
    assembler = Assembler(model, graph, scores, plugin(QUANTIZERS, "uniform"), recoveries[1:], calibration, images)
    config = parse_config(
        {
            "model": {"factory": FACTORY, "input": [3, 8, 8]},
            "data": {"name": "secateur.envs.tasks.synthetic:load", "calibration": 64, "validation": 256, "train": "rest"},
            "budgets": {"phone": {"macs": "<= 40%", "top1_drop": "<= 2"}},
        },
        "test.yaml",
    )
    dense = Evaluation(0.9, {"macs": 3e5, "weight_bytes": 1e4}, images=256)
    finalist_assembler = replace(assembler, recoveries=recoveries)
    problem = SimpleNamespace(
        config=config,
        task=Classification(data),
        assembler=assembler,
        finalist_assembler=finalist_assembler,
        dense=dense,
        device=None,
        given=None,
    )
    problem.on = lambda device: problem
    return problem


@pytest.fixture(scope="session")
def policy(untrained: SimpleNamespace) -> CompressionPolicy:
    """Half of every group; all kinds of bits next to each other."""
    layers = len(untrained.assembler.graph.geometry.layers)
    widths = tuple(group.units // 2 for group in untrained.assembler.graph.groups)
    return CompressionPolicy(widths, (8, 4, 3, 32, 2)[:layers], (8, 32, 8, 8, 32)[:layers])


@pytest.fixture(scope="session")
def write(untrained: SimpleNamespace, policy: CompressionPolicy) -> Callable[..., None]:
    """A function that writes an export of the policy to a folder."""
    return lambda folder, **options: write_export(folder, untrained, policy, BUDGET, VALIDATION, TEST, **options)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, write: Callable[..., None]) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "phone"
    write(folder, pt2=True)
    return folder


@pytest.fixture
def folder(tmp_path: Path, exported: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(exported, tmp_path / "phone")


@pytest.fixture
def without_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports with an empty model.onnx, which takes no time."""

    def write(network, graph, images, path, in_float):
        path.write_bytes(b"")
        return []

    monkeypatch.setattr("secateur.search.export.write.export_onnx", write)
