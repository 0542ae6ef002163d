"""Queries the agent of a finished run for policies under any budget and preference: seconds instead of another search."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from os.path import isdir
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from secateur.agents import QUERYABLE
from secateur.agents.core import Queryable, SequenceActor
from secateur.envs.compression_env import CompressionEnv
from secateur.envs.core import Budget, CompressionPolicy, Evaluation, InputError
from secateur.envs.feasibility import FeasibleSpace
from secateur.envs.policy_space import policy_to_document
from secateur.envs.rollout import rollout
from secateur.envs.tasks.imports import did_you_mean
from secateur.search.build import absolute_budget, build_problem, make_env
from secateur.search.config import BudgetConfig, Overrides, SearchConfig, split_limits
from secateur.search.given import Given
from secateur.search.named_code import load_own_manifest
from secateur.search.problem import Problem, StatusCallback
from secateur.search.run.folder import AGENT

ROLLOUTS = 256
"""Candidates per query, among which the agent chooses."""


@dataclass(frozen=True)
class Answer:
    """A policy that the agent proposes, measured by the search's evaluator.

    Attributes:
        policy: the proposed one.
        evaluation: its score on the validation images and its costs; None if `failure` says why there is none.
        constraints: {name: value / limit - 1}; feasible when all are <= 0.
        utility: preference @ measured reward; -inf without a score.
        expected_score: the agent's prediction before the evaluation.
        failure: one sentence, or None.
    """

    policy: CompressionPolicy
    evaluation: Evaluation | None
    constraints: Mapping[str, float]
    utility: float
    expected_score: float
    failure: str | None = None


@dataclass(frozen=True)
class Reply:
    """The answers to one query, best measured utility first, with the budget, the preference and the problem of the query."""

    budget: Budget
    preference: np.ndarray
    answers: tuple[Answer, ...]
    problem: Problem


def ask(
    run: str | os.PathLike[str],
    budget: str | Mapping[str, str],
    preference: str | Mapping[str, float] | None = None,
    evaluations: int = 3,
    overrides: Overrides = (),
    status: StatusCallback = lambda text: None,
    given: Given | None = None,
    trust: Collection[str] = (),
) -> Reply:
    """Return the best policies that the agent of a run proposes, measured.

    Args:
        run: folder of a finished search with an agent that can be queried (`QUERYABLE`).
        budget: limits such as "macs<=43%,weight_bytes<=20kB" or {"macs": "<= 43%"}; any cost may be limited.
        preference: weights such as "macs=0.7" or {"macs": 0.7}; the metric gets the rest of 1. None: that of the search.
        evaluations: how many policies are measured.
        overrides: changes of the run's configuration, such as {"data.root": "where/the/data/are/now"}.
        status: status callback, called at each stage.
        given: model and task as Python objects, if the run began with such (`Run.given`).
        trust: modules that the run's manifest may name.
    Raises:
        InputError: for a run without such an agent, or a budget or preference that cannot be used.
    """
    if evaluations < 1:
        raise InputError(f"`evaluations` must be at least 1, but got {evaluations}.")
    settings, _ = load_own_manifest(run, overrides, given, trust)
    agent_folder(run, settings)  # before anything that takes long
    limits = _budget_config(budget)
    problem = build_problem(settings, status, given)
    wanted = absolute_budget("asked", limits, problem.space.dense_costs, problem.task.metric)
    problem.space.check(wanted)
    status("querying the agent")
    agent = load_agent(run, settings, problem.space)
    weights = agent.preference if preference is None else _weights(preference, problem.space.objectives)
    answers = answer(agent, make_env(problem), wanted, weights, evaluations, status)
    return Reply(wanted, weights, tuple(answers), problem)


def answer(
    agent: Queryable,
    env: CompressionEnv,
    budget: Budget,
    preference: np.ndarray,
    evaluations: int,
    status: StatusCallback = lambda text: None,
) -> list[Answer]:
    """Return what the agent proposes, measured: feasible ones first, then by measured utility.

    Args:
        agent: proposes.
        env: evaluates.
        budget: satisfiable; any cost may be limited.
        preference: (num_objectives,) on the simplex.
        evaluations: how many policies are measured.
        status: status callback, called at each stage.
    """
    sequences = agent.propose(budget, preference, evaluations, ROLLOUTS)
    qualities, metric = agent.predict_quality(np.stack(sequences)), env.space.metric
    answers = []
    for number, (sequence, quality) in enumerate(zip(sequences, qualities, strict=True)):
        status(f"evaluating proposal {number + 1} of {len(sequences)}")
        episode = rollout(env, SequenceActor(budget, sequence, number))
        utility = -np.inf if episode.reward is None else float(preference @ episode.reward)
        expected = metric.score(float(quality), env.space.dense_score)
        policy = agent.space.decode(sequence)
        found = Answer(policy, episode.evaluation, episode.constraints, utility, expected, episode.failure)
        answers.append(((not episode.feasible, -utility), found))
    return [found for _, found in sorted(answers, key=lambda item: item[0])]


def reply_document(reply: Reply) -> dict[str, Any]:
    """Return a reply as JSON values: metric, limits, preference, and the answers, best first."""
    space = reply.problem.space
    return {
        "metric": space.metric.name,
        "budget": dict(reply.budget.limits),
        "preference": {name: float(weight) for name, weight in zip(space.objectives, reply.preference, strict=True)},
        "answers": [_answer_document(answer) for answer in reply.answers],
    }


def _answer_document(answer: Answer) -> dict[str, Any]:
    found = answer.evaluation
    return {
        "score": None if found is None else found.score,
        "expected_score": answer.expected_score,
        "costs": {} if found is None else dict(found.costs),
        "feasible": found is not None and all(value <= 0 for value in answer.constraints.values()),
        "constraints": dict(answer.constraints),
        "utility": answer.utility if np.isfinite(answer.utility) else None,
        "failure": answer.failure,
        "policy": policy_to_document(answer.policy),
    }


def load_agent(run: str | os.PathLike[str], settings: SearchConfig, space: FeasibleSpace) -> Queryable:
    """Return the agent that a run has stored.

    Raises:
        InputError: if there is none.
    """
    return QUERYABLE[settings.search.agent](agent_folder(run, settings), space)


def agent_folder(run: str | os.PathLike[str], settings: SearchConfig) -> Path:
    """Return the folder of the agent that a run has stored.

    Raises:
        InputError: if there is none.
    """
    folder, name = Path(run) / AGENT, settings.search.agent
    if name not in QUERYABLE:
        choices = " or ".join(f"`search.agent={choice}`" for choice in QUERYABLE)
        raise InputError(f"{run} has no agent that can be queried: its search used `{name}`. Search with {choices}.")
    if not isdir(folder):
        unfinished = f"{run} has no agent yet: its search was not finished."
        raise InputError(
            f'{unfinished} Continue it: secateur.resume("{run}")', f"{unfinished} Continue it: secateur resume {run}"
        )
    return folder


def _wrong(argument: str, reason: str) -> InputError:
    """Return the error for an argument, which is an option of the command."""
    return InputError(f"`{argument}`{reason}", f"--{argument}{reason}")


def _budget_config(budget: str | Mapping[str, str]) -> BudgetConfig:
    """Return the limits of a text or a mapping."""
    if isinstance(budget, str):
        try:
            budget = split_limits(budget)
        except InputError as reason:
            raise _wrong("budget", f" {reason}.") from None
    try:
        return BudgetConfig.model_validate(dict(budget))
    except ValidationError as errors:
        error = errors.errors(include_url=False)[0]
        place = ".".join(str(part) for part in error["loc"] if part != "[key]")
        raise _wrong("budget", f": {place}: {error.get('ctx', {}).get('error', error['msg'])}") from None


def _weights(preference: str | Mapping[str, float], objectives: Sequence[str]) -> np.ndarray:
    """Return the preference on the simplex; the metric gets the rest of 1, unless it has a weight itself."""
    if isinstance(preference, str):
        pairs = [part.partition("=") for part in preference.split(",") if part.strip()]
        try:
            preference = {name.strip(): float(value) for name, _, value in pairs}
        except ValueError:
            raise _wrong("preference", f' must read like "macs=0.7", but got {preference!r}.') from None
    weights = np.zeros(len(objectives))
    for name, value in preference.items():
        if name not in objectives:
            known = f"{did_you_mean(name, objectives)} Known: {', '.join(objectives)}"
            raise _wrong("preference", f": {name} is no objective of this run.{known}")
        if not 0 <= value < float("inf"):
            raise _wrong("preference", f": the weight of {name} must be 0 or more, but got {value}.")
        weights[objectives.index(name)] = value
    if objectives[0] not in preference:
        weights[0] = 1 - weights.sum()
        if weights[0] < 0:
            raise _wrong(
                "preference", f": the weights add up to {weights[1:].sum():g}, which leaves nothing for {objectives[0]}."
            )
    if not weights.sum():
        raise _wrong("preference", ": some weight must be above 0.")
    return weights / weights.sum()
