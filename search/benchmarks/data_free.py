"""`secateur benchmark data-free`: recoveries that need no images.

Two kinds of compression are repaired: uniform pruning with low-bit weights, and low bits in one layer and high bits in the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from secateur.cost_models.core import FLOAT_BITS
from secateur.envs.assembler import Assembler
from secateur.envs.core import CompressionPolicy
from secateur.envs.model_graph import ModelGraph
from secateur.envs.piece_cache import PieceCache
from secateur.envs.quantization.quantizers import QUANTIZERS
from secateur.envs.recovery import RECOVERIES
from secateur.search.benchmarks.policies import inner_groups, uniform_policy
from secateur.search.benchmarks.records import Records, Row, config_record, network_name
from secateur.search.benchmarks.scaffold import ROWS, markdown_table, percent, show_progress, write_results
from secateur.search.benchmarks.timing import timed
from secateur.search.build import build_assemblers, build_costs, build_model_and_graph, build_plugin
from secateur.search.config import PluginEntry, SearchConfig
from secateur.search.problem import StatusCallback

PRUNED_METHODS: Mapping[str, tuple[PluginEntry, ...]] = {
    "none": (),
    "UDFC": (PluginEntry(name="data_free", options={"fit": "closed_form", "statistics": False}),),
    "UDFC, s >= 0": (PluginEntry(name="data_free", options={"fit": "nonnegative", "statistics": False}),),
    "UDFC, s >= 0, statistics": (PluginEntry(name="data_free", options={"fit": "nonnegative"}),),
    "data_free": (PluginEntry(name="data_free"),),
    "data_free, gptq": (PluginEntry(name="data_free"),),
    "least_squares (images)": (PluginEntry(name="least_squares"),),
}
"""{column: recoveries} for pruned networks; the last column needs calibration images."""

MIXED_METHODS: Mapping[str, tuple[PluginEntry, ...]] = {
    "none": (),
    "df_mpc, batch norms kept": (PluginEntry(name="df_mpc", options={"statistics": "kept"}),),
    "df_mpc": (PluginEntry(name="df_mpc"),),
    "data_free": (PluginEntry(name="data_free"),),
    "data_free, gptq": (PluginEntry(name="data_free"),),
}
"""{column: recoveries} for mixed precision."""

QUANTIZED_BY = {"data_free, gptq": PluginEntry(name="gptq")}
"""{column: quantizer} where it is not the configuration's; this one uses the statistics that `data_free` generates."""


@dataclass(frozen=True)
class Case:
    """One row: how the network is compressed.

    Attributes:
        ratio: share of units that each inner group loses.
        bits: (low, high) weight bits: low for the layers that produce an inner group's channels, high for the others.
        published: {network: (test top-1 % published for this method, that of the dense network there)}.
    """

    ratio: float
    bits: tuple[int, int]
    published: Mapping[str, tuple[float, float]]

    @property
    def methods(self) -> Mapping[str, tuple[PluginEntry, ...]]:
        """The columns that apply."""
        return PRUNED_METHODS if self.ratio else MIXED_METHODS

    @property
    def name(self) -> str:
        """The compression in words."""
        low, high = ("float" if bits == FLOAT_BITS else f"{bits} bits" for bits in self.bits)
        return f"{100 * self.ratio:g} % removed, {low}" if low == high else f"{low} / {high} in turn"


CASES = (
    Case(0.3, (4, 4), {"resnet56": (90.33, 93.88)}),
    Case(0.4, (4, 4), {"resnet56": (86.99, 93.88)}),
    Case(0.5, (4, 4), {"resnet56": (81.90, 93.88)}),
    Case(0.0, (2, 6), {"resnet56": (91.05, 93.88)}),
)
"""Published: Bai et al. 2023, arXiv:2308.07209, and, in mixed precision, Chen et al. 2023, arXiv:2307.00498."""


def run_data_free(config: SearchConfig, output: Path) -> None:
    """Measure and report; `output` is the folder of the results."""
    records = Records(output / ROWS, {"benchmark": "data_free"})
    with show_progress() as progress:
        write_results(records, compare_data_free(config, records, progress.status), data_free_report)


def case_policy(graph: ModelGraph, case: Case) -> CompressionPolicy:
    """Return the policy of a case: inner groups lose units; the layers that produce them have the low bits, others the high.

    A layer that reads the channels of a low-bit layer has the high bits, so that low and high alternate in a chain.
    """
    low: set[str] = set()
    for group, inner in zip(graph.groups, inner_groups(graph), strict=True):
        producer = group.producers[0]
        read = {name for other in graph.groups if producer in other.consumers for name in other.producers}
        if inner and not read & low:
            low.add(producer)
    bits = tuple(case.bits[layer.name not in low] if layer.quantizable else FLOAT_BITS for layer in graph.geometry.layers)
    return replace(uniform_policy(graph, case.ratio), weight_bits=bits)


def compare_data_free(
    config: SearchConfig, records: Records, status: StatusCallback, cases: Sequence[Case] = CASES
) -> Iterator[str]:
    """Add a row with the float32 test score of every case and method that has none yet; yield new rows as lines of text.

    Args:
        config: network, data, importance and quantizer; its recoveries, budgets and search are not used.
        records: the rows.
        status: status callback.
        cases: rows of the table.
    """
    with_images = config.data.calibration != 0
    own = _with_recovery(config, "least_squares" if with_images else "data_free")
    task, model, graph = build_model_and_graph(own, status)
    costs = build_costs(own, graph)
    status("calibrating")
    assembler, _ = build_assemblers(own, task, model, graph)
    key = {"network": network_name(config), "config": config_record(own)}
    status("scoring")
    if records.find(**key, case="dense") is None:
        records.add(
            **key, case="dense", test_top1=task.evaluate(model, "test").score, images=task.samples("test"), data=task.source
        )
    for case in cases:
        policy = case_policy(graph, case)
        macs = costs.of_policy(policy)["macs"] / costs.dense["macs"]
        for method, entries in case.methods.items():
            row = {**key, "case": case.name, "method": method}
            if records.find(**row) is not None or (not with_images and "images" in method):
                continue
            seconds, network = timed(_assembler_of(assembler, entries, QUANTIZED_BY.get(method)).assemble, policy)
            score = task.evaluate(network, "test").score
            records.add(**row, test_top1=score, macs=macs, seconds=seconds)
            yield f"{key['network']}, {case.name}, {method}: {percent(score)} %"


def _with_recovery(config: SearchConfig, name: str) -> SearchConfig:
    """Return the configuration with one recovery, for the search and for the finalists."""
    finalize = config.finalize.model_copy(update={"recovery": None})
    return config.model_copy(update={"recovery": (PluginEntry(name=name),), "finalize": finalize})


def _assembler_of(assembler: Assembler, entries: Sequence[PluginEntry], quantizer: PluginEntry | None) -> Assembler:
    """Return the assembler with these recoveries, and perhaps another quantizer.

    If none of the recoveries needs images, neither they nor the quantizer get any.
    """
    recoveries = [build_plugin(RECOVERIES, entry) for entry in entries]
    changed = replace(assembler, recoveries=recoveries, cache=PieceCache())
    if quantizer is not None:
        changed = replace(changed, quantizer=build_plugin(QUANTIZERS, quantizer))
    if any(recovery.needs_images for recovery in recoveries) or not recoveries:
        return changed
    return replace(changed, calibration=None, images=None)


# ---------------------------------------------------------------------------------------------------------------- report


def data_free_report(rows: Sequence[Row], cases: Sequence[Case] = CASES) -> str:
    """Return a table for pruning and one for mixed precision, top-1 in percent, and what they were measured on."""
    parts = [
        table
        for methods in (PRUNED_METHODS, MIXED_METHODS)
        if (table := _table(rows, [case for case in cases if case.methods is methods], methods))
    ]
    parts += [
        f"{row['network']}: dense {percent(row['test_top1'])} % of {row['images']} test images. {row['data']} "
        "Removed: that share of the channels of each group that a single layer produces."
        for row in rows
        if row["case"] == "dense"
    ]
    return "\n\n".join(parts) + "\n"


def _table(rows: Sequence[Row], cases: Sequence[Case], methods: Mapping[str, tuple[PluginEntry, ...]]) -> str | None:
    """Return the table of cases that have the same methods; None if nothing is measured."""
    names = [name for name in methods if any(row.get("method") == name for row in rows)]
    networks = dict.fromkeys(row["network"] for row in rows)
    lines = [line for network in networks for case in cases if (line := _cells(rows, network, case, names))]
    if not lines:
        return None
    return markdown_table(["network", "case", "MACs left %", *names, "published (dense there)"], lines)


def _cells(rows: Sequence[Row], network: str, case: Case, names: Sequence[str]) -> list[str] | None:
    found = {row["method"]: row for row in rows if row["network"] == network and row["case"] == case.name}
    if not found:
        return None
    published = "{:.2f} ({:.2f})".format(*case.published[network]) if network in case.published else "-"
    macs = f"{100 * next(iter(found.values()))['macs']:.1f}"
    scores = [percent(found[name]["test_top1"]) if name in found else "-" for name in names]
    return [network, case.name, macs, *scores, published]
