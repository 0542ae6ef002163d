"""Measured latency: a table of layer times, and the correction that turns their sum into the time of a whole network.

`secateur profile` (search/profiling/profiler.py) measures the tables; here they are only read. Time is no smooth function of
channel counts: kernels work on blocks of channels, and counts that are no multiple of some number get another, slower
kernel. So each axis of a table knows the staircase that a fine scan has shown (`Axis`), and a wider layer may be faster.
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
"""What a correction leaves of the time of a layer, at least."""

WORTHWHILE = 1.1
"""A kernel is worth a channel multiple if one channel less takes this many times as long."""

WORTH_MIXING = 0.8
"""An execution that changes between integers and floats is chosen if its predicted time is below this share of both executions
without such a choice. Predictions of mixed networks were measured to be 8 to 33 % off, those of others 2 to 5 %."""

LayerKey = tuple[str, tuple[int, int], tuple[int, int], tuple[int, int], int]
"""What layers have in common whose times differ by channel counts only: kind, kernel, stride, out_hw, conv groups (0:
depthwise, one per channel)."""


def _pair(size: Sequence[int]) -> tuple[int, int]:
    height, width = size  # lists, where the table comes from JSON
    return height, width


def layer_key(layer: LayerShape) -> LayerKey:
    """Return the key of the grid that a layer's times are in."""
    groups = 0 if layer.depthwise else layer.conv_groups
    return layer.kind, _pair(layer.kernel), _pair(layer.stride), _pair(layer.out_hw), groups


def layer_family(kind: str, kernel: tuple[int, int], conv_groups: int) -> str:
    """Return what shares one staircase and one factor: "depthwise", "linear", "pointwise" or "conv"."""
    if conv_groups == 0:
        return "depthwise"
    return "pointwise" if kind == "conv" and tuple(kernel) == (1, 1) else kind


def weight_bytes(bits: int, float_precision: str) -> float:
    """Return the bytes of one weight as it is executed; `bits` as in `executed_precision`."""
    return FLOAT_WIDTHS[float_precision] / 8 if bits == FLOAT_BITS else bits / 8


@dataclass(frozen=True)
class Axis:
    """The channel counts at which one axis of a grid was measured.

    Attributes:
        counts: ascending.
        multiples: descending, e.g. (16, 8): multiples of the first have a kernel of their own, then those of the second, and
            so on; times are interpolated among counts of one kind.
        step: of the first kind, counts from `step` on cost as much as the next multiple of `step`.
    """

    counts: tuple[int, ...]
    multiples: tuple[int, ...] = ()
    step: int = 1

    def coordinates(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return for each count 0..max: the indices of two entries of `counts`, and the weight of the second in [0, 1]."""
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
    """Return the index of the first of `multiples` that divides each count, their number if none does."""
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
        precision: what it was executed in, e.g. "float32" or "int8".
        in_axis, out_axis: channel counts; a depthwise layer has the single count 1 in `out_axis`.
        milliseconds: of the layer's kernel alone, one tuple per entry of `in_axis`, one number per entry of `out_axis`.
        spread: likewise, (75 % quantile - 25 % quantile) / median over the repeats.
        repeats: least number of timed runs per entry.
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
        """What `layer_key` says of its layers."""
        return self.kind, _pair(self.kernel), _pair(self.stride), _pair(self.out_hw), self.conv_groups

    @property
    def family(self) -> str:
        """What `layer_family` says of its layers."""
        return layer_family(self.kind, self.kernel, self.conv_groups)

    def covers(self, in_channels: int, out_channels: int) -> bool:
        """Whether a layer of this dense size, and what pruning leaves of it, is within the grid."""
        wanted = [(self.in_axis, in_channels)] + [(self.out_axis, out_channels)] * (self.conv_groups != 0)
        return all(count in axis.counts or (len(axis.counts) > 1 and count <= axis.counts[-1]) for axis, count in wanted)


@dataclass(frozen=True)
class Staircase:
    """A fine scan over one channel count of one layer.

    Attributes:
        family: which layers it is taken for, see `layer_family`.
        axis: "in" or "out"; a depthwise layer has "in" only.
        precision: what the layer was executed in.
        layer: what was scanned, in words.
        multiples, step: the staircase that explains the scan best, see `Axis`.
        counts: the scanned channel counts.
        milliseconds: the layer's time at each.
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
        """Those of `multiples` that cost clearly less than the counts just below them."""
        times = dict(zip(self.counts, self.milliseconds, strict=True))

        def gain(multiple: int) -> float:
            return float(np.median([times[count - 1] / times[count] for count in times if count % multiple == 0 and count > 1]))

        return tuple(multiple for multiple in self.multiples if gain(multiple) > WORTHWHILE)


@dataclass(frozen=True)
class Correction:
    """What a whole network takes beyond its layers measured alone, for one precision, fitted to whole networks.

    A layer takes factor x its time in the grid + per_layer + per_weight_megabyte x its weights; a network takes its layers
    and per_megabyte x the traffic of all other steps.

    Attributes:
        precision: what the layers were executed in.
        factors: by family; 1 if a family is missing.
        per_layer: milliseconds for each call of a layer: dispatch of the operators around it, less what the profile of the
            runtime had added to its time. It never takes more of a layer than `LEAST_SHARE` leaves.
        per_weight_megabyte: milliseconds for each 10^6 bytes of weights, which come from farther away than in a small model.
        per_megabyte: milliseconds for each 10^6 bytes that steps without a layer move (sums, pooling, reordering).
    """

    precision: str
    factors: dict[str, float] = field(default_factory=dict)
    per_layer: float = 0.0
    per_weight_megabyte: float = 0.0
    per_megabyte: float = 0.0


@dataclass(frozen=True)
class WholeModelCheck:
    """Predictions for random compressed versions that took no part in the fit, against their measured latency.

    Attributes:
        precision: of all layers, or "mixed".
        fitted: number of other versions that the correction was fitted to.
        mean_error: mean of |predicted / measured - 1|.
        uncorrected_error: the same for the plain sum of the layers' times.
        rank_correlation: Spearman's, between predicted and measured.
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
    """Everything that was measured on one device with one runtime.

    Attributes:
        model: what was profiled, e.g. "torchvision:resnet18 at 3x224x224".
        runtime, runtime_version: what executed the layers.
        threads: of the runtime.
        batch: images per run; milliseconds are per run.
        warm_up: runs that were not timed, per measurement.
        float_precision: how layers are executed that are not integer.
        grids: layer times.
        staircases: the scans behind the axes of the grids.
        corrections: one per precision.
        checks: how far whole networks were from the predictions.
        border: milliseconds for each 10^6 values that pass from one precision to another.
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
        """The recommended `space.channel_multiple`: the largest multiple whose own kernel is worth it in some scan."""
        return max((multiple for stairs in self.staircases for multiple in stairs.worthwhile), default=1)


@dataclass(frozen=True)
class TableLatency:
    """Milliseconds of one run, from a table.

    A layer that has bits for integers is executed in them only if that makes the network faster; exports follow the same
    choice (`executed`). A table has the times of the layers of the profiled model; other layers are an InputError.

    Attributes:
        table: the measurements.
        integer_bits: widths that the device has integer kernels for; all others run in the table's float precision.
    """

    table: LatencyTable
    integer_bits: tuple[int, ...] = ()
    name: ClassVar[str] = "latency_ms"

    def executed(self, shapes: LayerShapes) -> np.ndarray:
        """Return the bits that each layer is executed in, (population, L): the fastest of three choices for each network.

        All layers in the float precision; integers wherever the bits allow them; or layer by layer, if that is clearly faster
        than the first two (`WORTH_MIXING`). Of equally fast choices the first is taken.

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
        """Return each layer's share in ms, (population, L): its kernel's time in a whole network, calls included.

        Args:
            shapes: of the networks.
            executed: bits that each layer is executed in, (population, L); default: the fastest choice.
        Raises:
            InputError: if a layer is not in the table.
        """
        return self._per_layer(shapes, self.executed(shapes) if executed is None else executed)

    def total(self, shapes: LayerShapes, executed: np.ndarray | None = None) -> np.ndarray:
        """Return the latency of each network in ms, (population,): layers, steps between them, changes of precision.

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
        """Yield (index of a grid, the layers that it covers) for the layers `used` in a precision."""
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
    """Return the bits of each layer for the least total time of its network, (population, L).

    Dynamic programming over the layers in execution order (the recursion of the Viterbi algorithm): the best sum up to a layer
    depends on the best sums up to the layer before, one for each of its options. Of equal sums the first option's is taken.

    Args:
        options: bits of each option, (options, population, L).
        times: milliseconds of each layer in each option, likewise.
        conversions: milliseconds of converting a layer's input from other bits, (population, L); images are floats.
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
    """Interpolates in one grid."""

    def __init__(self, grid: LayerGrid, correction: Correction):
        times = correction.factors.get(grid.family, 1.0) * np.array(grid.milliseconds)
        self._times = np.maximum(times + correction.per_layer, LEAST_SHARE * times)
        self._in, self._out = grid.in_axis.coordinates(), grid.out_axis.coordinates()

    def __call__(self, ins: np.ndarray, outs: np.ndarray) -> np.ndarray:
        """Return milliseconds at channel counts of any equal shape."""
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
