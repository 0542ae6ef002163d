"""Before a search: does its score rank good policies like the outputs after the finalists' repair?

Policies near greedy's are what a search compares at its end. Each of them gets the quality that the search would see (its score,
its recovery, its number format), and the divergence of its outputs from the dense model's after the finalists' recovery.
Spearman's rank correlation of both says whether the search can tell good policies apart. The divergence is measured on validation
samples, which no repair has seen, without labels: among good policies it ranks like the test score, and a metric of so few
samples does not (`secateur benchmark score`). Test samples are not used.

The check draws from a generator of its own, and its evaluations do not count: the search is the same as without it. It takes the
first budget. It runs before the first evaluation, when a setting can still be changed at no loss.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from secateur.agents.greedy import GreedyConfig, allocate
from secateur.envs.core import Budget, CompressionPolicy
from secateur.envs.memory import run_model
from secateur.envs.tasks.core import first_inputs
from secateur.search.build import make_evaluator, with_sensitivities
from secateur.search.problem import Problem, StatusCallback
from secateur.search.results.score_check import ScoreCheck, compare_ranks

log = logging.getLogger(__name__)

NOISE = 0.15
"""Standard deviation of what is added to greedy's actions for the policies near it."""

SAMPLES = 256
"""Number of validation samples for the divergence after the finalists' recovery, at most."""

DRAWS = 4
"""So many times as many policies are drawn as are needed, because some are alike."""


def check_score(problem: Problem, status: StatusCallback = log.info) -> ScoreCheck:
    """Return how well the search's score ranks `search.check_score` policies near greedy's.

    Args:
        problem: the search; sensitivities are measured unless it has them.
        status: called before each policy.
    """
    problem, count = with_sensitivities(problem, status), problem.config.search.check_score
    budget, start = problem.budgets[0], time.perf_counter()
    drawn = near_greedy(problem, budget, greedy_sequences(problem, budget), DRAWS * count)
    policies = list(dict.fromkeys(drawn))[:count]
    pairs = list(_qualities(problem, policies, status))
    scores, careful = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    return compare_ranks(scores, careful, budget.name, time.perf_counter() - start)


def greedy_sequences(problem: Problem, budget: Budget) -> list[np.ndarray]:
    """Return greedy's executed sequences for a budget; the problem has sensitivities."""
    sensitivities = problem.space.sensitivities
    assert sensitivities is not None, "with_sensitivities comes first"
    return [allocate(problem.space, sensitivities, budget, power) for power in GreedyConfig().powers]


def near_greedy(problem: Problem, budget: Budget, greedy: Sequence[np.ndarray], count: int) -> list[CompressionPolicy]:
    """Return `count` policies at the edge of the budget near greedy's sequences, in turns; some may be alike."""
    space, rng = problem.space, np.random.default_rng(problem.config.search.seed)
    moved = [np.clip(greedy[i % len(greedy)] + rng.normal(0, NOISE, space.used.shape), 0, 1) for i in range(count)]
    return [space.decode(space.scale_to_budget(sequence, budget)) for sequence in moved]


def _qualities(problem: Problem, policies: Sequence[CompressionPolicy], status: StatusCallback) -> Iterator[tuple[float, float]]:
    """Yield the quality that the search sees and that after the finalists' recovery, of all policies that can be scored."""
    evaluator, divergence = make_evaluator(problem), _careful_divergence(problem)
    for number, policy in enumerate(policies, 1):
        status(f"checking the search's score, policy {number} of {len(policies)}")
        try:
            pair = evaluator.evaluate(policy).quality, -divergence(policy)
        except (Exception, SystemExit) as error:  # as any policy of a search may fail
            log.warning("a policy is left out of the check of the score: %s: %s", type(error).__name__, error)
            continue
        if np.isfinite(pair).all():
            yield pair


def _careful_divergence(problem: Problem) -> Callable[[CompressionPolicy], float]:
    """Return a function that gives the mean divergence of a policy's outputs after the finalists' recovery."""
    inputs = first_inputs(problem.task, "validation", SAMPLES)

    @torch.inference_mode()
    def outputs(network: torch.nn.Module) -> list[Any]:
        return [run_model(network, batch) for batch in inputs]

    dense = outputs(problem.assembler.model)

    def divergence(policy: CompressionPolicy) -> float:
        found = outputs(problem.finalist_assembler.assemble(policy))
        return float(torch.cat([problem.task.divergence(*pair) for pair in zip(dense, found, strict=True)]).double().mean())

    return divergence
