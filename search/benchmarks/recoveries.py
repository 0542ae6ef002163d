"""How much accuracy each recovery keeps, on one network after the other: pruned by one ratio, quantized, or both."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from secateur.cost_models.core import FLOAT_BITS
from secateur.envs.core import CompressionPolicy
from secateur.envs.evaluator import top1
from secateur.envs.model_graph import ModelGraph
from secateur.envs.quantization.quantizers import QUANTIZERS
from secateur.search.benchmarks.records import Records, config_record
from secateur.search.benchmarks.recovered import calibrated_problem, with_recoveries
from secateur.search.build import build_plugin
from secateur.search.config import PluginEntry, SearchConfig
from secateur.search.problem import Problem, StatusCallback


@dataclass(frozen=True)
class Variant:
    """One way to compress and repair a network.

    Attributes:
        name: heading of its column.
        pruned: whether the inner groups lose their share.
        bits: (weight_bits, activation_bits) of all layers.
        quantizer, recoveries: plug-ins by name, with default options.
        keep_ends: whether the first and the last layer stay in float.
    """

    name: str
    pruned: bool = False
    bits: tuple[int, int] = (FLOAT_BITS, FLOAT_BITS)
    quantizer: str = "uniform"
    recoveries: tuple[str, ...] = ()
    keep_ends: bool = False


VARIANTS = (
    Variant("dense"),
    Variant("pruned", pruned=True),
    Variant("pruned, least_squares", pruned=True, recoveries=("least_squares",)),
    Variant("pruned, sequential", pruned=True, recoveries=("sequential",)),
    Variant("pruned, sequential + batch_norm", pruned=True, recoveries=("sequential", "batch_norm")),
    Variant("W8A8", bits=(8, 8)),
    Variant("W4A8", bits=(4, 8)),
    Variant("W4A8, gptq + sequential", bits=(4, 8), quantizer="gptq", recoveries=("sequential",)),
    Variant("pruned W8A8, sequential", pruned=True, bits=(8, 8), recoveries=("sequential",)),
)
"""The columns of the table."""


def inner_groups(graph: ModelGraph) -> tuple[bool, ...]:
    """Return for each group whether it lies inside a block: a single layer makes its channels.

    Depthwise convolutions that carry the channels on do not count as makers. Channels that several layers add up to are a
    residual stream, which every block reads: pruning it by the same ratio costs far more accuracy than it saves.
    """
    depthwise = {layer.name for layer in graph.geometry.layers if layer.depthwise}
    return tuple(len(set(group.producers) - depthwise) == 1 for group in graph.groups)


def uniform_policy(graph: ModelGraph, variant: Variant, ratio: float, exclude: Sequence[str] = ()) -> CompressionPolicy:
    """Return the policy of a variant.

    Args:
        graph: the plan; channels that are excluded from pruning are in none of its groups.
        variant: what is compressed.
        ratio: share of units that each inner group loses.
        exclude: patterns of layer names that are not quantized.
    """
    widths = tuple(
        max(1, round((1 - ratio) * group.units)) if variant.pruned and inner else group.units
        for group, inner in zip(graph.groups, inner_groups(graph), strict=True)
    )
    layers = graph.geometry.layers
    patterns = [*exclude, *((layers[0].name, layers[-1].name) if variant.keep_ends else ())]
    weight_bits, activation_bits = (
        tuple(
            bits if layer.quantizable and not any(fnmatchcase(layer.name, pattern) for pattern in patterns) else FLOAT_BITS
            for layer in layers
        )
        for bits in variant.bits
    )
    return CompressionPolicy(widths, weight_bits, activation_bits)


def compare_recoveries(
    configs: Sequence[SearchConfig],
    ratio: float,
    records: Records,
    status: StatusCallback,
    on_row: Callable[[str], None],
    variants: Sequence[Variant] = VARIANTS,
) -> None:
    """Add to `records` the float32 test score of every variant of every network, except those that are there already.

    Args:
        configs: one network each; their `space.exclude` counts, but not the rest of `space`, nor `recovery` and `quantizer`.
        ratio: share of units that each inner group loses, in [0, 1).
        records: the rows.
        status: told what happens in between.
        on_row: told each row in one line.
        variants: columns.
    """
    for config in configs:
        network, record = network_name(config), config_record(config)
        key = {"network": network, "ratio": ratio, "config": record}
        missing = [variant for variant in variants if records.find(**key, variant=variant.name) is None]
        if not missing:
            status(f"{network}: measured already")
            continue
        problem = calibrated_problem(config, status)
        for variant in missing:
            row = records.add(**key, variant=variant.name, **_measure(problem, variant, ratio))
            on_row(f"{network}, {variant.name}: {100 * row['test_top1']:.2f} % of {row['images']} test images")


def network_name(config: SearchConfig) -> str:
    """Return what the network is called in tables: the name of its factory."""
    return config.model.factory.rpartition(":")[2]


def _measure(problem: Problem, variant: Variant, ratio: float) -> dict[str, Any]:
    policy = uniform_policy(problem.graph, variant, ratio, problem.config.space.exclude)
    quantizer = build_plugin(QUANTIZERS, PluginEntry(name=variant.quantizer))
    assembler = with_recoveries(problem.assembler, variant.recoveries, quantizer=quantizer)
    start = time.perf_counter()
    network = assembler.assemble(policy)
    seconds = time.perf_counter() - start
    images, labels = problem.data.tensors(problem.data.test)
    costs, dense = problem.space.costs.of_policy(policy), problem.space.dense_costs
    return {
        "test_top1": top1(network, images, labels),
        "images": len(labels),
        "shares": {name: costs[name] / dense[name] for name in ("macs", "weight_bytes")},
        "seconds": seconds,
        "data": problem.data.source,
    }


def recovery_table(rows: Sequence[Mapping[str, Any]], variants: Sequence[Variant] = VARIANTS) -> str:
    """Return the results as Markdown: test top-1 in percent, a network per line, a variant per column."""
    lines: dict[tuple[str, float, str], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        # Of the same network under two configurations, each has a line.
        lines.setdefault((row["network"], row["ratio"], str(row["config"])), {})[row["variant"]] = row
    names = [variant.name for variant in variants]
    head = ["network", "removed %", "MACs left %", *names]
    table = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for (network, ratio, _), cells in lines.items():
        pruned = next((cells[v.name] for v in variants if v.pruned and v.name in cells), None)
        macs = f"{100 * pruned['shares']['macs']:.1f}" if pruned else "-"
        scores = [f"{100 * cells[name]['test_top1']:.2f}" if name in cells else "-" for name in names]
        table.append(f"| {' | '.join([network, f'{100 * ratio:g}', macs, *scores])} |")
    return "\n".join(table)


def recovery_report(rows: Sequence[Mapping[str, Any]], variants: Sequence[Variant] = VARIANTS) -> str:
    """Return the table with what it was measured on."""
    sources = dict.fromkeys(
        f"- {row['network']}: {row['images']} test images, standard error {_error(row):.2f} points at "
        f"{100 * row['test_top1']:.1f} %. {row['data']}"
        for row in rows
        if row["variant"] == variants[0].name
    )
    notes = [
        "Test top-1 in percent, float32 arithmetic, no fine-tuning. Removed: share of the channels of every group that a "
        "single layer makes, by the importance of the configuration; residual streams stay whole. MACs left: of the pruned "
        "columns. WnAm: weights in n, inputs in m bits, simulated.",
        "\n".join(sources),
    ]
    return "\n\n".join([recovery_table(rows, variants), *notes]) + "\n"


def _error(row: Mapping[str, Any]) -> float:
    return 100 * float(np.sqrt(row["test_top1"] * (1 - row["test_top1"]) / row["images"]))
