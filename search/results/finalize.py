"""Finalists: the best policies of each budget, with the finalists' recovery, scored on images that the search has not used."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import nn

from secateur.envs.core import Budget, CompressionPolicy, Evaluation, InputError
from secateur.search.problem import Problem
from secateur.search.results.core import Finalist, FrontPoint
from secateur.search.results.front import Front

log = logging.getLogger(__name__)


def finalist_scores(problem: Problem, policy: CompressionPolicy) -> tuple[Evaluation, Evaluation]:
    """Return the float32 scores after the finalists' recovery, on the validation and on the test split."""
    network, costs = problem.finalist_assembler.assemble(policy), problem.space.costs.of_policy(policy)
    return score_network(problem, network, costs, "validation"), score_network(problem, network, costs, "test")


def dense_test_score(problem: Problem) -> Evaluation:
    """Return the dense model's float32 score on the test split."""
    return score_network(problem, problem.assembler.model, problem.space.dense_costs, "test")


def score_network(problem: Problem, network: nn.Module, costs: Mapping[str, float], split: str) -> Evaluation:
    """Return the float32 score of a network with these costs on the validation or the test split."""
    found = problem.task.evaluate(network, split)
    quality = problem.task.metric.quality(found.score, problem.dense.score)
    return Evaluation(found.score, costs, "final" if split == "test" else split, found.samples, quality=quality)


def score_finalist(problem: Problem, budget: Budget, candidate: FrontPoint) -> Finalist | None:
    """Return a candidate as a finalist; None if it loses more of the metric than the budget allows."""
    validation, final = finalist_scores(problem, candidate.policy)
    return _finalist(problem, budget, candidate, validation, final)


def finalize(problem: Problem, front: Front, top: int) -> list[Finalist]:
    """Return the `top` policies of every budget, best validation score first: the first of each budget is its winner.

    Policies are left out that cannot be scored, or violate the budget's limit of the metric's loss after the finalists' recovery.
    """
    scored: dict[CompressionPolicy, tuple[Evaluation, Evaluation] | None] = {}
    finalists = []
    for budget in problem.budgets:
        of_budget = []
        for candidate in front.best(budget.name, top):
            if candidate.policy not in scored:
                scored[candidate.policy] = _scores_or_none(problem, candidate)
            scores = scored[candidate.policy]
            finalist = None if scores is None else _finalist(problem, budget, candidate, *scores)
            of_budget += [] if finalist is None else [finalist]
        finalists += sorted(of_budget, key=lambda finalist: -finalist.validation.quality)
    return finalists


def _scores_or_none(problem: Problem, candidate: FrontPoint) -> tuple[Evaluation, Evaluation] | None:
    """Return a candidate's final scores; None if the task cannot score it, which must not end a search that found others."""
    try:
        return finalist_scores(problem, candidate.policy)
    except InputError as error:
        log.warning("policy %d is no finalist: %s", candidate.number, error)
        return None


def _finalist(
    problem: Problem, budget: Budget, candidate: FrontPoint, validation: Evaluation, final: Evaluation
) -> Finalist | None:
    allowed = budget.metric_drop
    if allowed is not None and problem.task.metric.drop(validation.score, problem.dense.score) > allowed:
        return None
    return Finalist(budget.name, candidate.policy, candidate.evaluation, validation, final)
