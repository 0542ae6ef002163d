"""The exported graph of a model: operators in execution order, the tensors that they read, and the layers among them."""

from __future__ import annotations

import logging
import math
import operator
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

from secateur.cost_models.core import InputError, LayerShape

_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
_TERMINAL_CODE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_LONGEST_REASON = 400
"""Characters of an error's message that are shown; some errors hold a whole graph."""

_TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")


@dataclass(frozen=True)
class TracedLayer:
    """A convolution or linear operator whose weight is a parameter.

    Attributes:
        shape: the dense layer, for the cost models.
        weight: name of its weight tensor.
        bias: name of the bias parameter of its first call, or None.
        out_axis, in_axis: the weight's axes of output and input channels.
        transposed: whether it is a transposed convolution.
        nodes: its calls, in execution order.
    """

    shape: LayerShape
    weight: str
    bias: str | None
    out_axis: int
    in_axis: int
    transposed: bool
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class Trace:
    """The graph that `torch.export` recorded for one image.

    Attributes:
        nodes: the operators, in execution order.
        inputs: the model's own inputs.
        outputs: the nodes whose values the model returns.
        tensors: placeholder -> name of its parameter or buffer; tied tensors have one name.
        tensor_shapes: shape of each of these tensors, by name.
        parameters: names of those that are parameters.
        layers: the convolutions and linear layers, ordered by first call.
        computed: the calls of convolutions and linear operators whose weight is not a parameter, but computed.
        batch_norms: batch norm node -> module path, for the `nn.BatchNorm` modules that are called once and registered
            once, so that they can be replaced.
        group_norms, instance_norms: norm node -> module path, for modules of PyTorch, whose attributes hold numbers of channels.
    """

    nodes: tuple[Node, ...]
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    tensors: Mapping[Node, str]
    tensor_shapes: Mapping[str, tuple[int, ...]]
    parameters: frozenset[str]
    layers: tuple[TracedLayer, ...]
    computed: tuple[Node, ...]
    batch_norms: Mapping[Node, str]
    group_norms: Mapping[Node, str]
    instance_norms: Mapping[Node, str]

    @cached_property
    def layer_index(self) -> dict[Node, int]:
        """The index in `layers` for each call of a layer."""
        return {node: index for index, layer in enumerate(self.layers) for node in layer.nodes}


def trace_model(model: nn.Module, example_inputs: Sequence[Tensor]) -> Trace:
    """Return the exported graph of a model in eval mode, for the first image of the example.

    Args:
        model: in eval mode; it is not changed.
        example_inputs: example inputs for `model(*example_inputs)`; the first axis is the batch.
    Raises:
        InputError: if the forward pass or the export fails.
    """
    inputs = tuple(x[:1] for x in example_inputs)
    exporter_log = logging.getLogger("torch._subclasses.fake_tensor")
    exporter_log.disabled, was_disabled = True, exporter_log.disabled  # it also prints a traceback
    try:
        with warnings.catch_warnings():
            # Recurrent modules assign their own list of weights in every forward pass.
            # Others keep tensors between calls; `clear_caches` removes those of the exporter.
            warnings.filterwarnings("ignore", message="The tensor attribute")
            program = torch.export.export(model, inputs, strict=False)
    except Exception as error:  # the exporter and the user's forward may raise any error
        _try_forward(model, inputs)
        raise InputError(
            f"`torch.export` cannot trace {type(model).__name__}: {first_line(error)}. "
            "Its forward pass must not depend on the values of the input."
        ) from error
    finally:
        exporter_log.disabled = was_disabled
    return _read(program, model)


@torch.no_grad()
def _try_forward(model: nn.Module, inputs: Sequence[Tensor]) -> None:
    """Run the forward pass.

    Raises:
        InputError: if it fails; the message holds the error.
    """
    try:
        model(*inputs)
    except Exception as error:  # the user's forward may raise any error
        raise InputError(
            f"The model's forward pass fails on inputs of shape {', '.join(str(tuple(x.shape)) for x in inputs)}: "
            f"{first_line(error)}. Check the input shape."
        ) from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, without terminal colors, or its type if it has none."""
    lines = _TERMINAL_CODE.sub("", str(error)).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")[:_LONGEST_REASON]


def root_cause(error: BaseException) -> str:
    """Return type and first line of the error that was raised first, of a chain of errors."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {first_line(error)}"


def schema_of(node: Node) -> Any:
    """Return an operator's schema, None if it is no operator of ATen."""
    return getattr(node.target, "_schema", None)


def op_name(node: Node) -> str:
    """Return the operator's plain name: "conv2d", "getitem", "relu" (also for the in-place `relu_`)."""
    if schema_of(node) is None:
        return "getitem" if node.target is operator.getitem else str(node.target)
    return plain_name(node.target)


def plain_name(operator_function: Any) -> str:
    """Return the plain name of an operator of ATen or another library, without its overload."""
    return operator_function._schema.name.split("::")[1].rstrip("_")


def arguments(node: Node) -> dict[str, Any]:
    """Return an operator's arguments by the names in its schema, with default values."""
    return {
        argument.name: node.args[i] if i < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
        for i, argument in enumerate(schema_of(node).arguments)
    }


def argument(node: Node, index: int) -> Any:
    """Return a positional argument of an operator; torch allows too many types here to name them."""
    return node.args[index]


POINTWISE = frozenset(
    "hardswish log_sigmoid rsub dropout feature_dropout alpha_dropout native_dropout to _to_copy type_as clone "
    "contiguous alias detach zeros_like ones_like full_like empty_like rand_like randn_like fill zero bernoulli "
    "float_power".split()
)
"""Pointwise operators that PyTorch does not tag as pointwise, and operators that copy a tensor's shape."""


def is_pointwise(node: Node) -> bool:
    """Return whether each entry of an operator's result depends only on the entries of its operands at the same position."""
    return op_name(node) in POINTWISE or torch.Tag.pointwise in getattr(node.target, "tags", ())


def shape_of(node: Node) -> tuple[int, ...]:
    """Return the shape of a node's value."""
    return tuple(node.meta["val"].shape)


def run_with(node: Node, values: Mapping[Node, Tensor]) -> Any:
    """Return the result of the node's operator for operands with these values."""
    args, kwargs = pytree.tree_map(lambda x: values[x] if isinstance(x, Node) else x, (list(node.args), dict(node.kwargs)))
    operator_function: Any = node.target
    return operator_function(*args, **kwargs)


def _inline_regions(module: GraphModule) -> None:
    """Move the operators of `no_grad` and `autocast` regions into the graph; the exporter puts them into submodules."""
    graph = module.graph
    for node in list(graph.nodes):
        regions = [x for x in node.all_input_nodes if x.op == "get_attr" and hasattr(module, x.target)]
        regions = [x for x in regions if isinstance(getattr(module, x.target), GraphModule)]
        if "wrap_with" not in str(node.target) or not regions:
            continue
        region = getattr(module, regions[0].target)
        _inline_regions(region)
        operands = node.args[node.args.index(regions[0]) + 1 :]
        inside = dict(zip((x for x in region.graph.nodes if x.op == "placeholder"), operands, strict=True))
        with graph.inserting_before(node):
            results: Any = graph.graph_copy(region.graph, inside)
        for reader in list(node.users):
            reader.replace_all_uses_with(results[argument(reader, 1)])
            graph.erase_node(reader)
        graph.erase_node(node)


def _read(program: ExportedProgram, model: nn.Module) -> Trace:
    _inline_regions(program.graph_module)
    signature = program.graph_signature
    canonical = _canonical_names(model)
    named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    user_inputs = set(signature.user_inputs)
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    tensors = {node: canonical[named[node.name]] for node in placeholders if node.name in named}
    output = next(node for node in program.graph.nodes if node.op == "output")
    nodes = tuple(node for node in program.graph.nodes if node.op == "call_function")
    return Trace(
        nodes=nodes,
        inputs=tuple(node for node in placeholders if node.name in user_inputs),
        outputs=tuple(node for node in pytree.tree_leaves(output.args) if isinstance(node, Node)),
        tensors=tensors,
        tensor_shapes={name: shape_of(node) for node, name in tensors.items()},
        parameters=frozenset(canonical[name] for name in signature.inputs_to_parameters.values()),
        layers=_layers(nodes, tensors, model),
        computed=tuple(node for node in nodes if is_layer_call(node) and arguments(node)["weight"] not in tensors),
        batch_norms=_batch_norms(nodes, model),
        group_norms=_called_by(nodes, model, "group_norm", nn.GroupNorm),
        instance_norms=_called_by(nodes, model, "instance_norm", nn.modules.instancenorm._InstanceNorm),
    )


def _canonical_names(model: nn.Module) -> dict[str, str]:
    """Return {name: first name of the same tensor} of all parameters and buffers: tied tensors get one name."""
    first: dict[int, str] = {}
    names = {}
    for source in (model.named_parameters, model.named_buffers):
        for name, tensor in source(remove_duplicate=False):
            names[name] = first.setdefault(id(tensor), name)
    return names


def calling_module(node: Node) -> str | None:
    """Return the path of the module whose forward calls the operator."""
    stack = node.meta.get("nn_module_stack")
    return list(stack.values())[-1][0] if stack else None


def is_layer_call(node: Node) -> bool:
    """Return whether the operator is a convolution or a linear operator."""
    return op_name(node) in (*_CONVOLUTIONS, *_TRANSPOSED, "linear")


def _layers(nodes: Sequence[Node], tensors: Mapping[Node, str], model: nn.Module) -> tuple[TracedLayer, ...]:
    calls: dict[str, list[Node]] = {}
    for node in nodes:
        if is_layer_call(node):
            weight = tensors.get(arguments(node)["weight"])
            if weight is not None:
                calls.setdefault(weight, []).append(node)
    return tuple(_layer(weight, tuple(found), tensors, model) for weight, found in calls.items())


def _layer(weight: str, nodes: tuple[Node, ...], tensors: Mapping[Node, str], model: nn.Module) -> TracedLayer:
    node, given = nodes[0], arguments(nodes[0])
    linear, transposed = op_name(node) == "linear", op_name(node) in _TRANSPOSED
    size = shape_of(given["weight"])
    groups = 1 if linear else given["groups"]
    axes = (1, 0) if transposed else (0, 1)  # of the output and the input channels
    owners = {model.get_submodule(calling_module(call) or "") for call in nodes}
    # A module may be registered under several names; the layer has the name that its weight has.
    home, _, attribute = weight.rpartition(".")
    owner = model.get_submodule(home)
    owned = owners == {owner} and attribute == "weight"
    quantizable = owned and isinstance(owner, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear))
    bias = tensors.get(given["bias"])
    positions, calls = _positions(nodes, linear, transposed)
    shape = LayerShape(
        name=_layer_name(weight, model, quantizable),
        kind="linear" if linear else "conv",
        in_channels=size[axes[1]] * (1 if transposed else groups),
        out_channels=size[axes[0]] * (groups if transposed else 1),
        kernel=_pair(size[2:]),
        stride=(1, 1) if linear else _pair(_repeated(given["stride"], len(size) - 2)),
        out_hw=positions,
        conv_groups=groups,
        calls=calls,
        has_bias=bias is not None,
        quantizable=quantizable,
        own_weight=owned and isinstance(owner, (_ConvNd, nn.Linear)),
    )
    return TracedLayer(shape, weight, bias, *axes, transposed, nodes)


def _layer_name(weight: str, model: nn.Module, quantizable: bool) -> str:
    """Return the path of the module with this `weight`, or a name made of another parameter's, e.g. "attention.in_proj"."""
    home, _, attribute = weight.rpartition(".")
    if attribute == "weight" and (home or quantizable):
        return home
    name = weight.removesuffix("weight").rstrip("._")
    return weight if not name or any(name == path for path, _ in model.named_modules()) else name


def _positions(nodes: Sequence[Node], linear: bool, transposed: bool) -> tuple[tuple[int, int], int]:
    """Return the number of positions at which the weight is applied, as (height, width), and the number of calls.

    A transposed convolution applies its weight at every position of its *input*. If the calls have different sizes, all
    positions count as one call.
    """
    sizes = []
    for node in nodes:
        size = shape_of(arguments(node)["input"] if transposed else node)
        if linear:
            sizes.append((math.prod(size[:-1]), 1))
        else:
            sizes.append(_pair(size[-(len(shape_of(arguments(node)["weight"])) - 2) :]))
    if len(set(sizes)) == 1:
        return sizes[0], len(sizes)
    return (sum(height * width for height, width in sizes), 1), 1


def _pair(values: Sequence[int]) -> tuple[int, int]:
    """Return sizes of any number of spatial axes as two numbers with the same product."""
    return (math.prod(values[:-1]), values[-1] if values else 1)


def _repeated(values: Sequence[int], count: int) -> list[int]:
    return list(values) * count if len(values) == 1 else list(values)


def _called_by(nodes: Sequence[Node], model: nn.Module, name: str, kind: type[nn.Module]) -> dict[Node, str]:
    """Return {operator: module path} of the operators of one name that modules of one class call."""
    paths = {node: calling_module(node) for node in nodes if op_name(node) == name}
    return {node: path for node, path in paths.items() if path is not None and isinstance(model.get_submodule(path), kind)}


def _batch_norms(nodes: Sequence[Node], model: nn.Module) -> dict[Node, str]:
    calls: dict[nn.Module, list[Node]] = {}
    for node in nodes:
        if op_name(node) == "batch_norm":
            module = model.get_submodule(calling_module(node) or "")
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                calls.setdefault(module, []).append(node)
    paths = {module: path for path, module in model.named_modules()}
    places = Counter(child for parent in model.modules() for child in parent._modules.values())
    return {found[0]: paths[norm] for norm, found in calls.items() if len(found) == places[norm] == 1}
