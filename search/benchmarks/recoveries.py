"""`secateur benchmark recoveries`: how much accuracy each recovery keeps.

Networks are pruned by one ratio, quantized, or both, and repaired without any search.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from secateur.cost_models.core import FLOAT_BITS
from secateur.envs.assembler import Assembler
from secateur.envs.core import CompressionPolicy
from secateur.envs.metric import TOP1
from secateur.envs.quantization.quantizers import QUANTIZERS
from secateur.search.benchmarks.policies import uniform_policy
from secateur.search.benchmarks.records import (
    Records,
    Row,
    config_record,
    metric_heading,
    network_name,
    row_metric,
    shown_score,
)
from secateur.search.benchmarks.recovery_settings import calibrated_problem, with_recoveries
from secateur.search.benchmarks.scaffold import ROWS, markdown_table, show_progress, write_results
from secateur.search.benchmarks.timing import timed
from secateur.search.build import build_plugin
from secateur.search.config import PluginEntry, SearchConfig
from secateur.search.problem import Problem, StatusCallback


@dataclass(frozen=True)
class Variant:
    """One way to compress and repair a network.

    Attributes:
        name: heading of its column.
        pruned: whether the inner groups are pruned.
        bits: (weight_bits, activation_bits) of all layers.
        quantizer: plug-in.
        recoveries: names of plug-ins, with default options.
        keep_ends: whether the first and the last layer stay in float.
    """

    name: str
    pruned: bool = False
    bits: tuple[int, int] = (FLOAT_BITS, FLOAT_BITS)
    quantizer: PluginEntry = PluginEntry(name="uniform")
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
    Variant("W4A8, gptq + sequential", bits=(4, 8), quantizer=PluginEntry(name="gptq"), recoveries=("sequential",)),
    Variant("pruned W8A8, sequential", pruned=True, bits=(8, 8), recoveries=("sequential",)),
)
"""The columns of the table."""


def run_recoveries(configs: Sequence[SearchConfig], ratio: float, output: Path) -> None:
    """Measure and report; `output` is the folder of the results."""
    records = Records(output / ROWS, {"benchmark": "recoveries"})
    with show_progress() as progress:
        write_results(records, compare_recoveries(configs, ratio, records, progress.status), recovery_report)


def compare_recoveries(
    configs: Sequence[SearchConfig],
    ratio: float,
    records: Records,
    status: StatusCallback,
    variants: Sequence[Variant] = VARIANTS,
) -> Iterator[str]:
    """Add a row with the float32 test score of every variant that has none yet; yield each new row as a line of text.

    Args:
        configs: one network each; their `space` (except `space.exclude`), `recovery` and `quantizer` are not used.
        ratio: share of units that each inner group loses, in [0, 1).
        records: the rows.
        status: status callback.
        variants: columns of the table.
    """
    for config in configs:
        network = network_name(config)
        key = {"network": network, "ratio": ratio, "config": config_record(config)}
        missing = [variant for variant in variants if records.find(**key, variant=variant.name) is None]
        if not missing:
            status(f"{network}: measured already")
            continue
        problem = calibrated_problem(config, status)
        for variant in missing:
            row = records.add(**key, variant=variant.name, **measure_variant(problem, variant, ratio))
            yield f"{network}, {variant.name}: {row_metric(row).text(row['test_score'])} on {row['images']} test images"


def measure_variant(problem: Problem, variant: Variant, ratio: float) -> dict[str, Any]:
    """Return test score, cost shares and seconds of one variant.

    Args:
        problem: from `calibrated_problem`.
        variant: how to compress and repair.
        ratio: share of units that each inner group loses, if the variant is pruned.
    """
    policy, assembler = policy_and_assembler(problem, variant, ratio)
    seconds, network = timed(assembler.assemble, policy)
    costs, dense = problem.space.costs.of_policy(policy), problem.space.dense_costs
    return {
        "test_score": problem.task.evaluate(network, "test").score,
        "metric": asdict(problem.task.metric),
        "images": problem.task.samples("test"),
        "shares": {name: costs[name] / dense[name] for name in ("macs", "weight_bytes")},
        "seconds": seconds,
        "data": problem.task.source,
    }


def policy_and_assembler(problem: Problem, variant: Variant, ratio: float) -> tuple[CompressionPolicy, Assembler]:
    """Return the policy of a variant, and what assembles its network; arguments as in `measure_variant`."""
    layers = problem.graph.geometry.layers
    ends = (layers[0].name, layers[-1].name) if variant.keep_ends else ()
    exclude = (*problem.config.space.exclude, *ends)
    policy = uniform_policy(problem.graph, ratio if variant.pruned else 0.0, variant.bits, exclude)
    quantizer = build_plugin(QUANTIZERS, variant.quantizer)
    return policy, with_recoveries(problem.assembler, variant.recoveries, quantizer=quantizer)


# ---------------------------------------------------------------------------------------------------------------- report


def recovery_table(rows: Sequence[Row], variants: Sequence[Variant] = VARIANTS) -> str:
    """Return the results as Markdown: test scores, a network per line, a variant per column."""
    by_network: dict[tuple[str, float, str], dict[str, Row]] = {}
    for row in rows:
        # The same network under two configurations has two lines.
        by_network.setdefault((row["network"], row["ratio"], str(row["config"])), {})[row["variant"]] = row
    names = [variant.name for variant in variants]
    lines = []
    for (network, ratio, _), found in by_network.items():
        pruned = next((found[v.name] for v in variants if v.pruned and v.name in found), None)
        macs = f"{100 * pruned['shares']['macs']:.1f}" if pruned else "-"
        scores = [score_text(found[name]) if name in found else "-" for name in names]
        lines.append([network, f"{100 * ratio:g}", macs, *scores])
    return markdown_table(["network", "removed %", "MACs left %", *names], lines)


def score_text(row: Row) -> str:
    """Return the test score of a row as tables show it, without the unit."""
    return f"{shown_score(row_metric(row), row['test_score']):.2f}"


def recovery_report(rows: Sequence[Row], variants: Sequence[Variant] = VARIANTS) -> str:
    """Return the table with what it was measured on."""
    sources = dict.fromkeys(
        f"- {row['network']}: {row['images']} test images{_error(row)}. {row['data']}"
        for row in rows
        if row["variant"] == variants[0].name
    )
    headings = ", ".join(dict.fromkeys(metric_heading(row_metric(row)) for row in rows))
    notes = (
        f"Test scores ({headings}), float32 arithmetic, no fine-tuning. Removed: share of the channels of every group that a "
        "single layer produces, chosen by the importance of the configuration; residual streams are not pruned. MACs left: of "
        "the pruned columns. WnAm: weights in n bits and inputs in m bits, simulated."
    )
    return "\n\n".join([recovery_table(rows, variants), notes, "\n".join(sources)]) + "\n"


def _error(row: Row) -> str:
    """Return words about the standard error of a test score; none, if the score is no share of correct answers."""
    score = row["test_score"]
    if row_metric(row).name != TOP1.name:
        return ""
    return f", standard error {100 * float(np.sqrt(score * (1 - score) / row['images'])):.2f} points at {100 * score:.1f} %"
