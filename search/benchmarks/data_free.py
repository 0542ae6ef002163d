"""How far recoveries without images come: uniform pruning with low-bit weights, and alternating low and high precision."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from secateur.cost_models.core import FLOAT_BITS
from secateur.envs.assembler import Assembler
from secateur.envs.core import CompressionPolicy
from secateur.envs.evaluator import top1
from secateur.envs.model_graph import ModelGraph
from secateur.envs.piece_cache import PieceCache
from secateur.envs.quantization.quantizers import QUANTIZERS
from secateur.envs.recovery import RECOVERIES
from secateur.search.benchmarks.records import Records, config_record
from secateur.search.benchmarks.recoveries import Variant, inner_groups, network_name, uniform_policy
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
"""Columns of the pruned rows; the last needs calibration images."""

MIXED_METHODS: Mapping[str, tuple[PluginEntry, ...]] = {
    "none": (),
    "df_mpc, batch norms kept": (PluginEntry(name="df_mpc", options={"statistics": "kept"}),),
    "df_mpc": (PluginEntry(name="df_mpc"),),
    "data_free": (PluginEntry(name="data_free"),),
    "data_free, gptq": (PluginEntry(name="data_free"),),
}
"""Columns of the rows in mixed precision."""

ROUNDED_BY = {"data_free, gptq": PluginEntry(name="gptq")}
"""Quantizers of the columns that do not take the configuration's; this one gets the statistics that `data_free` makes."""


@dataclass(frozen=True)
class Case:
    """One row: what is done to the network.

    Attributes:
        ratio: share of units that each inner group loses.
        bits: (low, high) weight bits of the layers that make an inner group's channels, and of the others.
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
        """What is done, in words."""
        low, high = ("float" if bits == FLOAT_BITS else f"{bits} bits" for bits in self.bits)
        return f"{100 * self.ratio:g} % removed, {low}" if low == high else f"{low} / {high} in turn"


CASES = (
    Case(0.3, (4, 4), {"resnet56": (90.33, 93.88)}),
    Case(0.4, (4, 4), {"resnet56": (86.99, 93.88)}),
    Case(0.5, (4, 4), {"resnet56": (81.90, 93.88)}),
    Case(0.0, (2, 6), {"resnet56": (91.05, 93.88)}),
)
"""Published: Bai et al. 2023, arXiv:2308.07209, and, in mixed precision, Chen et al. 2023, arXiv:2307.00498."""


def case_policy(graph: ModelGraph, case: Case) -> CompressionPolicy:
    """Return a case's policy: inner groups lose units; their makers have the low bits, all others the high ones.

    A layer that reads a low-bit layer's channels has the high bits, so that the two take turns in a chain.
    """
    policy = uniform_policy(graph, Variant("case", pruned=case.ratio > 0), case.ratio)
    low: set[str] = set()
    for group, inner in zip(graph.groups, inner_groups(graph), strict=True):
        read = {name for other in graph.groups if group.producers[0] in other.consumers for name in other.producers}
        if inner and not read & low:
            low.add(group.producers[0])
    bits = tuple(case.bits[layer.name not in low] if layer.quantizable else FLOAT_BITS for layer in graph.geometry.layers)
    return replace(policy, weight_bits=bits)


def compare_data_free(
    config: SearchConfig, records: Records, status: StatusCallback, on_row: Callable[[str], None], cases: Sequence[Case] = CASES
) -> None:
    """Add to `records` the float32 test score of every case and method, except those that are there already.

    Args:
        config: network, data, importance and quantizer; its recoveries, budgets and search are not used.
        records: the rows.
        status: told what happens in between.
        on_row: told each row in one line.
        cases: rows of the table.
    """
    with_images = config.data.calibration != 0
    recovery = PluginEntry(name="least_squares" if with_images else "data_free")
    finalize = config.finalize.model_copy(update={"recovery": None})
    config = config.model_copy(update={"recovery": (recovery,), "finalize": finalize})
    data, model, graph = build_model_and_graph(config, status)
    costs = build_costs(config, graph)
    status("calibrating")
    assembler, _ = build_assemblers(config, data, model, graph)
    images, labels = data.tensors(data.test)
    key = {"network": network_name(config), "config": config_record(config)}
    status("scoring")
    if records.find(**key, case="dense") is None:
        records.add(**key, case="dense", test_top1=top1(model, images, labels), images=len(labels), data=data.source)
    for case in cases:
        policy = case_policy(graph, case)
        macs = costs.of_policy(policy)["macs"] / costs.dense["macs"]
        for method, entries in case.methods.items():
            row = {**key, "case": case.name, "method": method}
            if records.find(**row) is not None or (not with_images and "images" in method):
                continue
            start = time.perf_counter()
            network = _assembler_of(assembler, entries, ROUNDED_BY.get(method)).assemble(policy)
            seconds = time.perf_counter() - start
            score = top1(network, images, labels)
            records.add(**row, test_top1=score, macs=macs, seconds=seconds)
            on_row(f"{key['network']}, {case.name}, {method}: {100 * score:.2f} %")


def _assembler_of(assembler: Assembler, entries: Sequence[PluginEntry], quantizer: PluginEntry | None) -> Assembler:
    """Return the assembler with these recoveries, and perhaps another quantizer.

    Recoveries that need no images get none, nor does the quantizer.
    """
    recoveries = [build_plugin(RECOVERIES, entry) for entry in entries]
    changed = replace(assembler, recoveries=recoveries, cache=PieceCache())
    if quantizer is not None:
        changed = replace(changed, quantizer=build_plugin(QUANTIZERS, quantizer))
    if any(recovery.needs_images for recovery in recoveries) or not recoveries:
        return changed
    return replace(changed, calibration=None, images=None)


def data_free_report(rows: Sequence[Mapping[str, Any]], cases: Sequence[Case] = CASES) -> str:
    """Return both tables as Markdown, top-1 in percent on the test images, and what they were measured on."""
    parts = []
    for methods in (PRUNED_METHODS, MIXED_METHODS):
        chosen = [case for case in cases if case.methods is methods]
        names = [name for name in methods if any(row.get("method") == name for row in rows)]
        head = ["network", "case", "MACs left %", *names, "published (dense there)"]
        lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
        for network in dict.fromkeys(row["network"] for row in rows):
            lines += [line for case in chosen if (line := _line(rows, network, case, names))]
        if len(lines) > 2:
            parts.append("\n".join(lines))
    for row in rows:
        if row["case"] == "dense":
            parts.append(
                f"{row['network']}: dense {100 * row['test_top1']:.2f} % of {row['images']} test images. {row['data']} "
                "Removed: channels that a single layer makes, that share of each of its groups."
            )
    return "\n\n".join(parts) + "\n"


def _line(rows: Sequence[Mapping[str, Any]], network: str, case: Case, names: Sequence[str]) -> str | None:
    found = {row["method"]: row for row in rows if row["network"] == network and row["case"] == case.name}
    if not found:
        return None
    published = "{:.2f} ({:.2f})".format(*case.published[network]) if network in case.published else "-"
    macs = f"{100 * next(iter(found.values()))['macs']:.1f}"
    scores = [f"{100 * found[name]['test_top1']:.2f}" if name in found else "-" for name in names]
    return f"| {' | '.join([network, case.name, macs, *scores, published])} |"
