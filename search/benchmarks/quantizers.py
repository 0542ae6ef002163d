"""`secateur benchmark quantizers`: how much accuracy each way of rounding keeps, from 4 to 2 bits.

Nothing is pruned, and the inputs of layers stay in float. The first and the last layer stay in float, as is usual below 8 bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from secateur.cost_models.core import FLOAT_BITS
from secateur.search.benchmarks.records import Records, Row
from secateur.search.benchmarks.recoveries import Variant, compare_recoveries
from secateur.search.benchmarks.scaffold import ROWS, markdown_table, percent, show_progress, write_results
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


def run_quantizers(config: SearchConfig, output: Path) -> None:
    """Measure and report; `output` is the folder of the results."""
    records = Records(output / ROWS, {"benchmark": "quantizers"})
    with show_progress() as progress:
        write_results(records, compare_quantizers(config, records, progress.status), quantizer_report)


def variants() -> tuple[Variant, ...]:
    """Return the dense network, and every method at every bit-width."""
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


def compare_quantizers(config: SearchConfig, records: Records, status: StatusCallback) -> Iterator[str]:
    """Add a row with the float32 test score of every method at every bit-width; see `compare_recoveries`."""
    return compare_recoveries([config], 0.0, records, status, variants())


def quantizer_report(rows: Sequence[Row]) -> str:
    """Return the results as Markdown: a method per line, a bit-width per column, and what they were measured on."""
    scores = {row["variant"]: percent(row["test_top1"]) for row in rows}
    lines = [
        [" + ".join((method[0], *method[1])), *(scores.get(_name(*method, bits), "-") for bits in BITS)] for method in METHODS
    ]
    notes = [
        f"Test top-1 in percent of {row['images']} images, dense {percent(row['test_top1'])}. Weights of all layers but the "
        f"first and the last are rounded, inputs stay in float. {row['data']}"
        for row in rows
        if row["variant"] == DENSE.name
    ]
    table = markdown_table(["quantizer, recoveries", *(f"{bits} bits" for bits in BITS)], lines)
    return "\n\n".join([table, "\n".join(notes)]) + "\n"
