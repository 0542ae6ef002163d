"""Finalists: the best policies of each budget, with the finalists' recovery, scored on images that the search has not used."""

from __future__ import annotations

from secateur.envs.core import Budget, CompressionPolicy, Evaluation
from secateur.envs.evaluator import top1
from secateur.search.problem import Problem
from secateur.search.results.core import Finalist, FrontPoint
from secateur.search.results.front import Front


def finalist_scores(problem: Problem, policy: CompressionPolicy) -> tuple[Evaluation, Evaluation]:
    """Return the float32 scores after the finalists' recovery, on the validation and on the test split."""
    network, costs = problem.finalist_assembler.assemble(policy), problem.space.costs.of_policy(policy)
    splits = {"validation": problem.data.validation, "final": problem.data.test}
    scored = {name: (top1(network, *problem.data.tensors(split)), len(split)) for name, split in splits.items()}
    validation, final = (Evaluation(score, costs, name, images) for name, (score, images) in scored.items())
    return validation, final


def dense_test_score(problem: Problem) -> Evaluation:
    """Return the dense model's float32 score on the test split."""
    images, labels = problem.data.tensors(problem.data.test)
    return Evaluation(top1(problem.assembler.model, images, labels), problem.space.dense_costs, "final", len(labels))


def score_finalist(problem: Problem, budget: Budget, candidate: FrontPoint) -> Finalist | None:
    """Return a candidate as a finalist; None if it violates the budget's `top1_drop` after the finalists' recovery."""
    validation, final = finalist_scores(problem, candidate.policy)
    return _finalist(problem, budget, candidate, validation, final)


def finalize(problem: Problem, front: Front, top: int) -> list[Finalist]:
    """Return the `top` policies of every budget, best validation score first: the first of each budget is its winner.

    Policies that violate the budget's `top1_drop` after the finalists' recovery are left out.
    """
    scored: dict[CompressionPolicy, tuple[Evaluation, Evaluation]] = {}
    finalists = []
    for budget in problem.budgets:
        of_budget = []
        for candidate in front.best(budget.name, top):
            if candidate.policy not in scored:
                scored[candidate.policy] = finalist_scores(problem, candidate.policy)
            finalist = _finalist(problem, budget, candidate, *scored[candidate.policy])
            of_budget += [] if finalist is None else [finalist]
        finalists += sorted(of_budget, key=lambda finalist: -finalist.validation.top1)
    return finalists


def _finalist(
    problem: Problem, budget: Budget, candidate: FrontPoint, validation: Evaluation, final: Evaluation
) -> Finalist | None:
    least = 0.0 if budget.top1_drop is None else problem.dense.top1 - budget.top1_drop
    if validation.top1 < least:
        return None
    return Finalist(budget.name, candidate.policy, candidate.evaluation, validation, final)
