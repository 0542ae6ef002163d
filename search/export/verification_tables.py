"""Shows the result of checking an export."""

from __future__ import annotations

from functools import partial

from rich.table import Table

from secateur.envs.metric import Metric, drop_name
from secateur.search.export.files import ONNX
from secateur.search.export.verification import Verification
from secateur.search.export.verify import FLOAT_TOLERANCE, LEAST_AGREEMENT
from secateur.search.results.formatting import amount, percent


def verification_tables(verification: Verification) -> list[Table]:
    """Return the limits in one table and everything else in another; empty tables are left out."""
    return [table for table in (_limit_table(verification), _promise_table(verification)) if table.row_count]


def _limit_table(verification: Verification) -> Table:
    table = Table(title=f"Budget {verification.budget}", title_justify="left")
    for heading in ("limit", "allowed", "found", "margin"):
        table.add_column(heading, justify="left" if heading == "limit" else "right")
    for heading in ("how", "kept"):
        table.add_column(heading)
    metric = Metric(**verification.metric)
    for limit in verification.limits:
        shown = metric.difference if limit.name == drop_name(metric) else partial(amount, limit.name)
        found = "-" if limit.found is None else shown(limit.found)
        margin = "-" if limit.margin is None else percent(limit.margin, 1)
        kept = {None: "-", True: "[green]yes[/]", False: "[red]no[/]"}[limit.kept]
        table.add_row(limit.name, shown(limit.limit), found, margin, limit.how, kept)
    return table


def _promise_table(verification: Verification) -> Table:
    threads = f"{verification.threads} thread{'s' * (verification.threads != 1)}"
    title = f"{verification.runtime} {verification.runtime_version}, {threads}, {verification.machine['processor']}"
    table = Table("quantity", title=title, title_justify="left")
    for heading in ("promised", "found"):
        table.add_column(heading, justify="right")
    _add_outputs(table, verification)
    table.add_section()
    for cost in verification.costs:
        table.add_row(cost.name, amount(cost.name, cost.promised), "-" if cost.found is None else amount(cost.name, cost.found))
    for name, size in verification.files.items():
        table.add_row(name, "", amount("file_bytes", size))
    table.add_section()
    _add_latency(table, verification)
    return table


def _add_outputs(table: Table, verification: Verification) -> None:
    outputs, metric = verification.outputs, Metric(**verification.metric)
    recorded = "" if outputs.recorded_score is None else metric.text(outputs.recorded_score)
    table.add_row(f"{metric.label} on {outputs.images:,} test samples, PyTorch", recorded, metric.text(outputs.pytorch_score))
    table.add_row(f"{metric.label}, {ONNX}", "", metric.text(outputs.runtime_score))
    if outputs.agreement is not None:
        table.add_row("same answers", "" if outputs.exact else f">= {percent(LEAST_AGREEMENT, 0)}", percent(outputs.agreement))
    allowed = f"<= {FLOAT_TOLERANCE:g}" if outputs.exact else ""
    table.add_row("largest difference of an output, in standard deviations", allowed, f"{outputs.max_difference:.3g}")
    table.add_row("mean difference", "", f"{outputs.mean_difference:.3g}")


def _add_latency(table: Table, verification: Verification) -> None:
    latency = verification.latency
    # The predicted latency of another device cannot be compared with times of this machine; the costs list it.
    promised = f"{latency.promised:.3f} ms" if latency.measured_here and latency.promised is not None else ""
    quantiles = f"{latency.milliseconds:.3f} ms ({latency.low:.3f} to {latency.high:.3f})"
    dense = f"{latency.dense_milliseconds:.3f} ms ({latency.dense_low:.3f} to {latency.dense_high:.3f})"
    table.add_row("latency, median (10 % to 90 %)", promised, quantiles)
    table.add_row("latency of the dense network, float32", "", dense)
    table.add_row("times as fast", "", f"{latency.dense_milliseconds / latency.milliseconds:.2f}")
