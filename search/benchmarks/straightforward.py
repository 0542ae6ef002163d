"""The straightforward way to evaluate a policy, as a script would do it.

It copies the model, builds Torch-Pruning's dependency graph, removes the same channels with Torch-Pruning's functions, repairs
and quantizes in the same way but without cached pieces of other policies, and scores in float32, channels first, with the batch
norms not folded.

In its favor, the channels are given layer by layer, so that Torch-Pruning need not walk its graph.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import ModuleType

import numpy as np
import torch
from torch import nn

from secateur.envs.assembler import Assembler
from secateur.envs.candidate import CandidateNetwork
from secateur.envs.core import CompressionPolicy, InputError
from secateur.envs.model_graph import ModelGraph
from secateur.envs.piece_cache import PieceCache
from secateur.envs.pruning.slicing import kept_positions
from secateur.envs.tasks.core import all_samples
from secateur.search.problem import Problem


@torch.no_grad()
def straightforward_top1(problem: Problem, policy: CompressionPolicy, pruning: ModuleType, batch: int) -> float:
    """Return the policy's top-1 on the validation split.

    Args:
        problem: the search.
        policy: what to evaluate.
        pruning: the module `torch_pruning`.
        batch: images per forward pass.
    Raises:
        InputError: if Torch-Pruning cannot remove the channels.
    """
    assembler = problem.assembler
    images, labels = all_samples(problem.task, "validation")
    assert isinstance(images, torch.Tensor) and labels is not None, "a classification task"
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


def pruned_network(assembler: Assembler, policy: CompressionPolicy, image: torch.Tensor, pruning: ModuleType) -> nn.Module:
    """Return a copy of the dense model from which Torch-Pruning has removed what the policy removes."""
    network = copy.deepcopy(assembler.model)
    with torch.enable_grad():  # its tracer follows gradients
        dependencies = pruning.DependencyGraph().build_dependency(network, image)
    removed = removed_positions(assembler.model, assembler.graph, assembler.kept(policy))
    for name, axes in removed.items():
        module = network.get_submodule(name)
        pruner = dependencies.get_pruner_of_module(module)
        for axis, prune in ((0, pruner.prune_out_channels), (1, pruner.prune_in_channels)):
            if len(axes.get(axis, ())):
                prune(module, axes[axis].tolist())
    return network


def removed_positions(model: nn.Module, graph: ModelGraph, kept: Sequence[np.ndarray]) -> dict[str, dict[int, np.ndarray]]:
    """Return {module: {axis: removed positions}} of the weights.

    Raises:
        InputError: if a tensor is pruned whose module has no weight that is pruned.
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
