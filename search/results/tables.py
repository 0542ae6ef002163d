"""Tables for the terminal: the front of a run, and what an inspection found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from secateur.cost_models.device import DEVICE_COSTS, Device
from secateur.search.results.formatting import amount, percent
from secateur.search.schema import metric_of, search_score_of

if TYPE_CHECKING:  # a table of the command needs no torch
    from secateur.envs.calibration import LayerPlan
    from secateur.envs.model_graph.plan import ModelGraph
    from secateur.envs.policy_space import PolicySpace
    from secateur.search.ask import Reply
    from secateur.search.build import Feasibility

MAX_ROWS = 12
"""Rows of one front that are shown; the files hold all."""


# ---------------------------------------------------------------------------------------------------------------- front


def front_tables(document: Mapping[str, Any], budget: str | None = None) -> list[Table]:
    """Return one table per budget and one for all of them, from the document in front.json.

    Args:
        budget: only this one's.
    """
    names = list(document["budgets"]) if budget is None else [budget]
    tables = [_budget_table(document, name) for name in names]
    return tables if budget is not None or len(names) == 1 else [*tables, _overall_table(document)]


def _budget_table(document: Mapping[str, Any], name: str) -> Table:
    budget, dense = document["budgets"][name], document["dense"]
    limits = [
        f"{cost} <= {amount(cost, limit)} ({percent(limit / dense['costs'][cost], 1)})"
        for cost, limit in budget["limits"].items()
    ]
    if budget["metric_drop"] is not None:
        metric = metric_of(document)
        limits.append(f"{metric.label} drop <= {metric.difference(budget['metric_drop'])}")
    tested = {point["evaluation"]: point for point in document["final"]["points"] if point["budget"] == name}
    # Finalists that another policy dominates by a hair are shown too: their test scores were paid for.
    numbers = [*tested, *(number for number in budget["front"] if number not in tested)]
    return _front_table(document, f"{name}: {', '.join(limits)}", numbers, tested, list(budget["limits"]))


def _overall_table(document: Mapping[str, Any]) -> Table:
    tested = {point["evaluation"]: point for point in document["final"]["points"]}
    title = "Pareto front of all policies that fit a budget"
    return _front_table(document, title, document["front"], tested, document["objectives"][1:], fits=True)


def _front_table(
    document: Mapping[str, Any],
    title: str,
    numbers: Sequence[int],
    tested: Mapping[int, Mapping[str, Any]],
    costs: Sequence[str],
    fits: bool = False,
) -> Table:
    points, metric = {point["evaluation"]: point for point in document["points"]}, metric_of(document)
    searched, _, dense_score = search_score_of(document)
    sign, search_sign = (-1 if one.higher_is_better else 1 for one in (metric, searched))

    def order(point: Mapping[str, Any]) -> tuple[bool, float, float]:
        final = tested.get(point["evaluation"])
        return final is None, 0.0 if final is None else sign * final["validation_score"], search_sign * point["score"]

    shown = sorted((points[number] for number in numbers), key=order)[:MAX_ROWS]
    table = Table(title=title, caption=_caption(document, len(numbers)), title_justify="left", caption_justify="left")
    headings = [_heading(cost, document.get("device")) for cost in costs]  # runs of earlier versions have no device
    columns = (("search", searched), ("validation", metric), ("test", metric))
    for heading in ("policy", *(f"{name} {one.label}" for name, one in columns), *headings):
        table.add_column(heading, justify="right")
    if fits:
        table.add_column("fits")
    dense, dense_final = document["dense"], document["final"]["dense"]
    for point in shown:
        number = point["evaluation"]
        shares = [percent(point["costs"][cost] / dense["costs"][cost], 1) for cost in costs]
        finals = [metric.text(tested[number][key]) for key in ("validation_score", "score")] if number in tested else ["", ""]
        table.add_row(str(number), searched.text(point["score"]), *finals, *shares, *([", ".join(point["fits"])] if fits else []))
    if not shown:
        table.add_row("-", "nothing fits yet")
    table.add_section()
    test = metric.text(dense_final["score"]) if dense_final is not None else ""
    own = "" if searched == metric else searched.text(dense_score)
    table.add_row("dense", own, metric.text(dense["score"]), test, *(amount(cost, dense["costs"][cost]) for cost in costs))
    return table


def check_lines(document: Mapping[str, Any]) -> list[str]:
    """Return what the checks of the winners came to, in sentences."""
    lines = []
    for name, budget in document["budgets"].items():
        check = budget.get("check") or {}  # runs of earlier versions have none
        for rejected in check.get("rejected", ()):
            lines.append(
                f"{name}: policy {rejected['evaluation']} is too slow: {rejected['measured_ms']:.3f} ms measured, "
                f"{rejected['predicted_ms']:.3f} ms predicted."
            )
        if check.get("latency_ms") is not None:
            verdict = "checked from its files" if check["passed"] else "checked from its files: " + " ".join(check["failures"])
            gain = check["dense_latency_ms"] / check["latency_ms"]
            threads = f"{check['threads']} thread{'s' * (check['threads'] != 1)}"
            lines.append(
                f"{name}: {check['export']}, {verdict}; {check['latency_ms']:.3f} ms in {check['runtime']} with {threads}, "
                f"{gain:.2f} times as fast as the dense network."
            )
        if check.get("note"):
            lines.append(check["note"])
    return lines


def _heading(cost: str, device: str | None) -> str:
    """Return a column's name; for a cost of the device with the word "measured" or "analytic"."""
    words = cost.replace("_", " ")
    if device is None or cost not in DEVICE_COSTS:
        return words
    return f"{words} ({'measured' if cost == 'latency_ms' and device.startswith('measured') else 'analytic'})"


def _caption(document: Mapping[str, Any], rows: int) -> str:
    dense_final = document["final"]["dense"]
    images = f"{document['dense']['images']:,} validation"
    images += f" and {dense_final['images']:,} test images" if dense_final is not None else " images"
    if not document["dense"]["images"]:
        images = "scored by functions that were passed"  # only they know how many samples they use
    more = f" The best {MAX_ROWS} of {rows}; front.csv has all." if rows > MAX_ROWS else ""
    device = f" On the device: {document['device']}." if document.get("device") else ""
    repaired = "Finalists get their own recovery, then are scored again."
    return escape(f"Costs in percent of the dense model; {images}. {repaired}{device}{more}")


# -------------------------------------------------------------------------------------------------------------- inspect


def layer_table(graph: ModelGraph, space: PolicySpace) -> Table:
    """Return the layers in execution order, with what can be chosen for each."""
    choices: dict[str, list[str]] = {}
    for decision in space.decisions:
        kind, _, target = decision.name.partition("/")
        choices.setdefault(target.partition("#")[0], []).append(_choice(kind, decision.values))
    table = Table("layer", "kind", "channels", "output", "choices", title="Layers", title_justify="left")
    for layer in graph.geometry.layers:
        kind = "depthwise conv" if layer.depthwise else layer.kind
        table.add_row(
            layer.name,
            kind,
            f"{layer.in_channels} -> {layer.out_channels}",
            f"{layer.out_hw[0]} x {layer.out_hw[1]}",
            ", ".join(choices.get(layer.name, [])),
        )
    return table


def _choice(kind: str, values: Sequence[float]) -> str:
    if kind == "prune_ratio":
        return f"prune {values[0]:.2f}..{values[-1]:.2f}"
    return f"{kind.replace('_', ' ')} {'/'.join(f'{value:g}' for value in values)}"


def group_table(graph: ModelGraph) -> Table:
    """Return the coupled groups."""
    table = Table("group", "units", "made by", "read by", title="Coupled channel groups", title_justify="left")
    for group in graph.groups:
        table.add_row(group.name, str(group.units), _names(group.producers), _names(group.consumers))
    return table


def uncounted_lines(graph: ModelGraph) -> list[str]:
    """Return a line about the operators whose multiply-accumulates are not known, if there are any."""
    names = _names(graph.geometry.uncounted)
    return [f"not counted in macs, bops, latency and energy, which cannot be limited: {names}"] if names else []


def frozen_table(graph: ModelGraph) -> Table:
    """Return what is never pruned, and why."""
    table = Table("layer", "channels", "reason", title="Never pruned", title_justify="left")
    for frozen in graph.frozen:
        table.add_row(frozen.layer, str(frozen.channels), escape(frozen.reason))
    return table


_KEPT = {
    "channel": "moments of its channels",
    "diagonal": "mean and mean square of its channels",
    "none": "range only",
}
"""What a calibration keeps of a layer whose whole matrix it does not, by `LayerPlan.kind`."""


def calibration_table(plans: Mapping[str, LayerPlan], max_matrix_bytes: int) -> Table:
    """Return the layers of which less than everything is kept, and why."""
    table = Table("layer", "kept", "why", title="Calibrated with less detail", title_justify="left")
    for name, plan in plans.items():
        if plan.kind in _KEPT:
            large = f"matrix of {amount('_bytes', plan.matrix_bytes)} > {amount('_bytes', max_matrix_bytes)}"
            table.add_row(name, _KEPT[plan.kind], escape(plan.reason or large))
    return table


def calibration_line(plans: Mapping[str, LayerPlan] | None, images: int) -> str:
    """Return what the calibration will take; `plans` are None where there is none."""
    if plans is None:
        return "calibration: not needed by this configuration"
    memory = amount("_bytes", sum(plan.nbytes for plan in plans.values()))
    full = sum(plan.kind == "full" for plan in plans.values())
    return f"calibration: {images:,} images, {memory}, {full} of {len(plans)} layers in full detail"


def _names(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def device_line(device: Device) -> str:
    """Return where the costs of a device come from; of a measured one, how far off they were for whole networks."""
    if device.table is None:
        return f"{', '.join(device.cost_models())}: {device.label}"
    errors = [
        f"{100 * check.mean_error:.1f} % ({check.precision}, {len(check.measured)} networks)" for check in device.table.checks
    ]
    line = f"latency_ms: {device.label}" + f"; mean error {', '.join(errors)}" * bool(errors)
    return line if device.energy is None else f"{line}\nenergy_mj: analytic, energies of single operations"


def feasibility_report(rows: Iterable[Feasibility]) -> Table:
    """Return each limit beside what can be reached."""
    table = Table(title="Budgets", title_justify="left")
    for heading in ("budget", "cost"):
        table.add_column(heading)
    for heading in ("least reachable", "limit", "dense"):
        table.add_column(heading, justify="right")
    table.add_column("satisfiable")
    for row in rows:
        table.add_row(
            row.budget,
            row.cost,
            f"{amount(row.cost, row.least)} ({percent(row.least / row.dense, 1)})",
            f"{amount(row.cost, row.limit)} ({percent(row.limit / row.dense, 1)})",
            amount(row.cost, row.dense),
            "[green]yes[/]" if row.satisfiable else "[red]no[/]",
        )
    return table


def answer_table(reply: Reply) -> Table:
    """Return the measured answers to one question, best first."""
    space = reply.problem.space
    metric = space.metric
    limits = [
        f"{cost} <= {amount(cost, limit)} ({percent(limit / space.dense_costs[cost], 1)})"
        for cost, limit in reply.budget.limits.items()
    ]
    weights = [f"{name} {weight:.2g}" for name, weight in zip(space.objectives, reply.preference, strict=True) if weight]
    title = f"{', '.join(limits)}; preference: {', '.join(weights)}"
    table = Table(title=title, title_justify="left")
    costs = list(dict.fromkeys([*reply.budget.limits, *space.objectives[1:]]))
    for heading in ("proposal", metric.label, "expected", *(cost.replace("_", " ") for cost in costs), "fits"):
        table.add_column(heading, justify="right")
    for number, answer in enumerate(reply.answers, 1):
        if answer.evaluation is None:
            table.add_row(str(number), "failed", metric.text(answer.expected_score), *("" for _ in costs), "[red]no[/]")
            continue
        shares = [percent(answer.evaluation.costs[cost] / space.dense_costs[cost], 1) for cost in costs]
        fits = "[green]yes[/]" if all(value <= 0 for value in answer.constraints.values()) else "[red]no[/]"
        table.add_row(str(number), metric.text(answer.evaluation.score), metric.text(answer.expected_score), *shares, fits)
    dense = [amount(cost, space.dense_costs[cost]) for cost in costs]
    table.add_row("dense", metric.text(space.dense_score), "", *dense, "", style="dim")
    return table
