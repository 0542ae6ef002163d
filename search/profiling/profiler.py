"""Measures a device: times of layers over their channel counts, and how whole networks differ from the sum of their layers.

The method of nn-Meter (Zhang et al. 2021) and of the latency tables of hardware-aware search (ProxylessNAS, Cai et al. 2019,
arXiv:1812.00332), with two differences: channel counts are interpolated along the staircase that a fine scan shows, and a
correction is fitted to whole compressed networks and checked on others, so every table says how far it can be trusted.
"""

from __future__ import annotations

import os
import platform
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import cast

import numpy as np
from torch import nn

from secateur.cost_models.core import FLOAT_BITS, LayerShapes
from secateur.cost_models.device import SCHEMA, Device, FloatPrecision
from secateur.cost_models.latency_table import (
    Axis,
    LatencyTable,
    LayerGrid,
    LayerKey,
    Staircase,
    WholeModelCheck,
    layer_family,
    layer_key,
)
from secateur.envs.core import InputError
from secateur.envs.model_graph.plan import ModelGraph
from secateur.search.profiling.eager import SlicedModules
from secateur.search.profiling.fitting import check, fit_correction
from secateur.search.profiling.layer_models import LayerPoint
from secateur.search.profiling.measuring import Journal, LayerTimer, PointTime, chunks, merged
from secateur.search.profiling.plan import grid_axes, scan_points, scanned_layers
from secateur.search.profiling.runtimes import WARM_UP, PyTorch, Runtime, measure_latencies
from secateur.search.profiling.staircases import FULL, QUICK, Density, find_staircase
from secateur.search.profiling.whole_models import CompressedModels, DenseExport, export_dense, random_widths

INTEGER_BITS = {"int8": 8}
"""Integer precisions, and the bits that a policy must not exceed to be executed in them."""
TOGETHER_SHARE = 2.0
"""Layers that are timed together have this share of the network's weights, so that each finds other layers in the caches."""
LEAST_WEIGHTS = 1e5
"""Layers with fewer weights are timed together, because all of them stay in the nearest caches."""
TOGETHER_WEIGHTS = 6e7
"""Whole networks that take turns may have this many parameters together."""

Note = Callable[[str], None]
Advance = Callable[[float], None]


@dataclass(frozen=True)
class ProfileConfig:
    """How to measure.

    Attributes:
        precisions: one float precision, and possibly "int8".
        threads: of the runtime.
        batch: images per run.
        rounds: how often all layers are visited, so that no layer is only measured while something disturbs the machine.
        seconds: of each visit to a group of layers, and of each whole network.
        scanned: channel counts of a scan for the staircase.
        density: of the channel counts that are measured for every layer.
        fitted, checked: whole networks per precision that the correction is fitted to, and checked on.
        mixed: checked networks that are measured in mixed precision too.
        seed: random seed of the compressed networks.
    """

    precisions: tuple[str, ...] = ("float32", "int8")
    threads: int = 1
    batch: int = 1
    rounds: int = 2
    seconds: float = 0.6
    scanned: int = 72
    density: Density = FULL
    fitted: int = 20
    checked: int = 20
    mixed: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        floats = [name for name in self.precisions if name not in INTEGER_BITS]
        if len(floats) != 1:
            wrong = f"must name one float precision, and optionally int8, but got {', '.join(self.precisions)}."
            raise InputError(f"`precisions` {wrong}", f"`--precisions` {wrong}")
        if min(self.threads, self.batch) < 1 or min(self.fitted, self.checked) < 2 or self.seconds <= 0:
            wrong = "must be at least 1, and at least two networks must be fitted and checked."
            raise InputError(f"`threads` and `batch` {wrong}", f"`--threads` and `--batch` {wrong}")

    @classmethod
    def quick(cls, precisions: tuple[str, ...] = ("float32", "int8"), threads: int = 1, batch: int = 1) -> ProfileConfig:
        """Return how to measure in seconds rather than minutes: fewer channel counts, repeats and networks."""
        return cls(precisions, threads, batch, rounds=1, seconds=0.05, scanned=40, density=QUICK, fitted=10, checked=4, mixed=0)

    @property
    def float_precision(self) -> str:
        """How layers are executed that are not integer."""
        return next(name for name in self.precisions if name not in INTEGER_BITS)

    @property
    def integer_bits(self) -> tuple[int, ...]:
        """Widths that integer kernels are measured for."""
        return tuple(INTEGER_BITS[name] for name in self.precisions if name in INTEGER_BITS)


@dataclass(frozen=True)
class Subject:
    """A network to profile.

    Attributes:
        name: e.g. "torchvision:resnet18".
        model: the network in eval mode, with any weights.
        graph: its plan.
        image_shape: (channels, height, width).
    """

    name: str
    model: nn.Module
    graph: ModelGraph
    image_shape: tuple[int, ...]


def profile(subject: Subject, runtime: Runtime, config: ProfileConfig, journal: Journal, note: Note, advance: Advance) -> Device:
    """Return the device that this process runs on, measured with this network.

    Args:
        journal: keeps the measurements.
        note: called with the current stage, in words.
        advance: called with the finished share of the work, in [0, 1].
    """
    return _Profiler(subject, runtime, config, journal, note, advance).device()


class _Profiler:
    def __init__(self, subject: Subject, runtime: Runtime, config: ProfileConfig, journal: Journal, note: Note, advance: Advance):
        self._subject, self._runtime, self._config = subject, runtime, config
        self._journal, self._note, self._advance = journal, note, advance
        self._timer = LayerTimer(runtime, config.threads, config.batch, config.seconds)
        self._weights = max(TOGETHER_SHARE * float(subject.graph.geometry.shapes().weights.sum()), LEAST_WEIGHTS)

    def device(self) -> Device:
        config, subject = self._config, self._subject
        staircases = self._staircases()
        shape = "x".join(map(str, subject.image_shape))
        table = LatencyTable(
            model=f"{subject.name} at {shape}",
            runtime=self._runtime.name,
            runtime_version=self._runtime.version(),
            threads=config.threads,
            batch=config.batch,
            warm_up=WARM_UP,
            float_precision=config.float_precision,
            grids=self._grids(staircases),
            staircases=staircases,
            border=self._journal.get("border", self._timer.conversion) if config.integer_bits else 0.0,
        )
        machine = describe_machine()
        return Device(
            schema=SCHEMA,
            name=f"{machine['processor']}, {config.threads} thread{'s' * (config.threads != 1)}, {self._runtime.name}",
            kind="measured",
            sources=(f"measured by `secateur profile{' --quick' * (config.density == QUICK)}` with {table.model}",),
            machine=machine,
            float_precision=cast(FloatPrecision, config.float_precision),
            integer_bits=config.integer_bits,
            table=self._corrected(table),
        )

    def _visit(self, name: str, points: Sequence[LayerPoint], precision: str) -> list[PointTime]:
        """Return the times of points, measured in chunks."""
        times: list[PointTime] = []
        for index, chunk in enumerate(chunks(points, self._config.batch, self._weights)):
            entry = f"{name}/{index}/{zlib.crc32(repr(chunk).encode()):08x}"  # other points are other measurements
            times += self._journal.get(entry, partial(self._timer.times, chunk, precision))
        return [(fast, low, int(repeats)) for fast, low, repeats in times]

    def _staircases(self) -> tuple[Staircase, ...]:
        found = []
        geometry = self._subject.graph.geometry
        jobs = [(layer, family, axis) for family, layer in scanned_layers(geometry).items() for axis in ("in", "out")]
        for precision in self._config.precisions:
            for layer, family, axis in jobs:
                points = scan_points(geometry, layer, axis, self._config.scanned)
                if not points:
                    continue
                name = f"scan/{precision}/{family}/{axis}"
                self._note(f"scanning channel counts: {family} layers, {axis} channels, {precision}")
                visits = [
                    self._visit(f"{name}/{visit}", list(points.values()), precision) for visit in range(self._config.rounds)
                ]
                milliseconds = [time for time, _, _ in merged(visits)]
                multiples, step, _ = find_staircase(list(points), milliseconds, self._config.density)
                words = f"{layer.name} ({_in_words(layer_key(layer))})"
                found.append(Staircase(family, axis, precision, words, multiples, step, tuple(points), _rounded(milliseconds)))
        return tuple(found)

    def _grids(self, staircases: Sequence[Staircase]) -> tuple[LayerGrid, ...]:
        geometry, rounds = self._subject.graph.geometry, self._config.rounds
        axes = grid_axes(geometry, staircases, self._config.precisions, self._config.density)
        visits: dict[tuple[LayerKey, str], list[list[PointTime]]] = {plan: [] for plan in axes}
        for visit in range(rounds):
            for number, ((key, precision), (ins, outs)) in enumerate(axes.items()):
                points = [LayerPoint(key, i, i * o if key[4] == 0 else o) for i in ins.counts for o in outs.counts]
                self._note(f"layers, visit {visit + 1} of {rounds}: {_in_words(key)}, {precision}, {len(points)} sizes")
                visits[key, precision].append(self._visit(f"grid/{precision}/{key}/{visit}", points, precision))
                self._advance((visit * len(axes) + number + 1) / (rounds * len(axes)) * 0.5)
        return tuple(_grid(key, precision, *axes[key, precision], merged(times)) for (key, precision), times in visits.items())

    def _corrected(self, table: LatencyTable) -> LatencyTable:
        """Return the table with corrections fitted to whole networks, and their check."""
        config, graph = self._config, self._subject.graph
        rng = np.random.default_rng(config.seed)
        widths = random_widths(graph, config.fitted + config.checked, rng)
        measured = {precision: self._whole_networks(widths, precision) for precision in config.precisions}
        shapes = {}
        for precision in config.precisions:
            bits = np.full((len(widths), len(graph.geometry.layers)), INTEGER_BITS.get(precision, FLOAT_BITS))
            shapes[precision] = graph.geometry.shapes(np.array(widths), bits, bits)
        fit, rest = slice(0, config.fitted), slice(config.fitted, None)
        corrections = tuple(
            fit_correction(table, config.integer_bits, _rows(shapes[name], fit), measured[name][fit], name)
            for name in config.precisions
        )
        table = replace(table, corrections=corrections)
        checks = tuple(
            check(table, config.integer_bits, _rows(shapes[name], rest), measured[name][rest], name, config.fitted)
            for name in config.precisions
        )
        if len(checks) > 1 and config.mixed:
            checks = (*checks, self._mixed_check(table, widths[-config.mixed :]))
        return replace(table, checks=checks)

    def _mixed_check(self, table: LatencyTable, widths: Sequence[Sequence[int]]) -> WholeModelCheck:
        """Return the check with networks whose random half of layers is in the float precision; the fit excludes them."""
        config, layers = self._config, self._subject.graph.geometry.layers
        rng = np.random.default_rng(config.seed)
        bits = np.where(rng.random((len(widths), len(layers))) < 0.5, FLOAT_BITS, INTEGER_BITS["int8"])
        milliseconds = []
        for index, (row, row_bits) in enumerate(zip(widths, bits, strict=True)):
            self._note(f"whole networks in mixed precision: {index} of {len(widths)}")
            floats = [layer.name for layer, b in zip(layers, row_bits, strict=True) if b == FLOAT_BITS]
            milliseconds += self._journal.get(
                f"mixed/{index}",
                partial(self._mixed_milliseconds, row, floats),
            )
        shapes = self._subject.graph.geometry.shapes(np.array(widths), bits, bits)
        return check(table, config.integer_bits, shapes, milliseconds, "mixed", 0)

    def _whole_networks(self, widths: Sequence[Sequence[int]], precision: str) -> list[float]:
        """Return the measured milliseconds of whole networks; as many as fit into memory take turns."""
        config, models = self._config, None
        weights = self._subject.graph.geometry.shapes(np.array(widths)).weights.sum(axis=1)
        milliseconds: list[float] = []
        while len(milliseconds) < len(widths):
            start = len(milliseconds)
            count = max(1, int(np.searchsorted(np.cumsum(weights[start:]), TOGETHER_WEIGHTS)))
            part = widths[start : start + count]
            self._note(f"whole networks in {precision}: {start} of {len(widths)}")
            name = f"whole/{precision}/{start}"
            if name not in self._journal and models is None:
                models = self._versions(precision)
            milliseconds += self._journal.get(name, partial(self._together, models, part, precision))
            done = config.precisions.index(precision) + len(milliseconds) / len(widths)
            self._advance(0.5 + 0.5 * done / len(config.precisions))
        return milliseconds

    def _versions(self, precision: str, floats: Sequence[str] = ()) -> CompressedModels | SlicedModules:
        subject, batch = self._subject, self._config.batch
        if self._runtime.name == PyTorch.name:
            return SlicedModules(subject.model, subject.graph, subject.image_shape, batch)
        # A runtime executes bfloat16 from a float32 model.
        exported = precision if precision in INTEGER_BITS else "float32"
        return CompressedModels(self._dense_export, subject.graph, exported, floats)

    @cached_property
    def _dense_export(self) -> DenseExport:
        subject = self._subject
        return export_dense(subject.model, subject.graph, subject.image_shape, self._config.batch)

    def _mixed_milliseconds(self, widths: Sequence[int], floats: Sequence[str]) -> list[float]:
        return self._together(self._versions("int8", floats), [widths], self._config.float_precision)

    def _together(
        self, models: CompressedModels | SlicedModules | None, widths: Sequence[Sequence[int]], precision: str
    ) -> list[float]:
        assert models is not None, "made by the caller where the journal lacks the times"
        sessions = [self._runtime.open(models.version(row), self._config.threads, precision) for row in widths]
        return [latency.milliseconds for latency in measure_latencies(sessions, models.image, self._config.seconds / 2)]


def _grid(key: LayerKey, precision: str, ins: Axis, outs: Axis, times: Sequence[PointTime]) -> LayerGrid:
    rows = [times[start : start + len(outs.counts)] for start in range(0, len(times), len(outs.counts))]
    kind, kernel, stride, out_hw, conv_groups = key
    return LayerGrid(
        kind,
        kernel,
        stride,
        out_hw,
        conv_groups,
        precision,
        ins,
        outs,
        milliseconds=tuple(tuple(round(time[0], 6) for time in row) for row in rows),
        spread=tuple(tuple(time[1] for time in row) for row in rows),
        repeats=min(time[2] for time in times),
    )


def _rows(shapes: LayerShapes, rows: slice) -> LayerShapes:
    return replace(
        shapes, widths=shapes.widths[rows], weight_bits=shapes.weight_bits[rows], activation_bits=shapes.activation_bits[rows]
    )


def _rounded(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(value, 6) for value in values)


def _in_words(key: LayerKey) -> str:
    kind, kernel, stride, out_hw, conv_groups = key
    family = layer_family(kind, kernel, conv_groups)
    return family if kind == "linear" else f"{family} {kernel[0]}x{kernel[1]}/{stride[0]} to {out_hw[0]}x{out_hw[1]}"


def describe_machine() -> dict[str, str]:
    """Return processor, cores and system of this machine, as far as the system tells them."""
    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        named = next((line for line in lines if line.startswith("model name")), None)
        processor = named.partition(":")[2].strip() if named else processor
    except OSError:
        pass  # not Linux
    return {"processor": processor, "cores": str(os.cpu_count()), "system": platform.platform(terse=True)}
