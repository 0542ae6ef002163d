"""Finalists: chosen by the search, repaired with care, judged on validation, reported on test."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from envs.core import Budget, CompressionPolicy, Evaluation, Sensitivities
from search import finalize as module
from search.finalize import finalize

DENSE = Evaluation(0.9, {"macs": 100.0})
POLICIES = [CompressionPolicy((width,), (), ()) for width in (1, 2, 3)]


def run(monkeypatch, validation, budgets, top=3, strengths=None):
    """Return the finalists when the search found POLICIES in this order and the finalists' recovery scores them so.

    `strengths` of their only choices are their sensitivities too; None: nobody knows any.
    """
    calls = []

    def scores(problem, policy):
        calls.append(policy)
        index = POLICIES.index(policy)
        return Evaluation(validation[index], {}, "validation"), Evaluation(0.5 - index / 100, {}, "final")

    monkeypatch.setattr(module, "finalist_scores", scores)
    found = [SimpleNamespace(policy=policy, evaluation=Evaluation(0.8, {})) for policy in POLICIES]
    front = SimpleNamespace(best=lambda name, count: found[:count], evaluations=len(found))
    space = SimpleNamespace(strengths=lambda policy: np.array([strengths[POLICIES.index(policy)]]))
    problem = SimpleNamespace(budgets=budgets, dense=DENSE, space=SimpleNamespace(space=space))
    known = None if strengths is None else Sensitivities(np.array([[0.0, 1.0]]))
    finalists = finalize(problem, front, top, known)
    return [(f.budget, POLICIES.index(f.policy)) for f in finalists], calls


def test_validation_after_repair_chooses_whatever_the_test_split_says(monkeypatch):
    order, _ = run(monkeypatch, (0.80, 0.85, 0.82), (Budget("phone", {}),))
    assert order == [("phone", 1), ("phone", 2), ("phone", 0)]


def test_a_policy_of_two_budgets_is_scored_once(monkeypatch):
    order, calls = run(monkeypatch, (0.8, 0.7, 0.6), (Budget("phone", {}), Budget("watch", {})), top=2)
    assert order == [("phone", 0), ("phone", 1), ("watch", 0), ("watch", 1)] and calls == POLICIES[:2]


@pytest.mark.parametrize(("drop", "left"), [(0.02, []), (0.055, [1]), (None, [1, 2, 0])])
def test_what_loses_too_much_after_repair_is_no_finalist(monkeypatch, drop, left):
    order, _ = run(monkeypatch, (0.80, 0.85, 0.82), (Budget("phone", {}, top1_drop=drop),))
    assert [index for _, index in order] == left


@pytest.mark.parametrize(
    ("top", "strengths", "expected"),
    [(2, (0.5, 0.4, 0.3), [0, 2]), (2, (0.5, 0.4, 0.6), [0, 1]), (2, (0.5, 0.4, 0.4), [0, 1]), (1, (0.5, 0.4, 0.3), [0]),
     (3, (0.5, 0.4, 0.3), [0, 1, 2]), (2, None, [0, 1])],
)  # fmt: skip
def test_the_last_of_several_places_goes_to_the_least_sum_of_sensitivities(monkeypatch, top, strengths, expected):
    order, _ = run(monkeypatch, (0.9, 0.8, 0.7), (Budget("phone", {}),), top, strengths)
    assert [index for _, index in order] == expected
