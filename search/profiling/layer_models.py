"""Single layers as ONNX models, many in one, so that one run of a runtime times them all, taking turns."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from secateur.cost_models.latency_table import LayerKey

OPSET, IR_VERSION = 20, 10
LAYER_NAME = re.compile(r"(?:fused )?layer(\d+)(?:_nchwc|_relu|_add|_token_\d+|/WithoutBiases|/MatMulAddFusion)*")
"""The operators that a point's time is the sum of, under all names that the runtimes give them when they fuse or move them.
What reorders a layer's input or output has other names."""


@dataclass(frozen=True)
class LayerPoint:
    """One layer to measure: what kind (see `LayerKey`) and how many channels."""

    key: LayerKey
    in_channels: int
    out_channels: int

    @property
    def conv_groups(self) -> int:
        """The convolution's groups."""
        return self.key[4] or self.in_channels

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(out, in / groups, height, width), (out, in), or (in, out) where a linear layer is applied to tokens."""
        if self.key[0] == "linear":
            return (self.in_channels, self.out_channels) if self.tokens > 1 else (self.out_channels, self.in_channels)
        return self.out_channels, self.in_channels // self.conv_groups, *self.key[1]

    @property
    def tokens(self) -> int:
        """How many vectors a linear layer is applied to, per image."""
        return self.key[3][0] * self.key[3][1]

    @property
    def padding(self) -> tuple[int, int]:
        """Padding at both ends of height and width: "same" for odd kernels, none for even ones."""
        height, width = (size // 2 if size % 2 else 0 for size in self.key[1])
        return height, width

    def input_shape(self, batch: int) -> tuple[int, ...]:
        """(batch, channels, height, width), or (batch, tokens, features)."""
        kind, kernel, stride, out_hw, _ = self.key
        if kind == "linear":
            return (batch, self.in_channels) if self.tokens == 1 else (batch, self.tokens, self.in_channels)
        size = [out * s if k % 2 else (out - 1) * s + k for k, s, out in zip(kernel, stride, out_hw, strict=True)]
        return batch, self.in_channels, *size

    @property
    def weights(self) -> int:
        """Elements of the weight."""
        return int(np.prod(self.weight_shape))

    @property
    def macs(self) -> int:
        """Multiply-accumulates per image."""
        return self.weights * self.tokens


def layers_model(points: Sequence[LayerPoint], precision: str, batch: int = 1) -> tuple[bytes, dict[str, np.ndarray]]:
    """Return a serialised model that runs all layers side by side, and its inputs.

    Point i is the operator "layer<i>", with bias and ReLU, as in a network whose batch norms are folded. Layers with equal
    inputs share one. In "int8" inputs and outputs are unsigned codes, as between two quantized layers of a network.
    """
    build = _QuantizedGraph() if precision == "int8" else _FloatGraph()
    for index, point in enumerate(points):
        build.add(index, point, batch)
    graph = helper.make_graph(build.nodes, "layers", build.inputs, build.outputs, build.initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    return model.SerializeToString(), build.feeds


def conversion_model(shape: tuple[int, ...] = (1, 64, 28, 28)) -> tuple[bytes, dict[str, np.ndarray]]:
    """Return a model that quantizes one input and dequantizes another, and its inputs."""
    values: dict[str, np.ndarray] = {"scale": np.array(0.05, np.float32), "zero": np.array(0, np.uint8)}
    constants = [numpy_helper.from_array(value, name) for name, value in values.items()]
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["values", "scale", "zero"], ["quantized"], name="quantize"),
            helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["dequantized"], name="dequantize"),
        ],
        "conversion",
        [
            helper.make_tensor_value_info("values", TensorProto.FLOAT, shape),
            helper.make_tensor_value_info("codes", TensorProto.UINT8, shape),
        ],
        [
            helper.make_tensor_value_info("quantized", TensorProto.UINT8, shape),
            helper.make_tensor_value_info("dequantized", TensorProto.FLOAT, shape),
        ],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    return model.SerializeToString(), {"values": np.ones(shape, np.float32), "codes": np.ones(shape, np.uint8)}


def times_by_point(times: dict[str, np.ndarray], count: int) -> list[np.ndarray]:
    """Return the milliseconds of each run, (repeats,), of each point from the times of all operators."""
    sums: list = [0.0] * count
    for name, milliseconds in times.items():
        if (match := LAYER_NAME.fullmatch(name)) and len(milliseconds):
            sums[int(match[1])] = sums[int(match[1])] + milliseconds
    if any(isinstance(values, float) for values in sums):
        raise ValueError(f"The profile has no operator of layer {next(i for i, s in enumerate(sums) if isinstance(s, float))}.")
    return sums


class _FloatGraph:
    """Collects the operators of float32 layers."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.feeds: dict[str, np.ndarray] = {}
        self.constant("first", np.array([0]))
        self.constant("second", np.array([1]))

    value_type: int = TensorProto.FLOAT
    dtype: type[np.generic] = np.float32

    def add(self, index: int, point: LayerPoint, batch: int) -> None:
        """Add point `index`."""
        shape = point.input_shape(batch)
        source = "input_" + "x".join(map(str, shape))
        if source not in self.feeds:
            self.feeds[source] = np.ones(shape, self.dtype)
            self.inputs.append(helper.make_tensor_value_info(source, self.value_type, shape))
        self.layer(f"layer{index}", source, point)
        # Only the first channel leaves the model: so the runtime reuses the layers' buffers, as it does in a network.
        bounds = ["first", "second", "second"]
        self.nodes.append(helper.make_node("Slice", [f"layer{index}", *bounds], [f"output{index}"]))
        self.outputs.append(helper.make_tensor_value_info(f"output{index}", self.value_type, None))

    def layer(self, name: str, source: str, point: LayerPoint) -> None:
        """Add one layer from the input `source` to the output `name`."""
        weight = self.constant(f"{name}_weight", np.full(point.weight_shape, 0.01, np.float32))
        bias = self.constant(f"{name}_bias", np.zeros(point.out_channels, np.float32))
        self.operator(name, source, weight, bias, point, name)

    def operator(self, name: str, source: str, weight: str, bias: str, point: LayerPoint, target: str) -> None:
        """Add the operator `name` and its ReLU."""
        kind, kernel, stride, _, _ = point.key
        value = f"{name}_value"
        if kind == "conv":
            attributes: dict[str, Any] = {
                "kernel_shape": kernel,
                "strides": stride,
                "pads": point.padding * 2,
                "group": point.conv_groups,
            }
            self.nodes.append(helper.make_node("Conv", [source, weight, bias], [value], name=name, **attributes))
        elif point.tokens == 1:
            self.nodes.append(helper.make_node("Gemm", [source, weight, bias], [value], name=name, transB=1))
        else:
            self.nodes.append(helper.make_node("MatMul", [source, weight], [f"{name}_product"], name=name))
            self.nodes.append(helper.make_node("Add", [f"{name}_product", bias], [value], name=f"{name}_add"))
        self.nodes.append(helper.make_node("Relu", [value], [target], name=f"{name}_relu"))

    def constant(self, name: str, values: np.ndarray) -> str:
        """Add a constant; return its name."""
        self.initializers.append(numpy_helper.from_array(values, name))
        return name


class _QuantizedGraph(_FloatGraph):
    """Collects the operators of layers with unsigned 8-bit inputs and outputs and signed 8-bit weights."""

    value_type: int = TensorProto.UINT8
    dtype: type[np.generic] = np.uint8

    def __init__(self) -> None:
        super().__init__()
        self.constant("scale", np.array(0.05, np.float32))
        self.constant("zero", np.array(0, np.uint8))

    def layer(self, name: str, source: str, point: LayerPoint) -> None:
        """Add one layer between dequantized and quantized tensors; runtimes fuse the three."""
        outputs = point.out_channels
        per_channel = np.ones(outputs, np.float32)
        axis = 1 if point.key[0] == "linear" and point.tokens > 1 else 0
        weight = self.dequantized(f"{name}_weight", np.full(point.weight_shape, 3, np.int8), 0.01 * per_channel, axis)
        bias = self.dequantized(f"{name}_bias", np.zeros(outputs, np.int32), 0.01 * 0.05 * per_channel)
        self.nodes.append(helper.make_node("DequantizeLinear", [source, "scale", "zero"], [f"{name}_input"]))
        self.operator(name, f"{name}_input", weight, bias, point, f"{name}_float")
        self.nodes.append(helper.make_node("QuantizeLinear", [f"{name}_float", "scale", "zero"], [name]))

    def dequantized(self, name: str, codes: np.ndarray, scales: np.ndarray, axis: int = 0) -> str:
        """Add codes with one scale per output channel, which are on this axis; return the name of their values."""
        names = [
            self.constant(f"{name}_codes", codes),
            self.constant(f"{name}_scale", scales),
            self.constant(f"{name}_zero", np.zeros(len(scales), codes.dtype)),
        ]
        self.nodes.append(helper.make_node("DequantizeLinear", names, [name], axis=axis))
        return name
