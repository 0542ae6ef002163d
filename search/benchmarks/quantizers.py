"""How much accuracy each way of rounding keeps, from 4 to 2 bits; nothing is pruned, inputs stay in float.

The first and the last layer stay in float, as is usual below 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from secateur.cost_models.core import FLOAT_BITS
from secateur.search.benchmarks.records import Records
from secateur.search.benchmarks.recoveries import Variant, compare_recoveries
from secateur.search.config import SearchConfig
from secateur.search.problem import StatusCallback

BITS = (4, 3, 2)

METHODS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("uniform", ()),
    ("uniform", ("bias_correction",)),
    ("uniform", ("batch_norm",)),
    ("power_of_two", ()),
    ("gptq", ()),
    ("gptq", ("batch_norm",)),
    ("gptq", ("sequential",)),
    ("gptq", ("sequential", "batch_norm")),
)
"""(quantizer, recoveries) of each row."""

DENSE = Variant("dense")


def variants() -> tuple[Variant, ...]:
    """Return every method at every bit-width, and the dense network."""
    return (
        DENSE,
        *(
            Variant(_name(quantizer, recoveries, bits), False, (bits, FLOAT_BITS), quantizer, recoveries, keep_ends=True)
            for quantizer, recoveries in METHODS
            for bits in BITS
        ),
    )


def _name(quantizer: str, recoveries: Sequence[str], bits: int) -> str:
    return f"{' + '.join((quantizer, *recoveries))}, {bits} bits"


def compare_quantizers(config: SearchConfig, records: Records, status: StatusCallback, on_row: Callable[[str], None]) -> None:
    """Add to `records` the float32 test score of every method at every bit-width; see `compare_recoveries`."""
    compare_recoveries([config], 0.0, records, status, on_row, variants())


def quantizer_report(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the results as Markdown: a method per line, a bit-width per column, and what they were measured on."""
    scores = {row["variant"]: f"{100 * row['test_top1']:.2f}" for row in rows}
    table = [f"| quantizer, recoveries | {' | '.join(f'{bits} bits' for bits in BITS)} |", "|---|" + "---|" * len(BITS)]
    for method in METHODS:
        cells = [scores.get(_name(*method, bits), "-") for bits in BITS]
        table.append(f"| {' + '.join((method[0], *method[1]))} | {' | '.join(cells)} |")
    notes = [
        f"Test top-1 in percent of {row['images']} images, dense {100 * row['test_top1']:.2f}. Weights of all layers but the "
        f"first and the last, inputs in float. {row['data']}"
        for row in rows
        if row["variant"] == DENSE.name
    ]
    return "\n".join([*table, "", *notes]) + "\n"
