"""The analysis of a model: trace it, propagate the channel identities, form the groups, and verify them by trial runs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from secateur.cost_models.core import InputError
from secateur.envs.model_graph.channel_flow import ChannelFlow
from secateur.envs.model_graph.groups import build_graph, exclude_layers
from secateur.envs.model_graph.plan import ModelGraph
from secateur.envs.model_graph.trace import first_line, trace_model
from secateur.envs.model_graph.verification import verified_graph
from secateur.envs.pruning.slicing import clear_caches, share_tensors


def analyze(model: nn.Module, example_inputs: tuple[Tensor, ...], exclude: Sequence[str] = (), verify: bool = True) -> ModelGraph:
    """Return the network's structure: layers, coupled groups, frozen channels with the reasons, shapes and memory.

    Args:
        model: any module, in training or eval mode; it is not changed.
        example_inputs: example inputs for `model(*example_inputs)`; the first axis is the batch, only the first image is used.
        exclude: shell patterns of layer names; the output channels of these layers are never removed.
        verify: whether one unit of every group is removed from a copy and the model's own forward pass is run; groups for
            which it fails, or differs from the network with the same entries zeroed, are frozen.
    Raises:
        InputError: if the model cannot be copied, run or traced, accepts single images only, or a pattern of `exclude` matches no
            layer.
    """
    started = time.perf_counter()
    try:
        model = share_tensors(model).eval()
    except (RuntimeError, TypeError) as error:
        raise InputError(f"{type(model).__name__} cannot be copied: {first_line(error)}.") from error
    clear_caches(model)
    trace = trace_model(model, example_inputs)
    clear_caches(model)
    flow = ChannelFlow(trace)
    exclude_layers(trace, flow, exclude)
    graph = build_graph(trace, flow)
    if verify:
        graph = verified_graph(model, example_inputs, trace, flow, graph)
    return replace(graph, seconds=time.perf_counter() - started)
