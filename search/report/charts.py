"""The plots of the search's progress and of the limits."""

from __future__ import annotations

from collections.abc import Sequence

from secateur.search.report.chart import Chart, Row, Spec, axis, facet_by, number, text, words
from secateur.search.report.data import RunData
from secateur.search.report.layers import LayerRow

TOP_LAYERS = 3
"""Layers that the plot of the limits names, of each limit."""
PEAK = "peak_activation_bytes"
BLUES = ["#0072B2", "#56B4E9", "#9ad4f5", "#c9c9c9"]
REST = "all others"


def anytime(runs: Sequence[RunData]) -> Chart:
    """Return the best score within each budget after each number of evaluations."""
    score, several = runs[0].quantities[0], len(runs) > 1
    rows = {"best": [row for run in runs for row in _best_rows(run)], "dense": [_dense_row(run) for run in runs]}
    name = "run" if several else "budget"
    x: Spec = {"field": "evaluation", **axis("evaluations", "d")}
    y: Spec = {"field": "score", **axis(score.title, score.format, zero=False)}
    color = {"field": name, "type": "nominal", "title": name}
    tooltip = [text("run"), text("budget"), number("evaluation"), number("score", score.format, score.title)]
    dense = number("score", score.format, score.title)
    layers: list[Spec] = [
        {
            "mark": {"type": "line", "interpolate": "step-after", "strokeWidth": 2},
            "encoding": {"x": x, "y": y, "color": color},
        },
        {
            "mark": {"type": "point", "filled": True, "size": 40},
            "encoding": {"x": x, "y": y, "color": color, "tooltip": tooltip},
        },
        {
            "data": {"name": "dense"},
            "mark": {"type": "rule", "strokeDash": [2, 3], "strokeWidth": 1.5},
            "encoding": {"y": y, "tooltip": [text("run", "dense model of"), dense]},
        },
    ]
    if not several:
        return Chart("anytime", {"data": {"name": "best"}, "height": 260, "layer": layers}, rows)
    inner = {"layer": layers, "width": 400, "height": 240}
    return Chart("anytime", {"data": {"name": "best"}, "facet": facet_by("budget"), "columns": 2, "spec": inner}, rows)


def _best_rows(run: RunData) -> list[Row]:
    """Return the improvements within each budget, and the best score again at the last evaluation."""
    score, last = run.quantities[0], max(run.trials, default=0)
    rows = []
    for name in run.budgets:
        found = [(trial.number, trial.values[score.name]) for trial in run.improvements(name)]
        for evaluation, value in [*found, *((last, value) for _, value in found[-1:])]:
            rows.append({"run": run.name, "budget": name, "evaluation": evaluation, "score": value * score.factor})
    return rows


def _dense_row(run: RunData) -> Row:
    score = run.quantities[0]
    return {"run": run.name, "score": score.dense * score.factor}


def limits(run: RunData) -> Chart:
    """Return how much of each limit its winner uses, and which layers use it."""
    x = axis("used share of the limit", "%", domainMin=0)
    y = {"field": "limit", "type": "nominal", "title": None, "sort": None, "axis": {"labelLimit": 260}}
    ranks = [*(f"layer {rank + 1}" for rank in range(TOP_LAYERS)), REST]
    color = {"field": "rank", "type": "nominal", "scale": {"domain": ranks, "range": BLUES}, "legend": None}
    tooltip = [
        text("limit"),
        text("layer"),
        number("share", ".1%", "share of the policy's total"),
        number("used", ".1%", "share of the limit"),
    ]
    dark = {"condition": {"test": "datum.rank == 'layer 1'", "value": "#ffffff"}, "value": "#1c1c1c"}
    layers = [
        {
            "mark": {"type": "bar", "height": 20},
            "encoding": {"x": {"field": "start", **x}, "x2": {"field": "end"}, "y": y, "color": color, "tooltip": tooltip},
        },
        {
            "transform": [{"filter": "datum.used > 0.16"}],  # where the name has room
            "mark": {"type": "text", "align": "left", "dx": 4, "fontSize": 10, "limit": 110, "clip": True},
            "encoding": {"x": {"field": "start", **x}, "y": y, "text": text("layer"), "color": dark},
        },
        {"mark": {"type": "rule", "strokeWidth": 2, "color": "#D55E00"}, "encoding": {"x": {"datum": 1, **x}}},
    ]
    spec = {"data": {"name": "limits"}, "height": {"step": 30}, "layer": layers}
    return Chart("limits", spec, {"limits": _limit_rows(run)})


def _limit_rows(run: RunData) -> list[Row]:
    rows: list[Row] = []
    for name, budget in run.budgets.items():
        trial = run.winner(name)
        if trial is None or run.layers is None:
            continue
        found = run.layers.rows(run.levels[trial.number], list(budget.limits))
        for cost, limit in budget.limits.items():
            rows += _uses(f"{name}: {words(cost)}", cost, trial.values[cost] / limit if limit else 0.0, found)
    return rows


def _uses(label: str, cost: str, used: float, found: Sequence[LayerRow]) -> list[Row]:
    """Return the segments of a bar: the layers with the largest shares, then the rest; of the peak memory, one segment."""
    ordered = sorted(found, key=lambda row: -row.shares[cost])
    if cost == PEAK:
        peak = {"limit": label, "rank": "layer 1", "layer": f"at {ordered[0].layer}", "share": ordered[0].shares[cost]}
        return [{**peak, "used": used, "start": 0.0, "end": used}]
    top = [(f"layer {rank + 1}", row.layer, row.shares[cost]) for rank, row in enumerate(ordered[:TOP_LAYERS])]
    parts = [*top, (REST, REST, max(1 - sum(share for _, _, share in top), 0.0))]
    rows, start = [], 0.0
    for rank, layer, share in parts:
        row = {"limit": label, "rank": rank, "layer": layer, "share": share, "used": share * used}
        rows.append({**row, "start": start, "end": start + share * used})
        start += share * used
    return rows
