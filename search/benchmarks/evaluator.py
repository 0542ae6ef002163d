"""How fast one evaluation is: its parts, against a bare forward pass, and against the straightforward way.

The straightforward way evaluates the same policy as a script would: deepcopy the model, build Torch-Pruning's dependency
graph, let its pruning functions remove the same channels, repair and quantize alike but with nothing remembered from
other policies, and score in float32, channels first, batch norms as they are.

Where we are kind to it: the channels are handed over layer by layer, so that Torch-Pruning need not walk its graph.

What no evaluator on this processor can beat is the arithmetic: the table also states how long the network's
multiply-accumulates take at the rate of a large square matrix product in the evaluation's number format.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.agents.core import SequenceActor
from secateur.envs.assembler import Assembler
from secateur.envs.candidate import CandidateNetwork
from secateur.envs.core import Actor, CompressionPolicy, InputError
from secateur.envs.evaluator import Evaluator, prepare_network
from secateur.envs.model_graph import ModelGraph
from secateur.envs.piece_cache import PieceCache
from secateur.envs.pruning.slicing import kept_positions
from secateur.envs.recovery import RECOVERIES
from secateur.search.build import make_env
from secateur.search.loop import Runner
from secateur.search.problem import Problem

STRAIGHTFORWARD_BATCH = 128
"""Images per forward pass of the straightforward way; it is measured with the whole split in one pass as well."""

MATRIX_SIZE = 2048

SLICE, PREPARE, FORWARD = "slice", "fold and convert", "forward"


@dataclass(frozen=True)
class EvaluationTimes:
    """What one policy took.

    Attributes:
        parts: {part: seconds}, in order; together they are the evaluation.
        top1: as it was scored.
        bare: seconds of a forward pass of the same network over the same batches, and nothing else.
        arithmetic: seconds of its multiply-accumulates at the rate of a large matrix product.
        straightforward: {images per forward pass: seconds} of the straightforward way; empty without Torch-Pruning.
        straightforward_top1: its score.
    """

    parts: dict[str, float]
    top1: float
    bare: float
    arithmetic: float
    straightforward: dict[int, float] = field(default_factory=dict)
    straightforward_top1: float | None = None

    @property
    def seconds(self) -> float:
        """Of the whole evaluation."""
        return sum(self.parts.values())


def random_sequences(problem: Problem, count: int) -> list[np.ndarray]:
    """Return random actions bent to the edge of the first budget, from the configuration's seed."""
    rng, space = np.random.default_rng(problem.config.search.seed), problem.space
    return [space.scale_to_budget(rng.uniform(size=space.used.shape), problem.budgets[0]) for _ in range(count)]


def measure_evaluations(
    problem: Problem, policies: Sequence[CompressionPolicy], pruning: Any | None, on_policy: Callable[[int], None]
) -> list[EvaluationTimes]:
    """Return the times of each policy; everything that is compared is measured in turns, so that it saw the same machine.

    Args:
        problem: what would be searched.
        policies: the first one is evaluated once more before, to warm up.
        pruning: the module `torch_pruning`; None leaves the straightforward way out.
        on_policy: told how many are done.
    """
    evaluator = make_env(problem).evaluator
    evaluator.race = None
    _timed_parts(evaluator, policies[0])  # the first call of everything pays for what is built once
    evaluator.assembler = replace(evaluator.assembler, cache=PieceCache())
    evaluator.assembler.candidate(policies[0])
    images = len(problem.data.validation)
    found = []
    for policy in policies:
        parts, network, top1 = _timed_parts(evaluator, policy)
        bare, _ = _timed(lambda network=network: _bare_forward(network, evaluator.batches))
        macs = images * problem.space.costs.of_policy(policy)["macs"]
        times = EvaluationTimes(parts, top1, bare, macs * seconds_per_mac(evaluator.dtype))
        if pruning is not None:
            for batch in (STRAIGHTFORWARD_BATCH, images):
                seconds, score = _timed(lambda policy=policy, batch=batch: straightforward_top1(problem, policy, pruning, batch))
                times.straightforward[batch] = seconds
                times = replace(times, straightforward_top1=score)
        found.append(times)
        on_policy(len(found))
    return found


@torch.inference_mode()
def seconds_per_mac(dtype: torch.dtype) -> float:
    """Return the seconds of one multiply-accumulate in a large square matrix product, now and with torch's threads."""
    matrix = torch.ones(MATRIX_SIZE, MATRIX_SIZE, dtype=dtype)
    return min(_timed(lambda: matrix @ matrix)[0] for _ in range(5)) / MATRIX_SIZE**3


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def _timed_parts(evaluator: Evaluator, policy: CompressionPolicy) -> tuple[dict[str, float], nn.Module, float]:
    """Return seconds by part, the network as it was scored, and its score: `Evaluator.evaluate` step by step."""
    assembler = evaluator.assembler
    names = {recovery.__name__: name for name, (_, recovery) in RECOVERIES.items()}
    parts: dict[str, float] = {}
    parts[SLICE], candidate = _timed(lambda: assembler.candidate(policy))
    for name, step in assembler.steps():
        name = names.get(name, name)
        parts[name] = parts.get(name, 0.0) + _timed(lambda step=step: step(candidate))[0]
    graph, dtype = assembler.graph, evaluator.dtype
    parts[PREPARE], network = _timed(lambda: prepare_network(candidate.network.eval(), graph, dtype))
    parts[FORWARD], (correct, _) = _timed(lambda: evaluator.score(network, evaluator.costs(policy)))
    return parts, network, float(correct.mean())


@torch.inference_mode()
def _bare_forward(network: nn.Module, batches: Sequence[torch.Tensor]) -> None:
    for batch in batches:
        network(batch)


@torch.no_grad()
def straightforward_top1(problem: Problem, policy: CompressionPolicy, pruning: Any, batch: int) -> float:
    """Return the policy's top-1 on the validation split, found in the straightforward way, `batch` images per forward pass.

    Raises:
        InputError: if Torch-Pruning cannot remove the channels.
    """
    assembler = problem.assembler
    images, labels = problem.data.tensors(problem.data.validation)
    candidate = CandidateNetwork(
        pruned_network(assembler, policy, images[:1], pruning),
        assembler.model,
        assembler.graph,
        assembler.kept(policy),
        assembler.layer_bits(policy),
        assembler.quantizer,
        assembler.calibration,
        assembler.images,
        PieceCache(),
    )
    for _, step in assembler.steps():
        step(candidate)
    network = candidate.network.eval()
    predicted = torch.cat([network(part).argmax(1) for part in images.split(batch)])
    return float((predicted == labels).double().mean())


def pruned_network(assembler: Assembler, policy: CompressionPolicy, image: torch.Tensor, pruning: Any) -> nn.Module:
    """Return a copy of the dense model from which Torch-Pruning has removed what the policy removes."""
    network, graph = copy.deepcopy(assembler.model), assembler.graph
    with torch.enable_grad():  # its tracer follows gradients
        dependencies = pruning.DependencyGraph().build_dependency(network, image)
    removed = removed_positions(assembler.model, graph, assembler.kept(policy))
    for name, axes in removed.items():
        module = network.get_submodule(name)
        pruner = dependencies.get_pruner_of_module(module)
        for axis, prune in ((0, pruner.prune_out_channels), (1, pruner.prune_in_channels)):
            if len(axes.get(axis, ())):
                prune(module, axes[axis].tolist())
    return network


def removed_positions(model: nn.Module, graph: ModelGraph, kept: Sequence[np.ndarray]) -> dict[str, dict[int, np.ndarray]]:
    """Return {module: {axis: removed positions}} by the modules' weights.

    Raises:
        InputError: if a tensor that is no weight loses something without the weight of its module.
    """
    positions, tensors = kept_positions(model, graph, kept), dict(model.state_dict(keep_vars=True))
    removed: dict[str, dict[int, np.ndarray]] = {}
    for tensor, axes in positions.items():
        module, _, name = tensor.rpartition(".")
        if name == "weight":
            sizes = tensors[tensor].shape
            removed[module] = {axis: np.setdiff1d(np.arange(sizes[axis]), stay) for axis, stay in axes.items()}
        elif f"{module}.weight" not in positions:
            raise InputError(f"Torch-Pruning has no function for the tensor `{tensor}`.")
    return removed


def evaluations_per_second(runner: Runner, problem: Problem, sequences: Sequence[np.ndarray]) -> float:
    """Return the rate at which a runner evaluates; before, every slot evaluates one policy to warm up."""
    actors = [SequenceActor(problem.budgets[0], sequence, ticket) for ticket, sequence in enumerate(sequences)]
    warm, timed = actors[: runner.slots], actors[runner.slots :]
    _run_all(runner, warm)
    seconds, _ = _timed(lambda: _run_all(runner, timed))
    return len(timed) / seconds


def _run_all(runner: Runner, actors: Sequence[Actor]) -> None:
    waiting, out = list(actors), 0
    while waiting or out:
        while waiting and out < runner.slots:
            runner.submit(waiting.pop(0))
            out += 1
        out -= len(runner.wait())


# --------------------------------------------------------------------------------------------------------------- report


def speed_table(times: Sequence[EvaluationTimes]) -> str:
    """Return a Markdown table of medians over policies, and the ratios in sentences."""
    whole = _median([policy.seconds for policy in times])
    lines = ["| part | ms | share of the evaluation |", "|---|---|---|"]
    for name in times[0].parts:
        seconds = _median([policy.parts[name] for policy in times])
        lines.append(f"| {name} | {1000 * seconds:,.1f} | {100 * seconds / whole:.1f} % |")
    lines.append(f"| evaluation | {1000 * whole:,.1f} | {1 / whole:.2f} evaluations/s |")
    ratio = _median([policy.seconds / policy.bare for policy in times])
    bare = _median([policy.bare for policy in times])
    lines.append(f"| bare forward pass | {1000 * bare:,.1f} | the evaluation takes {ratio:.3f} times as long |")
    arithmetic = _median([policy.arithmetic for policy in times])
    share = _median([policy.arithmetic / policy.seconds for policy in times])
    lines.append(f"| its arithmetic alone | {1000 * arithmetic:,.1f} | {100 * share:.0f} % of the evaluation |")
    compared = [policy for policy in times if policy.straightforward]
    if compared:
        for batch in compared[0].straightforward:
            seconds = _median([policy.straightforward[batch] for policy in compared])
            gain = _median([policy.straightforward[batch] / policy.seconds for policy in compared])
            lines.append(
                f"| straightforward way, {batch} images at a time | {1000 * seconds:,.1f} "
                f"| the evaluation is {gain:.1f} times as fast |"
            )
        shift = np.array([100 * (policy.top1 - policy.straightforward_top1) for policy in compared])
        lines.append(
            f"\nTop-1 against the straightforward way: {shift.mean():+.2f} points on average, "
            f"{shift.min():+.2f} to {shift.max():+.2f}."
        )
    else:
        lines.append("\nThe straightforward way needs Torch-Pruning: pip install 'secateur[test]'.")
    return "\n".join(lines)


def _median(values: Sequence[float]) -> float:
    return float(np.median(values))
