"""Which agent finds the best models at equal evaluations."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from envs.core import Evaluation
from search.build import Problem, build_agent, build_front
from search.finalize import finalize
from search.loop import Runner, run_loop


@dataclass(frozen=True)
class Outcome:
    """What one agent found under one budget with one seed.

    Attributes:
        search_top1: of the winner, as the search scored it; None if nothing fitted the budget.
        validation_top1: of the winner after the finalists' recovery, on the images that chose it.
        test_top1: likewise, on images that nobody chose by, before any fine-tuning.
        evaluations: episodes run; fewer than asked when the agent had nothing more to try.
        feasible: share of the episodes that broke no constraint.
        hypervolume: of the run's overall front (`Front.hypervolume`).
    """

    agent: str
    seed: int
    budget: str
    search_top1: float | None
    validation_top1: float | None
    test_top1: float | None
    evaluations: int
    feasible: float
    hypervolume: float


def benchmark_search(
    problem: Problem,
    runner: Runner,
    agents: Sequence[str],
    seeds: Sequence[int],
    evaluations: int,
    on_outcome: Callable[[Outcome], None],
) -> list[Outcome]:
    """Return the outcome of every agent, seed and budget; `evaluations` are shared by the budgets of a run.

    Runs share the workers and what these have evaluated, which saves time and changes no score.
    """
    outcomes = []
    for seed in seeds:
        for name in agents:
            options = problem.config.search.options if name == problem.config.search.agent else {}
            agent, front = build_agent(problem, name, options, seed), build_front(problem)
            run_loop(agent, runner, evaluations, lambda actor, episode, front=front: front.add(episode))
            finalists = finalize(problem, front, problem.config.finalize.top)
            winners = {finalist.budget: finalist for finalist in reversed(finalists)}  # the first one of each budget
            for budget in problem.budgets:
                winner = winners.get(budget.name)
                outcome = Outcome(
                    name,
                    seed,
                    budget.name,
                    winner and winner.proxy.top1,
                    winner and winner.validation.top1,
                    winner and winner.final.top1,
                    front.evaluations,
                    front.feasible / front.evaluations,
                    front.hypervolume,
                )
                outcomes.append(outcome)
                on_outcome(outcome)
    return outcomes


def outcome_line(outcome: Outcome) -> str:
    """Return one outcome in one line."""
    run = f"{outcome.agent}, seed {outcome.seed}, {outcome.budget}, {outcome.evaluations} evaluations:"
    if outcome.test_top1 is None:
        return f"{run} nothing fits"
    return f"{run} validation {100 * outcome.validation_top1:.2f} %, test {100 * outcome.test_top1:.2f} %"


def summary(outcomes: Sequence[Outcome]) -> str:
    """Return a Markdown table: mean and standard deviation over seeds, best mean test top-1 first within each budget.

    Seeds without any policy that fits have no top-1; the column of the seeds says how many have one.
    """
    lines = [
        "| budget | agent | seeds | evaluations | search top-1 % | validation top-1 % | test top-1 % | feasible % "
        "| hypervolume |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    rows: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        rows.setdefault((outcome.budget, outcome.agent), []).append(outcome)

    def spread(group: list[Outcome], field: str, factor: float = 1.0, digits: int = 2) -> str:
        values = factor * np.array([v for outcome in group if (v := getattr(outcome, field)) is not None])
        if not len(values):
            return "-"
        return f"{values.mean():.{digits}f}" + (f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else "")

    def order(item):
        return item[0][0], -np.mean([outcome.test_top1 or 0.0 for outcome in item[1]])

    for (budget, agent), group in sorted(rows.items(), key=order):
        found = sum(outcome.test_top1 is not None for outcome in group)
        seeds = f"{len(group)}" if found == len(group) else f"{found} of {len(group)}"
        lines.append(
            f"| {budget} | {agent} | {seeds} | {max(outcome.evaluations for outcome in group)} "
            f"| {spread(group, 'search_top1', 100)} | {spread(group, 'validation_top1', 100)} "
            f"| {spread(group, 'test_top1', 100)} "
            f"| {spread(group, 'feasible', 100, 0)} | {spread(group, 'hypervolume', 1, 4)} |"
        )
    return "\n".join(lines)


def write_results(folder: Path, problem: Problem, dense: Evaluation, outcomes: Sequence[Outcome]) -> None:
    """Write results.json (everything) and results.md (the table and what it was measured on) to an existing folder.

    Args:
        folder: where.
        problem: what was searched.
        dense: test score of the dense model.
        outcomes: all so far.
    """
    config = problem.config.model_dump(mode="json", exclude={"data": {"root"}, "output": True})
    config["model"]["weights"] = problem.config.model.weights and Path(problem.config.model.weights).name
    record = {
        "schema": 1,
        "config": config,  # without the folders of the machine that it ran on
        "data": problem.data.source,
        "dense": {"validation_top1": problem.dense.top1, "test_top1": dense.top1, "costs": dict(dense.costs)},
        "precision": asdict(problem.precision),
        "outcomes": [asdict(outcome) for outcome in outcomes],
    }
    (folder / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / "results.md").write_text(
        f"{summary(outcomes)}\n\nDense: {100 * problem.dense.top1:.2f} % on {problem.dense.images} validation images, "
        f"{100 * dense.top1:.2f} % on {dense.images} test images. {problem.data.source}\n"
    )
