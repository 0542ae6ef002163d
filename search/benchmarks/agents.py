"""`secateur benchmark search`: which agent finds the best models at equal evaluations."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from secateur.agents import AGENTS
from secateur.agents.core import Agent, needs_sensitivities
from secateur.envs.core import Actor, CompressionPolicy, Episode, InputError
from secateur.search.benchmarks.agent_tables import outcome_line, search_report
from secateur.search.benchmarks.records import Records, config_record
from secateur.search.benchmarks.scaffold import ROWS, show_progress, workers, write_results
from secateur.search.benchmarks.timing import timed
from secateur.search.build import build_agent, build_front, build_options, build_problem, make_evaluator, prepare
from secateur.search.config import SearchConfig, apply_override, parse_config
from secateur.search.loop import Runner, run_loop
from secateur.search.problem import Problem
from secateur.search.results.core import Finalist, FrontPoint
from secateur.search.results.finalize import dense_test_score, finalize
from secateur.search.results.front import Front

CURVE_POINTS = 12
"""How often a run's hypervolume is recorded, at equal distances."""


@dataclass(frozen=True)
class Contestant:
    """An agent and its options; `label` is the text of the user, such as "envelope_ddpg envelope=true"."""

    label: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)


def run_agents(config: SearchConfig, agents: Sequence[str] | None, seeds: int, output: Path) -> None:
    """Measure and report; see `run_contestants`.

    Args:
        config: without racing: runs share their evaluations, and none may stop those of another one early.
        agents: texts such as "envelope_ddpg envelope=true"; None: all agents.
        seeds: number of seeds, from the configuration's on.
        output: folder of the results.
    """
    contestants = [contestant(text, config) for text in agents or AGENTS]
    all_seeds = range(config.search.seed, config.search.seed + seeds)
    records = Records(output / ROWS, {"benchmark": "search", "config": config_record(config)})
    with show_progress() as progress:
        problem = build_problem(config, progress.status)
        with workers(problem, progress) as runner:
            report = partial(search_report, problem, dense_test_score(problem).score)
            write_results(records, run_contestants(problem, runner, contestants, all_seeds, records), report)


def contestant(text: str, config: SearchConfig) -> Contestant:
    """Return the contestant that "AGENT OPTION=VALUE ..." describes.

    The agent of the configuration starts from its options there.

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
        raise InputError(f"{reads}: {str(error).removeprefix('overrides: search.options.')}") from None
    parse_config(values, f'--agent "{text}"')
    return Contestant(" ".join(text.split()), name, values["search"]["options"])


def run_contestants(
    problem: Problem, runner: Runner, contestants: Sequence[Contestant], seeds: Sequence[int], records: Records
) -> Iterator[str]:
    """Add a row for every contestant and seed that has none yet; yield each new row as a line of text.

    The budgets of a run share its evaluations. Runs share the workers and their cached evaluations, which saves time and
    changes no score.

    Args:
        problem: the search; each run has the evaluations of its configuration.
        runner: evaluates.
        contestants: agents; all run with one seed before the next seed.
        seeds: of the agents.
        records: the rows.
    """
    missing = [(one, seed) for seed in seeds for one in contestants if records.find(agent=one.label, seed=seed) is None]
    for one in {one.label: one for one, _ in missing}.values():
        problem = prepare(problem, one.name, one.options)
        build_agent(problem, one.name, one.options, seeds[0])  # options that do not fit the problem are refused before any run
    for one, seed in missing:
        yield outcome_line(records.add(**_run(problem, runner, one, seed)))


class _TimedAgent:
    """An agent, and the seconds that it takes to choose and learn."""

    def __init__(self, agent: Agent):
        self._agent, self.seconds = agent, 0.0

    def ask(self, count: int) -> Sequence[Actor]:
        seconds, actors = timed(self._agent.ask, count)
        self.seconds += seconds
        return actors

    def tell(self, results: Sequence[tuple[Actor, Episode]]) -> None:
        self.seconds += timed(self._agent.tell, results)[0]


class _Curve:
    """A front, and its hypervolume and best scores after some numbers of evaluations."""

    def __init__(self, problem: Problem, evaluations: int):
        self.front, self.points = build_front(problem), list[dict[str, Any]]()
        self._budgets = [budget.name for budget in problem.budgets]
        self._at = {round(share * evaluations) for share in np.linspace(0, 1, CURVE_POINTS + 1)[1:]}

    def add(self, actor: Actor, episode: Episode) -> None:
        self.front.add(episode)
        if self.front.evaluations in self._at:
            self._add_point()

    def finish(self) -> list[dict[str, Any]]:
        """Return all points; an agent that had nothing more to try ends with one more."""
        if not self.points or self.points[-1]["evaluations"] < self.front.evaluations:
            self._add_point()
        return self.points

    def _add_point(self) -> None:
        best = {name: self.front.best_score(name) for name in self._budgets}
        self.points.append({"evaluations": self.front.evaluations, "hypervolume": self.front.hypervolume, "best": best})


def _run(problem: Problem, runner: Runner, one: Contestant, seed: int) -> dict[str, Any]:
    """Return the row of one run: its curve, and the scores of its winners (`_winner`)."""
    evaluations = problem.config.search.evaluations
    agent, curve = _TimedAgent(build_agent(problem, one.name, one.options, seed)), _Curve(problem, evaluations)
    seconds, _ = timed(run_loop, agent, runner, evaluations, curve.add)
    front = curve.front
    return {
        "agent": one.label,
        "seed": seed,
        "metric": asdict(problem.task.metric),
        "search_metric": asdict(problem.score.metric),
        "evaluations": front.evaluations,
        "feasible": front.feasible / front.evaluations,
        "failed": front.failed,
        "hypervolume": front.hypervolume,
        "seconds": round(seconds + _preparation_seconds(problem, one), 1),
        "agent_seconds": round(agent.seconds, 1),
        "winners": _winners(problem, front),
        "curve": curve.finish(),
    }


def _preparation_seconds(problem: Problem, one: Contestant) -> float:
    """Return the seconds of measuring the sensitivities, if the agent needs them."""
    config, sensitivities = build_options(AGENTS[one.name][0], one.options), problem.space.sensitivities
    return sensitivities.seconds if sensitivities is not None and needs_sensitivities(config) else 0.0


def _winners(problem: Problem, front: Front) -> dict[str, dict[str, Any] | None]:
    finalists = finalize(problem, front, problem.config.finalize.top)
    best = {finalist.budget: finalist for finalist in reversed(finalists)}  # the first of each budget
    return {
        budget.name: _winner(problem, best[budget.name], front.best(budget.name, 1)[0]) if budget.name in best else None
        for budget in problem.budgets
    }


def _winner(problem: Problem, finalist: Finalist, candidate: FrontPoint) -> dict[str, Any]:
    """Return a budget's winner, and four scores before any fine-tuning.

    Args:
        problem: the search.
        finalist: the winner; its scores "validation" and "test" come after the finalists' recovery.
        candidate: best in the search; its scores are "search", on validation images, and "plain_test", the same on test images,
            which were not used for selection.
    """
    return {
        "search_score": candidate.evaluation.score,
        "plain_test_score": plain_test_score(problem, candidate.policy),
        "validation_score": finalist.validation.score,
        "test_score": finalist.final.score,
        "costs": dict(finalist.final.costs),
        "widths": finalist.policy.widths,
        "weight_bits": finalist.policy.weight_bits,
        "activation_bits": finalist.policy.activation_bits,
    }


def plain_test_score(problem: Problem, policy: CompressionPolicy) -> float:
    """Return the test score of a policy with the search's recoveries and number format."""
    return problem.task.evaluate(make_evaluator(problem).network(policy), "test").score
