"""Least squares: what reads pruned channels is refitted on the channels that are left.

For a layer with weight W on the (unfolded) input u of the dense network, split into kept entries S (with a constant 1
for the intercept) and removed entries R, and A = E[u u^T] over the calibration images, the refitted weight is

    W'_S = W_S + W_R A_RS (A_SS + lambda I)^-1                                                                   (1)

the minimiser of E|W' u_S - W u|^2 + lambda |W' - W_S|^2. The intercept goes to the layer's bias, or to the running mean
of the batch norm behind it.

Source: He et al. 2017 (channel pruning), arXiv:1707.06168, eq. (1)-(3), the reconstruction step.

Where we differ and why:
1. Targets and inputs are those of the dense network ("independent"): A is computed once and a candidate costs one small
   solve per layer. Errors made by earlier layers are not absorbed.
2. Damping pulls towards the old weights instead of zero, so that a nearly constant input changes nothing. The
   intercept is not damped.
3. A comes from a sample of output positions: neighbouring patches say nearly the same.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from envs.core import InputError
from envs.model_graph.plan import ModelGraph

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LeastSquaresConfig:
    """How the second moments are sampled and used.

    Attributes:
        damping: lambda over the mean of A's diagonal.
        max_images: at most this many of the calibration images are used.
        positions: output positions (tokens) sampled per image and layer.
        max_inputs: layers with more inputs (channels x kernel area) are left alone; A takes 4 inputs^2 bytes.
        batch_size: images per forward pass.
        seed: of the sampled positions.
    """

    damping: float = 1e-3
    max_images: int = 1024
    positions: int = 8
    max_inputs: int = 2400
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise InputError(f"`damping` of the recovery `least_squares` must be above 0, but got {self.damping}.")
        for name in ("max_images", "positions", "max_inputs", "batch_size"):
            if getattr(self, name) < 1:
                value = getattr(self, name)
                raise InputError(f"`{name}` of the recovery `least_squares` must be at least 1, but got {value}.")


@dataclass(frozen=True)
class InputMoments:
    """Second moments of the dense network's inputs, by layer.

    Attributes:
        moments: {layer: (inputs + 1, inputs + 1) float32}, mean of [u, 1] [u, 1]^T; u in the order of the weight.
        skipped: layers that read prunable channels but exceed `max_inputs`.
    """

    moments: Mapping[str, np.ndarray]
    skipped: tuple[str, ...]


@dataclass(frozen=True)
class LeastSquares:
    """Refits ordinary convolutions and linear layers; depthwise and grouped convolutions are left alone."""

    config: LeastSquaresConfig = LeastSquaresConfig()
    before_quantization: ClassVar[bool] = True

    def prepare(self, model: nn.Module, graph: ModelGraph, images: Tensor) -> InputMoments:
        """See `Recovery.prepare`."""
        modules = dict(model.named_modules())
        readers = {name: modules.get(name) for group in graph.groups for name in group.consumers}
        readers = {name: layer for name, layer in readers.items() if _mixes(layer)}
        small = {name: layer for name, layer in readers.items() if _inputs(layer) <= self.config.max_inputs}
        rng = np.random.default_rng(self.config.seed)
        observers = {name: _MomentObserver(layer, self.config.positions, rng) for name, layer in small.items()}
        hooks = [small[name].register_forward_pre_hook(observer) for name, observer in observers.items()]
        try:
            with torch.inference_mode():
                for batch in images[: self.config.max_images].split(self.config.batch_size):
                    model(batch)
        finally:
            for hook in hooks:
                hook.remove()
        skipped = tuple(name for name in readers if name not in small)
        if skipped:
            logger.info("least_squares leaves alone what has over %d inputs: %s.", self.config.max_inputs, skipped)
        return InputMoments({name: observer.moments() for name, observer in observers.items()}, skipped)

    def apply(
        self,
        network: nn.Module,
        dense_model: nn.Module,
        graph: ModelGraph,
        kept: Sequence[np.ndarray],
        prepared: InputMoments,
        images: Tensor,
    ) -> None:
        """See `Recovery.apply`."""
        layers, dense_layers = dict(network.named_modules()), dict(dense_model.named_modules())
        norms = dict(graph.batch_norms)
        for name, moments in prepared.moments.items():
            weight = dense_layers[name].weight.detach()
            kept_in = kept_positions(graph, kept, f"{name}.weight", 1, weight.shape[1])
            if len(kept_in) == weight.shape[1]:
                continue
            kept_out = kept_positions(graph, kept, f"{name}.weight", 0, weight.shape[0])
            norm = layers[norms[name]] if name in norms else None
            intercept = layers[name].bias is not None or norm is not None
            refitted, shift = _refit(weight[kept_out], kept_in, moments, self.config.damping, intercept)
            # New tensors: the old ones may be shared with the dense model.
            layers[name].weight = nn.Parameter(refitted, layers[name].weight.requires_grad)
            if layers[name].bias is not None:
                layers[name].bias = nn.Parameter(layers[name].bias.detach() + shift, layers[name].bias.requires_grad)
            elif norm is not None:
                norm.running_mean = norm.running_mean - shift


def kept_positions(graph: ModelGraph, kept: Sequence[np.ndarray], tensor: str, axis: int, size: int) -> np.ndarray:
    """Return which positions of a dense tensor's axis are left, sorted."""
    left = np.ones(size, bool)
    for group, units in zip(graph.groups, kept, strict=True):
        removed = np.setdiff1d(np.arange(group.units), units)
        for place in group.slices:
            if place.tensor == tensor and place.axis == axis:
                left[place.positions[removed]] = False
    return np.flatnonzero(left)


def _refit(
    weight: Tensor, kept_in: np.ndarray, moments: np.ndarray, damping: float, intercept: bool
) -> tuple[Tensor, Tensor]:
    """Return eq. (1) and the intercept: (outputs, kept inputs, ...) and (outputs,), float32.

    Args:
        weight: dense weight of the kept outputs, (outputs, inputs, ...).
        kept_in: kept positions on the input axis.
        moments: see `InputMoments`.
        intercept: whether there is one; without it, its result is zero.
    """
    area = weight[0, 0].numel()
    kept_entries = (kept_in[:, None] * area + np.arange(area)).ravel()
    removed_entries = np.setdiff1d(np.arange(len(moments) - 1), kept_entries)
    fit = np.append(kept_entries, len(moments) - 1) if intercept else kept_entries
    second = torch.from_numpy(moments[np.ix_(fit, fit)]).double()
    cross = torch.from_numpy(moments[np.ix_(fit, removed_entries)]).double()
    diagonal = second.diagonal()[: len(kept_entries)]
    diagonal += damping * diagonal.mean().clamp_min(1e-12)
    rows = weight.flatten(1).double()
    change = torch.linalg.solve(second, cross @ rows[:, removed_entries].T).T
    refitted = (rows[:, kept_entries] + change[:, : len(kept_entries)]).float()
    shift = change[:, -1].float() if intercept else torch.zeros(len(rows))
    return refitted.view(len(rows), len(kept_in), *weight.shape[2:]), shift


def _mixes(layer: nn.Module | None) -> bool:
    """Whether a consumer is an ordinary layer, each output of which reads every input channel."""
    return isinstance(layer, nn.Linear) or (
        isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.padding_mode == "zeros"
    )


def _inputs(layer: nn.Module) -> int:
    return layer.weight[0].numel()


class _MomentObserver:
    """A forward pre-hook that adds up the second moments of a layer's sampled inputs."""

    def __init__(self, layer: nn.Module, positions: int, rng: np.random.Generator) -> None:
        self.positions, self.rng = positions, rng
        size = _inputs(layer) + 1
        self.total = torch.zeros(size, size, dtype=torch.float64)
        self.count = 0

    def __call__(self, layer: nn.Module, inputs: tuple) -> None:
        sample = _patches if isinstance(layer, nn.Conv2d) else _tokens
        rows = sample(layer, inputs[0], self.positions, self.rng)
        rows = F.pad(rows, (0, 1), value=1.0)
        self.total += rows.T @ rows
        self.count += len(rows)

    def moments(self) -> np.ndarray:
        return (self.total / max(self.count, 1)).float().numpy()


def _tokens(layer: nn.Linear, x: Tensor, positions: int, rng: np.random.Generator) -> Tensor:
    """Return sampled inputs of a linear layer, (images * positions, features)."""
    x = x.reshape(len(x), -1, layer.in_features)
    return x[:, _sample(x.shape[1], positions, rng)].flatten(0, 1)


def _patches(layer: nn.Conv2d, x: Tensor, positions: int, rng: np.random.Generator) -> Tensor:
    """Return sampled unfolded inputs of a convolution, (images * positions, channels * kernel area)."""
    x = F.pad(x, _padding(layer))
    extents = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    height, width = ((size - e - 1) // s + 1 for size, e, s in zip(x.shape[2:], extents, layer.stride, strict=True))
    picked = _sample(height * width, positions, rng)
    rows = _kernel_index(picked // width, layer, 0)[:, :, None]  # (positions, kernel height, 1)
    columns = _kernel_index(picked % width, layer, 1)[:, None, :]  # (positions, 1, kernel width)
    patches = x[:, :, rows, columns]  # (images, channels, positions, kernel height, kernel width)
    return patches.transpose(1, 2).reshape(len(x) * len(picked), -1)


def _kernel_index(start: Tensor, layer: nn.Conv2d, axis: int) -> Tensor:
    """Return the input coordinates under the kernel at each output coordinate, (positions, kernel size)."""
    return start[:, None] * layer.stride[axis] + torch.arange(layer.kernel_size[axis]) * layer.dilation[axis]


def _padding(layer: nn.Conv2d) -> tuple[int, int, int, int]:
    """Return (left, right, top, bottom)."""
    if layer.padding == "valid":
        return (0, 0, 0, 0)
    if layer.padding == "same":
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return (totals[1] // 2, totals[1] - totals[1] // 2, totals[0] // 2, totals[0] - totals[0] // 2)
    return (layer.padding[1],) * 2 + (layer.padding[0],) * 2


def _sample(size: int, count: int, rng: np.random.Generator) -> Tensor:
    """Return `count` of the integers below `size`, or all of them if they are fewer; sorted."""
    return torch.from_numpy(np.sort(rng.choice(size, min(size, count), replace=False)))
