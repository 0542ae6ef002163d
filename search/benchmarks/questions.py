"""What runs of the learning agent are worth afterwards: questions under new budgets and preferences, against fresh searches."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from secateur.envs.core import ActionSpace, Actor, Budget, CompressionPolicy, Episode, InputError
from secateur.search.ask import answer
from secateur.search.benchmarks.agents import markdown_table
from secateur.search.benchmarks.records import Records, config_record, difference
from secateur.search.build import build_agent, make_env
from secateur.search.config import SearchConfig
from secateur.search.loop import Runner, run_loop
from secateur.search.problem import Problem
from secateur.search.results.finalize import finalist_scores

if TYPE_CHECKING:
    from secateur.agents.envelope_ddpg.agent import EnvelopeDdpg

RIVAL = "bee_colony"
"""The agent whose fresh searches are the comparison; it takes a preference."""


@dataclass(frozen=True, eq=False)
class Question:
    """A budget and a preference that the run did not have; `preference` is (num_objectives,) on the simplex."""

    budget: Budget
    preference: np.ndarray


def draw_questions(space: ActionSpace, budgets: Sequence[Budget], count: int, seed: int) -> list[Question]:
    """Return questions between the tightest and the loosest budget of a run, all limits by the same random share.

    Every second one asks for top-1 alone, the others for a preference that is uniform on the simplex.

    Args:
        space: of the run.
        budgets: of the run.
        count: how many questions.
        seed: of the draws.
    Raises:
        InputError: if there is nothing between the budgets, or a question has no answer.
    """
    rng = np.random.default_rng(seed)
    limited = list(dict.fromkeys(name for budget in budgets for name in budget.limits))
    known = {name: [budget.limits[name] for budget in budgets if name in budget.limits] for name in limited}
    if all(min(values) == max(values) for values in known.values()):
        raise InputError("The run's budgets leave no other budget between them. Search with at least two that differ.")
    questions = []
    for number in range(count):
        share = rng.random()
        limits = {name: min(values) + share * (max(values) - min(values)) for name, values in known.items()}
        drawn = rng.dirichlet(np.ones(len(space.objectives)))
        preference = drawn if number % 2 else np.eye(len(space.objectives))[0]
        budget = Budget(f"question{number}", limits)
        space.check(budget)
        questions.append(Question(budget, preference))
    return questions


def agent_name(config: SearchConfig) -> str:
    """Return how a run's agent is called in the rows: its name, and the options that it was given."""
    options = (f"{name}={json.dumps(value)}" for name, value in sorted(config.search.options.items()))
    return " ".join([config.search.agent, *options])


def shared_config(runs: Sequence[Path], configs: Sequence[SearchConfig]) -> dict[str, Any]:
    """Return what the configurations of several runs have in common: all but the agent, its options, seed and evaluations.

    Raises:
        InputError: if they differ in anything else, or two of them are the same run.
    """
    records = [config_record(config) for config in configs]
    for record in records:
        record["search"] = {name: record["search"][name] for name in ("precision", "racing")}
    known: dict[tuple[str, int], Path] = {}
    for run, config, record in zip(runs, configs, records, strict=True):
        if record != records[0]:
            places = f"in {run}", f"in {runs[0]}"
            raise InputError(f"Runs of different searches cannot be asked together: {difference(record, records[0], places)}.")
        who = agent_name(config), config.search.seed
        if who in known:
            raise InputError(f"{run} and {known[who]} are runs of the same agent with the same seed: leave one of them out.")
        known[who] = run
    return records[0]


def shared_experience(runs: Sequence[Path], agents: Sequence[EnvelopeDdpg]) -> int:
    """Return how many evaluations every agent has learned from.

    Raises:
        InputError: if that differs: their answers would not be comparable.
    """
    for run, agent in zip(runs, agents, strict=True):
        if agent.learned != agents[0].learned:
            raise InputError(
                f"The agent in {run} has learned from {agent.learned} evaluations, the one in {runs[0]} from "
                f"{agents[0].learned}. Go on with the shorter run (secateur resume RUN --set search.evaluations=N), or ask each "
                "with an --output of its own."
            )
    return agents[0].learned


def answer_questions(
    problem: Problem,
    agent: EnvelopeDdpg,
    name: str,
    seed: int,
    runner: Runner,
    questions: Sequence[Question],
    evaluations: int,
    rival_evaluations: int,
    records: Records,
    on_row: Callable[[str], None],
) -> None:
    """Add one row for every question that this agent has not answered: its best measured proposal, and what a fresh search finds.

    The fresh search of a question is the same for all agents, so only the first one's row waits for it.

    Args:
        problem: of the run.
        agent: what the run has left.
        name, seed: of the agent; they tell its rows from those of other runs.
        runner: evaluates for the fresh searches.
        questions: to ask.
        evaluations: of proposals, for each question.
        rival_evaluations: of each fresh search.
        records: keeps the rows.
        on_row: told each new row in one line.
    """
    env = make_env(problem)
    for number, question in enumerate(questions):
        if records.find(agent=name, seed=seed, question=number) is not None:
            continue
        # The same answer whichever questions were asked before.
        agent.rng.bit_generator.state = np.random.default_rng(number).bit_generator.state
        start = time.perf_counter()
        best = answer(agent, env, question.budget, question.preference, evaluations)[0]
        asked = time.perf_counter() - start
        known = records.find(question=number)
        if known is None:
            found, seconds = _fresh_search(problem, runner, question, rival_evaluations, number)
            searched = _scores(problem, question, found.policy, float(question.preference @ found.reward), seconds)
        row = records.add(
            agent=name,
            seed=seed,
            question=number,
            limits={name: limit / problem.space.dense_costs[name] for name, limit in question.budget.limits.items()},
            preference=question.preference.tolist(),
            asked=_scores(problem, question, best.policy, best.utility, asked),
            searched=searched if known is None else known["searched"],
        )
        on_row(question_line(row))


def _fresh_search(problem: Problem, runner: Runner, question: Question, evaluations: int, seed: int) -> tuple[Episode, float]:
    """Return the best feasible episode of a search for this question alone, and its seconds."""
    options = {"preference": tuple(question.preference)}
    rival = build_agent(replace(problem, budgets=(question.budget,)), RIVAL, options, seed)
    episodes: list[Episode] = []
    start = time.perf_counter()

    def on_episode(actor: Actor, episode: Episode) -> None:
        if episode.feasible:
            episodes.append(episode)

    run_loop(rival, runner, evaluations, on_episode)
    if not episodes:
        raise RuntimeError(f"No evaluation of a fresh search for {question.budget.name} succeeded: see the log above.")
    return max(episodes, key=lambda episode: float(question.preference @ episode.reward)), time.perf_counter() - start


def _scores(problem: Problem, question: Question, policy: CompressionPolicy, validation: float, seconds: float) -> dict[str, Any]:
    """Return test top-1 and test utility of a policy, after the finalists' recovery, beside what its choice rests on."""
    _, final = finalist_scores(problem, policy)
    shares = {name: final.costs[name] / problem.space.dense_costs[name] for name in problem.space.objectives[1:]}
    utility = question.preference @ np.array([final.top1, *(-share for share in shares.values())])
    return {
        "top1": final.top1,
        "shares": shares,
        "test": float(utility),
        "validation": validation,
        "seconds": round(seconds, 1),
    }


# ---------------------------------------------------------------------------------------------------------------- tables


def question_line(row: Mapping[str, Any]) -> str:
    """Return one question in one line."""
    limits = ", ".join(f"{name} <= {100 * share:.1f} %" for name, share in row["limits"].items())
    weights = " ".join(f"{weight:.2f}" for weight in row["preference"])
    return (
        f"{row['agent']}, seed {row['seed']}, question {row['question']}, {limits}, preference {weights}: utility on test "
        f"{100 * row['asked']['test']:.2f}, of a fresh search {100 * row['searched']['test']:.2f}"
    )


def question_report(rows: Sequence[Mapping[str, Any]], evaluations: int, rival_evaluations: int) -> str:
    """Return a Markdown table, one line for each kind of question and agent: utilities times 100, means and their difference.

    Args:
        rows: at least one.
        evaluations, rival_evaluations: for each question.
    """
    heads = [
        "questions", "agent", "runs", f"asked: {evaluations} evaluations each", f"{RIVAL}: {rival_evaluations} each",
        "difference", "asked is better", "difference on validation", "seconds asked", "seconds searched",
    ]  # fmt: skip
    table = []
    for kind, chosen in (("top-1 alone", True), ("random preference", False)):
        for agent in dict.fromkeys(row["agent"] for row in rows):
            group = [row for row in rows if row["agent"] == agent and (row["preference"][0] == 1.0) == chosen]
            if group:
                table.append(_line(kind, agent, group))
    return (
        f"{markdown_table(heads, table)}\n\nUtility: preference @ (top-1, minus the shares of the dense costs), times 100, on "
        "test images; ± the standard error of the mean difference over the questions, of each the mean over the runs. The fresh "
        "searches are the same in all lines.\n"
    )


def _line(kind: str, agent: str, group: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the cells of one agent's rows for one kind of question."""

    def gains(what: str) -> np.ndarray:
        return np.array([100 * (row["asked"][what] - row["searched"][what]) for row in group])

    asked, searched = (np.mean([100 * row[who]["test"] for row in group]) for who in ("asked", "searched"))
    numbers = np.array([row["question"] for row in group])
    by_question = np.array([gains("test")[numbers == number].mean() for number in np.unique(numbers)])
    error = by_question.std(ddof=1) / len(by_question) ** 0.5 if len(by_question) > 1 else float("nan")
    seconds = [np.mean([row[who]["seconds"] for row in group]) for who in ("asked", "searched")]
    return [
        f"{len(by_question)}, {kind}", agent, f"{len({row['seed'] for row in group})}", f"{asked:.2f}", f"{searched:.2f}",
        f"{gains('test').mean():+.2f} ± {error:.2f}", f"{(gains('test') > 0).sum()} of {len(group)}",
        f"{gains('validation').mean():+.2f}", *(f"{value:.1f}" for value in seconds),
    ]  # fmt: skip
