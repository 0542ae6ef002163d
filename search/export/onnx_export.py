"""Writes a compressed network as ONNX: layers whose weight and input have at most 8 bits in integers, the others in float32.

The caller can keep layers in float32 that have the bits for integers (`in_float`), because the device computes them faster.

The float32 graph comes from torch.onnx; ONNX Runtime's own tool adds pairs of QuantizeLinear and DequantizeLinear (QDQ), which
runtimes turn into integer kernels. The grids of weights and layer inputs are the searched ones.

Differences between the file and the simulation in PyTorch, with their reasons:
1. An integer convolution needs a grid for its output too, and a residual sum is computed in integers only if both operands are
   on grids. The simulation keeps these values in float32; here their ranges are measured on calibration images.
2. A tensor has one grid for all of its readers: the widest of their grids. Float layers and sums read the rounded values too.
3. There are no kernels below 8 bits: codes of fewer bits are stored in bytes with their own scale, which is exact. Inputs of
   fewer bits get 256 levels over the same range. Levels that are not multiples of one step (powers of two, at 5 bits and
   more) are rounded to the nearest of 255.
4. A layer that is kept in float32 has the rounded weights of the simulation, but its input is not rounded: rounding would take
   two more operators and lose the time that float32 saves.

A runtime can add one more: ONNX Runtime rounds the weights of a float layer between two integer layers (its optimizer
WeightBiasQuantization). `secateur verify` compares the outputs after that.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.cost_models.core import FLOAT_BITS
from secateur.envs.core import InputError
from secateur.envs.inputs import Inputs, call_model, positional, samples_like, signature_of, tensors_of_inputs
from secateur.envs.model_graph.folding import fold_batch_norms
from secateur.envs.model_graph.plan import ModelGraph
from secateur.envs.model_graph.trace import root_cause
from secateur.envs.quantization.fake_quantize import ActivationQuantizer, activation_grid, quantized_weight
from secateur.envs.quantization.quantizers import ActivationGrid, QuantizedWeight
from secateur.envs.tasks.core import tensors_of
from secateur.search.export.files import LOGITS, OUTPUT, input_names
from secateur.search.export.image_size import agrees, free_axes, free_batch, free_size, name_axes

log = logging.getLogger(__name__)

INTEGER_BITS = 8
LARGEST_CODE = 127
DATA_SUFFIX = ".data"
MAX_ONE_FILE = 1.8e9
"""Bytes; a protocol buffer ends at 2 GB."""

CALIBRATION_BATCH = 8
LARGEST_BIAS = 2**30
"""In units of its scale; int32 ends at 2^31."""

SMALLEST_SCALE = 1e-30
"""Scale of an all-zero channel: its product with an input's scale is still a normal float32."""


@dataclass(frozen=True)
class LayerExecution:
    """How a runtime executes one convolution or linear layer of the file.

    Attributes:
        name: of the layer.
        weight_bits, activation_bits: of the policy.
        executed: "int8" or "float32".
        note: one sentence that says why, if this is not what the policy's bits ask for; else "".
        kept_in_float: whether the caller kept a layer in float32 that has the bits for integers.
    """

    name: str
    weight_bits: int
    activation_bits: int
    executed: str
    note: str = ""
    kept_in_float: bool = False


@dataclass(frozen=True)
class _IntegerLayer:
    """A layer that becomes integer.

    Attributes:
        codes: of its weight with batch norm folded, int8, in the layout of the module.
        scale: (outputs,) float32, above zero.
        grid: of its input, 8 bits.
        notes: where it is not the policy's layer exactly.
    """

    codes: np.ndarray
    scale: np.ndarray
    grid: ActivationGrid
    notes: tuple[str, ...]

    def weight(self) -> np.ndarray:
        """Return the values of the codes, float32."""
        return self.codes * self.scale.reshape(-1, *[1] * (self.codes.ndim - 1))


def export_onnx(
    network: nn.Module,
    graph: ModelGraph,
    images: Inputs,
    path: str | Path,
    in_float: Mapping[str, str] | None = None,
) -> list[LayerExecution]:
    """Write an ONNX file and return how each of its layers is executed.

    One input is called "input", and class scores (N, classes) "logits"; another output is "output", and several inputs or outputs
    are numbered. The number N of samples is free, and the size of images where image_size.py says so.

    Args:
        network: with simulated quantization, eval mode; it is left as it is.
        graph: plan of the dense network that it was made from.
        images: calibration inputs, usually (N, C, H, W) float32 normalized; a few dozen. They give the ranges of values without a
            grid, and the shapes of the inputs.
        path: of the file. Above 1.8 GB the weights go to a second file beside it.
        in_float: {layer: reason, a sentence} of layers that stay in float32 although they have the bits for integers.
    Raises:
        InputError: if torch cannot export the network.
    """
    path, in_float = Path(path), in_float or {}
    plain = copy.deepcopy(network).eval()
    plain.register_forward_hook(_only_tensors)
    weights = {name: weight for name, module in plain.named_modules() if (weight := quantized_weight(module)) is not None}
    grids = {name: grid for name, module in plain.named_modules() if (grid := _take_grid(module)) is not None}
    gains = _batch_norm_gains(plain, graph)
    fold_batch_norms(plain, graph)
    layers = {
        name: _integer_layer(weights[name], gains.get(name), plain.get_submodule(name), grids[name])
        for name in weights
        if name in grids and name not in in_float
    }
    for name, layer in layers.items():  # the exact values of the codes, so that the tool cannot round them to others
        plain.get_submodule(name).weight = nn.Parameter(torch.from_numpy(layer.weight()))
    model = _float_model(plain, images)
    nodes = _layer_nodes(model, plain, layers)
    layers = {name: layer for name, layer in layers.items() if name in nodes}
    notes: dict[str, str] = {}
    if layers:
        with TemporaryDirectory(dir=path.parent) as folder:
            model, notes = _quantize(model, layers, nodes, images, Path(folder))
            _save(model, path)
    else:
        _save(model, path)
    return [
        _execution(layer.name, weights.get(layer.name), grids.get(layer.name), layers.get(layer.name), notes, in_float)
        for layer in graph.geometry.layers
    ]


def _take_grid(module: nn.Module) -> ActivationGrid | None:
    """Return the grid of a layer's input, and remove it from the layer."""
    grid = activation_grid(module)
    for key in [key for key, hook in module._forward_pre_hooks.items() if isinstance(hook, ActivationQuantizer)]:
        del module._forward_pre_hooks[key]
    return grid


def _batch_norm_gains(network: nn.Module, graph: ModelGraph) -> dict[str, np.ndarray]:
    """Return {layer: (outputs,) factors} by which folding multiplies the channels of the layers that have a batch norm."""
    gains = {}
    for layer, name in graph.batch_norms:
        norm: Any = network.get_submodule(name)
        if not isinstance(norm, nn.Identity):
            gain = (norm.running_var + norm.eps).rsqrt()
            gains[layer] = (gain if norm.weight is None else gain * norm.weight.detach()).numpy()
    return gains


# ---------------------------------------------------------------------------------------------------------------- layers


def _integer_layer(weight: QuantizedWeight, gain: np.ndarray | None, folded: Any, grid: ActivationGrid) -> _IntegerLayer:
    """Return a layer as the file has it; `folded` is its module after batch norm was folded."""
    scale = weight.scale.numpy().astype(np.float64) * (1.0 if gain is None else gain)
    codes, step = _integer_levels(weight)
    codes, scale = codes * np.sign(scale).reshape(-1, *[1] * (codes.ndim - 1)), np.abs(scale) * step
    grid_8 = _eight_bits(grid)
    # The bias is stored in int32, in units of both scales; a channel whose weights are tiny beside it gets a coarser scale.
    bias = 0.0 if folded.bias is None else folded.bias.detach().abs().numpy().astype(np.float64)
    coarse = np.maximum(scale, np.maximum(bias / (grid_8.scale * LARGEST_BIAS), SMALLEST_SCALE)).astype(np.float32)
    shrunk = np.where(coarse > scale.astype(np.float32), scale / coarse, 1.0).reshape(-1, *[1] * (codes.ndim - 1))
    stored = np.clip(np.rint(codes * shrunk), -LARGEST_CODE - 1, LARGEST_CODE)
    notes = []
    if not np.array_equal(stored, codes):
        notes.append("Some weights are rounded to the nearest of 255 levels.")
    if grid.bits != INTEGER_BITS:
        notes.append(f"Its input has 256 levels over the range of the {grid.bits}-bit grid.")
    return _IntegerLayer(stored.astype(np.int8), coarse, grid_8, tuple(notes))


def _integer_levels(weight: QuantizedWeight) -> tuple[np.ndarray, float]:
    """Return the weight's values as multiples of a step, and the step in units of the scale.

    The multiples are integers in -127..127 wherever a step exists that makes them so; else they are not integers.
    """
    codes = weight.codes.numpy().astype(np.float64)
    if weight.levels is None:
        return codes, 1.0
    values = weight.levels.numpy().astype(np.float64)[weight.codes.numpy().astype(int) + 2 ** (weight.bits - 1)]
    largest = max(float(np.abs(values).max()), float(np.finfo(np.float32).tiny))
    for step in (2.0**-power for power in range(INTEGER_BITS)):
        if largest / step <= LARGEST_CODE and np.array_equal(values / step, np.rint(values / step)):
            return values / step, step
    return values / (largest / LARGEST_CODE), largest / LARGEST_CODE


def _eight_bits(grid: ActivationGrid) -> ActivationGrid:
    """Return the grid of 256 values over the same range."""
    if grid.bits == INTEGER_BITS:
        return grid
    scale = grid.scale * grid.max_code / (2**INTEGER_BITS - 1)
    return ActivationGrid(scale, round(grid.zero_point * grid.scale / scale), INTEGER_BITS)


def _execution(
    name: str,
    weight: QuantizedWeight | None,
    grid: ActivationGrid | None,
    layer: _IntegerLayer | None,
    conflicts: Mapping[str, str],
    in_float: Mapping[str, str],
) -> LayerExecution:
    bits = FLOAT_BITS if weight is None else weight.bits, FLOAT_BITS if grid is None else grid.bits
    if layer is not None:
        notes = (*layer.notes, *([conflicts[name]] if name in conflicts else []))
        return LayerExecution(name, *bits, "int8", " ".join(notes))
    if weight is not None and grid is not None and name in in_float:
        return LayerExecution(name, *bits, "float32", in_float[name], kept_in_float=True)
    if weight is not None and grid is not None:
        note = "The exporter has merged it with others, so it runs in float32 and its input is not rounded."
    elif weight is not None:
        note = "Only its weight has bits: it runs in float32 with the rounded values."
    else:
        note = "" if grid is None else "Only its input has bits: it runs in float32 and its input is not rounded."
    return LayerExecution(name, *bits, "float32", note)


# ----------------------------------------------------------------------------------------------------------- float graph


def _only_tensors(module: nn.Module, args: Any, outputs: Any) -> Any:
    """Forward hook: return the tensors of the outputs; an ONNX file has no other outputs, such as numbers."""
    leaves = pytree.tree_leaves(outputs)
    return outputs if all(isinstance(leaf, Tensor) for leaf in leaves) else tuple(tensors_of(outputs))


@torch.no_grad()
def _output_names(network: nn.Module, images: Inputs) -> list[str]:
    outputs = tensors_of(call_model(network, images[:1]))
    if len(outputs) == 1:
        return [LOGITS if outputs[0].dim() == 2 else OUTPUT]
    return [f"{OUTPUT}{index}" for index in range(len(outputs))]


def _float_model(network: nn.Module, images: Inputs) -> onnx.ModelProto:
    """Return the ONNX graph of a network without quantizers, with free image sizes where it computes the same at other sizes."""
    example, names = samples_like(images, 2), _output_names(network, images)
    if signature_of(images) is not None:
        network = positional(network, images)
        network.register_forward_hook(_only_tensors)
    if (free := free_size(network, example)) is not None:
        try:
            with quiet(), torch.no_grad():
                axes = free_axes(network, example, free.multiple)
                program = torch.export.export(network, example, dynamic_shapes=axes, strict=False)
            model = _converted(program, example, names)
            if agrees(model, free.samples):
                name_axes(model)
                return model
        except Exception as error:  # a size may become a constant when the network is traced
            log.info("image sizes are not free: %s", root_cause(error))
    try:
        return _converted(network, example, names, dynamic_shapes=free_batch(network, example))
    except Exception as error:  # the exporter runs the user's forward and many passes of its own
        raise InputError(
            f"torch.onnx cannot export this network: {root_cause(error)}. Rewrite that operation of its forward."
        ) from error


def _converted(network: Any, example: tuple[Tensor, ...], outputs: list[str], **options: Any) -> onnx.ModelProto:
    """Return the ONNX graph of a network, or of a program of torch.export."""
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            network,
            example,
            dynamo=True,
            input_names=input_names(len(example)),
            output_names=outputs,
            external_data=False,
            verbose=False,
            **options,
        )
    assert program is not None, "the exporter based on dynamo returns a program"
    return program.model_proto


def _layer_nodes(model: onnx.ModelProto, network: nn.Module, layers: Collection[str]) -> dict[str, list[onnx.NodeProto]]:
    """Return the nodes that multiply by the weights of these layers; layers that the exporter has merged have none."""
    constants = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    nodes: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul") or node.input[1] not in constants:
            continue
        # Transposed weights have names of their own; the metadata of the exporter name the module that made the node.
        for name in (node.input[1].removesuffix(".weight"), _module_of(node)):
            if name in layers and sorted(constants[node.input[1]]) == sorted(network.get_parameter(f"{name}.weight").shape):
                nodes.setdefault(name, []).append(node)
                break
    return nodes


def _module_of(node: onnx.NodeProto) -> str:
    scopes = [prop.value for prop in node.metadata_props if prop.key == "pkg.torch.onnx.name_scopes"]
    modules = ast.literal_eval(scopes[0]) if scopes else []
    return modules[-2] if len(modules) > 1 else ""


def _save(model: onnx.ModelProto, path: Path) -> None:
    """Check the model and write it without the exporter's metadata, which name files of this machine."""
    del model.metadata_props[:]
    for part in (model.graph, *model.graph.node, *model.graph.initializer, *model.graph.value_info):
        del part.metadata_props[:]
    for value in (*model.graph.input, *model.graph.output):
        del value.metadata_props[:]
    large = sum(len(tensor.raw_data) for tensor in model.graph.initializer) > MAX_ONE_FILE
    data: dict[str, Any] = (
        {"save_as_external_data": True, "location": path.name + DATA_SUFFIX, "size_threshold": 1024} if large else {}
    )
    onnx.save(model, path, **data)
    onnx.checker.check_model(path, full_check=True)


# --------------------------------------------------------------------------------------------------------- integer graph


class _Images(CalibrationDataReader):
    """Gives the calibration images to ONNX Runtime in batches."""

    def __init__(self, images: Inputs):
        self._names = input_names(len(tensors_of_inputs(images)))
        self._batches: Iterator[Inputs] = iter(images.split(CALIBRATION_BATCH))

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._batches, None)
        if batch is None:
            return None
        return {name: x.numpy() for name, x in zip(self._names, tensors_of_inputs(batch), strict=True)}


def _quantize(
    model: onnx.ModelProto,
    layers: Mapping[str, _IntegerLayer],
    nodes: Mapping[str, Sequence[onnx.NodeProto]],
    images: Inputs,
    folder: Path,
) -> tuple[onnx.ModelProto, dict[str, str]]:
    """Return the graph with the layers in integers, and {layer: note} for layers that read another grid."""
    _copy_shared_weights(model, nodes)
    grids, notes = _tensor_grids(layers, nodes)
    overrides: dict[str, list[dict]] = {}
    for tensor, grid in grids.items():
        scale, zero_point = np.array(grid.scale, np.float32), np.array(grid.zero_point, np.uint8)
        overrides[tensor] = [{"quant_type": QuantType.QUInt8, "scale": scale, "zero_point": zero_point}]
    for name, layer in layers.items():
        for node in nodes[name]:
            common = {"quant_type": QuantType.QInt8, "zero_point": 0, "axis": _output_axis(node)}
            overrides[node.input[1]] = [{**common, "scale": scale} for scale in layer.scale]
    source, target = folder / "float.onnx", folder / "integer.onnx"
    _save(model, source)
    with quiet():
        quantize_static(
            source,
            target,
            _Images(images),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Gemm", "MatMul", "Add", "Relu", "Clip"],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_quantize=_integer_nodes(model, {node.name for name in layers for node in nodes[name]}, grids),
            use_external_data_format=source.with_name(source.name + DATA_SUFFIX).exists(),
            extra_options={
                "TensorQuantOverrides": overrides,
                # Matrix products have integer kernels with float outputs; convolutions have none.
                "OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"],
            },
        )
    integer = onnx.load(target)
    stored = {tensor.name: tensor for tensor in integer.graph.initializer}
    for name, layer in layers.items():
        codes = numpy_helper.to_array(stored[f"{nodes[name][0].input[1]}_quantized"])
        expected = layer.codes if _output_axis(nodes[name][0]) == 0 else layer.codes.T
        if not np.array_equal(codes, expected):
            raise RuntimeError(f"The codes of layer `{name}` in the ONNX file are not those of the network.")
    return integer, notes


def _copy_shared_weights(model: onnx.ModelProto, nodes: Mapping[str, Sequence[onnx.NodeProto]]) -> None:
    """Give each node of a layer that is called several times its own copy of the weight, in place.

    On processors without VNNI, ONNX Runtime converts integer weights once for each reader and cannot load a file where one tensor
    has several.
    """
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for calls in nodes.values():
        for number, node in enumerate(calls[1:], start=1):
            copied = model.graph.initializer.add()
            copied.CopyFrom(stored[node.input[1]])
            copied.name = node.input[1] = f"{copied.name}.{number}"


def _tensor_grids(
    layers: Mapping[str, _IntegerLayer], nodes: Mapping[str, Sequence[onnx.NodeProto]]
) -> tuple[dict[str, ActivationGrid], dict[str, str]]:
    """Return the grid of every tensor that an integer layer reads, and a note for layers that get another layer's grid.

    Of several grids for a tensor the one with the widest range is taken, because clipping is the larger error.
    """
    chosen: dict[str, str] = {}
    for name, layer in layers.items():
        for node in nodes[name]:
            widest = chosen.get(node.input[0])
            if widest is None or layer.grid.scale > layers[widest].grid.scale:
                chosen[node.input[0]] = name
    notes = {
        name: f"It reads its input on the grid of layer {chosen[node.input[0]]}."
        for name, layer in layers.items()
        for node in nodes[name]
        if layer.grid != layers[chosen[node.input[0]]].grid
    }
    return {tensor: layers[name].grid for tensor, name in chosen.items()}, notes


def _integer_nodes(model: onnx.ModelProto, layer_nodes: set[str], grids: Mapping[str, ActivationGrid]) -> list[str]:
    """Return the names of the nodes that get integer inputs and outputs.

    These are the layers, sums whose operands are both on grids, and ReLUs after both: a runtime drops them, because the lowest
    code is their zero.
    """
    names, on_grid = [], set(grids)
    produced = set()  # by integer convolutions and sums
    for node in model.graph.node:
        if node.name in layer_nodes:
            names.append(node.name)
            if node.op_type == "Conv":
                produced.add(node.output[0])
        elif node.op_type == "Add" and set(node.input) <= on_grid | produced and produced & set(node.input):
            names.append(node.name)
            produced.add(node.output[0])
        elif node.op_type in ("Relu", "Clip") and node.input[0] in produced:
            grid = grids.get(node.output[0])
            if grid is None or grid.zero_point == 0:
                names.append(node.name)
                produced.add(node.output[0])
    return names


def _output_axis(node: onnx.NodeProto) -> int:
    """Return the axis of the node's weight that belongs to the layer's outputs."""
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return 0 if node.op_type == "Conv" or transposed else 1


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the messages of torch's exporter and ONNX Runtime's quantizer."""
    logger = logging.getLogger()
    level = logger.level
    # They are deprecations inside torch's exporter and hints about pre-processing; errors are raised.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)
