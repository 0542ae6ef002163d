"""The calibration pass: the inputs of all layers are recorded while the dense network runs once over the images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from secateur.cost_models.core import LayerShape
from secateur.envs.calibration.core import CHANNEL, DIAGONAL, FULL, NONE, Calibration, CalibrationConfig, LayerStatistics
from secateur.envs.calibration.patches import Layer, is_product, num_positions, patches, sample_positions
from secateur.envs.core import InputError
from secateur.envs.inputs import Inputs, call_model
from secateur.envs.memory import CALIBRATION, halving
from secateur.envs.model_graph.plan import ModelGraph
from secateur.envs.weight_layout import outputs_first

_FLOAT_BYTES = 4
_STRIP = 128
"""Number of rows of a matrix that are computed at once; see `_upper_moments`."""


@dataclass(frozen=True)
class LayerPlan:
    """The statistics that the pass will keep of a layer's input.

    Attributes:
        kind: see `LayerStatistics.kind`.
        nbytes: memory of the arrays in bytes.
        matrix_bytes: memory of the next larger matrix, which exceeds the limit; 0 if there is none.
        reason: reason why there are no moments; empty if there are moments.
    """

    kind: str
    nbytes: int
    matrix_bytes: int = 0
    reason: str = ""


def plan_calibration(model: nn.Module, graph: ModelGraph, config: CalibrationConfig) -> dict[str, LayerPlan]:
    """Return the statistics that a calibration will keep, by layer; layers that do not run as modules will be missing."""
    modules = _modules(model, graph)
    return {layer.name: _planned(layer, modules[layer.name], config) for layer in graph.geometry.layers if layer.name in modules}


def _modules(model: nn.Module, graph: ModelGraph) -> dict[str, nn.Module]:
    """Return the layers that are modules. `named_modules` is not used because it lists each module under one name only."""
    modules = {}
    for layer in graph.geometry.layers:
        try:
            modules[layer.name] = model.get_submodule(layer.name)
        except AttributeError:  # the weight belongs to an operator that another module calls
            continue
    return modules


def _planned(shape: LayerShape, layer: nn.Module, config: CalibrationConfig) -> LayerPlan:
    samples = _FLOAT_BYTES * config.samples
    if not is_product(layer):
        return LayerPlan(NONE, samples, reason="it has a forward pass of its own")
    if not shape.own_weight:
        return LayerPlan(NONE, samples, reason="its weight is used outside of its module")
    weight = outputs_first(layer)
    groups, channels, entries = getattr(layer, "groups", 1), weight.shape[1], weight[0].numel()
    too_large = 0
    for kind, size in ((FULL, entries), (CHANNEL, channels)):
        matrix = _FLOAT_BYTES * groups * (size + 1) ** 2
        if matrix <= config.max_matrix_bytes:
            return LayerPlan(kind, matrix + samples, too_large)
        too_large = matrix
    return LayerPlan(DIAGONAL, _FLOAT_BYTES * groups * 2 * channels + samples, too_large)


@torch.inference_mode()
def calibrate(model: nn.Module, graph: ModelGraph, images: Inputs, config: CalibrationConfig) -> Calibration:
    """Return the statistics of every convolution and linear layer that runs as a module.

    Args:
        model: the dense network, in eval mode.
        graph: structure of the dense network.
        images: calibration inputs, usually (N, C, H, W) float32 normalized.
        config: how the statistics are collected.
    Raises:
        InputError: if the input of a layer has NaN or infinite values.
    """
    return halving(CALIBRATION, lambda parts: _calibrate(model, graph, images, config, max(config.batch_size // parts, 1)))


def _calibrate(model: nn.Module, graph: ModelGraph, images: Inputs, config: CalibrationConfig, batch_size: int) -> Calibration:
    batches = images[: config.max_images].split(batch_size)
    observers = _observers(model, graph, config, -(-config.samples // len(batches)))
    modules = _modules(model, graph)
    hooks = [modules[name].register_forward_pre_hook(observer, with_kwargs=True) for name, observer in observers.items()]
    try:
        for batch in batches:
            for observer in observers.values():
                observer.images = len(batch)
            call_model(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    layers = {name: observer.statistics(name) for name, observer in observers.items() if observer.samples}
    return Calibration(layers, min(len(images), config.max_images), config)


def _observers(model: nn.Module, graph: ModelGraph, config: CalibrationConfig, samples: int) -> Mapping[str, _Observer]:
    plans = plan_calibration(model, graph, config)
    modules = _modules(model, graph)
    return {
        name: _Observer(plan.kind, modules[name], config, np.random.default_rng((config.seed, index)), samples)
        for index, (name, plan) in enumerate(plans.items())
    }


class _Observer:
    """A forward pre-hook that accumulates the moments, the range and a sample of a layer's inputs.

    Args:
        kind: see `LayerStatistics.kind`.
        layer: the layer.
        config: how the statistics are collected.
        rng: random generator for sampling positions and values.
        samples: number of input values to keep of every call.
    """

    def __init__(self, kind: str, layer: nn.Module, config: CalibrationConfig, rng: np.random.Generator, samples: int) -> None:
        self.kind, self.config, self.rng, self.samples_per_call = kind, config, rng, samples
        self.area = layer.weight[0, 0].numel() if is_product(layer) and kind != NONE else 1
        self.images = 1
        self.total: Tensor | None = None
        self.count = 0
        self.low, self.high = np.float32("inf"), np.float32("-inf")
        self.samples: list[Tensor] = []

    def __call__(self, layer: nn.Module, inputs: tuple, keywords: dict[str, Tensor]) -> None:
        x = (inputs[0] if inputs else keywords["input"]).float()
        low, high = (end.cpu() for end in x.aminmax())
        # numpy's minimum returns NaN if an operand is NaN; Python's does not.
        self.low, self.high = np.minimum(self.low, low.numpy()), np.maximum(self.high, high.numpy())
        picked = torch.from_numpy(self.rng.integers(x.numel(), size=self.samples_per_call))
        self.samples.append(x.flatten()[picked.to(x.device)])
        if self.kind != NONE:
            assert is_product(layer)
            rows = self._rows(layer, x)
            moments = _power_sums(rows) if self.kind == DIAGONAL else _upper_moments(rows)
            self.total = moments.double() if self.total is None else self.total.add_(moments)
            self.count += rows.shape[1]

    def _rows(self, layer: Layer, x: Tensor) -> Tensor:
        """Return sampled inputs, (conv_groups, rows, entries)."""
        most = self.config.positions
        if isinstance(layer, nn.Linear) and x.shape[0] % self.images == 0:
            x = x.reshape(self.images, -1, layer.in_features)  # windows that are part of the batch axis are tokens too
        if self.kind == FULL or isinstance(layer, nn.Linear):
            picked = sample_positions(num_positions(layer, x), most, self.rng).to(x.device)
            return patches(layer, x, picked).flatten(0, 1).transpose(0, 1)
        pixels = x.flatten(2)
        picked = sample_positions(pixels.shape[2], most, self.rng).to(x.device)
        rows = pixels[:, :, picked].transpose(1, 2).reshape(-1, layer.groups, x.shape[1] // layer.groups)
        return rows.transpose(0, 1)

    def statistics(self, name: str) -> LayerStatistics:
        """Return the statistics.

        Raises:
            InputError: if the input has NaN or infinite values.
        """
        low, high = float(self.low), float(self.high)
        if not float("-inf") < low <= high < float("inf"):
            raise InputError(
                f"The input of layer `{name}` has no finite range on the calibration images "
                f"({low} to {high}). Check the weights, or exclude the layer from the search."
            )
        samples = torch.cat(self.samples).cpu().numpy()
        if len(samples) > self.config.samples:
            samples = self.rng.choice(samples, self.config.samples, replace=False)
        return LayerStatistics(self.kind, self._means(), low, high, np.sort(samples), self.area, self.count)

    def _means(self) -> np.ndarray:
        """Return `LayerStatistics.moments`."""
        if self.kind == NONE or self.total is None:
            return np.zeros(0, np.float32)
        means = (self.total / self.count).float()
        return (means if self.kind == DIAGONAL else means.triu() + means.triu(1).mT).cpu().numpy()


def _power_sums(rows: Tensor) -> Tensor:
    """Return the sums over rows of x and of x^2, (conv_groups, 2, entries) float64."""
    return torch.stack([rows.sum(1, dtype=torch.float64), rows.double().square().sum(1)], dim=1)


def _upper_moments(rows: Tensor) -> Tensor:
    """Return the sum over rows of [x, 1] [x, 1]^T, (conv_groups, entries + 1, entries + 1) float32; only the upper half is valid.

    The matrix is symmetric: strips that end at the diagonal take little more than half of the time.
    """
    groups, count, entries = rows.shape
    moments = rows.new_empty(groups, entries + 1, entries + 1)
    for first in range(0, entries, _STRIP):
        strip = slice(first, min(first + _STRIP, entries))
        moments[:, strip, first:-1] = rows[:, :, strip].mT @ rows[:, :, first:]
    moments[:, :-1, -1] = rows.sum(1)
    moments[:, -1, -1] = count
    return moments
