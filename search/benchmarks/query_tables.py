"""The table of `secateur benchmark ask`: the answers of agents against fresh searches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from secateur.search.benchmarks.records import Row
from secateur.search.benchmarks.scaffold import markdown_table, percent

NUMBER = "question"
"""The key of a query's number in the rows."""

KINDS = {True: "top-1 alone", False: "random preference"}
"""{whether only top-1 counts: kind of query}."""


def query_line(row: Row) -> str:
    """Return one query in one line."""
    limits = ", ".join(f"{name} <= {100 * share:.1f} %" for name, share in row["limits"].items())
    weights = " ".join(f"{weight:.2f}" for weight in row["preference"])
    return (
        f"{row['agent']}, seed {row['seed']}, query {row[NUMBER]}, {limits}, preference {weights}: utility on test "
        f"{percent(row['asked']['test'])}, of a fresh search {percent(row['searched']['test'])}"
    )


def query_report(rows: Sequence[Row], columns: tuple[str, str]) -> str:
    """Return a Markdown table, one line for each kind of query and agent: utilities times 100, means and their difference.

    Args:
        rows: at least one.
        columns: headings of the utilities of agents and fresh searches.
    """
    heads = [
        "queries", "agent", "runs", *columns, "difference", "agent is better", "difference on validation", "agent seconds",
        "search seconds",
    ]  # fmt: skip
    lines = []
    for alone, kind in KINDS.items():
        for agent in dict.fromkeys(row["agent"] for row in rows):
            group = [row for row in rows if row["agent"] == agent and (row["preference"][0] == 1.0) == alone]
            lines += [_cells(kind, agent, group)] if group else []
    return (
        f"{markdown_table(heads, lines)}\n\nUtility: preference @ (top-1, minus the shares of the dense costs), times 100, on "
        "test images. ±: standard error of the mean difference over the queries, where the difference of a query is the mean "
        "over the runs. The fresh searches are the same in all lines.\n"
    )


def _cells(kind: str, agent: str, rows: Sequence[Row]) -> list[str]:
    """Return the cells of one agent and one kind of query."""

    def mean(who: str, what: str) -> float:
        return float(np.mean([row[who][what] for row in rows]))

    gains = np.array([100 * (row["asked"]["test"] - row["searched"]["test"]) for row in rows])
    numbers = np.array([row[NUMBER] for row in rows])
    by_query = np.array([gains[numbers == number].mean() for number in np.unique(numbers)])
    error = by_query.std(ddof=1) / len(by_query) ** 0.5 if len(by_query) > 1 else float("nan")
    return [
        f"{len(by_query)}, {kind}",
        agent,
        f"{len({row['seed'] for row in rows})}",
        *(percent(mean(who, "test")) for who in ("asked", "searched")),
        f"{gains.mean():+.2f} ± {error:.2f}",
        f"{(gains > 0).sum()} of {len(rows)}",
        f"{100 * (mean('asked', 'validation') - mean('searched', 'validation')):+.2f}",
        *(f"{mean(who, 'seconds'):.1f}" for who in ("asked", "searched")),
    ]
