"""`secateur benchmark ask`: how good the agents that runs have stored are for new queries, against a fresh search for each.

A query is a budget and a preference that the runs did not have.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from secateur.agents.core import Queryable
from secateur.envs.core import Actor, Budget, CompressionPolicy, Episode, InputError
from secateur.envs.feasibility import FeasibleSpace
from secateur.search.ask import agent_folder, answer, load_agent
from secateur.search.benchmarks.query_tables import NUMBER, query_line, query_report
from secateur.search.benchmarks.records import Records, config_record, difference
from secateur.search.benchmarks.scaffold import ROWS, show_progress, workers, write_results
from secateur.search.benchmarks.timing import timed
from secateur.search.build import build_agent, build_problem, make_env
from secateur.search.config import SearchConfig
from secateur.search.loop import Runner, run_loop
from secateur.search.problem import Problem
from secateur.search.results.finalize import finalist_scores
from secateur.search.run.folder import load_manifest

RIVAL = "bee_colony"
"""The agent of the fresh searches; it takes a preference."""


@dataclass(frozen=True, eq=False)
class Query:
    """A budget, and a preference (num_objectives,) on the simplex."""

    budget: Budget
    preference: np.ndarray


@dataclass(frozen=True, eq=False)
class Comparison:
    """What is the same for all agents.

    Attributes:
        problem: of the runs.
        runner: evaluates for the fresh searches.
        queries: every agent answers all of them.
        evaluations: measured proposals for each query.
        fresh_evaluations: evaluations of the fresh search for each query.
    """

    problem: Problem
    runner: Runner
    queries: Sequence[Query]
    evaluations: int
    fresh_evaluations: int


def run_queries(
    runs: Sequence[Path], overrides: Sequence[str], queries: int, evaluations: int, fresh_evaluations: int, output: Path
) -> None:
    """Measure and report; see `answer_queries`.

    Args:
        runs: folders of finished searches that differ in nothing but their agents.
        overrides: "section.key=value" texts over the configurations of the runs.
        queries: number of queries.
        evaluations: measured proposals for each query.
        fresh_evaluations: evaluations of the fresh search for each query.
        output: folder of the results.
    """
    configs = [load_manifest(run, overrides)[0] for run in runs]
    for run, config in zip(runs, configs, strict=True):
        agent_folder(run, config)  # a run without an agent is refused before anything is written
    header: dict[str, Any] = {"benchmark": "ask", "config": shared_config(runs, configs)}
    with show_progress() as progress:
        problem = build_problem(configs[0], progress.status)
        agents = [load_agent(run, config, problem.space) for run, config in zip(runs, configs, strict=True)]
        drawn = draw_queries(problem.space, problem.budgets, queries, seed=0)
        header |= {"learned": shared_experience(runs, agents), "evaluations": evaluations, "fresh": fresh_evaluations}
        records = Records(output / ROWS, header)
        with workers(problem, progress) as runner:
            comparison = Comparison(problem, runner, drawn, evaluations, fresh_evaluations)
            lines = chain.from_iterable(
                answer_queries(comparison, agent, agent_name(config), config.search.seed, records)
                for config, agent in zip(configs, agents, strict=True)
            )
            columns = f"agent: {evaluations} evaluations each", f"{RIVAL}: {fresh_evaluations} each"
            write_results(records, lines, partial(query_report, columns=columns))


def draw_queries(space: FeasibleSpace, budgets: Sequence[Budget], count: int, seed: int) -> list[Query]:
    """Return queries between the tightest and the loosest budget of a run, all limits by the same random share.

    Every second query is for top-1 alone, the others have a preference that is uniform on the simplex.

    Args:
        space: of the run.
        budgets: of the run.
        count: number of queries; the first ones do not depend on it.
        seed: random seed.
    Raises:
        InputError: if the budgets leave no other one between them, or a query cannot be met.
    """
    rng = np.random.default_rng(seed)
    limited = dict.fromkeys(name for budget in budgets for name in budget.limits)
    limits = {name: [budget.limits[name] for budget in budgets if name in budget.limits] for name in limited}
    if all(min(values) == max(values) for values in limits.values()):
        raise InputError("The run's budgets leave no other budget between them. Search with at least two that differ.")
    queries = []
    for number in range(count):
        share = rng.random()
        drawn = {name: min(values) + share * (max(values) - min(values)) for name, values in limits.items()}
        preference = rng.dirichlet(np.ones(len(space.objectives)))
        if number % 2 == 0:
            preference = np.eye(len(space.objectives))[0]
        budget = Budget(f"query{number}", drawn)
        space.check(budget)
        queries.append(Query(budget, preference))
    return queries


def agent_name(config: SearchConfig) -> str:
    """Return the name of a run's agent in the rows: with the options that it was given."""
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
    seen: dict[tuple[str, int], Path] = {}
    for run, config, record in zip(runs, configs, records, strict=True):
        if other := difference(record, records[0], (f"in {run}", f"in {runs[0]}")):
            raise InputError(f"Runs of different searches cannot be compared: {other}.")
        key = agent_name(config), config.search.seed
        if key in seen:
            raise InputError(f"{run} and {seen[key]} are runs of the same agent with the same seed: leave one of them out.")
        seen[key] = run
    return records[0]


def shared_experience(runs: Sequence[Path], agents: Sequence[Queryable]) -> int:
    """Return how many evaluations every agent has learned from.

    Raises:
        InputError: if that differs: their answers would not be comparable.
    """
    for run, agent in zip(runs, agents, strict=True):
        if agent.learned != agents[0].learned:
            raise InputError(
                f"The agent in {run} has learned from {agent.learned} evaluations, the one in {runs[0]} from "
                f"{agents[0].learned}. Resume the shorter run with more `search.evaluations`, or measure the runs apart, each "
                "with an output folder of its own."
            )
    return agents[0].learned


def answer_queries(comparison: Comparison, agent: Queryable, name: str, seed: int, records: Records) -> Iterator[str]:
    """Add a row for every query that this agent has not answered yet; yield each new row as a line of text.

    A row holds the agent's best measured proposal and the best policy of a fresh search, which is the same for all agents.

    Args:
        comparison: queries, and what the other agents have too.
        agent: loaded from a run.
        name, seed: identify the rows of this agent.
        records: the rows.
    """
    problem, env = comparison.problem, make_env(comparison.problem)
    for number, query in enumerate(comparison.queries):
        if records.find(agent=name, seed=seed, **{NUMBER: number}) is not None:
            continue
        # The answer does not depend on the queries before.
        agent.rng.bit_generator.state = np.random.default_rng(number).bit_generator.state
        seconds, answers = timed(answer, agent, env, query.budget, query.preference, comparison.evaluations)
        other = records.find(**{NUMBER: number})  # the same fresh search
        row = {
            "agent": name,
            "seed": seed,
            NUMBER: number,
            "limits": {cost: limit / problem.space.dense_costs[cost] for cost, limit in query.budget.limits.items()},
            "preference": query.preference.tolist(),
            "asked": _scores(problem, query, answers[0].policy, answers[0].utility, seconds),
            "searched": _search_scores(comparison, query, number) if other is None else other["searched"],
        }
        yield query_line(records.add(**row))


def _search_scores(comparison: Comparison, query: Query, seed: int) -> dict[str, Any]:
    """Return the scores of the best feasible policy of a fresh search for one query."""
    problem = comparison.problem
    rival = build_agent(replace(problem, budgets=(query.budget,)), RIVAL, {"preference": tuple(query.preference)}, seed)
    found: list[tuple[float, CompressionPolicy]] = []

    def on_episode(actor: Actor, episode: Episode) -> None:
        if episode.feasible and episode.policy is not None:
            found.append((float(query.preference @ episode.reward), episode.policy))

    seconds, _ = timed(run_loop, rival, comparison.runner, comparison.fresh_evaluations, on_episode)
    if not found:
        raise RuntimeError(f"No evaluation of a fresh search for {query.budget.name} succeeded: see the log above.")
    utility, policy = max(found, key=lambda item: item[0])
    return _scores(problem, query, policy, utility, seconds)


def _scores(problem: Problem, query: Query, policy: CompressionPolicy, validation: float, seconds: float) -> dict[str, Any]:
    """Return test top-1 and test utility of a policy under the finalists' recovery, and the validation utility that chose it."""
    _, final = finalist_scores(problem, policy)
    shares = {name: final.costs[name] / problem.space.dense_costs[name] for name in problem.space.objectives[1:]}
    utility = query.preference @ np.array([final.score, *(-share for share in shares.values())])
    return {
        "top1": final.score,
        "shares": shares,
        "test": float(utility),
        "validation": validation,
        "seconds": round(seconds, 1),
    }
