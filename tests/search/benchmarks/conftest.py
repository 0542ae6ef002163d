"""A small trained problem for the benchmarks."""

import pytest

from secateur.search.benchmarks.recovered import calibrated_problem
from secateur.search.config import parse_config

VALUES = {
    "model": {"factory": "secateur.envs.tasks.synthetic:synthetic_net", "weights": "trained", "input": [3, 8, 8]},
    "data": {"name": "secateur.envs.tasks.synthetic:load", "train": 256, "calibration": 64, "validation": 200},
    "search": {"agent": "random", "evaluations": 6, "workers": 0, "precision": "float32"},
    "space": {"prune_ratio": [0.0, 0.75]},
    "recovery": [],
    "budgets": {"half": {"macs": "<= 50%"}, "third": {"macs": "<= 33%"}},
}


@pytest.fixture(scope="module")
def settings():
    """Function (**sections) -> the configuration."""
    return lambda **sections: parse_config({**VALUES, **sections}, "test.yaml")


@pytest.fixture(scope="module")
def problem(settings):
    return calibrated_problem(settings(), lambda text: None)


@pytest.fixture
def lines():
    """Collects what a benchmark tells."""
    return []
