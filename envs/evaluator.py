"""The evaluation of a policy: its network is assembled, batch norms are folded, and the search's score is measured."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from secateur.envs.assembler import Assembler
from secateur.envs.core import CompressionPolicy, Evaluation, InputError, KnownFailure, failure_text
from secateur.envs.devices import CPU
from secateur.envs.memory import memory_note
from secateur.envs.model_graph.folding import fold_batch_norms
from secateur.envs.model_graph.plan import ModelGraph
from secateur.envs.number_format import InputFormat, convert_network, output_as_float32
from secateur.envs.quantization.fake_quantize import use_integer_inputs
from secateur.envs.racing import LOOKS, Race, is_clearly_worse, pack
from secateur.envs.scores.core import Score
from secateur.envs.tasks.core import Metrics, Task

PRECISION_TOLERANCE = 0.002
"""bfloat16 is used only if it changes the dense model's quality by at most this."""

BFLOAT16_VARIABLE = "SECATEUR_BFLOAT16"
"""Environment variable that switches bfloat16 off (0) or on (1), for every processor."""


@dataclass(frozen=True)
class Precision:
    """The number format of the validation runs, with the reason.

    Attributes:
        dtype: "float32", "bfloat16" or "float16".
        reason: one sentence with the figures that decided it.
    """

    dtype: str
    reason: str

    @property
    def torch_dtype(self) -> torch.dtype:
        """The number format as a torch dtype."""
        return getattr(torch, self.dtype)


def prepare_network(network: nn.Module, graph: ModelGraph, dtype: torch.dtype) -> nn.Module:
    """Return the network, changed in place: batch norms folded, channels last, in `dtype`; inputs and outputs are float32."""
    fold_batch_norms(network, graph)
    if dtype == torch.bfloat16:  # float16 has the bits for the values themselves, but not the range for weights times scales
        use_integer_inputs(network)
    convert_network(network, dtype)
    network.register_forward_pre_hook(InputFormat(dtype), prepend=True, with_kwargs=True)
    network.register_forward_hook(output_as_float32)
    return network


def processor_has_bfloat16() -> bool:
    """Return whether this processor multiplies bfloat16 in hardware; without hardware support, bfloat16 is slow.

    The environment variable SECATEUR_BFLOAT16 overrides the answer: 0 means no, 1 means yes.
    """
    if (override := os.environ.get(BFLOAT16_VARIABLE, "")) in ("0", "1"):
        return override == "1"
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check is not None and check() for check in checks)


def half_format(device: torch.device) -> torch.dtype | None:
    """Return the number format with 16 bits that a device computes fast in: bfloat16, float16 on older GPUs, or none."""
    if device.type == "cuda" and BFLOAT16_VARIABLE not in os.environ:
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if processor_has_bfloat16() else None


def choose_precision(
    assemble_dense: Callable[[], nn.Module], graph: ModelGraph, task: Task, dense_score: float, device: torch.device = CPU
) -> Precision:
    """Return 16 bits if the device supports them and the dense model's score is almost unchanged, otherwise float32.

    The choice does not depend on time measurements: the same search on the same processor always gets the same format.

    Args:
        assemble_dense: returns a new copy of the dense network.
        graph: structure of the dense network.
        task: scores it on the validation split.
        dense_score: of the dense model, in float32.
        device: where the networks are.
    """
    dtype = half_format(device)
    if dtype is None:
        off = os.environ.get(BFLOAT16_VARIABLE) == "0"
        return Precision("float32", "bfloat16 is switched off" if off else "this processor has no bfloat16 arithmetic")
    name = str(dtype).removeprefix("torch.")
    network = prepare_network(assemble_dense(), graph, dtype)
    try:
        found = task.evaluate(network, "validation")
    except (RuntimeError, InputError) as error:  # the forward may use its own float32 tensors, or overflow
        return Precision("float32", f"the model does not run in {name}: {str(error).splitlines()[0]}")
    metric = task.metric
    difference = abs(metric.quality(found.score, dense_score) - metric.quality(dense_score, dense_score))
    moved = metric.difference(round(abs(found.score - dense_score), 6))
    return Precision(
        name if difference <= PRECISION_TOLERANCE + 1e-9 else "float32",
        f"{name} moves the dense model's {metric.label} by {moved} on {found.samples} validation samples; "
        f"at most {100 * PRECISION_TOLERANCE:g} % of its range is accepted",
    )


class Evaluator:
    """Evaluates policies, each policy once: a policy that has failed is not tried again.

    Args:
        assembler: assembles the network of a policy.
        costs: returns the value of every cost model for a policy.
        score: measures networks.
        precision: number format of the forward passes.
        race: stops policies that are clearly worse than evaluated ones; None: every policy is scored on all samples.

    Attributes:
        cache: evaluations by policy.
        failures: why a policy has failed, by policy.
    """

    def __init__(
        self,
        assembler: Assembler,
        costs: Callable[[CompressionPolicy], Mapping[str, float]],
        score: Score,
        precision: Precision,
        race: Race | None = None,
    ) -> None:
        self.dtype = precision.torch_dtype
        self.assembler, self.costs, self.race = replace(assembler, dtype=self.dtype), costs, race
        self.score = score
        self.cache: dict[CompressionPolicy, Evaluation] = {}
        self.failures: dict[CompressionPolicy, str] = {}

    def remember(self, evaluated: Iterable[tuple[CompressionPolicy, Evaluation | str]]) -> None:
        """Reuse evaluations that were made elsewhere; a text instead of an evaluation is the reason why a policy has failed."""
        for policy, found in evaluated:
            if isinstance(found, Evaluation):
                self.cache[policy] = found
            else:
                self.failures[policy] = found

    def evaluate(self, policy: CompressionPolicy) -> Evaluation:
        """Return the policy's score and costs; cached evaluations are reused.

        Raises:
            KnownFailure: if the policy has failed before.
        """
        if policy in self.failures:
            raise KnownFailure(self.failures[policy])
        if policy not in self.cache:
            try:
                self.cache[policy] = self._evaluate(policy)
            except (Exception, SystemExit) as error:  # whatever a model or a plug-in raises
                self.failures[policy] = failure_text(error)
                raise
        return self.cache[policy]

    def _evaluate(self, policy: CompressionPolicy) -> Evaluation:
        start = time.perf_counter()
        costs = dict(self.costs(policy))
        found = self.measure(self.network(policy), costs)
        return Evaluation(
            found.score,
            costs,
            "proxy",
            found.samples,
            time.perf_counter() - start,
            found.stopped,
            None if found.stopped else _answers(found.contributions),
            self.score.metric.quality(found.score, self.score.dense),
            memory_note(),
        )

    def network(self, policy: CompressionPolicy) -> nn.Module:
        """Return the policy's network in the form in which it is evaluated."""
        return prepare_network(self.assembler.assemble(policy), self.assembler.graph, self.dtype)

    def measure(self, network: nn.Module, costs: Mapping[str, float]) -> Metrics:
        """Return the score of a network with these costs, perhaps of the first samples only (`race`)."""
        reference = None if self.race is None else self.race.reference(costs, self.cache.values())

        def stop(contributions: np.ndarray, batches: int, total: int) -> bool:
            if reference is None or batches == total or batches not in {round(share * total) for share in LOOKS}:
                return False
            return is_clearly_worse(contributions, reference)

        return self.score.measure(network, None if reference is None else stop)


def _answers(contributions: np.ndarray | None) -> bytes | None:
    """Return which samples were answered correctly, packed; None: the metric counts no correct answers."""
    return pack(contributions) if contributions is not None and contributions.dtype == np.bool_ else None
