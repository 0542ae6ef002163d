"""The tables of `secateur benchmark search`: scores by budget, whole runs, and hypervolume over evaluations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from secateur.envs.metric import Metric
from secateur.search.benchmarks.records import Row, metric_heading, row_metric, shown_score
from secateur.search.benchmarks.scaffold import markdown_table
from secateur.search.problem import Problem

SCORES = {"search_score": "search", "plain_test_score": "plain test", "validation_score": "validation", "test_score": "test"}
"""{key in the rows: heading}."""
TEST_SCORES = ("plain_test_score", "test_score")
CAPTION = (
    '"Search" and "plain test": the policy with the best search score, under the recovery of the search, on the images '
    'of the search, and on test images. "Validation" and "test": the best finalist, under the recovery of the '
    "finalists. Means: over the budgets. Agents choose while workers evaluate; seconds include measuring the sensitivities for "
    "agents that need them; later runs reuse cached evaluations."
)

Runs = Mapping[str, Sequence[Row]]
"""{agent: its rows}."""


def outcome_line(row: Row) -> str:
    """Return one run in one line."""
    metric = row_metric(row)
    tests = [f"{name} {metric.text(winner['test_score']) if winner else '-'}" for name, winner in row["winners"].items()]
    return (
        f"{row['agent']}, seed {row['seed']}, {row['evaluations']} evaluations in {row['seconds']:.0f} s: hypervolume "
        f"{row['hypervolume']:.4f}, test {metric.label} {', '.join(tests)}"
    )


def _search_metric(row: Row) -> Metric:
    return Metric(**row["search_metric"]) if "search_metric" in row else row_metric(row)


def _metric_of_score(row: Row, score: str) -> Metric:
    return _search_metric(row) if score == "search_score" else row_metric(row)


def _heading(runs: Runs, score: str) -> str:
    return f"{SCORES[score]} {metric_heading(_metric_of_score(next(iter(runs.values()))[0], score))}"


def search_report(problem: Problem, dense_test: float, rows: Sequence[Row]) -> str:
    """Return the report: the tables and what they were measured on.

    Args:
        problem: the search.
        dense_test: test score of the dense model.
        rows: all rows so far, at least one.
    """
    validation, test = f"{problem.dense.images} validation images", f"{problem.task.samples('test')} test images"
    metric = problem.task.metric
    return (
        f"{summary(rows)}\n\nDense: {metric.text(problem.dense.score)} on {validation}, {metric.text(dense_test)} on {test}. "
        f"{problem.task.source}\n{CAPTION}\n"
    )


def summary(rows: Sequence[Row]) -> str:
    """Return three Markdown tables of means and standard deviations over seeds, the best mean first.

    The scores of the winners by budget; the whole runs; hypervolume over evaluations. A seed without any feasible policy has no
    score; the column "seeds" tells how many have one.
    """
    by_agent: dict[str, list[Row]] = {}
    for row in rows:
        by_agent.setdefault(row["agent"], []).append(row)
    return "\n\n".join([_budget_table(by_agent), _run_table(by_agent), _curve_table(by_agent)])


def _budget_table(runs: Runs) -> str:
    budgets = dict.fromkeys(name for rows in runs.values() for row in rows for name in row["winners"])
    heads = ["budget", "agent", "seeds", *(_heading(runs, score) for score in SCORES)]
    return markdown_table(heads, [cells for budget in budgets for cells in _budget_lines(budget, runs)])


def _budget_lines(budget: str, runs: Runs) -> list[list[str]]:
    lines = []
    for agent, rows in runs.items():
        winners = [winner for row in rows if (winner := row["winners"].get(budget))]
        seeds = f"{len(rows)}" if len(winners) == len(rows) else f"{len(winners)} of {len(rows)}"
        scores = [
            _spread([shown_score(_metric_of_score(rows[0], score), winner[score]) for winner in winners if score in winner])
            for score in SCORES
        ]
        sign = 1 if row_metric(rows[0]).higher_is_better else -1
        lines.append(
            (_mean([sign * winner["test_score"] for winner in winners], default=-np.inf), [budget, agent, seeds, *scores])
        )
    return _best_first(lines)


def _run_table(runs: Runs) -> str:
    heads = [
        "agent", "evaluations", "hypervolume", *(f"mean {_heading(runs, score)}" for score in TEST_SCORES), "feasible %",
        "s per evaluation", "of these, agent s",
    ]  # fmt: skip
    lines = [(_mean([row["hypervolume"] for row in rows]), _run_cells(agent, rows)) for agent, rows in runs.items()]
    return markdown_table(heads, _best_first(lines))


def _run_cells(agent: str, rows: Sequence[Row]) -> list[str]:
    complete: list[list[Mapping[str, Any]]] = [list(row["winners"].values()) for row in rows if all(row["winners"].values())]
    return [
        agent,
        f"{max(row['evaluations'] for row in rows)}",
        _spread([row["hypervolume"] for row in rows], 4),
        *(
            _spread(
                [
                    shown_score(row_metric(rows[0]), _mean([winner[score] for winner in winners]))
                    for winners in complete
                    if all(score in winner for winner in winners)
                ]
            )
            for score in TEST_SCORES
        ),
        f"{100 * _mean([row['feasible'] for row in rows]):.0f}",
        *(_seconds_per_evaluation(rows, key) for key in ("seconds", "agent_seconds")),
    ]


def _seconds_per_evaluation(rows: Sequence[Row], key: str) -> str:
    known = [row[key] / row["evaluations"] for row in rows if key in row]  # a sweep does not measure its agents
    return f"{_mean(known):.2f}" if known else "-"


def _curve_table(runs: Runs) -> str:
    """Return hypervolume over evaluations; a run that ended early keeps its last value."""
    longest = max((row for rows in runs.values() for row in rows), key=lambda row: row["evaluations"])
    recorded = [point["evaluations"] for point in longest["curve"]]
    shown = recorded[1::2] or recorded
    lines = []
    for agent, rows in runs.items():
        means = [_mean([_hypervolume_at(row, evaluations) for row in rows]) for evaluations in shown]
        lines.append((means[-1], [agent, *(f"{mean:.4f}" for mean in means)]))
    return markdown_table(["hypervolume after", *map(str, shown)], _best_first(lines))


def _hypervolume_at(row: Row, evaluations: int) -> float:
    return max((point["hypervolume"] for point in row["curve"] if point["evaluations"] <= evaluations), default=0.0)


def _best_first(lines: Iterable[tuple[float, list[str]]]) -> list[list[str]]:
    """Return the cells of (score, cells) pairs, the largest score first."""
    return [cells for _, cells in sorted(lines, key=lambda line: -line[0])]


def _mean(values: Sequence[float], default: float = float("nan")) -> float:
    return float(np.mean(values)) if values else default


def _spread(values: Sequence[float], digits: int = 2) -> str:
    """Return "mean ± standard deviation"; "-" without any value."""
    if not values:
        return "-"
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"
