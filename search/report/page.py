"""The report as one HTML file: template, style, script, the library that draws, and the data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from importlib.resources import files
from typing import Any

import jinja2
import vl_convert
from markupsafe import Markup

import secateur
from secateur.search.report.charts import limits
from secateur.search.report.data import RunData
from secateur.search.report.front_chart import FrontData, limit_text
from secateur.search.report.origin import commands, configuration, origin
from secateur.search.report.page_data import page_data, policies
from secateur.search.results.formatting import amount

VEGA_LITE = "6.4"
"""Version of Vega-Lite that draws; vl-convert-python brings several."""
UNKNOWN = "The layers are not known: an earlier version of secateur made this run. `secateur resume RUN` records them."


def render(runs: Sequence[RunData]) -> str:
    """Return the page.

    Raises:
        InputError: if the runs cannot be compared.
    """
    front = FrontData(runs)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(_file("page.html"))
    names = ", ".join(run.name for run in runs)
    several = len(runs) > 1
    return template.render(
        title=f"Comparison of {len(runs)} runs" if several else names,
        lead=names if several else _lead(runs[0]),
        several=several,
        level=3 if several else 2,
        version=secateur.__version__,
        vega_lite=VEGA_LITE,
        quantities=[one.title for one in front.quantities],
        budgets=front.budgets,
        policies=policies(front),
        summary=[row for run in runs for row in _summary(run)],
        runs=[_sections(run) for run in runs],
        style=Markup(_file("page.css")),
        script=Markup(_file("page.js")),
        bundle=Markup(library()),
        data=Markup(as_json(page_data(front))),
    )


def as_json(value: Any) -> str:
    """Return JSON that is safe inside a script element: no text of it can end the element or begin a comment."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


@cache
def library() -> str:
    """Return Vega, Vega-Lite and Vega-Embed as one script, from vl-convert-python; takes some seconds."""
    script = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", VEGA_LITE)
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _file(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _lead(run: RunData) -> str:
    model = run.manifest["config"]["model"]
    factory = model.get("factory") or "a model object"
    device = f" Latencies: {run.document['device']}." if run.document.get("device") else ""
    search = run.config.search
    return f"{factory}, agent {search.agent}, {run.document['evaluations']:,} evaluations, seed {search.seed}.{device}"


def _summary(run: RunData) -> list[dict[str, str]]:
    rows, finals = [], run.document["final"]
    for name, budget in run.budgets.items():
        trial = run.winner(name)
        tested = next((one for one in finals["points"] if one["budget"] == name), None)
        rows.append(
            {
                "run": run.name,
                "agent": run.config.search.agent,
                "budget": name,
                "limits": limit_text(run, name),
                "winner": "nothing fits" if budget.winner is None else f"policy {budget.winner}",
                "search": "" if trial is None else run.searched.text(trial.values[run.searched.name]),
                "validation": "" if tested is None else run.metric.text(tested["validation_score"]),
                "test": "" if tested is None else run.metric.text(tested["score"]),
                "dense": "" if finals["dense"] is None else run.metric.text(finals["dense"]["score"]),
                "export": _export_text(run.document["budgets"][name].get("check") or {}),
            }
        )
    return rows


def _export_text(check: Mapping[str, Any]) -> str:
    """Return what the check of a winner's export came to."""
    broken = f"broken: {' '.join(check.get('failures', ()))}"
    passed = {True: "verified", False: broken, None: check.get("note") or "not verified"}[check.get("passed")]
    own, dense = check.get("latency_ms"), check.get("dense_latency_ms")
    return f"{passed}, {amount('_ms', own)}, {dense / own:.2f}× as fast as dense" if own and dense else passed


def _sections(run: RunData) -> dict[str, Any]:
    document = run.document
    counts = (
        f"{run.name}: {document['evaluations']:,} evaluations, {document['feasible']:,} within their budget, "
        f"{document['failed']:,} failed; hypervolume {document['hypervolume']:.4f}."
    )
    here = [one.measured_here for one in run.latencies]
    elsewhere = "The prediction is for another machine, so the two differ by design." if here and not all(here) else ""
    return {
        "name": run.name,
        "counts": counts,
        "limits": bool(limits(run).rows["limits"]),
        "limits_none": UNKNOWN if run.layers is None else "No policy fits a budget.",
        "trained": any(step.step.startswith("epoch") for step in run.steps),
        "steps": bool(run.steps),
        "latency": bool(run.latencies),
        "latency_text": elsewhere,
        "unpruned": None if run.layers is None else [asdict(one) for one in run.layers.unpruned()],
        "unquantized": "" if run.layers is None else ", ".join(run.layers.unquantized()),
        "failures": sorted(run.failures.items(), key=lambda pair: -pair[1]),
        "origin": origin(run),
        "commands": commands(run),
        "config": configuration(run),
    }
