"""A small trained problem that all tests of the benchmarks share."""

import pytest
import torch
from torchvision.models import MobileNetV2

from secateur.envs.model_graph import analyze
from secateur.envs.tasks.cifar_resnet import resnet20, vgg16_bn
from secateur.search.benchmarks.recovery_settings import calibrated_problem
from secateur.search.config import parse_config

VALUES = {
    "model": {"factory": "secateur:synthetic", "weights": "trained", "input": [3, 8, 8]},
    "data": {"name": "synthetic", "train": 256, "calibration": 64, "validation": 200},
    "search": {"agent": "random", "evaluations": 6, "workers": 0, "precision": "float32"},
    "space": {"prune_ratio": [0.0, 0.75]},
    "recovery": [],
    "budgets": {"half": {"macs": "<= 50%"}, "third": {"macs": "<= 33%"}},
}


@pytest.fixture(scope="session")
def settings():
    """Function (**sections) -> the configuration; the same trained network as long as `data` and `model` stay."""
    return lambda **sections: parse_config({**VALUES, **sections}, "test.yaml")


@pytest.fixture(scope="session")
def problem(settings):
    """A problem with calibration; tests that change it make a copy with `dataclasses.replace`."""
    return calibrated_problem(settings(), lambda text: None)


def _graph(network):
    return analyze(network.eval(), (torch.zeros(1, 3, 32, 32),), verify=False)


@pytest.fixture(scope="session")
def resnet_graph():
    """The plan of ResNet-20: residual blocks."""
    return _graph(resnet20())


@pytest.fixture(scope="session")
def chain_graph():
    """The plan of VGG-16: a chain."""
    return _graph(vgg16_bn())


@pytest.fixture(scope="session")
def depthwise_graph():
    """The plan of a short MobileNetV2: a stem, and blocks without and with a residual connection."""
    return _graph(MobileNetV2(inverted_residual_setting=[[1, 16, 1, 1], [6, 24, 2, 2]]))


@pytest.fixture
def two_settings(monkeypatch):
    """Leaves two recovery settings: fewer evaluations show as much."""
    from secateur.search.benchmarks import importances, prediction, recovery_settings

    few = {name: recovery_settings.RECOVERY_SETTINGS[name] for name in ("none", "least_squares")}
    monkeypatch.setattr(prediction, "RECOVERY_SETTINGS", few)
    monkeypatch.setattr(importances, "TESTED_WITH", tuple(few))
    return few
