"""`secateur benchmark training`: what training gains after a search, by its length, and whether the allocation still matters.

The best policy of each agent is assembled with the finalists' recovery and trained with the recipe of the configuration
(`finalize.training`) for different numbers of epochs, with and without distillation, for several seeds. The last epoch counts;
test images are scored once, at its end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from secateur.envs.core import Budget, CompressionPolicy, InputError
from secateur.envs.devices import CPU, describe_device, find_device, move_network
from secateur.envs.training.distillation import Training
from secateur.envs.training.recipe import DistillationConfig
from secateur.search.benchmarks.policies import POLICY_FIELDS, allocate, check_agents, choose_budget, policy_choices
from secateur.search.benchmarks.processes import measured
from secateur.search.benchmarks.records import (
    Records,
    Row,
    config_record,
    mean_test_score,
    metric_heading,
    row_metric,
    shown_score,
)
from secateur.search.benchmarks.scaffold import ROWS, markdown_table, percent, show_progress, workers, write_results
from secateur.search.benchmarks.timing import timed
from secateur.search.build import build_options, build_problem
from secateur.search.config import SearchConfig
from secateur.search.problem import Problem
from secateur.search.run.progress import SearchProgress
from secateur.search.training.finalize import training_config
from secateur.search.training.samples import training_samples

AGENTS, EPOCHS, WEIGHTS = ("greedy", "uniform", "random"), (1, 5), (None,)
"""Agents, numbers of epochs and weights of distillation by default; None: the recipe's."""

START = 0
"""Number of epochs of a row that holds the network before training."""


@dataclass(frozen=True)
class Plan:
    """What is trained.

    Attributes:
        agents: whose best policies are trained.
        evaluations: of each agent.
        recipes: one for each number of epochs and weight of distillation; its seed is that of the first training.
        seeds: number of trainings with each recipe.
    """

    agents: Sequence[str]
    evaluations: int
    recipes: Sequence[DistillationConfig]
    seeds: int


@dataclass(frozen=True)
class Start:
    """The network of an agent's policy before training; picklable, on the CPU."""

    agent: str
    network: nn.Module


def make_plan(
    config: SearchConfig,
    agents: Sequence[str] | None = None,
    evaluations: int = 6,
    epochs: Sequence[int] | None = None,
    distillation: Sequence[float] | None = None,
    seeds: int = 3,
) -> Plan:
    """Return the plan with a recipe for every number of epochs and weight of distillation; see `Plan`, None: the defaults.

    Raises:
        InputError: if an agent is unknown.
    """
    check_agents(config, agents or AGENTS)
    recipes = []
    for count in epochs or EPOCHS:
        recipe = asdict(training_config(config, count))
        for weight in distillation or WEIGHTS:
            own = {} if weight is None else {"distillation": weight}
            recipes.append(build_options(DistillationConfig, {**recipe, **own}))
    return Plan(tuple(agents or AGENTS), evaluations, recipes, seeds)


def run_training(config: SearchConfig, budget_name: str | None, plan: Plan, processes: int, output: Path) -> None:
    """Measure and report.

    Args:
        config: the network, its data and budgets, and the recipe (`finalize.training`).
        budget_name: may be None if the configuration has only one budget.
        plan: what is trained.
        processes: trainings at the same time; 0: one, in this process.
        output: folder of the results.
    """
    with show_progress() as progress:
        problem = build_problem(config, progress.status)
        budget = choose_budget(problem, budget_name)
        header = {"benchmark": "training", "config": config_record(config), "budget": budget.name}
        records = Records(output / ROWS, header)
        write_results(records, compare_training(problem, budget, plan, processes, records, progress), training_report)


def compare_training(
    problem: Problem, budget: Budget, plan: Plan, processes: int, records: Records, progress: SearchProgress
) -> Iterator[str]:
    """Add a row for every start and every training that has none yet; yield each new row as a line of text."""
    trainings = [
        (agent, build_options(DistillationConfig, {**asdict(recipe), "seed": recipe.seed + seed}))
        for recipe in plan.recipes
        for agent in plan.agents
        for seed in range(plan.seeds)
    ]
    missing = [(agent, recipe) for agent, recipe in trainings if records.find(agent=agent, recipe=asdict(recipe)) is None]
    starts: dict[str, Start] = {}
    for agent in plan.agents:
        row = records.find(agent=agent, epochs=START)
        if row is not None and agent not in {agent for agent, _ in missing}:
            continue
        if row is None:
            row, starts[agent] = _add_start(problem, budget, agent, plan.evaluations, records, progress)
            yield _line(row)
        else:
            policy = CompressionPolicy(**{name: tuple(row[name]) for name in POLICY_FIELDS})
            starts[agent] = _start(problem, agent, policy)
    progress.status(f"{len(missing)} trainings")
    items = [(starts[agent], recipe) for agent, recipe in missing]
    for (start, recipe), found in measured(train, problem.on(CPU), items, processes):
        row = records.add(agent=start.agent, epochs=recipe.epochs, recipe=asdict(recipe), **found)
        yield _line(row)


def _add_start(
    problem: Problem, budget: Budget, agent: str, evaluations: int, records: Records, progress: SearchProgress
) -> tuple[dict[str, Any], Start]:
    """Let an agent search; return the row of its best policy and the network."""
    task = replace(problem, budgets=(budget,))
    with workers(task, progress) as runner:
        best, done = allocate(task, runner, agent, evaluations)
    if best is None:
        raise InputError(f"Agent `{agent}` finds nothing that fits budget `{budget.name}`. Choose another one with --agent.")
    seconds, start = timed(_start, problem, agent, best.policy)
    costs = problem.space.costs.of_policy(best.policy)
    row = records.add(
        agent=agent,
        epochs=START,
        evaluations=done,
        searched=best.evaluation.score,
        shares={name: cost / problem.space.dense_costs[name] for name, cost in costs.items() if problem.space.dense_costs[name]},
        seconds=seconds,
        dense=_dense_score(problem, records),
        metric=asdict(problem.task.metric),
        images=problem.task.samples("test"),
        data=problem.task.source,
        **policy_choices(best.policy),
        **_scores(problem, move_network(start.network, problem.torch_device)),
    )
    return row, start


def _dense_score(problem: Problem, records: Records) -> float:
    """Return the dense model's test score, measured once."""
    start = records.find(epochs=START)
    return problem.task.evaluate(problem.assembler.model, "test").score if start is None else start["dense"]


def _start(problem: Problem, agent: str, policy: CompressionPolicy) -> Start:
    return Start(agent, move_network(problem.finalist_assembler.assemble(policy), CPU))


def train(problem: Problem, item: tuple[Start, DistillationConfig]) -> dict[str, Any]:
    """Return what is known of one training.

    Args:
        problem: on the CPU; computed with on the device of the configuration.
        item: the network before, and the recipe.
    """
    start, recipe = item
    device = find_device(problem.config.compute.device)
    problem = problem.on(device)
    samples, source = training_samples(problem, recipe)
    training = Training(problem.task, problem.assembler.model, samples, recipe)
    seconds, trained = timed(training.run, move_network(start.network, device))
    return {
        "losses": [epoch.loss for epoch in trained.epochs],
        "note": trained.note,
        "seconds": seconds,
        "device": describe_device(device),
        "source": source,
        "metric": asdict(problem.task.metric),
        **_scores(problem, trained.network),
    }


def _scores(problem: Problem, network: nn.Module) -> dict[str, float]:
    return {
        "validation_score": problem.task.evaluate(network, "validation").score,
        "test_score": problem.task.evaluate(network, "test").score,
    }


def _line(row: Row) -> str:
    what = f"{row['epochs']} epochs, seed {row['recipe']['seed']}" if row["epochs"] else "before training"
    return f"{row['agent']}, {what}: {row_metric(row).text(row['test_score'])} on test images, {row['seconds']:.0f} s"


# ---------------------------------------------------------------------------------------------------------------- report


def training_table(rows: Sequence[Row]) -> str:
    """Return the results as Markdown: recipes per line, agents per column; mean and standard deviation over the seeds."""
    agents = list(dict.fromkeys(row["agent"] for row in rows))
    recipes = sorted({_recipe(row) for row in rows})
    lines = []
    for recipe in recipes:
        of_recipe = [row for row in rows if _recipe(row) == recipe]
        epochs, weight = recipe
        minutes = [row["seconds"] / 60 for row in of_recipe]
        lines.append(
            [
                str(epochs) if epochs else "before training",
                f"{weight:g}" if epochs else "",
                *(mean_test_score([row for row in of_recipe if row["agent"] == agent]) for agent in agents),
                f"{np.median(minutes):.1f}" if epochs else "",
            ]
        )
    return markdown_table(["epochs", "distillation", *agents, "minutes"], lines)


def _recipe(row: Row) -> tuple[int, float]:
    return row["epochs"], row["recipe"]["distillation"] if row["epochs"] else 0.0


def training_report(rows: Sequence[Row]) -> str:
    """Return the table with what it was measured on."""
    notes = []
    starts, trained = ([row for row in rows if bool(row["epochs"]) == is_trained] for is_trained in (False, True))
    for row in starts[:1]:
        dense = shown_score(row_metric(row), row["dense"])
        kept = ", ".join(f"{own['agent']} {percent(own['shares']['macs'])} % of {own['evaluations']}" for own in starts)
        notes.append(
            f"Test {metric_heading(row_metric(row))} of {row['images']} images, dense {dense:.2f}. MACs left, and evaluations of "
            f"the search: {kept}. {row['data']}"
        )
    for recipe in dict.fromkeys(_words(row) for row in trained):
        notes.append(recipe)
    return "\n\n".join([training_table(rows), *notes]) + "\n"


def _words(row: Row) -> str:
    """Return the recipe and the device of a training in words."""
    left_out = ("distillation", "seed", "estimator")
    recipe = ", ".join(f"{name} {value}" for name, value in row["recipe"].items() if name not in left_out and value is not None)
    return f"On {row['device']}: {recipe}. {row['source']}"
