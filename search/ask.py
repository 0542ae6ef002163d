"""Asks the agent that a run has left for a policy under any budget and preference: seconds instead of another search."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import ValidationError

from secateur.agents.core import SequenceActor
from secateur.envs.compression_env import CompressionEnv
from secateur.envs.core import Budget, CompressionPolicy, Evaluation, InputError
from secateur.envs.feasibility import FeasibleSpace
from secateur.envs.rollout import rollout
from secateur.envs.tasks.imports import did_you_mean
from secateur.search.build import absolute_budget, build_problem, make_env
from secateur.search.config import BudgetConfig, Overrides, SearchConfig
from secateur.search.problem import Problem, StatusCallback
from secateur.search.run.folder import AGENT, load_manifest

if TYPE_CHECKING:
    from secateur.agents.envelope_ddpg.agent import EnvelopeDdpg

ROLLOUTS = 256
"""Candidates that are made for one question; the critics choose among them."""


@dataclass(frozen=True)
class Answer:
    """A policy that the agent proposes, measured by the search's evaluator.

    Attributes:
        policy: what it is.
        evaluation: its score on the validation images and its costs; None if `failure` says why there is none.
        constraints: {name: value / limit - 1}; feasible when all are <= 0.
        utility: preference @ measured reward; -inf without a score.
        expected_top1: what the critics said before.
        failure: one sentence, or None.
    """

    policy: CompressionPolicy
    evaluation: Evaluation | None
    constraints: Mapping[str, float]
    utility: float
    expected_top1: float
    failure: str | None = None


@dataclass(frozen=True)
class Reply:
    """The answers to one question, best measured utility first, and what was asked."""

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
) -> Reply:
    """Return the best policies that the agent of a run proposes, measured.

    Args:
        run: folder of a finished search of the agent `envelope_ddpg`.
        budget: limits such as "macs<=43%,weight_bytes<=20kB" or {"macs": "<= 43%"}; any cost may be limited.
        preference: weights such as "macs=0.7" or {"macs": 0.7}; top1 has what is left of 1. None: that of the search.
        evaluations: how many policies are measured.
        overrides: changes of the run's configuration, such as {"data.root": "where/the/data/are/now"}.
        status: told each stage.
    Raises:
        InputError: for a run without an agent, or anything that cannot be asked.
    """
    if evaluations < 1:
        raise InputError(f"`evaluations` must be at least 1, but got {evaluations}.")
    settings, _ = load_manifest(run, overrides)
    agent_folder(run, settings)  # before anything is loaded that takes long
    limits = _budget_config(budget)
    problem = build_problem(settings, status)
    wanted = absolute_budget("asked", limits, problem.space.dense_costs)
    problem.space.check(wanted)
    status("asking the agent")
    agent = load_agent(run, settings, problem.space)
    weights = agent.preference if preference is None else _weights(preference, problem.space.objectives)
    answers = answer(agent, make_env(problem), wanted, weights, evaluations, status)
    return Reply(wanted, weights, tuple(answers), problem)


def answer(
    agent: EnvelopeDdpg,
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
        status: told each stage.
    """
    sequences = agent.propose(budget, preference, evaluations, ROLLOUTS)
    expected = agent.learner.predictions(np.stack(sequences)).mean(axis=0)
    answers = []
    for number, (sequence, top1) in enumerate(zip(sequences, expected, strict=True)):
        status(f"evaluating proposal {number + 1} of {len(sequences)}")
        episode = rollout(env, SequenceActor(budget, sequence, number))
        utility = -np.inf if episode.reward is None else float(preference @ episode.reward)
        policy = agent.space.decode(sequence)
        found = Answer(policy, episode.evaluation, episode.constraints, utility, float(top1), episode.failure)
        answers.append(((not episode.feasible, -utility), found))
    return [found for _, found in sorted(answers, key=lambda item: item[0])]


def load_agent(run: str | os.PathLike[str], settings: SearchConfig, space: FeasibleSpace) -> EnvelopeDdpg:
    """Return the agent that a run has left.

    Raises:
        InputError: if it has left none.
    """
    folder = agent_folder(run, settings)
    from secateur.agents.envelope_ddpg.agent import EnvelopeDdpg

    agent = EnvelopeDdpg.load(folder, space)
    agent.finish()
    return agent


def agent_folder(run: str | os.PathLike[str], settings: SearchConfig) -> Path:
    """Return the folder of the agent that a run has left.

    Raises:
        InputError: if it has left none.
    """
    folder = Path(run) / AGENT
    if not folder.is_dir():
        if settings.search.agent == "envelope_ddpg":
            unfinished = f"{run} has no agent yet: its search was not finished."
            raise InputError(
                f'{unfinished} Continue it: secateur.resume("{run}")', f"{unfinished} Continue it: secateur resume {run}"
            )
        raise InputError(
            f"{run} has no agent that can be asked: its search used `{settings.search.agent}`. Search with "
            "`search.agent=envelope_ddpg`."
        )
    return folder


def _wrong(argument: str, reason: str) -> InputError:
    """Return the error for an argument, which is an option of the command."""
    return InputError(f"`{argument}`{reason}", f"--{argument}{reason}")


def _budget_config(budget: str | Mapping[str, str]) -> BudgetConfig:
    """Return the limits that a text or a mapping asks for."""
    if isinstance(budget, str):
        parts = [part.strip() for part in budget.split(",") if part.strip()]
        pairs = [part.partition("<=") for part in parts]
        if not pairs or not all(sign and name.strip() and limit.strip() for name, sign, limit in pairs):
            raise _wrong("budget", f' must read like "macs<=43%,weight_bytes<=20kB", but got {budget!r}.')
        names = [name.strip() for name, _, _ in pairs]
        if len(set(names)) < len(names):
            raise _wrong("budget", f" limits a cost twice: {budget!r}.")
        budget = {name: f"<= {limit.strip()}" for name, (_, _, limit) in zip(names, pairs, strict=True)}
    try:
        return BudgetConfig.model_validate(dict(budget))
    except ValidationError as errors:
        error = errors.errors(include_url=False)[0]
        place = ".".join(str(part) for part in error["loc"] if part != "[key]")
        raise _wrong("budget", f": {place}: {error.get('ctx', {}).get('error', error['msg'])}") from None


def _weights(preference: str | Mapping[str, float], objectives: Sequence[str]) -> np.ndarray:
    """Return the preference on the simplex; top1 takes what the others leave, unless it has a weight itself."""
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
    if "top1" not in preference:
        weights[0] = 1 - weights.sum()
        if weights[0] < 0:
            raise _wrong("preference", f": the weights add up to {weights[1:].sum():g}, which leaves nothing for top1.")
    if not weights.sum():
        raise _wrong("preference", ": some weight must be above 0.")
    return weights / weights.sum()
