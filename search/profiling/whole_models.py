"""Compressed versions of one network as ONNX models, made in milliseconds: for measuring speed, not for deployment.

An export takes seconds, so the dense network is exported once and the tensors of the export are sliced. If the result does not
compute what the sliced module computes (because a constant repeats a shape), every version is exported.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn

from secateur.envs.core import InputError
from secateur.envs.model_graph.folding import fold_batch_norms
from secateur.envs.model_graph.plan import ModelGraph
from secateur.envs.pruning.slicing import kept_positions, slice_model
from secateur.search.export.files import INPUT, LOGITS
from secateur.search.export.onnx_export import quiet
from secateur.search.profiling.runtimes import OnnxRuntimeSession

TWINS = ("_quantized_zero_point", "_quantized_scale", "_zero_point", "_quantized", "_scale")
"""Suffixes that `quantize_static` appends to the name of a tensor for its codes and their scales."""


@dataclass(frozen=True)
class DenseExport:
    """A dense network in float32 as ONNX: the source of its compressed versions.

    Attributes:
        model: the network, with other weights, no two of them equal (`make_distinct`).
        image: an input, (batch, channels, height, width) float32; the batch size is fixed.
        onnx_model: the network with batch norms folded.
    """

    model: nn.Module
    image: np.ndarray
    onnx_model: onnx.ModelProto


def export_dense(model: nn.Module, graph: ModelGraph, image_shape: Sequence[int], batch: int = 1) -> DenseExport:
    """Return the export of a network in eval mode, which stays as it is; `image_shape` is (channels, height, width)."""
    distinct = copy.deepcopy(model)
    make_distinct(distinct)
    image = np.random.default_rng(0).standard_normal((batch, *image_shape), np.float32)
    return DenseExport(distinct, image, _folded_onnx(distinct, graph, image))


def _folded_onnx(network: nn.Module, graph: ModelGraph, image: np.ndarray) -> onnx.ModelProto:
    folded = copy.deepcopy(network)
    fold_batch_norms(folded, graph)
    return export_to_onnx(folded, torch.from_numpy(image))


class CompressedModels:
    """The versions of one network that slicing gives, as ONNX models of one precision.

    Args:
        dense: the network.
        graph: its plan.
        precision: "float32" or "int8" (all convolutions and linear layers, unsigned activations).
        excluded: layers that stay in float32 in spite of "int8".
    """

    def __init__(self, dense: DenseExport, graph: ModelGraph, precision: str = "float32", excluded: Sequence[str] = ()):
        self._model, self._graph, self._precision = dense.model, graph, precision
        self._excluded = tuple(excluded)
        self._image = dense.image
        skeleton = onnx.ModelProto()
        skeleton.CopyFrom(self._in_precision(dense.onnx_model))
        self._tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in skeleton.graph.initializer}
        self._free_flattened_sizes(skeleton)
        self._depthwise = {f"{layer.name}.weight" for layer in graph.geometry.layers if layer.depthwise}
        del skeleton.graph.initializer[:]
        del skeleton.graph.value_info[:]  # it repeats the shapes of the dense network
        self._skeleton = skeleton
        self.sliceable = self._check()

    @property
    def image(self) -> np.ndarray:
        """An input of the models, (batch, channels, height, width) float32."""
        return self._image

    def version(self, widths: Sequence[int]) -> bytes:
        """Return the network in which each group keeps this many units, as a serialised ONNX model."""
        kept = [np.arange(width) for width in widths]
        return self._slice(kept) if self.sliceable else self._export_sliced(kept)

    def _slice(self, kept: Sequence[np.ndarray]) -> bytes:
        positions = kept_positions(self._model, self._graph, kept)
        # A folded batch norm gives its layer a bias that is not in the plan.
        for layer, _ in self._graph.batch_norms:
            if 0 in positions.get(f"{layer}.weight", {}):
                positions.setdefault(f"{layer}.bias", {0: positions[f"{layer}.weight"][0]})
        groups: dict[str, int] = {}
        sliced = onnx.ModelProto()
        sliced.CopyFrom(self._skeleton)
        for name, values in self._tensors.items():
            original = next((name.removesuffix(twin) for twin in TWINS if name.endswith(twin)), name)
            for axis, stay in positions.get(original, {}).items():
                if axis < values.ndim:  # scales follow the output channels only, or are one number
                    values = values.take(stay, axis)
            if original in self._depthwise and values.ndim > 1:
                groups[name] = len(values)
            sliced.graph.initializer.append(numpy_helper.from_array(values, name))
        self._set_groups(sliced, groups)
        return sliced.SerializeToString()

    def _set_groups(self, sliced: onnx.ModelProto, groups: dict[str, int]) -> None:
        """Give depthwise convolutions as many groups as they have channels left; `groups` is {name of the weight: channels}."""
        source = {node.output[0]: node.input[0] for node in sliced.graph.node if node.op_type == "DequantizeLinear"}
        for node in sliced.graph.node:
            if node.op_type != "Conv":
                continue
            count = groups.get(source.get(node.input[1], node.input[1]))
            for attribute in node.attribute:
                if count is not None and attribute.name == "group":
                    attribute.i = count

    def _free_flattened_sizes(self, skeleton: onnx.ModelProto) -> None:
        """Replace the number of features in every reshaping to (batch, features) by -1, which infers it."""
        for node in skeleton.graph.node:
            if node.op_type == "Reshape" and self._tensors.get(node.input[1], np.empty(0)).shape == (2,):
                self._tensors[node.input[1]] = np.array([len(self._image), -1])

    def _export_sliced(self, kept: Sequence[np.ndarray]) -> bytes:
        sliced = slice_model(self._model, self._graph, kept)
        return self._in_precision(_folded_onnx(sliced, self._graph, self._image)).SerializeToString()

    def _in_precision(self, exported: onnx.ModelProto) -> onnx.ModelProto:
        if self._precision != "int8":
            return exported
        source = onnx.ModelProto()
        source.CopyFrom(exported)  # the quantizer changes its argument
        return quantize_to_int8(source, self._image, self._excluded)

    def _check(self) -> bool:
        """Return whether the sliced ONNX model computes what the sliced module computes; of int8, only the shape is compared."""
        widths = [max(1, group.units // 2) for group in self._graph.groups]
        kept = [np.arange(width) for width in widths]
        with torch.inference_mode():
            expected = slice_model(self._model, self._graph, kept)(torch.from_numpy(self._image)).numpy()
        try:
            (logits, *_) = OnnxRuntimeSession(self._slice(kept)).run(self._image)
        except InputError:
            return False
        if self._precision == "int8":
            return logits.shape == expected.shape  # the scales are those of the dense network
        return logits.shape == expected.shape and np.allclose(logits, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


@torch.no_grad()
def make_distinct(model: nn.Module) -> None:
    """Give every vector of the model distinct values, in place, because the exporter merges equal tensors."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if tensor.dim() == 1 and tensor.is_floating_point():
            noise = torch.rand(tensor.shape, generator=generator)
            tensor.copy_(noise * 0.1 if name.endswith(("bias", "mean")) else 0.75 + noise / 2)


def export_to_onnx(network: nn.Module, images: torch.Tensor) -> onnx.ModelProto:
    """Return the network as an ONNX model with a fixed batch; the initializers keep the names of its tensors."""
    with quiet():
        program = torch.onnx.export(network, (images,), dynamo=True, input_names=[INPUT], output_names=[LOGITS], verbose=False)
    assert program is not None, "the exporter based on dynamo returns a program"
    return program.model_proto


def quantize_to_int8(model: onnx.ModelProto, images: np.ndarray, excluded: Sequence[str] = ()) -> onnx.ModelProto:
    """Return the model with quantized and dequantized tensors around its operators: int8 weights, uint8 activations.

    Args:
        excluded: layers, by module path, that stay in float32.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self._feeds = iter([{INPUT: images}])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._feeds, None)

    weights = {f"{layer}.weight" for layer in excluded}
    with tempfile.TemporaryDirectory() as folder, quiet():
        path = Path(folder) / "quantized.onnx"
        quantize_static(
            model,
            path,
            Images(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=[node.name for node in model.graph.node if weights & set(node.input)],
        )
        return onnx.load(path)


def random_widths(graph: ModelGraph, count: int, rng: np.random.Generator, largest_ratio: float = 0.9) -> list[list[int]]:
    """Return the widths of random compressed versions that differ widely in size.

    Each has an overall compression level of its own; half of them have widths rounded to multiples of 4, 8 or 16.
    """
    versions = []
    for index in range(count):
        level = largest_ratio * (index + rng.random()) / count
        multiple = int(rng.choice([4, 8, 16])) if index % 2 else 1
        ratios = np.clip(rng.uniform(level - 0.3, level + 0.3, len(graph.groups)), 0.0, largest_ratio)
        widths = [
            min(group.units, max(1, round(group.units * (1 - ratio) / multiple) * multiple))
            for group, ratio in zip(graph.groups, ratios, strict=True)
        ]
        versions.append(widths)
    rng.shuffle(versions)
    return versions
