"""Finalists: chosen by the search, repaired with care, judged on validation, reported on test."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from secateur.envs.core import Budget, CompressionPolicy, Evaluation
from secateur.envs.metric import TOP1
from secateur.search.results import finalize as module
from secateur.search.results.finalize import finalize

DENSE = Evaluation(0.9, {"macs": 100.0})
POLICIES = [CompressionPolicy((width,), (), ()) for width in (1, 2, 3)]


def run(monkeypatch, validation, budgets, top=3):
    """Return the finalists when the search found POLICIES in this order and the finalists' recovery scores them so."""
    calls = []

    def scores(problem, policy):
        calls.append(policy)
        index = POLICIES.index(policy)
        return Evaluation(validation[index], {}, "validation"), Evaluation(0.5 - index / 100, {}, "final")

    monkeypatch.setattr(module, "finalist_scores", scores)
    found = [SimpleNamespace(policy=policy, evaluation=Evaluation(0.8, {})) for policy in POLICIES]
    front = SimpleNamespace(best=lambda name, count: found[:count])
    finalists = finalize(SimpleNamespace(budgets=budgets, dense=DENSE, task=SimpleNamespace(metric=TOP1)), front, top)
    return [(f.budget, POLICIES.index(f.policy)) for f in finalists], calls


def test_validation_after_repair_chooses_whatever_the_test_split_says(monkeypatch):
    order, _ = run(monkeypatch, (0.80, 0.85, 0.82), (Budget("phone", {}),))
    assert order == [("phone", 1), ("phone", 2), ("phone", 0)]


def test_a_policy_of_two_budgets_is_scored_once(monkeypatch):
    order, calls = run(monkeypatch, (0.8, 0.7, 0.6), (Budget("phone", {}), Budget("watch", {})), top=2)
    assert order == [("phone", 0), ("phone", 1), ("watch", 0), ("watch", 1)] and calls == POLICIES[:2]


@pytest.mark.parametrize(("drop", "left"), [(0.02, []), (0.055, [1]), (None, [1, 2, 0])])
def test_what_loses_too_much_after_repair_is_no_finalist(monkeypatch, drop, left):
    order, _ = run(monkeypatch, (0.80, 0.85, 0.82), (Budget("phone", {}, metric_drop=drop),))
    assert [index for _, index in order] == left
