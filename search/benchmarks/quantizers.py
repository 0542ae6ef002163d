"""`secateur benchmark quantizers`: how much of the score each way of rounding keeps, at several bit-widths.

Nothing is pruned. The first and the last layer stay in float, as is usual below 8 bits.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from secateur.cost_models.core import FLOAT_BITS, InputError
from secateur.envs.quantization.quantizers import QUANTIZERS
from secateur.envs.quantization.quantizers.core import check_bits
from secateur.envs.recovery import RECOVERIES
from secateur.search.benchmarks.records import Records, Row, metric_heading, row_metric
from secateur.search.benchmarks.recoveries import Variant, compare_recoveries, score_text
from secateur.search.benchmarks.scaffold import ROWS, markdown_table, show_progress, write_results
from secateur.search.config import SearchConfig, apply_override
from secateur.search.config.plugins import PluginEntry, check_plugin
from secateur.search.problem import StatusCallback

BITS = ("W4", "W3", "W2")
"""Columns: bits of weights; "W4A8" has bits of layer inputs too."""

METHODS = (
    "uniform",
    "uniform + bias_correction",
    "uniform + batch_norm",
    "power_of_two",
    "gptq",
    "gptq + batch_norm",
    "gptq + sequential",
    "gptq + sequential + batch_norm",
)
"""Lines: a quantizer, with options if any, and recoveries."""

DENSE = Variant("dense")


def run_quantizers(config: SearchConfig, methods: Sequence[str] | None, bits: Sequence[str] | None, output: Path) -> None:
    """Measure and report.

    Args:
        config: the network and its data.
        methods: texts such as "uniform activations=max" or "gptq + sequential"; None: `METHODS`.
        bits: texts such as "W4" or "W4A8"; None: `BITS`.
        output: folder of the results.
    """
    chosen = variants(methods or METHODS, bits or BITS)
    records = Records(output / ROWS, {"benchmark": "quantizers"})
    with show_progress() as progress:
        write_results(records, compare_quantizers(config, records, progress.status, chosen), quantizer_report)


def variants(methods: Sequence[str], bits: Sequence[str]) -> tuple[Variant, ...]:
    """Return the dense network, and every method at all bit-widths; see `run_quantizers`.

    Raises:
        InputError: for a method or bit-widths that do not exist.
    """
    named = [(" ".join(method.split()), *parse_method(method)) for method in methods]
    widths = {(pair := parse_bits(text)): _heading(pair) for text in bits}
    return (
        DENSE,
        *(
            Variant(f"{method}, {heading}", False, pair, quantizer, recoveries, keep_ends=True)
            for method, quantizer, recoveries in named
            for pair, heading in widths.items()
        ),
    )


def parse_method(text: str) -> tuple[PluginEntry, tuple[str, ...]]:
    """Return the quantizer and the recoveries that "QUANTIZER OPTION=VALUE ... + RECOVERY + ..." describes.

    Raises:
        InputError: if there are no such plug-ins or options.
    """
    first, *recoveries = (part.strip() for part in text.split("+"))
    try:
        name, *pairs = shlex.split(first) or [""]
        values = {"name": name, "options": {}}
        for pair in pairs:
            if "=" not in pair:
                raise ValueError(f"{pair} has no value")
            apply_override(values, f"options.{pair}")
        entry = PluginEntry.model_validate(values)
        check_plugin(QUANTIZERS, entry.name, entry.options)
        for recovery in recoveries:
            check_plugin(RECOVERIES, recovery, {})
    except ValueError as error:  # an InputError of the checks too
        raise InputError(
            f'--method must read like "uniform activations=max + bias_correction", but got {text!r}: {error}'
        ) from None
    return entry, tuple(recoveries)


def parse_bits(text: str) -> tuple[int, int]:
    """Return (weight_bits, activation_bits) of a text such as "W4" or "W4A8".

    Raises:
        InputError: if it is no such text, or bits are out of range.
    """
    found = re.fullmatch(r"W(\d+)(?:A(\d+))?", text)
    try:
        if found is None:
            raise ValueError("it is W, the bits of weights, and perhaps A and the bits of layer inputs")
        pair = int(found[1]), int(found[2] or FLOAT_BITS)
        for width in set(pair) - {FLOAT_BITS}:
            check_bits(width)
    except ValueError as error:
        raise InputError(f"--bits must read like W4 or W4A8, but got {text!r}: {error}") from None
    return pair


def _heading(bits: tuple[int, int]) -> str:
    return f"{bits[0]} bits" if bits[1] == FLOAT_BITS else f"W{bits[0]}A{bits[1]}"


def compare_quantizers(
    config: SearchConfig, records: Records, status: StatusCallback, chosen: Sequence[Variant]
) -> Iterator[str]:
    """Add a row with the float32 test score of every variant; see `compare_recoveries`."""
    return compare_recoveries([config], 0.0, records, status, chosen)


def quantizer_report(rows: Sequence[Row]) -> str:
    """Return the results as Markdown: a method per line, a bit-width per column, and what they were measured on."""
    scores = {tuple(row["variant"].rsplit(", ", 1)): score_text(row) for row in rows if row["variant"] != DENSE.name}
    methods, headings = (list(dict.fromkeys(keys)) for keys in zip(*scores, strict=True)) if scores else ([], [])
    lines = [[method, *(scores.get((method, heading), "-") for heading in headings)] for method in methods]
    rounded = "Weights of all layers but the first and the last are rounded, "
    rounded += (
        "with A, the inputs of these layers too." if any("A" in heading for heading in headings) else "inputs stay in float."
    )
    notes = [
        f"Test {metric_heading(row_metric(row))} of {row['images']} images, dense {score_text(row)}. {rounded} {row['data']}"
        for row in rows
        if row["variant"] == DENSE.name
    ]
    return "\n\n".join([markdown_table(["quantizer, recoveries", *headings], lines), "\n".join(notes)]) + "\n"
