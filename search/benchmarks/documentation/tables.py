"""Tables of README.md and docs/results.md, from the files that the benchmarks leave in results/."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from secateur.cost_models.device import read_device
from secateur.search.benchmarks.scaffold import markdown_table

Row = Mapping[str, Any]

COST_NAMES = {"macs": "MACs", "weight_bytes": "bytes"}
"""How costs are called in headings."""
WITH_OPTIONS = ("envelope_ddpg scalar=true",)
"""Agents with options that the short tables show too."""


def read_records(folder: Path) -> tuple[Row, list[Row]]:
    """Return the header of results.jsonl and its rows."""
    header, *rows = map(json.loads, (folder / "results.jsonl").read_text(encoding="utf-8").splitlines())
    return header, rows


def reported_table(folder: Path, number: int = 0) -> str:
    """Return one of the tables in the results.md that a benchmark has written; `number` counts from 0."""
    paragraphs = (folder / "results.md").read_text(encoding="utf-8").split("\n\n")
    return [paragraph for paragraph in paragraphs if paragraph.startswith("|")][number].strip()


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return "mean ± standard deviation" over seeds; only the mean if all values are equal."""
    mean = f"{np.mean(values):.{digits}f}"
    return mean if np.ptp(values) == 0 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


# --------------------------------------------------------------------------------------------------------------- search


def by_agent(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return {label of an agent: its rows, one per seed}."""
    return {label: [row for row in rows if row["agent"] == label] for label in dict.fromkeys(row["agent"] for row in rows)}


def is_short(label: str) -> bool:
    """Return whether the short tables and the picture show this agent: default options, or in `WITH_OPTIONS`."""
    return " " not in label or label in WITH_OPTIONS


def budget_headings(header: Row) -> dict[str, str]:
    """Return {name of a budget: its limits, such as "30 % MACs, 5 % bytes"}; the first budget names the costs."""
    headings: dict[str, str] = {}
    for name, limits in header["config"]["budgets"].items():
        parts = [
            limit.removeprefix("<=").strip().replace("%", " %") + ("" if headings else f" {COST_NAMES[cost]}")
            for cost, limit in limits.items()
        ]
        headings[name] = ", ".join(parts)
    return headings


def tops(rows: Sequence[Row], budget: str, kind: str) -> list[float]:
    """Return the top-1 in percent of the budget's winners, one per seed; `kind` is a key such as "test_score"."""
    return [100 * row["winners"][budget][kind] for row in rows]


def budgets_table(folder: Path, short: bool) -> str:
    """Return the comparison of agents under several budgets, best mean repaired top-1 first.

    Args:
        folder: of the results.
        short: only agents that `is_short`, and no seconds.
    """
    header, all_rows = read_records(folder)
    headings = budget_headings(header)
    lines = []
    for label, rows in by_agent(all_rows).items():
        if short and not is_short(label):
            continue
        means = {
            kind: np.mean([tops(rows, budget, kind) for budget in headings], axis=0)
            for kind in ("plain_test_score", "test_score")
        }
        cells = [
            f"`{label}`",
            f"{max(row['evaluations'] for row in rows)}",
            *(f"{np.mean(tops(rows, budget, 'plain_test_score')):.1f}" for budget in headings),
            *map(spread, means.values()),
            spread([row["hypervolume"] for row in rows], 3 if short else 4),
        ]
        if not short:
            cells += [f"{np.mean([row[key] / row['evaluations'] for row in rows]):.2f}" for key in ("seconds", "agent_seconds")]
        lines.append((np.mean(means["test_score"]), cells))
    heads = ["agent", "evaluations", *headings.values(), "mean", "mean, repaired", "hypervolume"]
    heads += [] if short else ["s per evaluation", "of these, agent"]
    return markdown_table(heads, [cells for _, cells in sorted(lines, key=lambda line: -line[0])])


def rerun_table(results: Path) -> str:
    """Return one run, `envelope_ddpg` with seed 0, as it was measured first and after the code was regrouped."""
    header, first = read_records(results / "budgets")
    _, again = read_records(results / "budgets_rerun")
    lines = []
    for when, rows in (("first", first), ("again", again)):
        (row,) = (row for row in rows if (row["agent"], row["seed"]) == ("envelope_ddpg", 0))
        scores = [
            f"{tops([row], budget, 'plain_test_score')[0]:.1f}, {tops([row], budget, 'test_score')[0]:.1f}"
            for budget in budget_headings(header)
        ]
        lines.append([when, *scores, f"{row['hypervolume']:.4f}"])
    return markdown_table(["run", *budget_headings(header).values(), "hypervolume"], lines)


def half_table(results: Path) -> str:
    """Return agents on ResNet-56 at half the MACs; `greedy` was measured in a run of its own."""
    folder = results / "resnet56_cifar10"
    outcomes = json.loads((folder / "results.json").read_text(encoding="utf-8"))["outcomes"]
    rows = [*({**outcome, "winners": {"half": outcome}} for outcome in outcomes), *read_records(folder / "greedy")[1]]
    lines = []
    for label, group in by_agent(rows).items():
        columns = [tops(group, "half", kind) for kind in ("search_score", "validation_score", "test_score")]
        hypervolume = spread([row["hypervolume"] for row in group], 4)
        cells = [f"`{label}`", f"{group[0]['evaluations']}", f"{len(group)}", *map(spread, columns), hypervolume]
        lines.append((np.mean(columns[-1]), cells))
    heads = ["agent", "evaluations", "seeds", "search top-1 %", "validation top-1 %", "test top-1 %", "hypervolume"]
    return markdown_table(heads, [cells for _, cells in sorted(lines, key=lambda line: -line[0])])


# -------------------------------------------------------------------------------------------------------------- others


def importance_table(results: Path) -> str:
    """Return test top-1 of every importance, by who allocates the widths and which recovery repairs."""
    _, rows = read_records(results / "importances")
    agents = list(dict.fromkeys(row["agent"] for row in rows))
    recoveries = list(rows[0]["test_top1"])
    found = {(row["importance"], row["agent"]): row["test_top1"] for row in rows}
    names = sorted({row["importance"] for row in rows}, key=lambda name: -found[name, agents[0]][recoveries[-1]])
    lines = [
        [f"`{name}`", *(f"{100 * found[name, agent][recovery]:.2f}" for agent in agents for recovery in recoveries)]
        for name in names
    ]
    heads = [f"{agent}: {recovery}" if not place else recovery for agent in agents for place, recovery in enumerate(recoveries)]
    return markdown_table(["importance", *heads], lines)


def latency_table(results: Path) -> str:
    """Return how far the latency tables in results/profile were from whole networks that the fit did not see."""
    lines = []
    for file in sorted((results / "profile").glob("*.json")):
        table = read_device(file).table
        if table is None:
            continue
        for check in table.checks:
            lines.append(
                [
                    table.model.rpartition(":")[2],
                    check.precision,
                    f"{len(check.measured)}",
                    f"{min(check.measured):.2f} to {max(check.measured):.2f}",
                    f"{100 * check.mean_error:.1f}",
                    f"{100 * check.uncorrected_error:.1f}",
                    f"{check.rank_correlation:.3f}",
                ]
            )
    heads = ["network", "precision", "networks", "ms", "mean error %", "without the correction %", "rank correlation"]
    return markdown_table(heads, lines)


def training_table(results: Path) -> str:
    """Return the scores of the network in results/training before and after its training."""
    lines = (results / "training" / "learning.jsonl").read_text(encoding="utf-8").splitlines()
    stages = {stage["stage"]: stage for stage in map(json.loads, lines)}
    names = {"dense": "dense", "repair": "pruned, after `sequential`", "trained": "after the training", "exported": "as exported"}

    def cell(score: float | None) -> str:
        return "-" if score is None else f"{100 * score:.2f}"

    rows = [[label, *(cell(stages[name].get(split)) for split in ("validation", "test"))] for name, label in names.items()]
    return markdown_table(["", "validation top-1 %", "test top-1 %"], rows)


TABLES: dict[str, Callable[[Path], str]] = {
    "budgets-short": lambda results: budgets_table(results / "budgets", short=True),
    "budgets": lambda results: budgets_table(results / "budgets", short=False),
    "budgets-bits": lambda results: budgets_table(results / "budgets_bits", short=False),
    "half": half_table,
    "training": training_table,
    "service": lambda results: reported_table(results / "service"),
    "budgets-rerun": rerun_table,
    "divergence": lambda results: reported_table(results / "divergence"),
    "segmentation": lambda results: reported_table(results / "segmentation"),
    "super-resolution": lambda results: reported_table(results / "super_resolution"),
    "detection": lambda results: reported_table(results / "detection"),
    "ask": lambda results: reported_table(results / "ask"),
    "sensitivities": lambda results: reported_table(results / "sensitivities"),
    "quantizers": lambda results: reported_table(results / "quantizers"),
    "quantizers-super-resolution": lambda results: reported_table(results / "quantizers_super_resolution"),
    "recoveries": lambda results: reported_table(results / "recoveries"),
    "importances": importance_table,
    "data-free-pruned": lambda results: reported_table(results / "data_free", 0),
    "data-free-mixed": lambda results: reported_table(results / "data_free", 1),
    "prediction": lambda results: reported_table(results / "prediction"),
    "latency-errors": latency_table,
    "speed": lambda results: reported_table(results / "speed"),
}
"""{name of a block: function of the folder results/}."""
