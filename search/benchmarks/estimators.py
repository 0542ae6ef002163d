"""`secateur benchmark estimators`: what training gains at low bit-widths, with each way to train quantized weights.

Nothing is pruned. Weights and inputs of all layers but the first and the last are rounded (GPTQ, `sequential`). This start is
trained with every estimator, with distillation from the dense model, for several seeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from secateur.envs.quantization.estimators import ESTIMATORS
from secateur.envs.training.distillation import Training
from secateur.envs.training.recipe import DistillationConfig
from secateur.envs.training.samples import Samples
from secateur.search.benchmarks.quantizers import parse_bits
from secateur.search.benchmarks.records import (
    Records,
    Row,
    config_record,
    mean_test_score,
    metric_heading,
    row_metric,
    shown_score,
)
from secateur.search.benchmarks.recoveries import Variant, policy_and_assembler
from secateur.search.benchmarks.recovery_settings import calibrated_problem
from secateur.search.benchmarks.scaffold import ROWS, markdown_table, show_progress, write_results
from secateur.search.benchmarks.timing import timed
from secateur.search.build import build_options
from secateur.search.config import PluginEntry, SearchConfig
from secateur.search.problem import Problem, StatusCallback
from secateur.search.training.finalize import training_config
from secateur.search.training.samples import training_samples

BITS = ("W4A4", "W2A4")
"""Rows of the table."""

START = "start"
"""Column of the score before training."""


def run_estimators(config: SearchConfig, bits: Sequence[str] | None, epochs: int, seeds: int, output: Path) -> None:
    """Measure and report.

    Args:
        config: the network, its data, and the recipe (`finalize.training`).
        bits: texts such as "W4A4"; None: `BITS`.
        epochs: of each training.
        seeds: number of trainings with each estimator, which see the samples in different orders.
        output: folder of the results.
    """
    records = Records(output / ROWS, {"benchmark": "estimators"})
    with show_progress() as progress:
        rows = compare_estimators(config, bits or BITS, epochs, seeds, records, progress.status)
        write_results(records, rows, estimator_report)


def compare_estimators(
    config: SearchConfig, bits: Sequence[str], epochs: int, seeds: int, records: Records, status: StatusCallback
) -> Iterator[str]:
    """Add a row for the start of every bit-width, and one for every training; yield each new row as a line of text."""
    chosen = {text: parse_bits(text) for text in bits}
    recipe = training_config(config, epochs)
    problem = calibrated_problem(config, status)
    samples, source = training_samples(problem, recipe)
    for text, pair in chosen.items():
        key = {"bits": text, "recipe": asdict(recipe), "config": config_record(config)}
        wanted = [(name, seed) for name in ESTIMATORS for seed in range(seeds)]
        missing = [(name, seed) for name, seed in wanted if records.find(**key, estimator=name, seed=seed) is None]
        if not missing:
            status(f"{text}: measured already")
            continue
        variant = Variant(text, False, pair, PluginEntry(name="gptq"), ("sequential",), keep_ends=True)
        policy, assembler = policy_and_assembler(problem, variant, 0.0)
        status(f"{text}: rounding")
        network = assembler.assemble(policy)
        if records.find(**key, estimator=START, seed=0) is None:
            row = records.add(**key, estimator=START, seed=0, losses=[], seconds=0.0, **_scores(problem, network, source))
            yield _line(row)
        for name, seed in missing:
            own = build_options(DistillationConfig, {**asdict(recipe), "estimator": name, "seed": seed})
            row = records.add(**key, estimator=name, seed=seed, **_train(problem, network, samples, source, own))
            yield _line(row)


def _train(problem: Problem, network: Any, samples: Samples, source: str, recipe: DistillationConfig) -> dict[str, Any]:
    training = Training(problem.task, problem.assembler.model, samples, recipe)
    seconds, trained = timed(training.run, network)
    losses = [epoch.loss for epoch in trained.epochs]
    return {"losses": losses, "seconds": seconds, **_scores(problem, trained.network, source)}


def _scores(problem: Problem, network: Any, source: str) -> dict[str, Any]:
    return {
        "test_score": problem.task.evaluate(network, "test").score,
        "dense": problem.task.evaluate(problem.assembler.model, "test").score,
        "metric": asdict(problem.task.metric),
        "images": problem.task.samples("test"),
        "data": f"{problem.task.source} {source}",
    }


def _line(row: Row) -> str:
    return f"{row['bits']}, {row['estimator']}, seed {row['seed']}: {row_metric(row).text(row['test_score'])} on test images"


# ---------------------------------------------------------------------------------------------------------------- report


def estimator_table(rows: Sequence[Row]) -> str:
    """Return the results as Markdown: bit-widths per line, estimators per column; mean and standard deviation over seeds."""
    lines = []
    for bits in dict.fromkeys(row["bits"] for row in rows):
        of_bits = [row for row in rows if row["bits"] == bits]
        lines.append(
            [bits, *(mean_test_score([row for row in of_bits if row["estimator"] == name]) for name in (START, *ESTIMATORS))]
        )
    return markdown_table(["bits", "before training", *ESTIMATORS], lines)


def estimator_report(rows: Sequence[Row]) -> str:
    """Return the table with what it was measured on."""
    notes = []
    for row in [row for row in rows if row["estimator"] == START][:1]:
        own = [other for other in rows if other["estimator"] != START]
        seeds, epochs = len({other["seed"] for other in own}), row["recipe"]["epochs"]
        dense = shown_score(row_metric(row), row["dense"])
        notes.append(
            f"Test {metric_heading(row_metric(row))} of {row['images']} images, dense {dense:.2f}; {epochs} epochs, mean and "
            f"standard deviation over {seeds} seeds. {row['data']}"
        )
    return "\n\n".join([estimator_table(rows), *notes]) + "\n"
