"""Measured latency: a table of layer times, and a correction from the sum of layer times to the time of a whole network.

`secateur profile` (search/profiling/profiler.py) measures the tables; this module only reads them. Time is not a smooth
function of channel counts: kernels process blocks of channels, and a channel count that is not a multiple of the block size
gets another, slower kernel. Each axis of a table therefore has the staircase of a fine scan (`Axis`), and a wider layer may be
faster.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import numpy as np

from secateur.cost_models.core import FLOAT_BITS, InputError, LayerShape, LayerShapes
from secateur.cost_models.precision import FLOAT_WIDTHS, executed_precision, precision_name
from secateur.cost_models.traffic import Traffic

LEAST_SHARE = 0.1
"""A corrected layer time is at least this share of the measured time."""

WORTHWHILE = 1.1
"""A multiple of channels is recommended if one channel less takes at least this many times as long."""

WORTH_MIXING = 0.8
"""Layers of one network are mixed between integers and floats only if the predicted time is below this share of the times of
both other choices. The measured error of predictions is 8 to 33 % for mixed networks and 2 to 5 % for others."""

LayerKey = tuple[str, tuple[int, int], tuple[int, int], tuple[int, int], int]
"""Kind, kernel, stride, out_hw and conv groups (0: depthwise): layers with equal keys differ only in their channel counts."""


def _pair(size: Sequence[int]) -> tuple[int, int]:
    height, width = size  # a list if the table comes from JSON
    return height, width


def layer_key(layer: LayerShape) -> LayerKey:
    """Return the key of the grid with a layer's times."""
    groups = 0 if layer.depthwise else layer.conv_groups
    return layer.kind, _pair(layer.kernel), _pair(layer.stride), _pair(layer.out_hw), groups


def layer_family(kind: str, kernel: tuple[int, int], conv_groups: int) -> str:
    """Return the family of a layer, "depthwise", "linear", "pointwise" or "conv"; each has one staircase and one factor."""
    if conv_groups == 0:
        return "depthwise"
    return "pointwise" if kind == "conv" and tuple(kernel) == (1, 1) else kind


def weight_bytes(bits: int, float_precision: str) -> float:
    """Return the bytes of one weight during execution; `bits` as in `executed_precision`."""
    return FLOAT_WIDTHS[float_precision] / 8 if bits == FLOAT_BITS else bits / 8


@dataclass(frozen=True)
class Axis:
    """The channel counts at which one axis of a grid was measured.

    Attributes:
        counts: channel counts in ascending order.
        multiples: in descending order, e.g. (16, 8). Multiples of the first number have their own kernel, then multiples of the
            second number, and so on; times are interpolated between counts with the same kernel.
        step: for the first kernel, counts of at least `step` take as long as the next multiple of `step`.
    """

    counts: tuple[int, ...]
    multiples: tuple[int, ...] = ()
    step: int = 1

    def coordinates(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return for each count 0..max the indices of two entries of `counts`, and the weight of the second in [0, 1]."""
        counts = np.arange(self.counts[-1] + 1)
        known = np.array(self.counts)
        kinds, known_kinds = count_kinds(counts, self.multiples), count_kinds(known, self.multiples)
        lower, upper, weight = np.zeros(len(counts), int), np.zeros(len(counts), int), np.zeros(len(counts))
        for kind in range(len(self.multiples) + 1):
            rows = np.flatnonzero(kinds == kind)
            same = np.flatnonzero(known_kinds == kind)
            same = same if len(same) else np.arange(len(known))
            wanted = counts[rows]
            if kind == 0:
                rounded = np.minimum(-(-wanted // self.step) * self.step, known[same[-1]])
                wanted = np.where(wanted >= self.step, rounded, wanted)
            position = np.interp(wanted, known[same], np.arange(len(same)))
            below = np.minimum(position.astype(int), max(len(same) - 2, 0))
            lower[rows], upper[rows] = same[below], same[np.minimum(below + 1, len(same) - 1)]
            weight[rows] = position - below
        return lower, upper, weight


def count_kinds(counts: np.ndarray, multiples: tuple[int, ...]) -> np.ndarray:
    """Return for each count the index of the first of `multiples` that divides it; len(multiples) if none does."""
    kinds = np.full(len(counts), len(multiples))
    for index in reversed(range(len(multiples))):
        kinds[counts % multiples[index] == 0] = index
    return kinds


@dataclass(frozen=True)
class LayerGrid:
    """Times of one kind of layer in one precision, over its channel counts.

    Attributes:
        kind, kernel, stride, out_hw: as in `LayerShape`.
        conv_groups: 0 means depthwise, as in `LayerKey`.
        precision: precision of the execution, e.g. "float32" or "int8".
        in_axis, out_axis: channel counts; a depthwise layer has the single count 1 in `out_axis`.
        milliseconds: times of the layer's kernel; one tuple per entry of `in_axis`, one number per entry of `out_axis`.
        spread: (75 % quantile - 25 % quantile) / median over the repeats, in the same shape.
        repeats: smallest number of timed runs per entry.
    """

    kind: str
    kernel: tuple[int, int]
    stride: tuple[int, int]
    out_hw: tuple[int, int]
    conv_groups: int
    precision: str
    in_axis: Axis
    out_axis: Axis
    milliseconds: tuple[tuple[float, ...], ...]
    spread: tuple[tuple[float, ...], ...] = ()
    repeats: int = 0

    def __post_init__(self) -> None:
        if len(self.milliseconds) != len(self.in_axis.counts) or {len(row) for row in self.milliseconds} != {
            len(self.out_axis.counts)
        }:
            raise InputError("`milliseconds` must have one row per in-channel count and one number per out-channel count")

    @property
    def key(self) -> LayerKey:
        """The `layer_key` of its layers."""
        return self.kind, _pair(self.kernel), _pair(self.stride), _pair(self.out_hw), self.conv_groups

    @property
    def family(self) -> str:
        """The `layer_family` of its layers."""
        return layer_family(self.kind, self.kernel, self.conv_groups)

    def covers(self, in_channels: int, out_channels: int) -> bool:
        """Return whether the grid covers a layer of this dense size and all of its pruned sizes."""
        wanted = [(self.in_axis, in_channels)] + [(self.out_axis, out_channels)] * (self.conv_groups != 0)
        return all(count in axis.counts or (len(axis.counts) > 1 and count <= axis.counts[-1]) for axis, count in wanted)


@dataclass(frozen=True)
class Staircase:
    """A fine scan over one channel count of one layer.

    Attributes:
        family: family of layers for which it is used, see `layer_family`.
        axis: "in" or "out"; a depthwise layer has only "in".
        precision: precision of the execution.
        layer: description of the scanned layer.
        multiples, step: the staircase with the best fit to the scan, see `Axis`.
        counts: the scanned channel counts.
        milliseconds: time of the layer for each count.
    """

    family: str
    axis: str
    precision: str
    layer: str
    multiples: tuple[int, ...]
    step: int
    counts: tuple[int, ...]
    milliseconds: tuple[float, ...]

    @property
    def worthwhile(self) -> tuple[int, ...]:
        """Those of `multiples` that are clearly faster than the counts one below them."""
        times = dict(zip(self.counts, self.milliseconds, strict=True))

        def gain(multiple: int) -> float:
            return float(np.median([times[count - 1] / times[count] for count in times if count % multiple == 0 and count > 1]))

        return tuple(multiple for multiple in self.multiples if gain(multiple) > WORTHWHILE)


@dataclass(frozen=True)
class Correction:
    """The difference between whole networks and separately measured layers, for one precision; fitted to whole networks.

    The time of a layer is factor x its time in the grid + per_layer + per_weight_megabyte x its weights; the time of a network
    is the sum over its layers + per_megabyte x the traffic of all other steps.

    Attributes:
        precision: precision of the execution.
        factors: {family: factor}; 1 for missing families.
        per_layer: milliseconds for each call of a layer: dispatch of the operators around it, minus the overhead of the
            runtime's profiler in the measured time. It can be negative; see `LEAST_SHARE`.
        per_weight_megabyte: milliseconds for each 10^6 bytes of weights, which in a whole network are less often in a cache.
        per_megabyte: milliseconds for each 10^6 bytes that steps without a layer move (sums, pooling, reordering).
    """

    precision: str
    factors: dict[str, float] = field(default_factory=dict)
    per_layer: float = 0.0
    per_weight_megabyte: float = 0.0
    per_megabyte: float = 0.0


@dataclass(frozen=True)
class WholeModelCheck:
    """Predicted and measured latencies of random compressed versions that were not used for the fit.

    Attributes:
        precision: precision of all layers, or "mixed".
        fitted: number of other versions to which the correction was fitted.
        mean_error: mean of |predicted / measured - 1|.
        uncorrected_error: the same for the sum of the layers' times without correction.
        rank_correlation: Spearman correlation between predicted and measured latencies.
        predicted, measured: milliseconds of each version.
    """

    precision: str
    fitted: int
    mean_error: float
    uncorrected_error: float
    rank_correlation: float
    predicted: tuple[float, ...]
    measured: tuple[float, ...]


@dataclass(frozen=True)
class LatencyTable:
    """All measurements on one device with one runtime.

    Attributes:
        model: the profiled model, e.g. "torchvision:resnet18 at 3x224x224".
        runtime, runtime_version: the runtime that executed the layers.
        threads: threads of the runtime.
        batch: images per run; milliseconds are per run.
        warm_up: number of runs before each measurement that are not timed.
        float_precision: precision of layers that are not executed in integers.
        grids: layer times.
        staircases: scans from which the axes of the grids follow.
        corrections: one per precision.
        checks: comparisons of predicted and measured latencies of whole networks.
        border: milliseconds for each 10^6 values that are converted from one precision to another.
    """

    model: str
    runtime: str
    runtime_version: str
    threads: int
    batch: int
    warm_up: int
    float_precision: str
    grids: tuple[LayerGrid, ...]
    staircases: tuple[Staircase, ...] = ()
    corrections: tuple[Correction, ...] = ()
    checks: tuple[WholeModelCheck, ...] = ()
    border: float = 0.0

    @property
    def channel_multiple(self) -> int:
        """The recommended `space.channel_multiple`: the largest multiple that is clearly faster in any scan."""
        return max((multiple for stairs in self.staircases for multiple in stairs.worthwhile), default=1)


@dataclass(frozen=True)
class TableLatency:
    """Milliseconds of one run, from a table.

    A layer with integer bits is executed in integers only if this makes the network faster; exports use the same choice
    (`executed`). A table has the times of the profiled model's layers; other layers are an InputError.

    Attributes:
        table: the measurements.
        integer_bits: bit-widths of the device's integer kernels; all other layers run in the table's float precision.
    """

    table: LatencyTable
    integer_bits: tuple[int, ...] = ()
    name: ClassVar[str] = "latency_ms"

    def executed(self, shapes: LayerShapes) -> np.ndarray:
        """Return the bits in which each layer is executed, (population, L): the fastest of three choices for each network.

        The choices are: all layers in the float precision; integers for all layers whose bits allow them; or the best precision
        for each layer, if this is clearly faster than the first two choices (`WORTH_MIXING`). Of equally fast choices, the
        first one is used.

        Raises:
            InputError: if a layer is not in the table.
        """
        integers = executed_precision(shapes.weight_bits, shapes.activation_bits, self.integer_bits)
        floats = np.full_like(integers, FLOAT_BITS)
        if np.array_equal(integers, floats):
            return floats
        options = np.stack([floats, integers])
        times = np.stack([self._option_times(shapes, option) for option in options])
        conversions = self._conversions(shapes)
        mixed = _fastest_options(options, times, conversions)
        choices = np.stack([floats, integers, mixed])
        layers = np.stack([*times, np.where(mixed == FLOAT_BITS, *times)])
        totals = np.stack([_sum(*choice, conversions) for choice in zip(layers, choices, strict=True)])
        totals[2] /= WORTH_MIXING
        return choices[totals.argmin(axis=0), np.arange(len(shapes))]

    def per_layer(self, shapes: LayerShapes, executed: np.ndarray | None = None) -> np.ndarray:
        """Return each layer's share in ms, (population, L): the time of its kernel in a whole network, for all calls.

        Args:
            shapes: shapes of the networks.
            executed: bits in which each layer is executed, (population, L); default: the fastest choice.
        Raises:
            InputError: if a layer is not in the table.
        """
        return self._per_layer(shapes, self.executed(shapes) if executed is None else executed)

    def total(self, shapes: LayerShapes, executed: np.ndarray | None = None) -> np.ndarray:
        """Return the latency of each network in ms, (population,): layers, other steps, and conversions between precisions.

        Arguments and errors as in `per_layer`.
        """
        executed = self.executed(shapes) if executed is None else executed
        return _sum(self._option_times(shapes, executed), executed, self._conversions(shapes))

    @property
    def _bits(self) -> tuple[int, ...]:
        return (*self.integer_bits, FLOAT_BITS)

    def _option_times(self, shapes: LayerShapes, executed: np.ndarray) -> np.ndarray:
        """Return each layer's time with an equal share of the steps between the layers, (population, L)."""
        times = self._per_layer(shapes, executed)
        moved, _ = Traffic(self.table.float_precision, self.integer_bits).other_steps(shapes)
        for bits, correction in self._corrections.items():
            shares = correction.per_megabyte * 1e-6 * moved / executed.shape[1]
            times += (executed == bits) * shares[:, None]
        return times

    def _per_layer(self, shapes: LayerShapes, executed: np.ndarray) -> np.ndarray:
        ins, outs = shapes.in_channels.astype(int), shapes.out_channels.astype(int)
        milliseconds = np.zeros(executed.shape)
        for bits in self._bits:
            chosen = executed == bits
            if not chosen.any():
                continue
            for grid, layers in self._grids_of(shapes, bits, np.flatnonzero(chosen.any(axis=0))):
                times = self._lookup[grid](ins[:, layers], outs[:, layers])
                times *= [shapes.geometry.layers[index].calls for index in layers]
                milliseconds[:, layers] = np.where(chosen[:, layers], times, milliseconds[:, layers])
            if bits in self._corrections and self._corrections[bits].per_weight_megabyte:
                width = weight_bytes(bits, self.table.float_precision)
                milliseconds += chosen * shapes.weights * (1e-6 * width * self._corrections[bits].per_weight_megabyte)
        return milliseconds

    def _conversions(self, shapes: LayerShapes) -> np.ndarray:
        """Return the milliseconds of converting each layer's input to another precision, (population, L)."""
        layers = shapes.geometry.layers
        pixels = np.array([np.prod(layer.out_hw) * np.prod(layer.stride) * layer.calls for layer in layers], float)
        return self.table.border * 1e-6 * shapes.in_channels * pixels

    def _grids_of(self, shapes: LayerShapes, bits: int, used: np.ndarray) -> Iterator[tuple[int, list[int]]]:
        """Yield (index of a grid, its layers) for the layers `used` that are executed in a precision."""
        found: dict[int, list[int]] = {}
        precision = precision_name(bits, self.table.float_precision)
        for index in used:
            layer = shapes.geometry.layers[index]
            grid = self._index.get((layer_key(layer), precision))
            if grid is None or not self.table.grids[grid].covers(layer.in_channels, layer.out_channels):
                raise InputError(
                    f"The latency table of {self.table.model!r} has no {precision} times for layer {layer.name!r} "
                    f"({_in_words(layer)}): profile this model."
                )
            found.setdefault(grid, []).append(int(index))
        yield from found.items()

    @cached_property
    def _index(self) -> dict[tuple[LayerKey, str], int]:
        return {(grid.key, grid.precision): index for index, grid in enumerate(self.table.grids)}

    @cached_property
    def _corrections(self) -> dict[int, Correction]:
        by_name = {correction.precision: correction for correction in self.table.corrections}
        named = {bits: precision_name(bits, self.table.float_precision) for bits in self._bits}
        return {bits: by_name[name] for bits, name in named.items() if name in by_name}

    @cached_property
    def _lookup(self) -> list[_GridLookup]:
        found = {correction.precision: correction for correction in self.table.corrections}
        return [_GridLookup(grid, found.get(grid.precision, Correction(grid.precision))) for grid in self.table.grids]


def _sum(times: np.ndarray, executed: np.ndarray, conversions: np.ndarray) -> np.ndarray:
    """Return the milliseconds of each network, (population,): its layers, and conversions where the precision changes."""
    before = np.concatenate([np.full((len(executed), 1), FLOAT_BITS), executed[:, :-1]], axis=1)
    return (times + (executed != before) * conversions).sum(axis=1)


def _fastest_options(options: np.ndarray, times: np.ndarray, conversions: np.ndarray) -> np.ndarray:
    """Return the bits of each layer with the smallest total time of its network, (population, L).

    Dynamic programming over the layers in execution order (the recursion of the Viterbi algorithm): the best sum up to a layer
    depends on the best sums up to the layer before, one for each of its options. Of equal sums, that of the first option is
    used.

    Args:
        options: bits of each option, (options, population, L).
        times: milliseconds of each layer in each option, (options, population, L).
        conversions: milliseconds for converting a layer's input from other bits, (population, L); images are floats.
    """
    best = times[:, :, 0] + conversions[:, 0] * (options[:, :, 0] != FLOAT_BITS)
    before = []
    for layer in range(1, times.shape[2]):
        changes = options[:, None, :, layer - 1] != options[None, :, :, layer]
        sums = best[:, None] + conversions[:, layer] * changes  # (option before, option, population)
        before.append(sums.argmin(axis=0))
        best = sums.min(axis=0) + times[:, :, layer]
    rows, option = np.arange(times.shape[1]), best.argmin(axis=0)
    chosen = [options[option, rows, -1]]
    for layer in reversed(range(times.shape[2] - 1)):
        option = before[layer][option, rows]
        chosen.append(options[option, rows, layer])
    return np.stack(chosen[::-1], axis=1)


class _GridLookup:
    """Interpolation in one grid."""

    def __init__(self, grid: LayerGrid, correction: Correction):
        times = correction.factors.get(grid.family, 1.0) * np.array(grid.milliseconds)
        self._times = np.maximum(times + correction.per_layer, LEAST_SHARE * times)
        self._in, self._out = grid.in_axis.coordinates(), grid.out_axis.coordinates()

    def __call__(self, ins: np.ndarray, outs: np.ndarray) -> np.ndarray:
        """Return milliseconds for channel counts, in their shape."""
        low_in, high_in, weight_in = (part[ins] for part in self._in)
        if self._times.shape[1] == 1:
            column = self._times[:, 0]
            return column[low_in] * (1 - weight_in) + column[high_in] * weight_in
        low_out, high_out, weight_out = (part[outs] for part in self._out)
        first = self._times[low_in, low_out] * (1 - weight_out) + self._times[low_in, high_out] * weight_out
        second = self._times[high_in, low_out] * (1 - weight_out) + self._times[high_in, high_out] * weight_out
        return first * (1 - weight_in) + second * weight_in


def _in_words(layer: LayerShape) -> str:
    size = "x".join(map(str, layer.out_hw))
    kind = "depthwise conv" if layer.depthwise else layer.kind
    kernel = f" {layer.kernel[0]}x{layer.kernel[1]}, stride {layer.stride[0]}," if layer.kind == "conv" else ""
    return f"{kind}{kernel} {layer.in_channels} to {layer.out_channels} channels, output {size}"
