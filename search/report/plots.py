"""The plots of a report as SVG and CSV files; no browser is needed."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import vl_convert

from secateur.envs.core import InputError
from secateur.search.report.chart import Chart, Row
from secateur.search.report.charts import anytime, limits
from secateur.search.report.data import ANY, RunData, limited_costs
from secateur.search.report.finalist_charts import latency, steps
from secateur.search.report.front_chart import FrontData, filled
from secateur.search.report.layers_chart import layer_rows, layers_spec
from secateur.search.report.page import VEGA_LITE

LOOK = {
    "font": "Helvetica, Arial, sans-serif",
    "background": "white",
    "view": {"stroke": None, "continuousWidth": 640, "continuousHeight": 380},
    "axis": {"titleFontWeight": "normal", "gridOpacity": 0.6},
    "legend": {"orient": "top", "labelLimit": 320},
    "style": {"halo": {"stroke": "white", "strokeWidth": 4, "strokeJoin": "round"}},
    "range": {
        "category": ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5b646e"],
        "state": ["#D55E00", "#0072B2", "#7d8590", "#9aa0a8"],
    },
}
"""Colors after Okabe and Ito, as on the page."""


def write_plots(runs: Sequence[RunData], folder: Path) -> list[Path]:
    """Write every plot as SVG and CSV; return the files.

    Raises:
        InputError: if the folder cannot be written to.
    """
    found = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for chart in all_charts(runs):
            svg, table = folder / f"{chart.name}.svg", folder / f"{chart.name}.csv"
            drawn = vl_convert.vegalite_to_svg(json.dumps({**chart.full, "config": LOOK}), vl_version=VEGA_LITE)
            svg.write_text(drawn, encoding="utf-8")
            _write_csv(table, chart.table)
            found += [svg, table]
    except OSError as error:
        raise InputError(f"Plots cannot be written to {folder}: {error.strerror}. Choose another folder.") from None
    return found


def all_charts(runs: Sequence[RunData]) -> list[Chart]:
    """Return every plot that has rows: the front over each limited cost, and all others."""
    charts = [*front_charts(runs), anytime(runs)]
    for run in runs:
        prefix = f"{_word(run.name)}-" if len(runs) > 1 else ""
        own = [limits(run), steps(run), latency(run), *_layers_charts(run)]
        charts += [replace(chart, name=prefix + chart.name) for chart in own]
    return [chart for chart in charts if any(chart.rows.values())]


def front_charts(runs: Sequence[RunData]) -> list[Chart]:
    """Return the front of the score over each limited cost; the CSV has all quantities of all trials."""
    front = FrontData(runs)
    limited = {name for run in runs for budget in run.budgets.values() for name in budget.limits}
    rows = {"trials": front.trials(), "marks": front.marks(), "boxes": front.boxes(), "lines": front.lines()}
    table = [front.readable(row) for row in rows["trials"]]
    return [
        Chart(f"front-{one.name}", filled(front.template(), front.tokens(index, 0, ANY, zoomed=False)), rows, table)
        for index, one in enumerate(front.quantities)
        if one.name in limited
    ]


def _layers_charts(run: RunData) -> Iterable[Chart]:
    """Yield the layers of each budget's winner."""
    for name in run.budgets:
        trial, view = run.winner(name), run.layers
        if view is None or trial is None:
            continue
        rows = view.rows(run.levels[trial.number], limited_costs(run))
        table = [_flat(asdict(row)) for row in rows]
        yield Chart(f"layers-{_word(name)}", layers_spec(view, limited_costs(run)), {"layers": layer_rows(rows)}, table)


def _flat(row: Row) -> Row:
    """Return the row of a layer with one column for each cost."""
    shares = row.pop("shares")
    return {**row, **{f"share_of_{cost}": share for cost, share in shares.items()}}


def _word(name: str) -> str:
    """Return a name as a part of a file name."""
    return re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-") or "unnamed"


def _write_csv(path: Path, rows: Sequence[Row]) -> None:
    fields: dict[str, Any] = {}
    for row in rows:
        fields |= dict.fromkeys(row)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(fields), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
