"""What one run of the learning agent is worth afterwards: questions under new budgets and preferences, against fresh searches."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from envs.core import ActionSpace, Actor, Budget, CompressionPolicy, Episode, InputError
from search.ask import answer
from search.benchmarks.agents import markdown_table
from search.benchmarks.records import Records
from search.build import Problem, build_agent, make_env
from search.finalize import finalist_scores
from search.loop import Runner, run_loop

if TYPE_CHECKING:
    from agents.envelope_ddpg.agent import EnvelopeDdpg

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


def answer_questions(
    problem: Problem,
    agent: EnvelopeDdpg,
    runner: Runner,
    questions: Sequence[Question],
    evaluations: int,
    rival_evaluations: int,
    records: Records,
    on_row: Callable[[str], None],
) -> None:
    """Add one row for every question that has none yet: the agent's best measured proposal, and what a fresh search finds.

    Args:
        problem: of the run.
        agent: what the run has left.
        runner: evaluates for the fresh searches.
        questions: to ask.
        evaluations: of proposals, for each question.
        rival_evaluations: of each fresh search.
        records: keeps the rows.
        on_row: told each new row in one line.
    """
    env = make_env(problem)
    for number, question in enumerate(questions):
        if records.find(question=number) is not None:
            continue
        # The same answer whichever questions were asked before.
        agent.rng.bit_generator.state = np.random.default_rng(number).bit_generator.state
        start = time.perf_counter()
        best = answer(agent, env, question.budget, question.preference, evaluations)[0]
        asked = time.perf_counter() - start
        found, seconds = _fresh_search(problem, runner, question, rival_evaluations, number)
        row = records.add(
            question=number,
            limits={name: limit / problem.space.dense_costs[name] for name, limit in question.budget.limits.items()},
            preference=question.preference.tolist(),
            asked=_scores(problem, question, best.policy, best.utility, asked),
            searched=_scores(problem, question, found.policy, float(question.preference @ found.reward), seconds),
        )
        on_row(question_line(row))


def _fresh_search(
    problem: Problem, runner: Runner, question: Question, evaluations: int, seed: int
) -> tuple[Episode, float]:
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


def _scores(
    problem: Problem, question: Question, policy: CompressionPolicy, validation: float, seconds: float
) -> dict[str, Any]:
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
        f"question {row['question']}, {limits}, preference {weights}: utility on test {100 * row['asked']['test']:.2f}, "
        f"of a fresh search {100 * row['searched']['test']:.2f}"
    )


def question_report(rows: Sequence[Mapping[str, Any]], evaluations: int, rival_evaluations: int) -> str:
    """Return a Markdown table, one line for each kind of question: utilities times 100, means and their difference.

    Args:
        rows: at least one.
        evaluations, rival_evaluations: for each question.
    """
    heads = [
        "questions", f"asked: {evaluations} evaluations each", f"{RIVAL}: {rival_evaluations} each", "difference",
        "asked is better", "difference on validation", "seconds asked", "seconds searched",
    ]  # fmt: skip
    table = []
    for kind, chosen in (("top-1 alone", True), ("random preference", False)):
        group = [row for row in rows if (row["preference"][0] == 1.0) == chosen]
        if not group:
            continue
        asked, searched = (100 * np.array([row[who]["test"] for row in group]) for who in ("asked", "searched"))
        gains = asked - searched
        seen = [100 * (row["asked"]["validation"] - row["searched"]["validation"]) for row in group]
        error = gains.std(ddof=1) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
        seconds = [np.mean([row[who]["seconds"] for row in group]) for who in ("asked", "searched")]
        table.append([
            f"{len(group)}, {kind}", f"{asked.mean():.2f}", f"{searched.mean():.2f}", f"{gains.mean():+.2f} ± {error:.2f}",
            f"{(gains > 0).sum()} of {len(group)}", f"{np.mean(seen):+.2f}", *(f"{value:.1f}" for value in seconds),
        ])  # fmt: skip
    return (
        f"{markdown_table(heads, table)}\n\nUtility: preference @ (top-1, minus the shares of the dense costs), times 100, on "
        "test images; ± the standard error of the mean difference.\n"
    )
