"""The speeds of the cost models."""

from __future__ import annotations

from secateur.search.benchmarks.costs import benchmark_costs


def test_cost_speeds_are_measured_for_every_model(problem):
    speeds = benchmark_costs(problem.space.costs, population=64, repeats=3)
    assert [speed.cost for speed in speeds] == list(problem.space.costs.models)
    assert all(speed.policies_per_second > 0 and speed.with_decoding > 0 for speed in speeds)
