"""The time limit of evaluations, fixed or derived."""

from __future__ import annotations

import pytest

from secateur.envs.core import Episode, Evaluation, InputError
from secateur.search.config import parse_config
from secateur.search.run.evaluation_timeout import FACTOR, FIRST_SECONDS, LEAST_SECONDS, EvaluationTimeout


def episode(seconds):
    return Episode("phone", None, Evaluation(0.5, {}, seconds=seconds))


def test_the_limit_follows_the_longest_evaluation():
    timeout = EvaluationTimeout()
    assert timeout.seconds == FIRST_SECONDS
    timeout.add(Episode("phone", None, None, failure="it broke after a millisecond"))
    assert timeout.seconds == FIRST_SECONDS, "a failure says nothing about the length of evaluations"
    timeout.add(episode(0.01))
    assert timeout.seconds == LEAST_SECONDS
    for seconds in (40.0, 10.0):
        timeout.add(episode(seconds))
        assert timeout.seconds == FACTOR * 40.0


def test_a_fixed_limit_stays():
    timeout = EvaluationTimeout(2)
    timeout.add(episode(40.0))
    assert timeout.seconds == 2.0


@pytest.mark.parametrize("value", [0, -1, True, "soon", float("inf"), float("nan")])
def test_only_seconds_and_auto_are_accepted(value):
    assert parse_config(values(evaluation_timeout="auto"), "test.yaml").search.evaluation_timeout == "auto"
    assert parse_config(values(evaluation_timeout=2.5), "test.yaml").search.evaluation_timeout == 2.5
    with pytest.raises(InputError, match="evaluation_timeout.*must be a number of seconds above 0, or `auto`"):
        parse_config(values(evaluation_timeout=value), "test.yaml")


def test_an_evaluation_in_the_searchs_own_process_has_no_limit():
    assert parse_config(values(workers=0), "test.yaml").search.evaluation_timeout == "auto"
    with pytest.raises(InputError, match="`evaluation_timeout` needs workers"):
        parse_config(values(workers=0, evaluation_timeout=2.5), "test.yaml")


def values(**search):
    return {
        "model": {"factory": "secateur:synthetic", "input": [3, 8, 8]},
        "data": {"name": "synthetic", "validation": 100},
        "search": search,
        "budgets": {"small": {"macs": "<= 50%"}},
    }
