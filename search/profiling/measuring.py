"""Measures grids of layers, and keeps what is measured so that an interrupted profile goes on where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from secateur.search.jsonl import append_line, as_read, read_lines, write_lines
from secateur.search.profiling.eager import EagerLayers
from secateur.search.profiling.layer_models import LayerPoint, conversion_model, layers_model, times_by_point
from secateur.search.profiling.runtimes import PyTorch, Runtime, fastest

CHUNK_MACS, CHUNK_WEIGHTS, CHUNK_VALUES = 2e9, 4e7, 1e8
"""Largest arithmetic, weights, and inputs and outputs of a model of many layers."""
REPEATS = 80
"""Timed runs per visit, at most."""

PointTime = tuple[float, float, int]
"""Milliseconds, relative spread (75 % - 25 % quantile) and repeats."""


class Journal:
    """Measurements by name, in a file of JSON lines; each is on disk as soon as it is measured.

    Args:
        path: the file; `finish` removes it.
        identity: what is measured, and where; a file with another identity is overwritten.
    """

    def __init__(self, path: Path, identity: dict[str, Any]):
        self._path, header = path, as_read({"identity": identity})
        found = read_lines(path)
        entries = found[1:] if found[:1] == [header] else []
        self._values: dict[str, Any] = {entry["name"]: entry["value"] for entry in entries}
        write_lines(path, [header, *entries])

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        """Return the measurement of this name; measure and store it if there is none yet."""
        if name not in self._values:
            self._values[name] = measure()
            append_line(self._path, {"name": name, "value": self._values[name]})
        return self._values[name]

    def finish(self) -> None:
        """Remove the file: its measurements are in the device file."""
        self._path.unlink(missing_ok=True)


class LayerTimer:
    """Times layers in a runtime.

    Args:
        runtime: executes the layers.
        threads: of the runtime.
        batch: images per run.
        seconds: per visit of a chunk.
    """

    def __init__(self, runtime: Runtime, threads: int, batch: int, seconds: float):
        self._runtime, self._threads, self._batch, self._seconds = runtime, threads, batch, seconds

    def times(self, points: Sequence[LayerPoint], precision: str) -> list[PointTime]:
        """Return the times of one visit."""
        if self._runtime.name == PyTorch.name:
            layers = EagerLayers(self._threads, self._batch, self._seconds, REPEATS)
            return [_summary(values) for values in layers.times(points, precision)]
        model, feeds = layers_model(points, precision, self._batch)
        times = self._runtime.operator_times(model, feeds, self._threads, precision, self._seconds, REPEATS)
        return [_summary(values) for values in times_by_point(times, len(points))]

    def conversion(self) -> float:
        """Return the milliseconds of quantizing or dequantizing 10^6 values; 0 if the runtime does not report them."""
        model, feeds = conversion_model()
        times = self._runtime.operator_times(model, feeds, self._threads, "float32", self._seconds, REPEATS)
        known = [fastest(values) for name, values in times.items() if "quantize" in name.lower()]
        values = sum(array.size for array in feeds.values())
        return round(1e6 * sum(known) / values, 6)


def _summary(values: np.ndarray) -> PointTime:
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    return round(fastest(values), 7), round(float((high - low) / max(median, 1e-9)), 4), len(values)


def chunks(points: Sequence[LayerPoint], batch: int = 1, weights: float = CHUNK_WEIGHTS) -> list[list[LayerPoint]]:
    """Return the points in parts that fit into one model each.

    Args:
        batch: images per run.
        weights: largest number of weights in a part, unless a single layer has more. It should be about that of the profiled
            networks, so that weights come from the same level of the caches.
    """
    parts: list[list[LayerPoint]] = []
    load = np.full(3, np.inf)
    for point in points:
        values = np.prod(point.input_shape(batch)) + batch * point.out_channels * np.prod(point.key[3])
        cost = np.array([batch * point.macs / CHUNK_MACS, point.weights / min(weights, CHUNK_WEIGHTS), values / CHUNK_VALUES])
        if (load + cost > 1).any():
            parts.append([])
            load = np.zeros(3)
        parts[-1].append(point)
        load += cost
    return parts


def merged(visits: Sequence[Sequence[PointTime]]) -> list[PointTime]:
    """Return the least disturbed visit of each point, with the repeats of all."""
    return [(min(v[0] for v in point), min(v[1] for v in point), sum(v[2] for v in point)) for point in zip(*visits, strict=True)]
