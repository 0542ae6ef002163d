"""How well the reward predicts what fine-tuning makes of a policy: rank correlations, one per grade of recovery.

A search chooses by validation top-1 right after recovery; its users fine-tune what it chose. Random feasible policies are
scored under every grade, then trained for some epochs and scored on the test split, which no grade has seen. Spearman's rank
correlation says how far a grade's order is the order after training.

The start of the training is the same for all grades and by default the plainly sliced network ("none"), although
finalists are better trained from what their recovery made of them: a repaired start would favor the grade that repaired
it, while every grade is a repair of the same slice. Its batch norms need no recalibration first: training normalises by
the batch, and what is left of the old running statistics after some hundred steps is nothing. `start` names another grade,
to see how much the choice matters. All policies see the same images in the same order with the same crops and flips.

The interval is Fisher's, on the scale of z = artanh r, with the standard error sqrt((1 + r^2 / 2) / (n - 3)) of Spearman's
coefficient. Source: Bonett and Wright 2000, Psychometrika 65, 23-28. It covers the draw of the policies. Noise of the test
scores (a binomial standard error, given in the report) lowers every correlation alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from secateur.envs.core import Budget, CompressionPolicy, InputError
from secateur.envs.evaluator import Evaluator, processor_has_bfloat16, top1
from secateur.envs.tasks.data import REST, Split, load_data
from secateur.envs.tasks.training import FineTuning, fine_tune
from secateur.search.benchmarks.records import Records, config_record
from secateur.search.benchmarks.recovered import with_recoveries
from secateur.search.build import build_agent
from secateur.search.config import SearchConfig
from secateur.search.problem import Problem
from secateur.search.run.ray_runner import available_cores

GRADES: Mapping[str, tuple[str, ...]] = {
    "none": (),
    "batch_norm": ("batch_norm",),
    "least_squares": ("least_squares",),
    "least_squares + batch_norm": ("least_squares", "batch_norm"),
    "sequential": ("sequential",),
    "sequential + batch_norm": ("sequential", "batch_norm"),
}
"""Recoveries behind the validation scores, by name."""

MIN_POLICIES = 5
"""Fewer have no interval worth printing."""


@dataclass(frozen=True)
class Experiment:
    """What one worker process needs; picklable.

    Attributes:
        problem: from `calibrated_problem`, with one budget.
        train: images for the fine-tuning.
        start: the grade whose network is trained.
        tuning: how.
    """

    problem: Problem
    train: Split
    start: str
    tuning: FineTuning


def check_start(start: str) -> None:
    """Raise InputError unless `start` is a grade."""
    if start not in GRADES:
        raise InputError(f"There is no recovery `{start}` to start from; choose one with --start: {', '.join(GRADES)}.")


def default_tuning(epochs: int, seed: int) -> FineTuning:
    """Return the usual recipe, in bfloat16 where the processor has it."""
    return FineTuning(epochs=epochs, precision="bfloat16" if processor_has_bfloat16() else "float32", seed=seed)


def processes(config: SearchConfig) -> int:
    """Return how many worker processes `search.workers` means on this machine."""
    return available_cores() if config.search.workers == "auto" else config.search.workers


def training_images(config: SearchConfig) -> Split:
    """Return `data.train` of the configuration, or all training images where it is 0.

    Raises:
        InputError: if there are none.
    """
    arguments = {**config.data.model_dump(), "train": config.data.train or REST}
    return load_data(**arguments, input_shape=config.model.input).train


def random_policies(problem: Problem, budget: Budget, count: int) -> list[CompressionPolicy]:
    """Return random policies at the edge of the budget; the first ones do not depend on `count`."""
    agent = build_agent(replace(problem, budgets=(budget,)), "random", {}, problem.config.search.seed)
    return [problem.space.decode(actor.sequence) for actor in agent.ask(count)]


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
    experiment: Experiment,
    policies: Sequence[CompressionPolicy],
    records: Records,
    workers: int,
    on_row: Callable[[str], None],
) -> None:
    """Add a row to `records` for every policy that has none yet.

    Args:
        experiment: what is measured.
        policies: distinct.
        records: the rows.
        workers: processes of one thread each; 0: in this process.
        on_row: told each row in one line.
    """
    missing = [(i, policy) for i, policy in enumerate(policies) if records.find(widths=policy.widths, **_bits(policy)) is None]
    for (index, policy), found in _outcomes(experiment, missing, workers):
        row = records.add(policy=index, widths=policy.widths, **_bits(policy), **found)
        scores = ", ".join(f"{grade} {100 * score:.2f}" for grade, score in row["validation_top1"].items())
        on_row(f"policy {index}: {100 * row['tuned_top1']:.2f} % after fine-tuning; before: {scores}")


def _bits(policy: CompressionPolicy) -> dict[str, Any]:
    return {"weight_bits": policy.weight_bits, "activation_bits": policy.activation_bits}


def _outcomes(
    experiment: Experiment, missing: Sequence[tuple[int, CompressionPolicy]], workers: int
) -> Iterator[tuple[tuple[int, CompressionPolicy], dict[str, Any]]]:
    """Yield each policy with what was measured, as they finish."""
    if workers == 0:
        yield from ((item, outcome(experiment, item[1])) for item in missing)
        return
    # Spawned, not forked: torch's threads do not survive a fork.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_keep, initargs=(experiment,))
    try:
        running = {pool.submit(_outcome_here, item[1]): item for item in missing}
        for done in as_completed(running):
            yield running[done], done.result()
    finally:
        pool.shutdown(cancel_futures=True)


_kept: Experiment
"""The experiment of a worker process, sent once."""


def _keep(experiment: Experiment) -> None:
    global _kept
    torch.set_num_threads(1)
    _kept = experiment


def _outcome_here(policy: CompressionPolicy) -> dict[str, Any]:
    return outcome(_kept, policy)


def outcome(experiment: Experiment, policy: CompressionPolicy) -> dict[str, Any]:
    """Return the policy's share of MACs, validation top-1 and seconds under every grade, and test top-1 after training."""
    problem = experiment.problem
    images, labels = problem.data.tensors(problem.data.validation)
    scored = {}
    for grade, names in GRADES.items():
        assembler = with_recoveries(problem.assembler, names)
        scored[grade] = Evaluator(assembler, problem.space.costs.of_policy, images, labels, problem.precision).evaluate(policy)
    start = time.perf_counter()
    network = with_recoveries(problem.assembler, GRADES[experiment.start]).assemble(policy)
    network = fine_tune(network, replace(problem.data, train=experiment.train), experiment.tuning)
    seconds = time.perf_counter() - start
    return {
        "macs": problem.space.costs.of_policy(policy)["macs"] / problem.space.dense_costs["macs"],
        "validation_top1": {grade: evaluation.top1 for grade, evaluation in scored.items()},
        "seconds": {grade: evaluation.seconds for grade, evaluation in scored.items()},
        "tuned_top1": top1(network, *problem.data.tensors(problem.data.test)),
        "tuning_seconds": seconds,
    }


# --------------------------------------------------------------------------------------------------------------- report


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Spearman's rank correlation; ties share their mean rank; NaN if one side is constant."""
    ranks = np.stack([_ranks(np.asarray(values, float)) for values in (first, second)])
    centred = ranks - ranks.mean(axis=1, keepdims=True)
    norm = np.sqrt((centred**2).sum(axis=1).prod())
    return float(centred[0] @ centred[1] / norm) if norm else float("nan")


def _ranks(values: np.ndarray) -> np.ndarray:
    below = (values[None] < values[:, None]).sum(axis=1)
    return below + ((values[None] == values[:, None]).sum(axis=1) - 1) / 2


def interval(correlation: float, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a rank correlation over `count` pairs; see the module."""
    bounded = np.clip(correlation, -1 + 1e-12, 1 - 1e-12)
    half = 1.96 * np.sqrt((1 + bounded**2 / 2) / (count - 3))
    low, high = np.tanh(np.arctanh(bounded) + np.array([-half, half]))
    return float(low), float(high)


def prediction_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return one line of Markdown per grade: its scores, its rank correlation, and what its favorite became."""
    head = ["recovery", "validation top-1 %", "seconds", "Spearman", "95 % interval", "its best policy after fine-tuning %"]
    table = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    tuned = np.array([row["tuned_top1"] for row in rows])
    for grade in GRADES:
        scores = np.array([row["validation_top1"][grade] for row in rows])
        seconds = float(np.median([row["seconds"][grade] for row in rows]))
        found, bounds = "-", "-"
        if len(rows) >= MIN_POLICIES and np.isfinite(correlation := spearman(scores, tuned)):
            low, high = interval(correlation, len(rows))
            found, bounds = f"{correlation:.2f}", f"{low:.2f} to {high:.2f}"
        # The first of equals, as a search would take it.
        cells = [grade, _spread(scores), f"{seconds:.2f}", found, bounds, f"{100 * tuned[scores.argmax()]:.2f}"]
        table.append(f"| {' | '.join(cells)} |")
    return "\n".join(table)


def _spread(shares: np.ndarray) -> str:
    return f"{100 * shares.mean():.2f} ({100 * shares.min():.2f} to {100 * shares.max():.2f})"


def prediction_report(experiment: Experiment, budget: Budget, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table with what it was measured on."""
    problem, tuning = experiment.problem, experiment.tuning
    tuned = np.array([row["tuned_top1"] for row in rows])
    tests = len(problem.data.test)
    error = np.sqrt(tuned.mean() * (1 - tuned.mean()) / tests)
    settings = ", ".join(f"{name} {value}" for name, value in asdict(tuning).items())
    notes = [
        f"{len(rows)} random policies at the edge of the budget `{budget.name}`. After fine-tuning (test top-1): "
        f"{_spread(tuned)}, standard deviation {100 * tuned.std(ddof=1) if len(rows) > 1 else 0:.2f} points over the policies; "
        f"the standard error of one test score is {100 * error:.2f} points on {tests} images. "
        f"Seconds: median of one evaluation on one thread.",
        f"Fine-tuning starts from the grade `{experiment.start}`, on {len(experiment.train)} training images: {settings}; "
        f"{np.median([row['tuning_seconds'] for row in rows]):.0f} s each (median). Dense: {100 * problem.dense.top1:.2f} % on "
        f"{problem.dense.images} validation images. {problem.data.source}",
    ]
    return "\n\n".join([prediction_table(rows), *notes]) + "\n"
