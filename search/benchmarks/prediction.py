"""`secateur benchmark prediction`: how well scores before fine-tuning predict those after it.

A search chooses by validation top-1 right after recovery; its users fine-tune what it chose. Random feasible policies are scored
under every recovery setting, then fine-tuned for some epochs and scored on the test split, which no recovery setting has seen.
Spearman's rank correlation tells how similar the two orders are.

Fine-tuning starts from the same network for all recovery settings, by default the sliced network without any recovery ("none"),
although finalists are better trained from what their recovery made of them: a repaired start would favor the setting that
repaired it, while every setting repairs the same slice. Batch norms need no recalibration before: training normalizes by the
batch, and the old running statistics decay within some hundred steps. `start` names another setting, to see how much the choice
matters. All policies see the same images in the same order with the same crops and flips.

The confidence interval (search/correlation.py) covers the choice of the policies. Noise of the test scores (a binomial standard
error, given in the report) lowers every correlation alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from secateur.envs.core import Budget, CompressionPolicy, InputError
from secateur.envs.evaluator import processor_has_bfloat16
from secateur.envs.tasks.data import Split
from secateur.envs.tasks.supervised import SupervisedTask
from secateur.envs.training.fine_tuning import FineTuning, fine_tune
from secateur.search.benchmarks.policies import choose_budget, policy_choices, random_policies
from secateur.search.benchmarks.processes import measured
from secateur.search.benchmarks.records import Records, Row, config_record
from secateur.search.benchmarks.recovery_settings import RECOVERY_SETTINGS, calibrated_problem, with_recoveries
from secateur.search.benchmarks.scaffold import markdown_table, percent, show_progress, write_results
from secateur.search.benchmarks.timing import timed
from secateur.search.build import make_evaluator
from secateur.search.config import SearchConfig
from secateur.search.correlation import spearman, spearman_interval
from secateur.search.problem import Problem
from secateur.search.run.ray_cluster import available_cores
from secateur.search.training.samples import load_training_data

FILE = "policies.jsonl"
MIN_POLICIES = 5
"""Fewer have no confidence interval worth printing."""


@dataclass(frozen=True)
class Experiment:
    """Everything that a worker process needs; picklable.

    Attributes:
        problem: from `calibrated_problem`, with one budget.
        train: images for the fine-tuning.
        start: the recovery setting whose network is fine-tuned.
        tuning: the recipe.
    """

    problem: Problem
    train: Split
    start: str
    tuning: FineTuning


def run_prediction(config: SearchConfig, budget_name: str | None, policies: int, epochs: int, start: str, output: Path) -> None:
    """Measure and report; see `measure_prediction`.

    Args:
        config: its recovery is not used.
        budget_name: may be None if the configuration has only one budget.
        policies: number of random policies.
        epochs: of fine-tuning.
        start: the recovery setting whose network is fine-tuned.
        output: folder of the results.
    """
    check_start(start)
    with show_progress() as progress:
        train = training_images(config)
        problem = calibrated_problem(config, progress.status)
        budget = choose_budget(problem, budget_name)
        experiment = Experiment(problem, train, start, default_tuning(epochs, config.search.seed))
        records = open_records(output / FILE, experiment, budget)
        drawn = random_policies(problem, budget, policies)
        progress.stop()
        lines = measure_prediction(experiment, drawn, records, worker_processes(config))
        write_results(records, lines, partial(prediction_report, experiment, budget))


def check_start(start: str) -> None:
    """Raise InputError unless `start` is a recovery setting."""
    if start not in RECOVERY_SETTINGS:
        known, missing = ", ".join(RECOVERY_SETTINGS), f"There is no recovery setting `{start}` to start from; choose"
        raise InputError(f"{missing} another `start`: {known}.", f"{missing} one with --start: {known}.")


def default_tuning(epochs: int, seed: int) -> FineTuning:
    """Return the usual recipe, in bfloat16 where the processor supports it."""
    return FineTuning(epochs=epochs, precision="bfloat16" if processor_has_bfloat16() else "float32", seed=seed)


def worker_processes(config: SearchConfig) -> int:
    """Return how many worker processes `search.workers` means on this machine."""
    workers = config.search.workers
    return workers if isinstance(workers, int) else available_cores()


def training_images(config: SearchConfig) -> Split:
    """Return `data.train` of the configuration, or all training images where it is 0.

    Raises:
        InputError: if there are none.
    """
    train = load_training_data(config).train
    if train is None:
        raise InputError("`data` has no training images, which fine-tuning needs.")
    return train


def open_records(file: Path, experiment: Experiment, budget: Budget) -> Records:
    """Return the records of this experiment: those in `file`, if they are of the same one."""
    header = {
        "config": config_record(experiment.problem.config),
        "budget": budget.name,
        "start": experiment.start,
        "train": len(experiment.train),
        "tuning": asdict(experiment.tuning),
    }
    return Records(file, header)


def measure_prediction(
    experiment: Experiment, policies: Sequence[CompressionPolicy], records: Records, processes: int
) -> Iterator[str]:
    """Add a row for every policy that has none yet; yield each new row as a line of text.

    Args:
        experiment: what is measured.
        policies: distinct.
        records: the rows.
        processes: of one thread each; 0: in this process.
    """
    missing = [(i, policy) for i, policy in enumerate(policies) if records.find(**policy_choices(policy)) is None]
    for (index, policy), found in measured(_outcome, experiment, missing, processes):
        row = records.add(policy=index, **policy_choices(policy), **found)
        scores = ", ".join(f"{name} {percent(score)}" for name, score in row["validation_top1"].items())
        yield f"policy {index}: {percent(row['tuned_top1'])} % after fine-tuning; before: {scores}"


def _outcome(experiment: Experiment, item: tuple[int, CompressionPolicy]) -> dict[str, Any]:
    return outcome(experiment, item[1])


def outcome(experiment: Experiment, policy: CompressionPolicy) -> dict[str, Any]:
    """Return share of MACs, validation top-1 and seconds under every recovery setting, and test top-1 after fine-tuning."""
    problem = experiment.problem
    scored = {}
    for setting, names in RECOVERY_SETTINGS.items():
        assembler = with_recoveries(problem.assembler, names)
        scored[setting] = make_evaluator(replace(problem, assembler=assembler)).evaluate(policy)
    seconds, network = timed(_fine_tuned, experiment, policy)
    return {
        "macs": problem.space.costs.of_policy(policy)["macs"] / problem.space.dense_costs["macs"],
        "validation_top1": {setting: evaluation.score for setting, evaluation in scored.items()},
        "seconds": {setting: evaluation.seconds for setting, evaluation in scored.items()},
        "tuned_top1": problem.task.evaluate(network, "test").score,
        "tuning_seconds": seconds,
    }


def _fine_tuned(experiment: Experiment, policy: CompressionPolicy) -> nn.Module:
    problem = experiment.problem
    network = with_recoveries(problem.assembler, RECOVERY_SETTINGS[experiment.start]).assemble(policy)
    assert isinstance(problem.task, SupervisedTask), "the configuration names the data"
    return fine_tune(network, replace(problem.task.data, train=experiment.train), experiment.tuning)


# ---------------------------------------------------------------------------------------------------------------- report


def prediction_table(rows: Sequence[Row]) -> str:
    """Return one line of Markdown per recovery setting: scores, rank correlation, its best policy after fine-tuning."""
    heads = ["recovery", "validation top-1 %", "seconds", "Spearman", "95 % interval", "its best policy after fine-tuning %"]
    return markdown_table(heads, [_cells(setting, rows) for setting in RECOVERY_SETTINGS])


def _cells(setting: str, rows: Sequence[Row]) -> list[str]:
    tuned = np.array([row["tuned_top1"] for row in rows])
    scores = np.array([row["validation_top1"][setting] for row in rows])
    seconds = float(np.median([row["seconds"][setting] for row in rows]))
    found, bounds = "-", "-"
    if len(rows) >= MIN_POLICIES and np.isfinite(correlation := spearman(scores, tuned)):
        low, high = spearman_interval(correlation, len(rows))
        found, bounds = f"{correlation:.2f}", f"{low:.2f} to {high:.2f}"
    best = percent(tuned[scores.argmax()])  # of equals the first, as in a search
    return [setting, _spread(scores), f"{seconds:.2f}", found, bounds, best]


def _spread(shares: np.ndarray) -> str:
    return f"{percent(shares.mean())} ({percent(shares.min())} to {percent(shares.max())})"


def prediction_report(experiment: Experiment, budget: Budget, rows: Sequence[Row]) -> str:
    """Return the table with what it was measured on."""
    problem, tuned = experiment.problem, np.array([row["tuned_top1"] for row in rows])
    deviation = tuned.std(ddof=1) if len(rows) > 1 else 0.0
    tests = problem.task.samples("test")
    error = np.sqrt(tuned.mean() * (1 - tuned.mean()) / tests)
    recipe = ", ".join(f"{name} {value}" for name, value in asdict(experiment.tuning).items())
    notes = [
        f"{len(rows)} random policies at the edge of the budget `{budget.name}`. After fine-tuning (test top-1): "
        f"{_spread(tuned)}, standard deviation {percent(deviation)} points over the policies; "
        f"the standard error of one test score is {percent(error)} points on {tests} images. "
        "Seconds: median of one evaluation on one thread.",
        f"Fine-tuning starts from the recovery setting `{experiment.start}`, on {len(experiment.train)} training images: "
        f"{recipe}; {np.median([row['tuning_seconds'] for row in rows]):.0f} s each (median). Dense: "
        f"{percent(problem.dense.score)} % on {problem.dense.images} validation images. {problem.task.source}",
    ]
    return "\n\n".join([prediction_table(rows), *notes]) + "\n"
