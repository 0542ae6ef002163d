"""The evaluation of a policy: its network is assembled, batch norms are folded, and the validation images are classified."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from secateur.envs.assembler import Assembler
from secateur.envs.core import CompressionPolicy, Evaluation
from secateur.envs.model_graph.folding import fold_batch_norms
from secateur.envs.model_graph.plan import ModelGraph
from secateur.envs.number_format import convert_network, prepare_images
from secateur.envs.quantization.fake_quantize import use_integer_inputs
from secateur.envs.racing import LOOKS, Race, is_clearly_worse, pack

PRECISION_TOLERANCE = 0.002
"""bfloat16 is used only if it changes the dense model's top-1 by at most this."""

BFLOAT16_VARIABLE = "SECATEUR_BFLOAT16"
"""Environment variable that switches bfloat16 off (0) or on (1), for every processor."""


@dataclass(frozen=True)
class Precision:
    """The number format of the validation runs, with the reason.

    Attributes:
        dtype: "bfloat16" or "float32".
        reason: one sentence with the figures that decided it.
    """

    dtype: str
    reason: str

    @property
    def torch_dtype(self) -> torch.dtype:
        """The number format as a torch dtype."""
        return getattr(torch, self.dtype)


def batches(images: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return views of the images in batches with activations of about the cache's size: 64 images for 32 x 32 pixels."""
    pixels = images.shape[-1] * images.shape[-2]
    return images.split(int(np.clip(65536 // pixels, 8, 256)))


@torch.inference_mode()
def predict(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return the predicted classes, (N,)."""
    return torch.cat([network(batch).argmax(dim=1) for batch in batches(images)])


def top1(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the fraction of images that the network classifies correctly."""
    return (predict(network, images) == labels).float().mean().item()


def prepare_network(network: nn.Module, graph: ModelGraph, dtype: torch.dtype) -> nn.Module:
    """Return the network, changed in place: batch norms folded, channels last, in `dtype`."""
    fold_batch_norms(network, graph)
    if dtype == torch.bfloat16:
        use_integer_inputs(network)
    convert_network(network, dtype)
    return network


def processor_has_bfloat16() -> bool:
    """Return whether this processor multiplies bfloat16 in hardware; without hardware support, bfloat16 is slow.

    The environment variable SECATEUR_BFLOAT16 overrides the answer: 0 means no, 1 means yes.
    """
    if (override := os.environ.get(BFLOAT16_VARIABLE, "")) in ("0", "1"):
        return override == "1"
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check is not None and check() for check in checks)


def choose_precision(
    assemble_dense: Callable[[], nn.Module], graph: ModelGraph, images: torch.Tensor, labels: torch.Tensor
) -> Precision:
    """Return bfloat16 if the processor supports it and the dense top-1 is almost unchanged, otherwise float32.

    The choice does not depend on time measurements: the same search on the same processor always gets the same format.

    Args:
        assemble_dense: returns a new copy of the dense network.
        graph: structure of the dense network.
        images, labels: the validation split, normalized float32.
    """
    if not processor_has_bfloat16():
        off = os.environ.get(BFLOAT16_VARIABLE) == "0"
        return Precision("float32", "bfloat16 is switched off" if off else "this processor has no bfloat16 arithmetic")
    correct = {}
    for dtype in (torch.float32, torch.bfloat16):
        network = prepare_network(assemble_dense(), graph, dtype)
        try:
            correct[dtype] = int((predict(network, prepare_images(images, dtype)) == labels).sum())
        except RuntimeError as error:  # the user's forward may use its own float32 tensors
            if dtype == torch.float32:
                raise
            return Precision("float32", f"the model does not run in bfloat16: {str(error).splitlines()[0]}")
    difference = abs(correct[torch.float32] - correct[torch.bfloat16]) / len(labels)
    return Precision(
        "bfloat16" if difference <= PRECISION_TOLERANCE else "float32",
        f"bfloat16 moves the dense top-1 by {100 * difference:.2f} points on {len(images)} validation images; "
        f"at most {100 * PRECISION_TOLERANCE:.2f} are accepted",
    )


class Evaluator:
    """Evaluates policies on the validation split, each policy once.

    Images are classified in a fixed random order, so the first images are a random sample of the split.

    Args:
        assembler: assembles the network of a policy.
        costs: returns the value of every cost model for a policy.
        images, labels: the validation split, normalized float32 (N, C, H, W) and (N,) int64.
        precision: number format of the forward passes.
        race: stops policies that are clearly worse than evaluated ones; None: every policy is scored on all images.

    Attributes:
        cache: evaluations by policy; runners add evaluations of other workers.
    """

    def __init__(
        self,
        assembler: Assembler,
        costs: Callable[[CompressionPolicy], Mapping[str, float]],
        images: torch.Tensor,
        labels: torch.Tensor,
        precision: Precision,
        race: Race | None = None,
    ) -> None:
        self.dtype = precision.torch_dtype
        self.assembler, self.costs, self.race = replace(assembler, dtype=self.dtype), costs, race
        order = torch.from_numpy(np.random.default_rng(0).permutation(len(labels)))
        self.batches = batches(prepare_images(images[order], self.dtype))
        self.labels = labels[order].split([len(batch) for batch in self.batches])
        self.cache: dict[CompressionPolicy, Evaluation] = {}

    def evaluate(self, policy: CompressionPolicy) -> Evaluation:
        """Return the policy's validation score and costs; cached evaluations are reused."""
        if policy not in self.cache:
            start = time.perf_counter()
            costs = dict(self.costs(policy))
            correct, stopped = self.score(self.network(policy), costs)
            seconds, bits = time.perf_counter() - start, None if stopped else pack(correct)
            self.cache[policy] = Evaluation(float(correct.mean()), costs, "proxy", len(correct), seconds, stopped, bits)
        return self.cache[policy]

    def network(self, policy: CompressionPolicy) -> nn.Module:
        """Return the policy's network in the form in which it is evaluated."""
        return prepare_network(self.assembler.assemble(policy), self.assembler.graph, self.dtype)

    def score(self, network: nn.Module, costs: Mapping[str, float]) -> tuple[np.ndarray, bool]:
        """Return for each processed image whether the network is correct, (processed,) bool, and whether it was stopped early."""
        reference = None if self.race is None else self.race.reference(costs, self.cache.values())
        looks = {} if reference is None else {round(share * len(self.batches)) for share in LOOKS}
        correct: list[np.ndarray] = []
        for batch, labels in zip(self.batches, self.labels, strict=True):
            correct.append((predict(network, batch) == labels).numpy())
            if len(correct) in looks and len(correct) < len(self.batches):
                processed = np.concatenate(correct)
                if reference is not None and is_clearly_worse(processed, reference):
                    return processed, True
        return np.concatenate(correct), False
