"""The data in the page: everything that its script draws."""

from __future__ import annotations

from typing import Any

from secateur.search.report.charts import anytime, limits
from secateur.search.report.data import ANY, FRONT, RunData, limited_costs
from secateur.search.report.finalist_charts import latency, steps
from secateur.search.report.front_chart import FrontData
from secateur.search.report.layers import LayerView
from secateur.search.report.layers_chart import layers_spec

MOST_LISTED = 200
"""Policies in the select box; any other is chosen by a click."""


def page_data(front: FrontData) -> dict[str, Any]:
    runs = front.runs
    charts = {"anytime": anytime(runs).full}
    for index, run in enumerate(runs):
        made = [limits(run), steps(run), latency(run)]
        charts |= {f"{chart.name}-{index}": chart.full for chart in made if any(chart.rows.values())}
    listed = policies(front)
    return {
        "several": len(runs) > 1,
        "chosen": listed[0]["key"] if listed else None,
        "front": {
            "template": front.template(),
            "datasets": {"trials": front.trials(), "marks": front.marks(), "boxes": front.boxes(), "lines": front.lines()},
            "quantities": [
                {
                    "title": one.title,
                    "format": one.format,
                    "higher_is_better": one.higher_is_better,
                    "domain": front.domain(one, None),
                    "zooms": [front.domain(one, budget) for budget in front.budgets],
                }
                for one in front.quantities
            ],
            "budgets": front.budgets,
            "x": _first_cost(front),
            "y": 0,
            "zoom": False,
        },
        "charts": charts,
        "layers": [None if run.layers is None else _layers(run, run.layers) for run in runs],
    }


def _first_cost(front: FrontData) -> int:
    """Return the index of the cost that is shown first: the first that a budget limits, else the first."""
    limited = [name for run in front.runs for budget in run.budgets.values() for name in budget.limits]
    names = [one.name for one in front.quantities]
    return next((names.index(name) for name in limited if name in names), min(1, len(names) - 1))


def _layers(run: RunData, view: LayerView) -> dict[str, Any]:
    """Return what the page needs to show the layers of any trial."""
    geometry, costs = view.graph.geometry, limited_costs(run)
    base = view.space.weakest[None]
    widths, weight_bits, activation_bits = (column[0].tolist() for column in view.space.levels_to_columns(base))
    finals = {point["evaluation"] for point in run.document["final"]["points"]}
    detailed = [n for n, trial in run.trials.items() if n in finals or FRONT in trial.status.values()]
    shares = view.shares([run.levels[number] for number in detailed])
    return {
        "spec": layers_spec(view, costs),
        "spec_without_shares": layers_spec(view, []),
        "measured": view.curves is not None,
        "layers": [
            {
                "name": layer.name,
                "channels": layer.out_channels,
                "fixed": float(geometry.out_fixed[index]),
                "units": [[group, count] for group, count in enumerate(geometry.out_per_unit[:, index].tolist()) if count],
            }
            for index, layer in enumerate(geometry.layers)
        ],
        "widths": widths,
        "weight_bits": weight_bits,
        "activation_bits": activation_bits,
        "decisions": [
            {
                "kind": decision.kind,
                "target": decision.target,
                "layer": view.decision_layers[index],
                "levels": list(decision.levels),
                "sensitivity": None if view.sensitivities is None else [float(f"{v:.4g}") for v in view.sensitivities[index]],
            }
            for index, decision in enumerate(view.space.decisions)
        ],
        "trials": run.levels,
        "shares": {number: [shares[cost][row].round(4).tolist() for cost in costs] for row, number in enumerate(detailed)},
    }


def policies(front: FrontData) -> list[dict[str, str]]:
    """Return the policies of the select box: winners, then the front, best score first."""
    found = []
    for index, run in enumerate(front.runs):
        score, several = run.quantities[0], f"{run.name}: " if len(front.runs) > 1 else ""
        of_front = [number for number, trial in run.trials.items() if trial.status[ANY] == FRONT]
        sign = -1 if score.higher_is_better else 1
        numbers = [*run.winners(), *sorted(of_front, key=lambda number: sign * run.trials[number].values[score.name])]
        for number in list(dict.fromkeys(number for number in numbers if number in run.trials))[:MOST_LISTED]:
            won = ", ".join(name for name, budget in run.budgets.items() if budget.winner == number)
            what = f"winner of {won}" if won else "on the front"
            text = f"{several}policy {number}, {what}, {run.searched.text(run.trials[number].values[score.name])}"
            found.append({"key": f"{index}/{number}", "text": text})
    return found
