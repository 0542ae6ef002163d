"""The end of a search: the best policies of each budget, scored in float32 on images that the search never saw."""

from __future__ import annotations

from dataclasses import dataclass

from envs.core import CompressionPolicy, Evaluation
from envs.evaluator import top1
from search.build import Problem
from search.front import Front


@dataclass(frozen=True)
class Finalist:
    """A policy that made it to the test split.

    Attributes:
        budget: whose limits it meets.
        policy: what it is.
        proxy: its validation score, which chose it.
        final: its test score, which chose nothing.
    """

    budget: str
    policy: CompressionPolicy
    proxy: Evaluation
    final: Evaluation


def test_score(problem: Problem, policy: CompressionPolicy) -> Evaluation:
    """Return the float32 score on the test split."""
    images, labels = problem.data.tensors(problem.data.test)
    network = problem.assembler.assemble(policy)
    return Evaluation(top1(network, images, labels), problem.space.policy_costs(policy), "final", len(labels))


def dense_test_score(problem: Problem) -> Evaluation:
    """Return the dense model's float32 score on the test split."""
    images, labels = problem.data.tensors(problem.data.test)
    return Evaluation(top1(problem.assembler.model, images, labels), problem.space.dense_costs, "final", len(labels))


def finalize(problem: Problem, front: Front, top: int) -> list[Finalist]:
    """Return the `top` policies of every budget, best validation score first: the first of each budget is its winner."""
    scored: dict[CompressionPolicy, Evaluation] = {}
    finalists = []
    for budget in problem.budgets:
        for candidate in front.best(budget.name, top):
            if candidate.policy not in scored:
                scored[candidate.policy] = test_score(problem, candidate.policy)
            finalists.append(Finalist(budget.name, candidate.policy, candidate.evaluation, scored[candidate.policy]))
    return finalists
