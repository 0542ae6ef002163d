"""The score of a policy: assembled, folded, and run over the validation images as fast as this processor can."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from envs.assembler import Assembler
from envs.core import CompressionPolicy, Evaluation
from envs.model_graph.folding import fold_batch_norms
from envs.model_graph.plan import ModelGraph

PRECISION_TOLERANCE = 0.002
"""bfloat16 is used only while it moves the dense model's top-1 by at most this."""


@dataclass(frozen=True)
class Precision:
    """The number format of the validation runs, and why.

    Attributes:
        dtype: "bfloat16" or "float32".
        reason: one sentence with the figures it rests on.
    """

    dtype: str
    reason: str

    @property
    def torch_dtype(self) -> torch.dtype:
        """The same as a torch dtype."""
        return getattr(torch, self.dtype)


def batches(images: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return views of the images in batches whose activations stay near the cache: about 64 images of 32 x 32 pixels."""
    pixels = images.shape[-1] * images.shape[-2]
    return images.split(int(np.clip(65536 // pixels, 8, 256)))


@torch.inference_mode()
def predict(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return the predicted classes, (N,)."""
    return torch.cat([network(batch).argmax(dim=1) for batch in batches(images)])


def top1(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the fraction of images that the network classifies right."""
    return (predict(network, images) == labels).float().mean().item()


def prepare_network(network: nn.Module, graph: ModelGraph, dtype: torch.dtype) -> nn.Module:
    """Return the network (changed in place) with batch norms folded, channels last, in `dtype`."""
    fold_batch_norms(network, graph)
    return network.to(dtype=dtype, memory_format=torch.channels_last)


def prepare_images(images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the images in the layout that `prepare_network` expects."""
    return images.to(dtype=dtype, memory_format=torch.channels_last if images.dim() == 4 else torch.preserve_format)


def processor_has_bfloat16() -> bool:
    """Return whether this processor multiplies bfloat16 in hardware; elsewhere it would only be emulated, slowly."""
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check is not None and check() for check in checks)


def choose_precision(
    assemble_dense: Callable[[], nn.Module], graph: ModelGraph, images: torch.Tensor, labels: torch.Tensor
) -> Precision:
    """Return bfloat16 if the processor has it and it leaves the dense top-1 alone, else float32.

    No stopwatch is asked: the same search on the same processor gets the same answer whatever else is running.

    Args:
        assemble_dense: returns a fresh copy of the dense network.
        graph: its plan.
        images, labels: the validation split, normalised float32.
    """
    if not processor_has_bfloat16():
        return Precision("float32", "this processor has no bfloat16 arithmetic")
    right = {}
    for dtype in (torch.float32, torch.bfloat16):
        network = prepare_network(assemble_dense(), graph, dtype)
        try:
            right[dtype] = int((predict(network, prepare_images(images, dtype)) == labels).sum())
        except RuntimeError as error:  # the user's forward may mix in float32 tensors of its own
            if dtype == torch.float32:
                raise
            return Precision("float32", f"the model does not run in bfloat16: {str(error).splitlines()[0]}")
    difference = abs(right[torch.float32] - right[torch.bfloat16]) / len(labels)
    return Precision(
        "bfloat16" if difference <= PRECISION_TOLERANCE else "float32",
        f"bfloat16 moves the dense top-1 by {100 * difference:.2f} points on {len(images)} validation images; "
        f"at most {100 * PRECISION_TOLERANCE:.2f} are accepted",
    )


class Evaluator:
    """Scores policies on the validation split; never the same policy twice.

    Args:
        assembler: turns a policy into a network.
        costs: returns the value of every cost model for a policy.
        images, labels: the validation split, normalised float32 (N, C, H, W) and (N,) int64.
        precision: number format of the forward passes.

    Attributes:
        known: evaluations by policy; runners add what other workers found.
    """

    def __init__(
        self,
        assembler: Assembler,
        costs: Callable[[CompressionPolicy], Mapping[str, float]],
        images: torch.Tensor,
        labels: torch.Tensor,
        precision: Precision,
    ):
        self.assembler, self.costs = assembler, costs
        self.dtype = precision.torch_dtype
        self.images, self.labels = prepare_images(images, self.dtype), labels
        self.known: dict[CompressionPolicy, Evaluation] = {}

    def evaluate(self, policy: CompressionPolicy) -> Evaluation:
        """Return the policy's validation score and costs, from memory if it is known."""
        if policy not in self.known:
            start = time.perf_counter()
            network = prepare_network(self.assembler.assemble(policy), self.assembler.graph, self.dtype)
            score = top1(network, self.images, self.labels)
            self.known[policy] = Evaluation(
                score, dict(self.costs(policy)), "proxy", len(self.labels), time.perf_counter() - start
            )
        return self.known[policy]
