"""How fast the cost models are."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from secateur.envs.costs import PolicyCosts


@dataclass(frozen=True)
class CostSpeed:
    """Policies per second that one cost model answers on one core, decoding of the policies included and excluded."""

    cost: str
    policies_per_second: float
    with_decoding: float


def benchmark_costs(costs: PolicyCosts, population: int = 4096, repeats: int = 9, seed: int = 0) -> list[CostSpeed]:
    """Return the speed of every cost model, the device's too, over random policies; medians over `repeats`.

    Args:
        costs: of the policies of a space.
        population: policies per call.
    """
    rng = np.random.default_rng(seed)
    space = costs.policy_space
    levels = rng.integers(space.num_levels, size=(population, len(space.num_levels)))
    columns = space.levels_to_columns(levels)

    def rate(call: Callable[[], object]) -> float:
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        return population / float(np.median(seconds))

    return [
        CostSpeed(
            name,
            rate(lambda model=model: model.total(space.geometry.shapes(*columns))),
            rate(lambda model=model: model.total(space.shapes(levels))),
        )
        for name, model in costs.models.items()
    ]
