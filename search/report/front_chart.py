"""The front of runs in any two quantities, as a Vega-Lite template: the page fills it in, and so does `filled` for SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from secateur.envs.core import InputError
from secateur.search.report.chart import Row, Spec, number, text
from secateur.search.report.data import ANY, FRONT, OUTSIDE, STOPPED, WITHIN, Quantity, ReportTrial, RunData
from secateur.search.results.formatting import amount

STATES = [FRONT, WITHIN, OUTSIDE, STOPPED]
FRONT_COLOR, GREEN, ORANGE = "#D55E00", "#009E73", "#E69F00"
MANY = 1000
"""Trials from which on points are drawn smaller."""
X, Y, STATE, BUDGET, PAIR, STEP = "@x", "@y", "@state", "@budget", "@pair", "@step"
"""Placeholders of the template: field names, the budget, the pair of quantities, and how the front's line goes."""


@dataclass(frozen=True)
class FrontData:
    """What the plot of the front shows.

    Attributes:
        runs: at least one.
    """

    runs: Sequence[RunData]

    @cached_property
    def quantities(self) -> list[Quantity]:
        """The quantities that all runs have; those of the first run.

        Raises:
            InputError: if the runs have different scores.
        """
        first = self.runs[0]
        for run in self.runs[1:]:
            ours, theirs = first.quantities[0], run.quantities[0]
            if (ours.name, ours.title) != (theirs.name, theirs.title):
                raise InputError(
                    f"{first.folder} and {run.folder} have different scores ({ours.title}, {theirs.title}) and cannot be "
                    "compared. Report them one by one."
                )
        shared = set.intersection(*({quantity.name for quantity in run.quantities} for run in self.runs))
        return [quantity for quantity in first.quantities if quantity.name in shared]

    @cached_property
    def budgets(self) -> list[str]:
        """All budgets of all runs, after `ANY`."""
        return [ANY, *dict.fromkeys(name for run in self.runs for name in run.budgets)]

    def trials(self) -> list[Row]:
        """Return one row per trial, those on a front last, so that they are drawn on top."""
        rows = [self._trial(index, run, trial) for index, run in enumerate(self.runs) for trial in run.trials.values()]
        return sorted(rows, key=lambda row: -STATES.index(row["s0"]))

    def _trial(self, index: int, run: RunData, trial: ReportTrial) -> Row:
        values = {f"q{i}": trial.values[one.name] * one.factor for i, one in enumerate(self.quantities)}
        states = {f"s{i}": trial.status.get(name, OUTSIDE) for i, name in enumerate(self.budgets)}
        return {
            "key": f"{index}/{trial.number}",
            "run": run.name,
            "evaluation": trial.number,
            **values,
            **states,
            **summary(run, trial),
        }

    def readable(self, row: Row) -> Row:
        """Return a row of `trials` with the names of quantities and budgets in place of field names."""
        titles = {f"q{i}": one.title for i, one in enumerate(self.quantities)}
        states = {f"s{i}": f"status: {name}" for i, name in enumerate(self.budgets)}
        return {{**titles, **states}.get(field, field): value for field, value in row.items() if field != "key"}

    def marks(self) -> list[Row]:
        """Return one row per dense model and per winner, with a label."""
        rows: list[Row] = []
        same = len({tuple(self._of(run, one.name).dense for one in self.quantities) for run in self.runs}) == 1
        for index, run in enumerate(self.runs):
            several = f"{run.name}: " if len(self.runs) > 1 else ""
            dense = {f"q{i}": self._of(run, one.name).dense * one.factor for i, one in enumerate(self.quantities)}
            if index == 0 or not same:
                label = "dense" if same else f"{several}dense"
                rows.append({**dense, "label": label, "what": "dense model", "run": run.name})
            for won in run.winners():
                names = [name for name, budget in run.budgets.items() if budget.winner == won]
                if won in run.trials:
                    values = run.trials[won].values
                    place = {f"q{i}": values[one.name] * one.factor for i, one in enumerate(self.quantities)}
                    rows.append({**place, "label": several + ", ".join(names), "what": "winner", "run": run.name})
        return rows

    @staticmethod
    def _of(run: RunData, name: str) -> Quantity:
        return next(quantity for quantity in run.quantities if quantity.name == name)

    def boxes(self) -> list[Row]:
        """Return one row per budget: the least and the largest allowed value of each quantity; the plot clips them."""
        rows, seen = [], set()
        for run in self.runs:
            for name, budget in run.budgets.items():
                row: Row = {"budget": name, "run": run.name}
                for i, one in enumerate(self.quantities):
                    low, high = self.domain(one, None)
                    reach = (low - 10 * (high - low), high + 10 * (high - low))
                    if i == 0 and budget.drop is not None:
                        bound = one.factor * (one.dense - budget.drop * (1 if one.higher_is_better else -1))
                        reach = (bound, reach[1]) if one.higher_is_better else (reach[0], bound)
                    if one.name in budget.limits:
                        reach = (reach[0], budget.limits[one.name] * one.factor)
                    row[f"q{i}"], row[f"q{i}_high"] = reach
                key = tuple(value for field, value in row.items() if field != "run")
                rows += [] if key in seen else [row]
                seen.add(key)
        return rows

    def lines(self) -> list[Row]:
        """Return the front of each budget in each pair of quantities, point by point."""
        fields = {one.name: f"q{i}" for i, one in enumerate(self.quantities)}
        rows = []
        for run in self.runs:
            for name in [ANY, *run.budgets]:
                for x, y in run.pairs():
                    if x in fields and y in fields:
                        shared = {"run": run.name, "budget": name, "pair": fields[x] + fields[y]}
                        factors = {one.name: one.factor for one in self.quantities}
                        rows += [
                            {**shared, "x": trial.values[x] * factors[x], "y": trial.values[y] * factors[y]}
                            for trial in run.front_lines(x, y, name)
                        ]
        return rows

    def domain(self, quantity: Quantity, budget: str | None) -> tuple[float, float]:
        """Return the shown range: of all trials and the dense model, or (zoomed) of the front of a budget and the dense model."""
        values = [self._of(run, quantity.name).dense for run in self.runs]
        for run in self.runs:
            trials = run.trials.values()
            values += [
                trial.values[quantity.name] for trial in trials if budget is None or trial.status.get(budget, OUTSIDE) == FRONT
            ]
        low, high = min(values) * quantity.factor, max(values) * quantity.factor
        margin = 0.04 * (high - low) or 1.0
        return low - margin, high + margin

    def tokens(self, x: int, y: int, budget: str, zoomed: bool) -> dict[str, Any]:
        """Return the values of the template's placeholders for two quantities, by their index."""
        horizontal, vertical = self.quantities[x], self.quantities[y]
        return {
            X: f"q{x}",
            Y: f"q{y}",
            f"{X}_high": f"q{x}_high",
            f"{Y}_high": f"q{y}_high",
            STATE: f"s{self.budgets.index(budget)}",
            BUDGET: budget,
            PAIR: f"q{x}q{y}",
            STEP: "step-before" if horizontal.higher_is_better else "step-after",
            f"{X}_title": horizontal.title,
            f"{Y}_title": vertical.title,
            f"{X}_format": horizontal.format,
            f"{Y}_format": vertical.format,
            f"{X}_domain": list(self.domain(horizontal, budget if zoomed else None)),
            f"{Y}_domain": list(self.domain(vertical, budget if zoomed else None)),
        }

    def template(self) -> Spec:
        """Return the specification with placeholders; its datasets are `trials`, `marks`, `boxes` and `lines`."""
        several = len(self.runs) > 1
        present = {state for run in self.runs for trial in run.trials.values() for state in trial.status.values()}
        states = [state for state in STATES if state in present]
        by_run = {"field": "run", "type": "nominal", "scale": {"domain": [run.name for run in self.runs]}, "title": "run"}
        color = by_run if several else _by_state("state", states)
        line = {
            "type": "line",
            "interpolate": STEP,
            "strokeWidth": 1.5,
            "clip": True,
            **({} if several else {"color": FRONT_COLOR}),
        }
        lines = {
            "data": {"name": "lines"},
            "transform": [{"filter": {"field": "budget", "equal": BUDGET}}, {"filter": {"field": "pair", "equal": PAIR}}],
            "mark": line,
            "encoding": {
                "x": {**_axis(X), "field": "x"},
                "y": {**_axis(Y), "field": "y"},
                **({"color": color} if several else {}),
            },
        }
        return {"layer": [_box(), lines, self._points(color, states), *_mark_layers()], "resolve": {"scale": {"color": "shared"}}}

    def _points(self, color: Spec, states: Sequence[str]) -> Spec:
        """Return the layer of the trials; a click chooses one."""
        names = [text("run")] if len(self.runs) > 1 else []
        values = [number(f"q{i}", one.format, one.title) for i, one in enumerate(self.quantities)]
        chosen = {"param": "chosen", "empty": False}
        ordered = {"type": "ordinal", "sort": STATES}
        many = sum(len(run.trials) for run in self.runs) > MANY
        return {
            "data": {"name": "trials"},
            "params": [{"name": "chosen", "select": {"type": "point", "fields": ["key"], "clear": False}}],
            "mark": {"type": "point", "filled": True, "cursor": "pointer", "clip": True},
            "encoding": {
                "x": _axis(X),
                "y": _axis(Y),
                "color": color,
                "shape": _by_state(["circle", "circle", "cross", "cross"], states),
                "opacity": {**_by_state([1, 0.6, 0.35, 0.2], states), **ordered},
                "size": {**_by_state([70, *([12, 10, 8] if many else [30, 22, 18])], states), **ordered},
                "stroke": {"condition": {**chosen, "value": "currentColor"}, "value": "transparent"},
                "strokeWidth": {"condition": {**chosen, "value": 3}, "value": 0},
                "tooltip": [
                    *names,
                    number("evaluation"),
                    *values,
                    text("policy"),
                    text("for", "searched for"),
                    text(STATE, "it is"),
                ],
            },
        }


def _by_state(values: Any, states: Sequence[str]) -> Spec:
    """Return a channel that shows what a trial is; the legend lists the states that occur."""
    scale, legend = {"type": "ordinal", "domain": STATES, "range": values}, {"values": list(states)}
    return {"field": STATE, "type": "nominal", "scale": scale, "title": None, "legend": legend}


def summary(run: RunData, trial: ReportTrial) -> Row:
    """Return what a tooltip says of a policy besides its quantities: mean share of kept channels, and mean bits."""
    kinds: dict[str, list[float]] = {}
    for name, value in trial.choices.items():
        kinds.setdefault(name.partition("/")[0], []).append(value)
    words = []
    if ratios := kinds.get("prune_ratio"):
        words.append(f"{100 * (1 - sum(ratios) / len(ratios)):.0f} % of channels kept on average ({len(ratios)} groups)")
    for kind in ("weight_bits", "activation_bits"):
        if bits := kinds.get(kind):
            words.append(f"{kind.replace('_', ' ')} {min(bits):g} to {max(bits):g}, mean {sum(bits) / len(bits):.1f}")
    return {"policy": "; ".join(words), "for": trial.budget}


def filled(template: Any, tokens: Mapping[str, Any]) -> Any:
    """Return the template with every text that is a placeholder replaced."""
    if isinstance(template, Mapping):
        return {name: filled(value, tokens) for name, value in template.items()}
    if isinstance(template, list):
        return [filled(value, tokens) for value in template]
    return tokens.get(template, template) if isinstance(template, str) else template


def limit_text(run: RunData, budget: str) -> str:
    """Return the limits of a budget as text: "latency ≤ 0.28 ms (40.0%)"."""
    dense = run.document["dense"]["costs"]
    limits = run.budgets[budget].limits
    titles = {one.name: one.title.partition(" (")[0] for one in run.quantities}
    parts = [f"{titles[name]} ≤ {amount(name, limit)} ({limit / dense[name]:.1%})" for name, limit in limits.items()]
    drop = run.document["budgets"][budget]["metric_drop"]
    return ", ".join([*parts, *([] if drop is None else [f"{run.metric.label} drop ≤ {run.metric.difference(drop)}"])])


def _axis(token: str) -> Spec:
    axis = {"format": f"{token}_format", "title": f"{token}_title", "tickCount": 8}
    scale = {"zero": False, "nice": False, "domain": f"{token}_domain"}
    return {"field": token, "type": "quantitative", "axis": axis, "scale": scale}


def _box() -> Spec:
    ends = {"x": _axis(X), "y": _axis(Y), "x2": {"field": f"{X}_high"}, "y2": {"field": f"{Y}_high"}}
    return {
        "data": {"name": "boxes"},
        "mark": {"type": "rect", "clip": True, "fillOpacity": 0.09, "fill": GREEN, "stroke": GREEN, "strokeDash": [4, 3]},
        "encoding": {**ends, "tooltip": text("budget", "limits of budget")},
    }


def _mark_layers() -> list[Spec]:
    place = {"x": _axis(X), "y": _axis(Y)}
    shared: Spec = {"data": {"name": "marks"}}
    label = {"type": "text", "align": "right", "dx": -9, "dy": -9, "fontWeight": "bold", "clip": True}
    named = {**place, "text": text("label")}
    return [
        {
            **shared,
            "transform": [{"filter": {"field": "what", "equal": "dense model"}}],
            "mark": {"type": "point", "shape": "diamond", "filled": True, "size": 110, "color": ORANGE, "clip": True},
            "encoding": {**place, "tooltip": text("label", "model")},
        },
        *({**shared, "mark": {**label, **style}, "encoding": named} for style in ({"style": "halo"}, {})),
    ]
