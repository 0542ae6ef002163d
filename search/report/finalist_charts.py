"""The plots of the finalists' scores, and of predicted and measured latencies."""

from __future__ import annotations

from dataclasses import asdict

from secateur.search.report.chart import Chart, Row, Spec, axis, facet_by, number, text
from secateur.search.report.data import RunData
from secateur.search.report.steps import EXPORT, EXPORT_OF_TRAINED, REPAIR, SEARCH, TRAINED_STEP

MOST_WIDE = 900
"""Largest width of one budget's plot in pixels; many epochs share it."""


def steps(run: RunData) -> Chart:
    """Return the scores of the finalists step by step, with intervals."""
    metric = run.metric
    number_format, unit = (".2~f", "%") if metric.unit == "%" else (".4~g", metric.unit)
    order, rows = _order(run), _step_rows(run, 100 if metric.unit == "%" else 1)
    x: Spec = {
        "field": "step",
        "type": "ordinal",
        "sort": order,
        "title": None,
        "axis": {"labelAngle": -30 if len(order) > 4 else 0},
    }
    y = axis(metric.label + f" ({unit})" * bool(unit), number_format, ticks=6, zero=False)
    shared = {
        "x": x,
        "xOffset": {"field": "line", "type": "nominal"},
        "color": {"field": "split", "type": "nominal", "scale": {"domain": ["validation", "test"]}, "title": None},
        "opacity": {"condition": {"test": "datum.winner", "value": 1}, "value": 0.35},
    }
    tooltip = [text("policy"), text("step"), text("split"), *(number(name, number_format) for name in ("score", "low", "high"))]
    score: Spec = {"field": "score", **y}
    low: Spec = {"field": "low", **y}
    layers = [
        {
            "mark": {"type": "line", "strokeWidth": 1},
            "encoding": {**shared, "y": score, "detail": [{"field": "line", "type": "nominal"}]},
        },
        {
            "transform": [{"filter": "datum.low != null"}],
            "mark": {"type": "rule", "strokeWidth": 1.5},
            "encoding": {**shared, "y": low, "y2": {"field": "high"}, "tooltip": tooltip},
        },
        {"mark": {"type": "point", "filled": True, "size": 60}, "encoding": {**shared, "y": score, "tooltip": tooltip}},
    ]
    offsets = {"scale": {"xOffset": "independent"}}
    inner = {"layer": layers, "width": min(max(320, 90 * len(order)), MOST_WIDE), "height": 240}
    spec = {
        "data": {"name": "steps"},
        "facet": facet_by("budget", list(run.budgets)),
        "columns": 2,
        "spec": inner,
        "resolve": offsets,
    }
    return Chart("steps", spec, {"steps": rows})


def _order(run: RunData) -> list[str]:
    """Return the steps that any finalist has reached, in their order."""
    names = {step.step for step in run.steps}
    epochs = sorted((name for name in names if name.startswith("epoch")), key=lambda name: int(name.split()[1]))
    return [name for name in (SEARCH, REPAIR, EXPORT, *epochs, TRAINED_STEP, EXPORT_OF_TRAINED) if name in names]


def _step_rows(run: RunData, factor: float) -> list[Row]:
    rows = []
    for step in run.steps:
        scores = {"score": step.score, "low": step.low, "high": step.high}
        scaled = {name: None if value is None else value * factor for name, value in scores.items()}
        policy = f"policy {step.evaluation}" + ", winner" * step.winner
        rows.append({**asdict(step), **scaled, "policy": policy, "line": f"{step.evaluation} {step.split}"})
    return rows


def latency(run: RunData) -> Chart:
    """Return predicted and measured latencies of the verified exports and of rejected policies."""
    x: Spec = axis("latency (ms)", ".3~g", zero=True)
    y: Spec = {"field": "name", "type": "nominal", "title": None, "sort": None, "axis": {"labelLimit": 240}}
    titles = {"predicted": "predicted", "measured": "measured", "low": "10 %", "high": "90 %", "dense": "dense model"}
    tooltip = [
        text("name"),
        *(number(field, ".4~g", f"{title} (ms)") for field, title in titles.items()),
        text("where", "measured with"),
    ]

    def color(kind: str) -> Spec:
        return {"datum": kind, "type": "nominal", "scale": {"domain": ["measured", "predicted", "dense model"]}, "title": None}

    def marks(field: str, mark: Spec, kind: str, **more: Spec) -> Spec:
        across: Spec = {"field": field, **x}
        encoding = {"x": across, "y": y, "color": color(kind), "tooltip": tooltip, **more}
        known: list[Spec] = [{"filter": f"datum.{field} != null"}]
        return {"transform": known, "mark": mark, "encoding": encoding}

    point: Spec = {"type": "point", "filled": True, "size": 90}
    rule: Spec = {"type": "rule", "strokeWidth": 2}
    layers = [
        marks("low", rule, "measured", x2={"field": "high"}),
        marks("dense", {**point, "shape": "diamond"}, "dense model"),
        marks("measured", point, "measured"),
        marks("predicted", {"type": "tick", "thickness": 3, "height": 20}, "predicted"),
    ]
    spec = {"data": {"name": "latency"}, "height": {"step": 34}, "layer": layers}
    return Chart("latency", spec, {"latency": [asdict(one) for one in run.latencies]})
