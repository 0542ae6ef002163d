"""`secateur benchmark evaluator`: what one evaluation takes, part by part.

Each evaluation is compared with a bare forward pass of the same network, with the straightforward way (straightforward.py), and
with its arithmetic alone: the seconds of the network's multiply-accumulates at the rate of a large square matrix product in the
number format of the evaluation. No evaluator on this processor can be faster than its arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType

import numpy as np
import torch
from torch import nn

from secateur.agents.core import SequenceActor
from secateur.envs.core import Actor, CompressionPolicy
from secateur.envs.devices import CPU, describe_device
from secateur.envs.evaluator import Evaluator, prepare_network
from secateur.envs.inputs import Inputs, call_model
from secateur.envs.piece_cache import PieceCache
from secateur.envs.recovery import RECOVERIES
from secateur.search.benchmarks.policies import random_actors
from secateur.search.benchmarks.scaffold import markdown_table, show_progress, workers
from secateur.search.benchmarks.straightforward import straightforward_top1
from secateur.search.benchmarks.timing import timed
from secateur.search.build import build_problem, make_env
from secateur.search.config import SearchConfig
from secateur.search.loop import Runner
from secateur.search.problem import Problem
from secateur.search.run.ray_cluster import available_cores

STRAIGHTFORWARD_BATCH = 128
"""Images per forward pass of the straightforward way; it is measured with the whole split in one pass as well."""

MATRIX_SIZE, GPU_MATRIX_SIZE = 2048, 8192
"""Rows and columns of the matrices whose product gives the rate of the arithmetic."""

SLICE, PREPARE, FORWARD = "slice", "fold and convert", "forward"


@dataclass(frozen=True)
class EvaluationTimes:
    """Times of one policy.

    Attributes:
        parts: {part: seconds}, in order; their sum is the evaluation.
        top1: its score.
        bare: seconds of a forward pass of the same network over the same batches, and nothing else.
        arithmetic: seconds of its multiply-accumulates at the rate of a large matrix product.
        straightforward: {images per forward pass: (seconds, top-1)} of the straightforward way; empty without Torch-Pruning.
    """

    parts: dict[str, float]
    top1: float
    bare: float
    arithmetic: float
    straightforward: dict[int, tuple[float, float]] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Seconds of the whole evaluation."""
        return sum(self.parts.values())


def run_evaluator(config: SearchConfig, policies: int) -> None:
    """Measure `policies` random policies of the first budget and print the table.

    Args:
        config: without racing, which would stop evaluations early.
        policies: how many.
    """
    torch.set_num_threads(available_cores())
    with show_progress() as progress:
        problem = build_problem(config, progress.status)
        progress.note(f"evaluations in {problem.precision.dtype}: {problem.precision.reason}")
        drawn = [problem.space.decode(actor.sequence) for actor in random_actors(problem, problem.budgets[0], policies)]
        times = []
        for found in measure_evaluations(problem, drawn, torch_pruning() if problem.torch_device == CPU else None):
            times.append(found)
            progress.status(f"policy {len(times)} of {policies}")
        with workers(problem, progress) as runner:
            rate = evaluations_per_second(runner, random_actors(problem, problem.budgets[0], policies + runner.slots))
            slots = runner.slots
    print(speed_table(times))
    where = describe_device(problem.torch_device)
    print(f"\nMedians over {policies} policies, {where}, {problem.dense.images} images, {problem.precision.dtype}.")
    print(f"In a search: {rate:.2f} evaluations/s, {slots} at the same time with one thread each.")


def torch_pruning() -> ModuleType | None:
    """Return the module `torch_pruning`, None if it is not installed."""
    try:
        import torch_pruning as module
    except ImportError:
        return None
    return module


def measure_evaluations(
    problem: Problem, policies: Sequence[CompressionPolicy], pruning: ModuleType | None
) -> Iterator[EvaluationTimes]:
    """Yield the times of each policy. All times of a policy are measured one after the other, on the same state of the machine.

    Args:
        problem: the search.
        policies: the first one is evaluated once more before, to warm up.
        pruning: the module `torch_pruning`; None leaves the straightforward way out.
    """
    evaluator = make_env(problem).evaluator
    evaluator.race = None
    _timed_parts(evaluator, policies[0])  # the first call builds what later ones reuse
    evaluator.assembler = replace(evaluator.assembler, cache=PieceCache())
    evaluator.assembler.candidate(policies[0])
    images = problem.task.samples("validation")
    for policy in policies:
        parts, network, top1 = _timed_parts(evaluator, policy)
        bare, _ = timed(_bare_forward, network, [batch.inputs for batch in problem.task.batches("validation")])
        macs = images * problem.space.costs.of_policy(policy)["macs"]
        times = EvaluationTimes(parts, top1, bare, macs * seconds_per_mac(evaluator.dtype, problem.torch_device))
        if pruning is not None:
            for batch in (STRAIGHTFORWARD_BATCH, images):
                times.straightforward[batch] = timed(straightforward_top1, problem, policy, pruning, batch)
        yield times


@torch.inference_mode()
def seconds_per_mac(dtype: torch.dtype, device: torch.device) -> float:
    """Return the seconds of one multiply-accumulate in a large square matrix product, now and with torch's threads."""
    size = MATRIX_SIZE if device == CPU else GPU_MATRIX_SIZE
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    return min(timed(torch.matmul, matrix, matrix)[0] for _ in range(5)) / size**3


def _timed_parts(evaluator: Evaluator, policy: CompressionPolicy) -> tuple[dict[str, float], nn.Module, float]:
    """Return seconds by part, the scored network, and its score: `Evaluator.evaluate` step by step."""
    assembler = evaluator.assembler
    names = {recovery.__name__: name for name, (_, recovery) in RECOVERIES.items()}
    parts: dict[str, float] = {}
    parts[SLICE], candidate = timed(assembler.candidate, policy)
    for step_name, step in assembler.steps():
        name = names.get(step_name, step_name)
        parts[name] = parts.get(name, 0.0) + timed(step, candidate)[0]
    parts[PREPARE], network = timed(prepare_network, candidate.network.eval(), assembler.graph, evaluator.dtype)
    parts[FORWARD], found = timed(evaluator.measure, network, evaluator.costs(policy))
    return parts, network, found.score


@torch.inference_mode()
def _bare_forward(network: nn.Module, batches: Sequence[Inputs]) -> None:
    for batch in batches:
        call_model(network, batch)


def evaluations_per_second(runner: Runner, actors: Sequence[SequenceActor]) -> float:
    """Return the rate at which a runner evaluates; the first actors, one per slot, warm it up and are not timed."""
    warm_up, measured = actors[: runner.slots], actors[runner.slots :]
    _run_all(runner, warm_up)
    return len(measured) / timed(_run_all, runner, measured)[0]


def _run_all(runner: Runner, actors: Sequence[Actor]) -> None:
    waiting, running = list(actors), 0
    while waiting or running:
        while waiting and running < runner.slots:
            runner.submit(waiting.pop(0))
            running += 1
        running -= len(runner.wait())


# ---------------------------------------------------------------------------------------------------------------- report


def speed_table(times: Sequence[EvaluationTimes]) -> str:
    """Return a Markdown table of medians over policies, with ratios, and a sentence about the scores."""
    whole = _median([policy.seconds for policy in times])
    lines = []
    for name in times[0].parts:
        seconds = _median([policy.parts[name] for policy in times])
        lines.append([name, _milliseconds(seconds), f"{100 * seconds / whole:.1f} %"])
    lines.append(["evaluation", _milliseconds(whole), f"{1 / whole:.2f} evaluations/s"])
    bare = _median([policy.bare for policy in times])
    ratio = _median([policy.seconds / policy.bare for policy in times])
    lines.append(["bare forward pass", _milliseconds(bare), f"the evaluation takes {ratio:.3f} times as long"])
    arithmetic = _median([policy.arithmetic for policy in times])
    share = _median([policy.arithmetic / policy.seconds for policy in times])
    lines.append(["its arithmetic alone", _milliseconds(arithmetic), f"{100 * share:.0f} % of the evaluation"])
    compared = [policy for policy in times if policy.straightforward]
    lines += _straightforward_lines(compared)
    return f"{markdown_table(['part', 'ms', 'share of the evaluation'], lines)}\n\n{_score_note(compared)}"


def _straightforward_lines(times: Sequence[EvaluationTimes]) -> list[list[str]]:
    lines = []
    for batch in times[0].straightforward if times else ():
        seconds = _median([policy.straightforward[batch][0] for policy in times])
        gain = _median([policy.straightforward[batch][0] / policy.seconds for policy in times])
        name = f"straightforward way, {batch} images at a time"
        lines.append([name, _milliseconds(seconds), f"the evaluation is {gain:.1f} times as fast"])
    return lines


def _score_note(times: Sequence[EvaluationTimes]) -> str:
    if not times:
        return "The straightforward way is measured on the CPU, and needs Torch-Pruning: pip install 'secateur[test]'."
    differences = np.array([100 * (policy.top1 - list(policy.straightforward.values())[-1][1]) for policy in times])
    return (
        f"Top-1 minus that of the straightforward way: {differences.mean():+.2f} points on average, "
        f"{differences.min():+.2f} to {differences.max():+.2f}."
    )


def _median(values: Sequence[float]) -> float:
    return float(np.median(values))


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.1f}"
