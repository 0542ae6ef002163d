"""The speeds of the cost models."""

from __future__ import annotations

from secateur.search.benchmarks.costs import benchmark_costs
from secateur.search.build import build_costs, build_model_and_graph
from secateur.search.config import parse_config

VALUES = {
    "model": {"factory": "secateur.envs.tasks.synthetic:synthetic_net", "input": [3, 8, 8]},
    "data": {"name": "secateur.envs.tasks.synthetic:load", "validation": 200},
    "budgets": {"small": {"macs": "<= 50%"}},
}


def test_cost_speeds_are_measured_for_every_model():
    config = parse_config(VALUES, "test.yaml")
    _, _, graph = build_model_and_graph(config)
    costs = build_costs(config, graph)
    speeds = benchmark_costs(costs, population=64, repeats=3)
    assert [speed.cost for speed in speeds] == list(costs.models)
    assert all(speed.policies_per_second > 0 and speed.with_decoding > 0 for speed in speeds)
