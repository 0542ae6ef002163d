"""`secateur benchmark costs`: how many policies per second every cost model evaluates, on one core."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from secateur.cost_models.core import CostModel
from secateur.envs.costs import PolicyCosts
from secateur.envs.policy_space import PolicySpace
from secateur.search.benchmarks.scaffold import markdown_table
from secateur.search.benchmarks.timing import median_seconds
from secateur.search.build import build_costs, build_model_and_graph
from secateur.search.config import SearchConfig


@dataclass(frozen=True)
class CostSpeed:
    """Speed of one cost model on one core.

    Attributes:
        cost: name of the cost.
        policies_per_second: without decoding the policies.
        with_decoding: policies per second, from levels to costs.
    """

    cost: str
    policies_per_second: float
    with_decoding: float


def run_costs(config: SearchConfig) -> None:
    """Measure the cost models of a configuration and print the table."""
    torch.set_num_threads(1)
    _, _, graph = build_model_and_graph(config)
    costs = build_costs(config, graph)
    cells = [[speed.cost, f"{speed.policies_per_second:,.0f}", f"{speed.with_decoding:,.0f}"] for speed in benchmark_costs(costs)]
    print(markdown_table(["cost", "policies/s", "with decoding of the policies"], cells))


def benchmark_costs(costs: PolicyCosts, population: int = 4096, repeats: int = 9, seed: int = 0) -> list[CostSpeed]:
    """Return the speed of every cost model, those of the device too, over random policies; medians over `repeats`.

    Args:
        costs: of the policies of a space.
        population: policies per call.
        repeats: calls of each cost model.
        seed: random seed for the policies.
    """
    rng, space = np.random.default_rng(seed), costs.policy_space
    levels = rng.integers(space.num_levels, size=(population, len(space.num_levels)))
    return [_speed(space, name, model, levels, repeats) for name, model in costs.models.items()]


def _speed(space: PolicySpace, name: str, model: CostModel, levels: np.ndarray, repeats: int) -> CostSpeed:
    columns = space.levels_to_columns(levels)
    without_decoding = median_seconds(lambda: model.total(space.geometry.shapes(*columns)), repeats)
    with_decoding = median_seconds(lambda: model.total(space.shapes(levels)), repeats)
    return CostSpeed(name, len(levels) / without_decoding, len(levels) / with_decoding)
