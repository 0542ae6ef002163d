"""The network of one candidate policy: recoveries and the quantizer change it step by step."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.cost_models.core import FLOAT_BITS
from secateur.envs.calibration.core import NONE, Calibration, LayerStatistics
from secateur.envs.inputs import Inputs
from secateur.envs.model_graph.plan import ModelGraph
from secateur.envs.piece_cache import PieceCache
from secateur.envs.pruning.slicing import Positions, kept_positions
from secateur.envs.quantization.fake_quantize import is_quantized, set_activation_grid, set_quantized_weight
from secateur.envs.quantization.quantizers.core import Quantizer
from secateur.envs.weight_layout import as_stored, is_transposed, outputs_first


@dataclass(frozen=True)
class KeptAxes:
    """The kept part of a layer's dense weight after slicing.

    Attributes:
        outputs, inputs: kept positions of axis 0 and axis 1 of `outputs_first`, sorted.
        conv_groups: kept conv groups, sorted; a depthwise convolution loses one conv group with each channel.
    """

    outputs: np.ndarray
    inputs: np.ndarray
    conv_groups: np.ndarray


@dataclass
class CandidateNetwork:
    """The sliced network of one policy, and everything that recoveries may use. It is used for one evaluation.

    Attributes:
        network: the sliced network; recoveries replace its tensors and never write into a tensor.
        dense_model: the dense model; it is never changed.
        graph: structure of the dense model.
        kept: kept units of every group, sorted.
        layer_bits: {layer: (weight_bits, activation_bits)} of the quantized layers; 32: not quantized.
        quantizer: plug-in of envs/quantization/quantizers.
        calibration: statistics of the dense network; None if no plug-in needs images.
        images: calibration inputs, usually (N, C, H, W) float32 normalized; None if no plug-in needs images.
        cache: cache of computed pieces, shared by all candidates of a process.
        positions: kept positions of the dense tensors; None: they are computed when they are needed.
        dtype: number format of forward passes in which recoveries only estimate statistics.
        parts: number of parts that recoveries divide their batches into, because memory is short.
        float_weights: {layer: weight before it was quantized}, filled by `quantize`.
    """

    network: nn.Module
    dense_model: nn.Module
    graph: ModelGraph
    kept: Sequence[np.ndarray]
    layer_bits: Mapping[str, tuple[int, int]]
    quantizer: Quantizer
    calibration: Calibration | None
    images: Inputs | None
    cache: PieceCache
    positions: Positions | None = None
    dtype: torch.dtype = torch.float32
    parts: int = 1
    float_weights: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def layers(self) -> dict[str, Any]:
        """Modules of the network by name; the type is Any because torch has no types for the attributes of modules."""
        return dict(self.network.named_modules())

    @cached_property
    def dense_layers(self) -> dict[str, Any]:
        """Modules of the dense model by name; see `layers`."""
        return dict(self.dense_model.named_modules())

    @cached_property
    def batch_norms(self) -> dict[str, str]:
        """{layer: the batch norm that is its only reader}."""
        return dict(self.graph.batch_norms)

    @cached_property
    def _axes(self) -> Positions:
        if self.positions is not None:
            return self.positions
        return kept_positions(self.dense_model, self.graph, self.kept)

    def kept_axes(self, name: str) -> KeptAxes:
        """Return the kept part of a layer's weight."""
        dense = self.dense_layers[name]
        axes = self._axes.get(f"{name}.weight", {})
        conv_groups, size = getattr(dense, "groups", 1), outputs_first(dense).shape
        # Transposed convolutions store the inputs first; those with conv groups are not pruned.
        stored = (1, 0) if is_transposed(dense) else (0, 1)
        outputs, inputs = (axes.get(axis, np.arange(length)) for axis, length in zip(stored, size, strict=False))
        per_group = size[0] // conv_groups
        return KeptAxes(outputs, inputs, np.unique(outputs // per_group) if conv_groups > 1 else np.zeros(1, int))

    def given_images(self) -> Inputs:
        """Return the calibration inputs.

        Raises:
            ValueError: if there are none.
        """
        if self.images is None:
            raise ValueError("A plug-in needs images, but there are no calibration images.")
        return self.images

    def statistics(self, name: str) -> LayerStatistics | None:
        """Return the dense network's statistics of a layer's kept inputs, None if there are none."""
        dense = None if self.calibration is None else self.calibration.layers.get(name)
        if dense is None or dense.kind == NONE:
            return dense
        axes = self.kept_axes(name)
        return dense.restricted(axes.inputs, axes.conv_groups if len(dense.moments) > 1 else None)

    def norm(self, name: str) -> Any:
        """Return the batch norm that is a layer's only reader and is not folded, or None."""
        norm = self.layers.get(self.batch_norms.get(name, ""))
        return norm if getattr(norm, "running_mean", None) is not None else None

    def has_intercept(self, name: str) -> bool:
        """Return whether a layer's output can be shifted: by its bias, or by the batch norm after it."""
        return self.layers[name].bias is not None or self.norm(name) is not None

    def set_weight(self, name: str, weight: Tensor) -> None:
        """Replace a layer's weight; `weight` has the shape of `outputs_first`."""
        layer = self.layers[name]
        layer.weight = nn.Parameter(as_stored(layer, weight.detach()), layer.weight.requires_grad)

    def shift(self, name: str, shift: Tensor) -> None:
        """Add `shift`, (outputs,), to a layer's output, by its bias or the running mean of the batch norm after it."""
        layer, norm = self.layers[name], self.norm(name)
        if layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias.detach() + shift, layer.bias.requires_grad)
        elif norm is not None:
            norm.running_mean = norm.running_mean - shift
        else:
            raise ValueError(f"The output of layer `{name}` cannot be shifted.")

    def quantize(self, name: str, statistics: LayerStatistics | None = None) -> None:
        """Quantize a layer's weight, unless it has no weight bits or is already quantized.

        Args:
            name: name of the layer.
            statistics: statistics of the layer's current input; None: those of the dense network.
        """
        bits, layer = self.layer_bits.get(name, (FLOAT_BITS, FLOAT_BITS))[0], self.layers[name]
        if bits == FLOAT_BITS or name in self.float_weights:
            return
        weight = layer.weight.detach()
        self.float_weights[name] = weight
        if statistics is not None:
            quantized = self.quantizer.quantize_weight(weight, bits, statistics)
        else:
            axes = self.kept_axes(name)
            key = ("quantized", name, bits, axes.inputs.tobytes(), axes.outputs.tobytes(), _digest(weight))
            quantized = self.cache.get(key, lambda: self.quantizer.quantize_weight(weight, bits, self._needed(name)))
        set_quantized_weight(layer, quantized)

    def _needed(self, name: str) -> LayerStatistics | None:
        return self.statistics(name) if self.quantizer.needs_images else None

    def quantize_weights(self) -> None:
        """Quantize all weights that have weight bits and are not yet quantized."""
        for name in self.layer_bits:
            self.quantize(name)

    def quantize_inputs(self) -> None:
        """Quantize the inputs of all layers that have activation bits.

        Raises:
            ValueError: if a layer is already quantized or was not calibrated.
        """
        for name, (_, bits) in self.layer_bits.items():
            if bits == FLOAT_BITS:
                continue
            if is_quantized(self.layers[name]):
                raise ValueError(f"Layer `{name}` is already quantized; start from the float network.")
            if self.calibration is None or name not in self.calibration.layers:
                raise ValueError(f"The input of layer `{name}` was not calibrated.")
            make = partial(self.quantizer.activation_grid, self.calibration.layers[name], bits)
            grid = self.cache.get(("activation_grid", name, bits), make)
            set_activation_grid(self.layers[name], grid)


def _digest(weight: Tensor) -> bytes:
    return hashlib.blake2b(weight.cpu().contiguous().numpy().data, digest_size=16).digest()
