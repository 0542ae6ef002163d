"""`secateur benchmark speed`: what pruning and 8-bit integers gain on this processor.

Latency, file size and memory of one network in four versions, measured in one run: as it is, pruned by one ratio everywhere, in
8-bit integers, and both. The weights are random: they change accuracy, not speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from secateur.cost_models.core import NetworkGeometry
from secateur.cost_models.macs import Macs
from secateur.envs.core import InputError
from secateur.envs.model_graph import ModelGraph, analyze
from secateur.envs.tasks.models import load_model
from secateur.search.benchmarks.peak_memory import peak_memory
from secateur.search.benchmarks.scaffold import markdown_table, show_progress
from secateur.search.profiling.profiler import describe_machine
from secateur.search.profiling.runtimes import Latency, find_runtime, measure_latencies, open_session
from secateur.search.profiling.whole_models import CompressedModels, export_dense

DENSE, PRUNED, INT8, BOTH = "dense", "pruned", "int8", "pruned, int8"
HEADS = (
    "network", "version", "MACs %", "ms (10 % to 90 %)", "times as fast", "file MB", "times as small", "memory MB",
    "times as little",
)  # fmt: skip


@dataclass(frozen=True)
class SpeedConfig:
    """How to prune and measure.

    Attributes:
        share: of the dense multiply-accumulates that the pruned versions may keep, in (0, 1].
        multiple: widths are multiples of this.
        threads: of the runtime.
        seconds: of measuring the latency of each version.
    """

    share: float = 0.2
    multiple: int = 16
    threads: int = 1
    seconds: float = 3.0


@dataclass(frozen=True)
class Version:
    """What was measured of one version of a network.

    Attributes:
        name: "dense", "pruned", "int8" or "pruned, int8".
        macs: share of the dense multiply-accumulates.
        latency: of one image.
        file_bytes: of the ONNX file.
        memory_bytes: see `peak_memory`; None if unknown.
    """

    name: str
    macs: float
    latency: Latency
    file_bytes: int
    memory_bytes: int | None


def run_speed(factories: Sequence[str], runtimes: Sequence[str], config: SpeedConfig, output: Path | None) -> None:
    """Measure networks and print the table.

    Args:
        factories: "module:function:height" or "torchvision:name:height".
        runtimes: names.
        config: how to prune and measure.
        output: Markdown file for the table too.
    """
    networks = [factory_and_size(text) for text in factories]
    versions = [f"{name} {find_runtime(name).version()}" for name in runtimes]
    lines = []
    with show_progress() as progress:
        for factory, size in networks:
            model, graph = random_model(factory, size)
            for runtime in runtimes:
                progress.status(f"{factory}, {runtime}")
                found = measure_speed(model, graph, size, runtime, config)
                lines += speed_cells(f"{factory.partition(':')[2]} ({size} px), {runtime}", found)
    machine, threads = describe_machine(), f"{config.threads} thread{'s' * (config.threads > 1)}"
    used = f"{threads}; one image; float layers in float32."
    note = f"{machine['processor']}, {machine['cores']} cores; {', '.join(versions)}; {used}"
    text = f"{markdown_table(HEADS, lines)}\n\n{note}"
    print(text)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(f"{text}\n", encoding="utf-8")


def factory_and_size(text: str) -> tuple[str, int]:
    """Return ("module:function", height) of "module:function:height"."""
    factory, _, size = text.rpartition(":")
    if not size.isdigit() or ":" not in factory:
        raise InputError(f"`{text}` must read FACTORY:HEIGHT, such as torchvision:resnet18:224.")
    return factory, int(size)


def random_model(factory: str, size: int) -> tuple[nn.Module, ModelGraph]:
    """Return a network with random weights in eval mode and its plan, for square images of 3 channels.

    Args:
        factory: "package.module:function" or "torchvision:name".
        size: height and width of an image.
    """
    model = load_model(factory)
    return model, analyze(model, (torch.zeros(1, 3, size, size),), verify=False)


def uniform_widths(geometry: NetworkGeometry, share: float, multiple: int) -> list[int]:
    """Return the largest widths, one per group, that one ratio for all groups gives within a share of the dense MACs.

    Args:
        geometry: of the dense network.
        share: of the multiply-accumulates, in (0, 1].
        multiple: widths are multiples of this, and at least one multiple where the group has as many units.
    Raises:
        InputError: if even the smallest widths exceed the share.
    """
    units, macs = geometry.group_units, Macs()
    dense = macs.total(geometry.shapes())[0]
    ratios = np.linspace(0, 1, 1001)[:, None]
    widths = np.round((1 - ratios) * units / multiple).astype(int) * multiple
    widths = np.clip(widths, np.minimum(units, multiple), units)
    fitting = np.flatnonzero(macs.total(geometry.shapes(widths)) <= share * dense)
    if not len(fitting):
        least = 100 * macs.total(geometry.shapes(widths[-1:]))[0] / dense
        raise InputError(
            f"Widths that are multiples of {multiple} leave at least {least:.3g} % of the MACs. Allow more MACs, or a smaller "
            "multiple."
        )
    return widths[fitting[0]].tolist()


def measure_speed(model: nn.Module, graph: ModelGraph, size: int, runtime: str, config: SpeedConfig) -> list[Version]:
    """Return the four versions of a network; their runs alternate.

    Args:
        model: dense, eval mode.
        graph: its plan.
        size: height and width of an image.
        runtime: name.
        config: how to prune and measure.
    """
    geometry = graph.geometry
    dense, pruned = geometry.group_units.tolist(), uniform_widths(geometry, config.share, config.multiple)
    macs = Macs().total(geometry.shapes(np.array([dense, pruned])))
    exported = export_dense(model, graph, (3, size, size))
    files: dict[str, bytes] = {}
    for precision, names in (("float32", (DENSE, PRUNED)), ("int8", (INT8, BOTH))):
        versions = CompressedModels(exported, graph, precision)
        files |= {name: versions.version(widths) for name, widths in zip(names, (dense, pruned), strict=True)}
    sessions = [open_session(content, runtime, config.threads) for content in files.values()]
    latencies = measure_latencies(sessions, versions.image, config.seconds)
    return [
        Version(
            name,
            float(macs[1] / macs[0]) if name in (PRUNED, BOTH) else 1.0,
            latency,
            len(content),
            peak_memory(content, versions.image, runtime, config.threads),
        )
        for (name, content), latency in zip(files.items(), latencies, strict=True)
    ]


def speed_cells(network: str, versions: Sequence[Version]) -> list[list[str]]:
    """Return the cells of one row per version: milliseconds, and how many times faster and smaller than the first version."""
    return [
        [
            network,
            version.name,
            f"{100 * version.macs:.1f}",
            f"{version.latency.milliseconds:.2f} ({version.latency.low:.2f} to {version.latency.high:.2f})",
            f"{versions[0].latency.milliseconds / version.latency.milliseconds:.2f}",
            f"{version.file_bytes / 1e6:,.2f}",
            f"{versions[0].file_bytes / version.file_bytes:.2f}",
            *_memory_cells(version, versions[0]),
        ]
        for version in versions
    ]


def _memory_cells(version: Version, dense: Version) -> tuple[str, str]:
    if version.memory_bytes is None or not dense.memory_bytes:
        return "-", "-"
    return f"{version.memory_bytes / 1e6:,.1f}", f"{dense.memory_bytes / max(version.memory_bytes, 1):.2f}"
