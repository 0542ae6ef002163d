"""Means and covariances of the layers' inputs, computed from batch norms and weights without images.

A batch norm's output has mean beta and standard deviation |gamma| in every channel. Means and covariances of the channels
are propagated from there through the recorded operators (`ModelGraph.operations`):

    function f       E f(z_i) f(z_j) = sum_n rho_ij^n a_n(i) a_n(j), a_n(i) = E f(beta_i + |gamma_i| t) h_n(t)          (1)
    layer            mean W m + b, covariance W (C x S) W^T, S_pq = r^|p - q| between the positions p, q of the kernel  (2)
    batch norm       correlations of its input times the signs of gamma, and its own means and variances                (3)
    sum              means and covariances are added; product: second moments are multiplied                            (4)

with t standard normal, h_n the normalized Hermite polynomials, rho_ij the correlation of the Gaussians z_i and z_j.

Source: (1) is Mehler's formula; the means of rectified batch-norm outputs are those of Nagel et al. 2019 (data-free
quantization), arXiv:1906.04721, section 4.2.1. The other equations are new.

Approximations: all inputs of functions are Gaussian; operands of sums and products are independent; the correlation of
neighboring pixels is equal in all channels; the image is white noise; pooling does not change the moments.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.envs.calibration.core import FULL, LayerStatistics
from secateur.envs.calibration.patches import PlainLayer, is_plain
from secateur.envs.candidate import CandidateNetwork
from secateur.envs.model_graph.plan import ModelGraph, Operation

HERMITE_TERMS = 12
"""Number of terms of eq. (1); the truncated terms are added to the variances, so that the matrix stays positive."""

MAX_STATISTICS_BYTES = 256_000_000
"""Layers with larger synthetic statistics are quantized without statistics."""

_GRID = torch.linspace(-6, 6, 241, dtype=torch.float64)
"""Points t of the numerical integration in eq. (1)."""


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of the channels of one value.

    Attributes:
        mean: (channels,) float32.
        covariance: (channels, channels) float32.
        known: False if the moments follow from an unknown input, taken as white noise: then only correlations are valid.
        size: spatial size, if each channel was flattened into a channel per pixel; else ().
    """

    mean: Tensor
    covariance: Tensor
    known: bool = True
    size: tuple[int, ...] = ()

    def restricted(self, channels: np.ndarray) -> Moments:
        """Return the moments of some of the channels."""
        picked = torch.from_numpy(channels).to(self.mean.device)
        return Moments(self.mean[picked], self.covariance[picked[:, None], picked], self.known, self.size)


def input_moments(model: nn.Module, graph: ModelGraph, spatial_correlation: float) -> dict[str, Moments]:
    """Return the moments of the layers' inputs by layer name; layers with unknown inputs are missing.

    Args:
        model: the dense network.
        graph: structure of the dense network.
        spatial_correlation: r in eq. (2), the correlation of neighboring pixels, in [0, 1).
    """
    modules = dict(model.named_modules())
    values: list[Moments | None] = []
    found: dict[str, Moments] = {}
    for operation in graph.operations:
        inputs = [values[i] if i >= 0 else None for i in operation.inputs]
        known = [value for value in inputs if value is not None and value.known]
        if operation.kind == "layer":
            if known and is_plain(modules[operation.name]):
                found[operation.name] = known[0]
            values.append(_layer(modules[operation.name], inputs[0], spatial_correlation))
        elif operation.kind == "batch_norm":
            values.append(_batch_norm(modules[operation.name], inputs[0]))
        elif len(known) == len(inputs):
            values.append(_RULES[operation.kind](operation, known))
        else:
            values.append(None)
    return found


def cached_moments(candidate: CandidateNetwork, spatial_correlation: float) -> dict[str, Moments]:
    """Return `input_moments` of the dense model, computed once per process."""
    return candidate.cache.get(
        ("moments", spatial_correlation),
        lambda: input_moments(candidate.dense_model, candidate.graph, spatial_correlation),
    )


def output_moments(layer: PlainLayer, weight: Tensor, moments: Moments, spatial_correlation: float) -> tuple[Tensor, Tensor]:
    """Return mean (without the bias) and variance of a layer's outputs by eq. (2), (outputs,) each.

    Args:
        layer: a layer with `is_plain(layer)`.
        weight: weight of the layer's shape.
        moments: moments of its input.
        spatial_correlation: r in eq. (2).
    """
    rows = _grouped(layer, weight, moments.size)
    groups, _, channels, _ = rows.shape
    picked = torch.arange(groups, device=rows.device)
    blocks = moments.covariance.view(groups, channels, groups, channels)[picked, :, picked]
    mean = torch.einsum("goip,gi->go", rows, moments.mean.view(groups, channels))
    variance = torch.zeros_like(mean)
    for part in _decorrelated(rows, layer, moments.size, spatial_correlation):
        variance += (part @ blocks * part).sum(2)
    return mean.flatten(), variance.flatten()


def kept_moments(candidate: CandidateNetwork, name: str, moments: Moments) -> Moments:
    """Return the moments of a layer's input after slicing."""
    axes, dense = candidate.kept_axes(name), candidate.dense_layers[name]
    inputs = np.unique(axes.inputs // math.prod(moments.size))
    per_group = len(moments.mean) // getattr(dense, "groups", 1)
    return moments.restricted((axes.conv_groups[:, None] * per_group + inputs).ravel())


# ---------------------------------------------------------------------------------------------------------- eq. (1)-(4)


def _grouped(layer: nn.Module, weight: Tensor, size: tuple[int, ...]) -> Tensor:
    """Return a weight as (conv groups, outputs, channels, positions) float32; `size` as in `Moments`."""
    groups = getattr(layer, "groups", 1)
    channels = weight.shape[1] // math.prod(size)
    return weight.detach().float().reshape(groups, len(weight) // groups, channels, -1)


def _decorrelated(rows: Tensor, layer: nn.Module, size: tuple[int, ...], r: float) -> tuple[Tensor, ...]:
    """Return W L with S = L L^T for each position, (conv groups, outputs, channels): eq. (2) is the sum over these parts."""
    return (rows @ torch.linalg.cholesky(_spatial(layer, size, r)).float().to(rows.device)).unbind(3)


def _spatial(layer: Any, size: tuple[int, ...], r: float) -> Tensor:
    """Return S of eq. (2), (positions, positions) float64."""
    if not isinstance(layer, nn.Linear):
        size = layer.kernel_size
    dilation = getattr(layer, "dilation", (1,) * len(size))
    axes = (torch.arange(n, dtype=torch.float64) * d for n, d in zip(size, dilation, strict=True))
    blocks = (r ** (axis[:, None] - axis).abs() for axis in axes)
    return reduce(torch.kron, blocks, torch.ones(1, 1, dtype=torch.float64))


def _white_noise(channels: int, device: torch.device) -> Moments:
    """Return the moments that stand for an unknown input."""
    return Moments(torch.zeros(channels, device=device), torch.eye(channels, device=device), False)


def _layer(layer: nn.Module, moments: Moments | None, r: float) -> Moments | None:
    if not is_plain(layer):
        return None
    if moments is None:
        channels = layer.weight.shape[1] * getattr(layer, "groups", 1)
        moments = _white_noise(channels, layer.weight.device)
    rows = _grouped(layer, layer.weight, moments.size)
    groups, _, channels, _ = rows.shape
    covariance = rows.new_zeros(len(layer.weight), len(layer.weight))
    for part in _decorrelated(rows, layer, moments.size, r):
        half = (part @ moments.covariance.view(groups, channels, -1)).flatten(0, 1)  # W C, (outputs, channels)
        covariance += (part @ half.T.reshape(groups, channels, -1)).flatten(0, 1)
    mean = torch.einsum("goip,gi->go", rows, moments.mean.view(groups, channels)).flatten()
    bias = 0 if layer.bias is None else layer.bias.detach().float()
    return Moments(mean + bias, covariance, moments.known)


def _batch_norm(norm: Any, moments: Moments | None) -> Moments | None:
    if norm.running_mean is None:
        return None
    mean = torch.zeros_like(norm.running_mean) if norm.bias is None else norm.bias.detach().float()
    gamma = torch.ones_like(mean) if norm.weight is None else norm.weight.detach().float()
    deviation = gamma * (norm.running_var / (norm.running_var + norm.eps)).sqrt()
    correlation = torch.eye(len(mean), device=mean.device) if moments is None else _correlation(moments.covariance)
    return Moments(mean, correlation * deviation * deviation[:, None])


def _correlation(covariance: Tensor) -> Tensor:
    scale = covariance.diagonal().clamp_min(0).sqrt()
    inverse = torch.where(scale > 0, 1 / scale, 0)
    correlation = (covariance * inverse * inverse[:, None]).clamp(-1, 1)
    return correlation.fill_diagonal_(1)


def _function(operation: Operation, inputs: list[Moments]) -> Moments | None:
    (x,) = inputs
    function = _operator(operation)
    deviation = x.covariance.diagonal().clamp_min(0).sqrt().double()
    grid = _GRID.to(x.mean.device)
    density = torch.exp(-grid.square() / 2)
    density = density / density.sum()
    y = function((x.mean.double()[:, None] + deviation[:, None] * grid).float()).double()  # (channels, points)
    if not y.isfinite().all():  # for example a logarithm
        return None
    coefficients = y * density @ torch.from_numpy(_hermite()).to(y.device).T  # a_n, (channels, terms)
    correlation = _correlation(x.covariance).double()
    covariance, power = torch.zeros_like(correlation), torch.ones_like(correlation)
    for a in coefficients.T[1:]:
        power = power * correlation
        covariance += power * a * a[:, None]
    mean = coefficients[:, 0]
    covariance.diagonal().copy_((y - mean[:, None]).square() @ density)
    return Moments(mean.float(), covariance.float(), size=x.size)


def _operator(operation: Operation) -> Callable[[Tensor], Tensor]:
    _, packet, overload = operation.name.split(".")
    function = getattr(getattr(torch.ops.aten, packet), overload)
    return lambda x: function(x, **dict(operation.arguments))


def _hermite() -> np.ndarray:
    """Return the normalized Hermite polynomials on the grid, (terms, points)."""
    rows = np.eye(HERMITE_TERMS) / np.sqrt([math.factorial(n) for n in range(HERMITE_TERMS)])
    return np.stack([np.polynomial.hermite_e.hermeval(_GRID.numpy(), row) for row in rows])


def _add(operation: Operation, inputs: list[Moments]) -> Moments:
    x, y = inputs
    return Moments(x.mean + y.mean, x.covariance + y.covariance, size=x.size)


def _mul(operation: Operation, inputs: list[Moments]) -> Moments:
    x, y = inputs
    mean = x.mean * y.mean
    second = (x.covariance + torch.outer(x.mean, x.mean)) * (y.covariance + torch.outer(y.mean, y.mean))
    return Moments(mean, second - torch.outer(mean, mean), size=x.size)


def _cat(operation: Operation, inputs: list[Moments]) -> Moments | None:
    if any(math.prod(x.size) > 1 for x in inputs):
        return None
    return Moments(torch.cat([x.mean for x in inputs]), torch.block_diag(*(x.covariance for x in inputs)))


def _pad(operation: Operation, inputs: list[Moments]) -> Moments:
    (x,), (before, after) = inputs, dict(operation.arguments).values()
    mean = nn.functional.pad(x.mean, (before, after))
    return Moments(mean, nn.functional.pad(x.covariance, (before, after, before, after)))


def _flatten(operation: Operation, inputs: list[Moments]) -> Moments:
    return Moments(inputs[0].mean, inputs[0].covariance, size=tuple(dict(operation.arguments).values()))


_RULES = {"function": _function, "add": _add, "mul": _mul, "cat": _cat, "pad": _pad, "flatten": _flatten}


def synthetic_statistics(layer: Any, moments: Moments, spatial_correlation: float) -> LayerStatistics | None:
    """Return moments in the form of calibration statistics, for rounding with compensation; None if they are too large.

    Range and samples are empty, because moments do not determine them.
    """
    groups, area = getattr(layer, "groups", 1), 1 if isinstance(layer, nn.Linear) else layer.weight[0, 0].numel()
    spatial = _spatial(layer, moments.size, spatial_correlation).to(moments.mean.device)
    channels = len(moments.mean) // groups
    entries = channels * len(spatial)
    if 4 * groups * (entries + 1) ** 2 > MAX_STATISTICS_BYTES:
        return None
    result = np.empty((groups, entries + 1, entries + 1), np.float32)
    for group, mean in enumerate(moments.mean.double().view(groups, channels)):
        part = slice(group * channels, (group + 1) * channels)
        mean = torch.cat([mean.repeat_interleave(len(spatial)), mean.new_ones(1)])
        second = torch.outer(mean, mean)
        second[:-1, :-1] += torch.kron(moments.covariance[part, part].double(), spatial)
        result[group] = second.cpu().numpy()
    return LayerStatistics(FULL, result, 0.0, 0.0, np.zeros(0, np.float32), area, 0)


def quantize_in_place(candidate: CandidateNetwork, name: str, moments: Moments | None, spatial_correlation: float) -> None:
    """Quantize a layer; if the quantizer needs statistics and there is no calibration, it gets synthetic statistics."""
    statistics = None
    if candidate.quantizer.needs_images and candidate.calibration is None and moments is not None:
        kept = kept_moments(candidate, name, moments)
        statistics = synthetic_statistics(candidate.layers[name], kept, spatial_correlation)
    candidate.quantize(name, statistics)


# -------------------------------------------------------------------------------- statistics of batch norms after a change

VARIANCE_RATIOS = (0.05, 20.0)
"""Limits for the change of a variance; estimates outside of these limits are not reliable."""


@dataclass(frozen=True)
class LayerState:
    """A layer's weight and the moments of its input at some time.

    Attributes:
        weight: weight of the layer.
        moments: moments of its input; None: unknown.
    """

    weight: Tensor
    moments: Moments | None


def dense_state(candidate: CandidateNetwork, name: str, moments: Moments | None) -> LayerState:
    """Return a layer's state before its inputs were removed: the dense weight of the kept outputs."""
    axes, dense = candidate.kept_axes(name), candidate.dense_layers[name]
    if moments is not None:
        per_group = len(moments.mean) // getattr(dense, "groups", 1)
        moments = moments.restricted((axes.conv_groups[:, None] * per_group + np.arange(per_group)).ravel())
    return LayerState(dense.weight.detach()[torch.from_numpy(axes.outputs).to(dense.weight.device)], moments)


def current_state(candidate: CandidateNetwork, name: str, moments: Moments | None) -> LayerState:
    """Return a layer's current state; `moments` are those of its dense input."""
    return LayerState(candidate.layers[name].weight.detach(), moments and kept_moments(candidate, name, moments))


def restate_statistics(
    candidate: CandidateNetwork, name: str, before: LayerState, moments: Moments | None, spatial_correlation: float
) -> None:
    """Change the statistics of the batch norm after a layer to those of the layer's new weight; without one, change the bias.

    The mean is shifted by the difference between the computed means before and after, the variance is multiplied by the ratio
    of the computed variances. Unknown inputs are taken as white noise if their number did not change; the mean is then kept.

    Args:
        candidate: the candidate.
        name: name of the layer, whose weight was replaced.
        before: state of the layer before.
        moments: moments of its dense input; None: unknown.
        spatial_correlation: r in eq. (2).
    """
    layer, norm = candidate.layers[name], candidate.norm(name)
    after = current_state(candidate, name, moments)
    if not is_plain(layer) or (moments is None and before.weight.shape != after.weight.shape):
        return
    states = []
    for state in (before, after):
        channels = state.weight.shape[1] * getattr(layer, "groups", 1)
        noise = _white_noise(channels, state.weight.device)
        states.append(output_moments(layer, state.weight, state.moments or noise, spatial_correlation))
    (mean, variance), (new_mean, new_variance) = states
    if candidate.has_intercept(name):
        candidate.shift(name, mean - new_mean)
    if norm is not None:
        ratio = torch.where(variance > 0, new_variance / variance, 1).clamp(*VARIANCE_RATIOS)
        norm.running_var = norm.running_var * ratio
