"""Data-free compensation: readers of pruned or quantized channels get new weights, computed from weights and batch norms.

Each removed channel j of a group is predicted from the kept channels, x_j ~ sum_i s_ij x_i. Its readers compensate the
removal by W[:, i] += s_ij W[:, j] at every position of the kernel. The option `fit` selects the computation of s:

    "closed_form"  s_j = (Q^T Q + alpha_1 P^T P)^-1 (Q^T V_j + alpha_1 P^T K_j)                                         (1)
    "nonnegative"  the minimizer of the same |Q s - V_j|^2 + alpha_1 (P s - K_j)^2, but over s >= 0                     (2)
    "moments"      s_j = (C_SS + delta I)^-1 C_Sj, C the channels' covariance by envs/recovery/common/moments.py               (3)

The columns of Q are the filters gamma W / sigma of the kept channels, V_j is the filter of the removed channel, P are the
offsets beta - gamma mu / sigma of the kept channels, and K_j is the offset of the removed channel. With the first two, the
weights of a quantized channel's readers are also multiplied by a scale, eq. (1) of envs/recovery/common/channel_scales.py with
lambda_1 = alpha_2. Layers are processed in execution order, and each layer is quantized after it gets its new weight.

Source: Bai et al. 2023 (UDFC), arXiv:2308.07209, the closed forms for s and the scale; eq. (2) and (3) are new.

Where we differ and why (figures: CIFAR ResNet-56, dense 93.5 %, all weights at 4 bits, 30 / 40 / 50 % of the inner channels of
every block removed by l1 norm, top-1 on 8,000 test images; without recovery: 79.2 / 53.3 / 30.0 %):
1. The filters are not divided by gamma_j / sigma_j of the removed channel, because the result diverges if gamma_j goes to 0.
   Closed form: 83.2 / 63.1 / 40.5 %.
2. After a ReLU, a channel cannot replace the negative of another channel: with s >= 0, 83.8 / 75.0 / 50.5 %.
3. The prediction error reduces the variance at the next batch norm, and the reduction accumulates over layers. The batch norms
   therefore get the mean and variance that are computed from the moments: with s >= 0, 88.7 / 85.7 / 75.5 %.
4. If the moments are known (default), s is a regression on the covariance of the channels themselves, after their activation
   and with the correlations of the filters' inputs: 90.6 / 87.3 / 78.6 %. Quantized channels are then not scaled.
5. The systems of all producers of a residual stream are stacked. A group without batch norms after its producers is not
   changed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from secateur.cost_models.core import NonNegative, Positive, Range, check_fields
from secateur.envs.calibration.patches import is_plain
from secateur.envs.candidate import CandidateNetwork
from secateur.envs.model_graph.plan import ChannelGroup, TensorSlice
from secateur.envs.pruning.importance.common.unit_slices import unit_rows
from secateur.envs.recovery.common.channel_scales import (
    ScaleEstimator,
    filters,
    is_depthwise,
    normed_producers,
    reading_places,
    scale_inputs,
)
from secateur.envs.recovery.common.moments import (
    LayerState,
    Moments,
    cached_moments,
    current_state,
    dense_state,
    quantize_in_place,
    restate_statistics,
)


@dataclass(frozen=True)
class DataFreeConfig:
    """Configuration of the compensation.

    Attributes:
        fit: "moments", "nonnegative" or "closed_form"; see the top of this file. "moments" uses "nonnegative" for layers whose
            input has unknown moments.
        statistics: whether the batch norms after changed layers get the statistics that are computed from the moments.
        alpha1: weight of the offsets in the prediction of removed channels.
        alpha2: weight of the offsets in the scale of quantized channels.
        damping: delta, relative to the mean variance of the kept channels.
        spatial_correlation: correlation of neighboring pixels, in [0, 1).
    """

    fit: Literal["moments", "nonnegative", "closed_form"] = "moments"
    statistics: bool = True
    alpha1: NonNegative = 0.01
    alpha2: NonNegative = 0.008
    damping: Positive = 0.01
    spatial_correlation: Annotated[float, Range(least=0, below=1)] = 0.5

    def __post_init__(self) -> None:
        check_fields(self, "the recovery `data_free`")


@dataclass(frozen=True)
class Prediction:
    """The prediction of removed input positions of a layer: removed = kept @ coefficients.

    Attributes:
        kept, removed: (units, multiplicity) positions on the dense weight's input axis.
        coefficients: (kept units, removed units) float64.
    """

    kept: np.ndarray
    removed: np.ndarray
    coefficients: Tensor


@dataclass(frozen=True)
class DataFree:
    """Changes the weights of plain convolutions and linear layers; other layers are only quantized."""

    config: DataFreeConfig = DataFreeConfig()
    after_quantization: ClassVar[bool] = False
    needs_images: ClassVar[bool] = False
    makes_statistics: ClassVar[bool] = True  # for a quantizer that needs statistics, if there are no images

    def apply(self, candidate: CandidateNetwork) -> None:
        """See `Recovery.apply`."""
        _Compensation(candidate, self.config).run()


@dataclass
class _Compensation:
    """The compensation of one candidate, layer by layer."""

    candidate: CandidateNetwork
    config: DataFreeConfig
    estimator: ScaleEstimator = field(init=False)

    def __post_init__(self) -> None:
        self.estimator = ScaleEstimator(self.config.alpha2)
        self.moments = cached_moments(self.candidate, self.config.spatial_correlation)
        self.readings: dict[str, list[tuple[int, TensorSlice]]] = {}
        for index, group in enumerate(self.candidate.graph.groups):
            for name, place in reading_places(self.candidate, group):
                self.readings.setdefault(name, []).append((index, place))

    def run(self) -> None:
        """Compensate and quantize all layers in execution order."""
        for layer in self.candidate.graph.geometry.layers:
            if getattr(self.candidate.layers.get(layer.name), "weight", None) is not None:
                self._visit(layer.name)

    def _visit(self, name: str) -> None:
        candidate, moments = self.candidate, self.moments.get(name)
        predictions = list(self._predictions(name, moments))
        if predictions:
            before = dense_state(candidate, name, moments)
            candidate.set_weight(name, compensated_weight(candidate, name, predictions))
            self._restate(name, before, moments)
        before = current_state(candidate, name, moments)
        if self.config.fit != "moments":
            self._scale(name)
        norm = candidate.norm(name) if is_plain(candidate.layers[name]) else None
        rounded_from = filters(candidate.layers[name], norm) if norm is not None else None
        quantize_in_place(candidate, name, moments, self.config.spatial_correlation)
        if name not in candidate.float_weights:
            return
        self._restate(name, before, moments)
        if rounded_from is not None:
            self.estimator.before[name], self.estimator.after[name] = rounded_from, filters(candidate.layers[name], norm)

    def _restate(self, name: str, before: LayerState, moments: Moments | None) -> None:
        if self.config.statistics:
            restate_statistics(self.candidate, name, before, moments, self.config.spatial_correlation)

    def _scale(self, name: str) -> None:
        for index, place in self.readings.get(name, ()):
            group, kept = self.candidate.graph.groups[index], self.candidate.kept[index]
            quantized = [producer for producer in group.producers if producer in self.estimator.after]
            if quantized:
                scales = self.estimator.scales(self.candidate, group, kept, quantized)
                scale_inputs(self.candidate, name, place, kept, scales)

    # Prediction of removed channels ----------------------------------------------------------------------------------

    def _predictions(self, name: str, moments: Moments | None) -> Iterator[Prediction]:
        pruned = [(index, place) for index, place in self.readings.get(name, ()) if self._removed(index).size]
        if not pruned:
            return
        if self.config.fit == "moments" and moments is not None:
            yield self._from_moments(name, moments)
            return
        for index, place in pruned:
            coefficients = self._from_filters(index)
            if coefficients is not None:
                kept, removed = place.positions[self.candidate.kept[index]], place.positions[self._removed(index)]
                yield Prediction(kept, removed, coefficients)

    def _removed(self, index: int) -> np.ndarray:
        return np.setdiff1d(np.arange(self.candidate.graph.groups[index].units), self.candidate.kept[index])

    def _from_moments(self, name: str, moments: Moments) -> Prediction:
        """Return the prediction by eq. (3) of all channels that a layer reads."""
        area = math.prod(moments.size)
        kept = np.unique(self.candidate.kept_axes(name).inputs // area)
        removed = np.setdiff1d(np.arange(len(moments.mean)), kept)
        key = ("data_free", name, self.config.damping, self.config.spatial_correlation, kept.tobytes())
        coefficients = self.candidate.cache.get(key, lambda: from_covariance(moments, kept, removed, self.config.damping))
        inside = np.arange(area)
        return Prediction(kept[:, None] * area + inside, removed[:, None] * area + inside, coefficients)

    def _from_filters(self, index: int) -> Tensor | None:
        """Return eq. (1) or (2) for a group, None if its producers have no batch norms."""
        candidate, group, kept = self.candidate, self.candidate.graph.groups[index], self.candidate.kept[index]
        nonnegative = self.config.fit != "closed_form"
        key = ("data_free", group.name, self.config.alpha1)
        gram = candidate.cache.get(key, lambda: filter_gram(candidate, group, self.config.alpha1))
        if not len(gram):
            return None
        removed = self._removed(index)
        solve = from_gram_nonnegative if nonnegative else from_gram
        return candidate.cache.get((*key, nonnegative, kept.tobytes()), lambda: solve(gram, kept, removed))


def filter_gram(candidate: CandidateNetwork, group: ChannelGroup, alpha1: float) -> Tensor:
    """Return [Q, V]^T [Q, V] + alpha_1 [P, K]^T [P, K] for the units of a group, (units, units) or (0, 0) without batch norm.

    The systems of several producers are stacked: their Gram matrices are added. The filters of a depthwise convolution are
    multiplied with the filters before it: the Gram matrix of all products of entries is the product of the Gram matrices.
    """
    total = torch.zeros(0, 0, dtype=torch.float64)
    for name, place in normed_producers(candidate, group):
        layer = candidate.dense_layers[name]
        found = filters(layer, candidate.dense_layers[candidate.batch_norms[name]])
        rows, offsets = unit_rows(found.rows, place), unit_rows(found.offsets, place)
        gram = rows @ rows.T + alpha1 * offsets @ offsets.T
        if not len(total):
            total = gram
        else:
            total = total * gram if is_depthwise(layer) else total + gram
    return total


def from_gram(gram: Tensor, kept: np.ndarray, removed: np.ndarray) -> Tensor:
    """Return eq. (1), (kept, removed); if there are several solutions, the one with the smallest norm."""
    matrix = gram.cpu().numpy()
    found = np.linalg.lstsq(matrix[np.ix_(kept, kept)], matrix[np.ix_(kept, removed)], rcond=1e-10)[0]
    return torch.from_numpy(found).to(gram.device)


def from_gram_nonnegative(gram: Tensor, kept: np.ndarray, removed: np.ndarray) -> Tensor:
    """Return eq. (2), (kept, removed)."""
    values, vectors = np.linalg.eigh(gram.cpu().numpy())
    factor = np.sqrt(values.clip(0))[:, None] * vectors.T  # factor^T factor = gram
    solutions = [nnls(factor[:, kept], factor[:, unit])[0] for unit in removed]
    return torch.from_numpy(np.stack(solutions, axis=1)).to(gram.device)


def from_covariance(moments: Moments, kept: np.ndarray, removed: np.ndarray, damping: float) -> Tensor:
    """Return eq. (3), (kept, removed)."""
    covariance = moments.covariance.double()
    matrix, cross = covariance[np.ix_(kept, kept)], covariance[np.ix_(kept, removed)]
    delta = damping * matrix.diagonal().mean().clamp_min(1e-12)
    return torch.linalg.solve(matrix + delta * torch.eye(len(kept), device=delta.device), cross)


def compensated_weight(candidate: CandidateNetwork, name: str, predictions: list[Prediction]) -> Tensor:
    """Return a sliced layer's weight that compensates the removed inputs."""
    axes, dense = candidate.kept_axes(name), candidate.dense_layers[name].weight.detach()
    weight = dense[_index(axes.outputs, dense)].double()
    weight = weight.reshape(*weight.shape[:2], -1)  # (outputs, inputs, area)
    result = weight.clone()
    for prediction in predictions:
        removed = weight[:, _index(prediction.removed, dense)]  # (outputs, units, multiplicity, area)
        change = torch.einsum("oruk,sr->osuk", removed, prediction.coefficients)
        result[:, _index(prediction.kept, dense)] += change
    kept = result[:, _index(axes.inputs, dense)].float()
    return kept.reshape(len(axes.outputs), len(axes.inputs), *dense.shape[2:]).contiguous()


def _index(positions: np.ndarray, tensor: Tensor) -> Tensor:
    """Return positions as an index of a tensor."""
    return torch.from_numpy(positions).to(tensor.device)
