"""Measures the study and its queries at the size of a long search: `record`, `front` and `query`, on made-up evaluations."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
from rich.console import Console
from rich.table import Table

from secateur.envs.core import Budget, CompressionPolicy, Episode, Evaluation
from secateur.envs.metric import TOP1
from secateur.envs.policy_space import Decision, PolicySpace
from secateur.envs.rewards import constraints
from secateur.search.results.document import read_front, write_front
from secateur.search.results.front import Front
from secateur.search.results.query import query
from secateur.search.results.tables import front_tables
from secateur.search.run.study import StudyRecorder

WINDOW = 1_000
"""Evaluations whose mean time is taken at both ends of the study."""

DENSE = Evaluation(0.95, {"macs": 1e8, "weight_bytes": 4e6}, images=1000)
BUDGET = Budget("phone", {"macs": 5e7})
CONDITION = "top1 >= 0.7 and macs <= 0.5*dense and budget == 'phone'"
WIDTHS = tuple(range(64, 0, -1))


@dataclass(frozen=True)
class _Space:
    """The part of a policy space that the recorder uses: so many widths."""

    decisions: tuple[Decision, ...]

    def policy_to_choices(self, policy: CompressionPolicy) -> Mapping[str, float]:
        """Return {choice: prune ratio}."""
        return {one.name: 1 - width / WIDTHS[0] for one, width in zip(self.decisions, policy.widths, strict=True)}


def run_study(trials: int, choices: int) -> None:
    """Print the times of recording and reading a study.

    Args:
        trials: number of evaluations.
        choices: number of choices in each.
    """
    with TemporaryDirectory() as folder:
        run = Path(folder)
        records = _record(run, trials, choices)
        read, shown = _timed(lambda: front_tables(read_front(run)))
        found, rows = _timed(lambda: query(run, CONDITION, sort="-top1", limit=20))
        size = (run / "study.journal").stat().st_size
    first, last = (float(np.mean(part)) for part in (records[:WINDOW], records[-WINDOW:]))
    table = Table("measured", "value", title=f"{trials:,} evaluations of {choices} choices, {size / 1e6:,.0f} MB")
    table.add_row(f"record, mean of the first {min(WINDOW, trials):,}", f"{1e3 * first:.2f} ms")
    table.add_row(f"record, mean of the last {min(WINDOW, trials):,}", f"{1e3 * last:.2f} ms")
    table.add_row("ratio of the two", f"{last / first:.2f}")
    table.add_row(f"front, {len(shown)} tables", f"{read:.2f} s")
    table.add_row(f"query, {len(rows)} rows", f"{found:.2f} s")
    Console().print(table)


def _record(run: Path, trials: int, choices: int) -> list[float]:
    """Write a study and a front; return the seconds of each record."""
    ratios = tuple(1 - width / WIDTHS[0] for width in WIDTHS)
    levels = np.linspace(0, 1, len(WIDTHS))
    names = [f"prune_ratio/layer{index}" for index in range(choices)]
    space = _Space(tuple(Decision(name, "prune_ratio", index, WIDTHS, ratios, levels) for index, name in enumerate(names)))
    objectives = (TOP1.name, *DENSE.costs)
    recorder = StudyRecorder(run, cast(PolicySpace, space), objectives, TOP1, (BUDGET,))
    front, rng, seconds = Front(objectives, (BUDGET,), DENSE, TOP1), np.random.default_rng(0), []
    for number in range(trials):
        episode = _episode(rng, choices)
        front.add(episode)
        seconds.append(_timed(lambda number=number, episode=episode: recorder.record(number, "random", episode))[0])
    write_front(run, front.document(space.policy_to_choices))
    return seconds


def _episode(rng: np.random.Generator, choices: int) -> Episode:
    widths = tuple(rng.integers(1, WIDTHS[0], choices).tolist())
    macs, weight_bytes = float(rng.uniform(1e7, 6e7)), float(rng.uniform(4e5, 4e6))
    score = float(np.clip(0.5 + macs / 2e8 + rng.normal(0, 0.05), 0, 1))
    evaluation = Evaluation(score, {"macs": macs, "weight_bytes": weight_bytes}, images=1000, seconds=0.5)
    policy = CompressionPolicy(widths, (32,) * choices, (32,) * choices)
    return Episode(BUDGET.name, policy, evaluation, constraints(evaluation, BUDGET, TOP1, DENSE.score), reward=np.zeros(3))


def _timed(function: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result
