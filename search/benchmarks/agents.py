"""Which agent finds the best models at equal evaluations."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from secateur.agents import AGENTS
from secateur.agents.core import Agent
from secateur.envs.core import Actor, CompressionPolicy, Episode, InputError
from secateur.envs.evaluator import Evaluator
from secateur.search.benchmarks.records import Records
from secateur.search.build import build_agent, build_front, build_options, prepare
from secateur.search.config import SearchConfig, apply_override, parse_config
from secateur.search.loop import Runner, run_loop
from secateur.search.problem import Problem
from secateur.search.results.finalize import Finalist, finalize
from secateur.search.results.front import Candidate, Front

KINDS = {"search_top1": "search", "plain_test_top1": "plain test", "validation_top1": "validation", "test_top1": "test"}
TEST_KINDS = ("plain_test_top1", "test_top1")
CAPTION = (
    '"Search" and "plain test": what the search liked best, under its recovery, on validation images, which chose, and on test '
    'images; "validation" and "test": the best finalist after their recovery. Means: over the budgets. An agent thinks while '
    "workers evaluate; seconds include the measurement of sensitivities where an agent wants them; later runs find a few "
    "policies evaluated already."
)
LOOKS = 12
"""How often a run's hypervolume is noted, at even distances."""


@dataclass(frozen=True)
class Contestant:
    """An agent and its options; `label` is what the user wrote, such as "envelope_ddpg envelope=true"."""

    label: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


def contestant(text: str, config: SearchConfig) -> Contestant:
    """Return what "AGENT OPTION=VALUE ..." names; the configuration's own agent starts from its options there.

    Raises:
        InputError: for an unknown agent, or options that it does not have.
    """
    reads = f'--agent must read like "envelope_ddpg envelope=true", but got {text!r}'
    values = config.model_dump(mode="json")
    try:
        name, *pairs = shlex.split(text) or [""]
        values["search"] |= {"agent": name, "options": dict(config.search.options) if name == config.search.agent else {}}
        for pair in pairs:
            if "=" not in pair:
                raise ValueError(f"{pair} has no value")
            apply_override(values, f"search.options.{pair}")
    except ValueError as error:  # an InputError of `apply_override` too
        raise InputError(f"{reads}: {str(error).removeprefix('--set search.options.')}") from None
    parse_config(values, f'--agent "{text}"')
    return Contestant(" ".join(text.split()), name, values["search"]["options"])


class _Timed:
    """An agent, and the seconds that it thinks."""

    def __init__(self, agent: Agent):
        self._agent, self.seconds = agent, 0.0

    def ask(self, count: int) -> list[Actor]:
        return self._clocked(self._agent.ask, count)

    def tell(self, results: Sequence[tuple[Actor, Episode]]) -> None:
        self._clocked(self._agent.tell, results)

    def _clocked(self, function: Callable, argument):
        start = time.perf_counter()
        try:
            return function(argument)
        finally:
            self.seconds += time.perf_counter() - start


def run_contestants(
    problem: Problem,
    runner: Runner,
    contestants: Sequence[Contestant],
    seeds: Sequence[int],
    evaluations: int,
    records: Records,
    on_row: Callable[[str], None],
) -> None:
    """Add one row for every contestant and seed that has none yet; `evaluations` are shared by the budgets of a run.

    Runs share the workers and what these have evaluated, which saves time and changes no score.

    Args:
        problem: what is searched.
        runner: evaluates.
        contestants: agents; all run with one seed before the next seed.
        seeds: of the agents.
        evaluations: of each run.
        records: keeps the rows.
        on_row: told each new row in one line.
    """
    for one in contestants:
        if all(records.find(agent=one.label, seed=seed) is not None for seed in seeds):
            continue
        problem = prepare(problem, one.name, one.options)
        build_agent(problem, one.name, one.options, seeds[0])  # what does not fit the problem is refused before hours of work
    for seed in seeds:
        for one in contestants:
            if records.find(agent=one.label, seed=seed) is None:
                on_row(outcome_line(records.add(**_run(problem, runner, one, seed, evaluations))))


def _run(problem: Problem, runner: Runner, one: Contestant, seed: int, evaluations: int) -> dict[str, Any]:
    """Return the row of one run: what it found by when, and its winners' scores (`_winner`)."""
    config = build_options(AGENTS[one.name][0], one.options)
    agent, front = _Timed(build_agent(problem, one.name, one.options, seed)), build_front(problem)
    prepared = problem.space.sensitivities.seconds if getattr(config, "needs_sensitivities", False) else 0.0
    looks = {round(share * evaluations) for share in np.linspace(0, 1, LOOKS + 1)[1:]}
    curve: list[dict[str, Any]] = []

    def look() -> None:
        best = {budget.name: front.best_top1(budget.name) for budget in problem.budgets}
        curve.append({"evaluations": front.evaluations, "hypervolume": front.hypervolume, "best": best})

    def on_episode(actor: Actor, episode: Episode) -> None:
        front.add(episode)
        if front.evaluations in looks:
            look()

    start = time.perf_counter()
    run_loop(agent, runner, evaluations, on_episode)
    seconds = time.perf_counter() - start + prepared
    if not curve or curve[-1]["evaluations"] < front.evaluations:
        look()  # the agent had nothing more to try
    return {
        "agent": one.label,
        "seed": seed,
        "evaluations": front.evaluations,
        "feasible": front.feasible / front.evaluations,
        "failed": front.failed,
        "hypervolume": front.hypervolume,
        "seconds": round(seconds, 1),
        "agent_seconds": round(agent.seconds, 1),
        "winners": _winners(problem, front),
        "curve": curve,
    }


def _winners(problem: Problem, front: Front) -> dict[str, dict[str, Any] | None]:
    finalists = finalize(problem, front, problem.config.finalize.top)
    best: dict[str, Finalist] = {finalist.budget: finalist for finalist in reversed(finalists)}  # the first of each budget
    return {
        name: _winner(problem, best[name], front.best(name, 1)[0]) if name in best else None
        for name in (budget.name for budget in problem.budgets)
    }


def _winner(problem: Problem, finalist: Finalist, plain: Candidate) -> dict[str, Any]:
    """Return a budget's winner, and top-1 before any fine-tuning, in four ways.

    Of what the search liked best: "search", as it scored it, on the validation images; "plain_test", the same on test images,
    which chose nothing. Of the winner among the finalists: "validation" and "test", after their recovery.
    """
    return {
        "search_top1": plain.evaluation.top1,
        "plain_test_top1": plain_test_top1(problem, plain.policy),
        "validation_top1": finalist.validation.top1,
        "test_top1": finalist.final.top1,
        "costs": dict(finalist.final.costs),
        "widths": finalist.policy.widths,
        "weight_bits": finalist.policy.weight_bits,
        "activation_bits": finalist.policy.activation_bits,
    }


def plain_test_top1(problem: Problem, policy: CompressionPolicy) -> float:
    """Return the test top-1 of a policy as the search would have scored it: its recoveries, its number format."""
    images, labels = problem.data.tensors(problem.data.test)
    return Evaluator(problem.assembler, problem.space.costs.of_policy, images, labels, problem.precision).evaluate(policy).top1


# ---------------------------------------------------------------------------------------------------------------- tables


def outcome_line(row: Mapping[str, Any]) -> str:
    """Return one run in one line."""
    tests = [f"{name} {_percent(winner and winner['test_top1'])}" for name, winner in row["winners"].items()]
    return (
        f"{row['agent']}, seed {row['seed']}, {row['evaluations']} evaluations in {row['seconds']:.0f} s: hypervolume "
        f"{row['hypervolume']:.4f}, test top-1 % {', '.join(tests)}"
    )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}"


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return Markdown tables of means and standard deviations over seeds: winners' top-1 by budget, best mean first; the whole
    runs; hypervolume over evaluations.

    Seeds without any policy that fits have no top-1; the column of the seeds says how many have one.
    """
    by_agent: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_agent.setdefault(row["agent"], []).append(row)
    return "\n\n".join([_budget_table(by_agent), _run_table(by_agent), _curve_table(by_agent)])


def _budget_table(by_agent: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    heads = ["budget", "agent", "seeds", *(f"{KINDS[kind]} top-1 %" for kind in KINDS)]
    table = []
    budgets = list(dict.fromkeys(name for rows in by_agent.values() for row in rows for name in row["winners"]))
    for budget in budgets:
        lines = []
        for agent, rows in by_agent.items():
            winners = [winner for row in rows if (winner := row["winners"].get(budget))]
            seeds = f"{len(rows)}" if len(winners) == len(rows) else f"{len(winners)} of {len(rows)}"
            tops = [_spread([100 * winner[kind] for winner in winners]) for kind in KINDS]
            mean = np.mean([winner["test_top1"] for winner in winners]) if winners else -1.0
            lines.append((-mean, [budget, agent, seeds, *tops]))
        table += [cells for _, cells in sorted(lines, key=lambda line: line[0])]
    return markdown_table(heads, table)


def _run_table(by_agent: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    heads = [
        "agent", "evaluations", "hypervolume", *(f"mean {KINDS[kind]} top-1 %" for kind in TEST_KINDS), "feasible %",
        "s per evaluation", "of these, agent s",
    ]  # fmt: skip
    lines = []
    for agent, rows in by_agent.items():
        whole = [list(row["winners"].values()) for row in rows if all(row["winners"].values())]
        cells = [
            agent,
            f"{max(row['evaluations'] for row in rows)}",
            _spread([row["hypervolume"] for row in rows], 4),
            *(_spread([100 * np.mean([winner[kind] for winner in winners]) for winners in whole]) for kind in TEST_KINDS),
            f"{100 * np.mean([row['feasible'] for row in rows]):.0f}",
            *(f"{np.mean([row[key] / row['evaluations'] for row in rows]):.2f}" for key in ("seconds", "agent_seconds")),
        ]
        lines.append((-np.mean([row["hypervolume"] for row in rows]), cells))
    return markdown_table(heads, [cells for _, cells in sorted(lines, key=lambda line: line[0])])


def _curve_table(by_agent: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Hypervolume over evaluations; a run that ended early stays where it was."""
    longest = max((row for rows in by_agent.values() for row in rows), key=lambda row: row["evaluations"])
    looks = [look["evaluations"] for look in longest["curve"]]
    at = looks[1::2] or looks
    lines = []
    for agent, rows in by_agent.items():
        volumes = [[_hypervolume_at(row, count) for row in rows] for count in at]
        lines.append((-np.mean(volumes[-1]), [agent, *(f"{np.mean(volume):.4f}" for volume in volumes)]))
    heads = ["hypervolume after", *(str(count) for count in at)]
    return markdown_table(heads, [cells for _, cells in sorted(lines, key=lambda line: line[0])])


def _hypervolume_at(row: Mapping[str, Any], count: int) -> float:
    return max((look["hypervolume"] for look in row["curve"] if look["evaluations"] <= count), default=0.0)


def _spread(values: Sequence[float], digits: int = 2) -> str:
    if not len(values):
        return "-"
    return f"{np.mean(values):.{digits}f}" + (f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else "")


def markdown_table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows).replace("| --- ", "|---").replace("|--- |", "|---|")


def search_report(problem: Problem, dense_test: float, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return results.md: the tables and what they were measured on.

    Args:
        problem: what was searched.
        dense_test: test top-1 of the dense model.
        rows: all so far, at least one.
    """
    images = f"{problem.dense.images} validation images", f"{len(problem.data.test)} test images"
    return (
        f"{summary(rows)}\n\nDense: {100 * problem.dense.top1:.2f} % on {images[0]}, {100 * dense_test:.2f} % on {images[1]}. "
        f"{problem.data.source}\n{CAPTION}\n"
    )
