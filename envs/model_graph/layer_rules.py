"""How layers and norms change the channels: rules of `ChannelFlow`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from secateur.envs.model_graph.channel_state import ChannelState
from secateur.envs.model_graph.shadows import Shadow, along, as_axis, narrow
from secateur.envs.model_graph.trace import TracedLayer, argument, arguments, op_name, shape_of


def layer(flow: ChannelState, node: Node) -> Tensor:
    layer = flow.trace.layers[flow.trace.layer_index[node]]
    given, ids = arguments(node), flow.identities
    x = flow.single(given["input"])
    axis = x.dim() - 1 if layer.shape.kind == "linear" else x.dim() + 1 - len(shape_of(given["weight"]))
    varying = flow.channel_axes(x)
    if layer.shape.kind == "conv" and varying and axis not in varying:
        flow.freeze([given["input"]], f"{op_name(node)} runs along the channels: the result depends on their neighbors")
    channels = flow.unify(x, [d for d in range(x.dim()) if d != axis]).reshape(-1).numpy()
    outputs = layer_outputs(flow, layer, channels)
    if given["bias"] is not None:
        bias = flow.shadows.get(given["bias"], ())
        name = flow.trace.tensors.get(given["bias"])  # calls of a shared weight may have biases of their own
        if name is not None:
            ids.merge(ids.of(name, 0), outputs)
        elif isinstance(bias, tuple) and bias:
            outputs = flow.meet([(torch.from_numpy(outputs),), bias], outputs.shape)[0].numpy()
    return along(outputs, axis, shape_of(node))


def layer_outputs(flow: ChannelState, layer: TracedLayer, channels: np.ndarray) -> np.ndarray:
    """Merge the positions on the weight's input axis with the channels that it reads; return its output channels."""
    ids, shape = flow.identities, layer.shape
    outputs, inputs = ids.of(layer.weight, layer.out_axis), ids.of(layer.weight, layer.in_axis)
    if layer.transposed and shape.conv_groups > 1:
        for found in (channels, outputs, inputs):
            ids.freeze(found, "belongs to a transposed convolution with groups")
        return np.tile(outputs, shape.conv_groups)
    if shape.depthwise:
        ids.merge(outputs, np.repeat(channels, shape.out_channels // shape.in_channels))
        return outputs
    ids.merge(np.tile(inputs, shape.conv_groups), channels)
    parts = outputs.reshape(shape.conv_groups, -1)
    # The number of a convolution's groups does not change, so all groups lose the same channels.
    ids.merge(parts, np.broadcast_to(parts[0], parts.shape))
    return outputs


def batch_norm(flow: ChannelState, node: Node) -> Shadow:
    given = arguments(node)
    operands = [flow.shadow(given["input"])]
    rank = len(shape_of(node))
    for name in ("weight", "bias", "running_mean", "running_var"):
        if given.get(name) is not None:
            operands.append(tuple(as_axis(ids, 1, rank) for ids in flow.shadow(given[name])))
    return flow.meet(operands, shape_of(node))


def instance_norm(flow: ChannelState, node: Node) -> Shadow:
    given = arguments(node)
    path = flow.trace.instance_norms.get(node)
    x = flow.single(given["input"])
    if path is not None and given["weight"] is None and given["running_mean"] is None and flow.channel_axes(x) == [1]:
        flow.sizes.append((path, "num_features", narrow(x).numpy().ravel()))  # the module has no tensor with the channels
    return batch_norm(flow, node)


def group_norm(flow: ChannelState, node: Node) -> Shadow:
    """Each group of an `nn.GroupNorm` is one unit: without a whole group, the statistics of the others stay the same."""
    given = arguments(node)
    x, count = flow.single(given["input"]), given["num_groups"]
    if 1 in flow.channel_axes(x):
        path = flow.trace.group_norms.get(node)
        if path is None or count == 1:
            flow.freeze([given["input"]], f"{op_name(node)} takes statistics over channels")
        else:
            parts = narrow(x).unflatten(1, (count, -1))
            flow.unify(parts, [2])
            if given["weight"] is None:  # the module has no tensor with the channels: its attributes are listed
                flow.sizes.append((path, "num_channels", parts.numpy().ravel()))
                flow.sizes.append((path, "num_groups", parts.narrow(2, 0, 1).numpy().ravel()))
    return batch_norm(flow, node)


def layer_norm(flow: ChannelState, node: Node) -> Shadow:
    given = arguments(node)
    x = flow.single(given["input"])
    normalized = range(x.dim() - len(given["normalized_shape"]), x.dim())
    if set(normalized) & set(flow.channel_axes(x)) and not flow.give_up(x, normalized):
        flow.freeze([given["input"]], f"{op_name(node)} takes statistics over channels")
    operands = [flow.shadow(given[name]) for name in ("input", "weight", "bias") if given.get(name) is not None]
    return flow.meet(operands, shape_of(node))


def prelu(flow: ChannelState, node: Node) -> Shadow:
    x, weight = argument(node, 0), argument(node, 1)
    slopes = tuple(as_axis(ids, 1, len(shape_of(node))) for ids in flow.shadow(weight))
    return flow.meet([flow.shadow(x), slopes], shape_of(node))
