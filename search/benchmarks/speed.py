"""What pruning and integers gain on this processor: latency, size of the file and memory, measured in one run.

One network in four versions: as it is, pruned by one ratio everywhere, in 8-bit integers, and both. The weights are random:
they change accuracy, not speed.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
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
from secateur.search.profiling.runtimes import Latency, Session, measure_latencies, open_session
from secateur.search.profiling.whole_models import CompressedModels, export_dense

DENSE, PRUNED, INT8, BOTH = "dense", "pruned", "int8", "pruned, int8"
RUNS = 3
"""Of a model whose memory is measured."""


@dataclass(frozen=True)
class Version:
    """What was measured of one version of a network.

    Attributes:
        name: "dense", "pruned", "int8" or "pruned, int8".
        macs: share of the dense multiply-accumulates.
        latency: of one image.
        file_bytes: of the ONNX file.
        memory_bytes: by how much loading and running the file raised the peak memory of a fresh process; None if unknown.
    """

    name: str
    macs: float
    latency: Latency
    file_bytes: int
    memory_bytes: int | None


def random_model(factory: str, size: int) -> tuple[nn.Module, ModelGraph]:
    """Return a network with random weights in eval mode and its plan, for square images of 3 channels.

    Args:
        factory: "package.module:function" or "torchvision:name".
        size: height and width of an image.
    """
    model = load_model(factory)
    return model, analyze(model, (torch.zeros(1, 3, size, size),), verify=False)


def uniform_widths(geometry: NetworkGeometry, share: float, multiple: int) -> np.ndarray:
    """Return the largest widths, (groups,), that one ratio for all groups gives within a share of the dense MACs.

    Args:
        geometry: of the dense network.
        share: of the multiply-accumulates, in (0, 1].
        multiple: widths are multiples of this, at least one multiple where the group has as many units.
    Raises:
        InputError: if even the smallest widths are above the share.
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
            f"Widths that are multiples of {multiple} leave at least {least:.3g} % of the MACs. Allow more with --macs, "
            "or a smaller --multiple."
        )
    return widths[fitting[0]]


def measure_speed(
    model: nn.Module,
    graph: ModelGraph,
    image_shape: Sequence[int],
    share: float,
    multiple: int = 16,
    runtime: str = "onnxruntime",
    precision: str = "float32",
    threads: int = 1,
    seconds: float = 3.0,
) -> list[Version]:
    """Return the four versions of a network; their runs take turns.

    Args:
        model: dense, eval mode.
        graph: its plan.
        image_shape: (channels, height, width).
        share: of the dense multiply-accumulates that the pruned versions may keep.
        multiple: of their widths.
        runtime: a key of `RUNTIMES`.
        precision: of layers that are no integers.
        threads: of the runtime.
        seconds: of measuring, for each version.
    """
    geometry = graph.geometry
    pruned = uniform_widths(geometry, share, multiple)
    left = float(Macs().total(geometry.shapes(pruned))[0] / Macs().total(geometry.shapes())[0])
    dense = export_dense(model, graph, image_shape)
    files: dict[str, bytes] = {}
    for integer, names in (("float32", (DENSE, PRUNED)), ("int8", (INT8, BOTH))):
        versions = CompressedModels(dense, graph, integer)
        files |= {name: versions.version(widths) for name, widths in zip(names, (geometry.group_units, pruned), strict=True)}
    sessions: list[Session] = [open_session(content, runtime, threads, precision) for content in files.values()]
    latencies = measure_latencies(sessions, versions.image, seconds)
    return [
        Version(
            name,
            left if name in (PRUNED, BOTH) else 1.0,
            latency,
            len(content),
            peak_memory(content, versions.image, runtime, precision, threads),
        )
        for (name, content), latency in zip(files.items(), latencies, strict=True)
    ]


def peak_memory(content: bytes, image: np.ndarray, runtime: str, precision: str, threads: int) -> int | None:
    """Return the bytes by which loading and running a model raises the peak memory of a fresh process; None but on Linux."""
    if sys.platform != "linux":
        return None
    with tempfile.TemporaryDirectory() as folder:
        model, images = Path(folder) / "model.onnx", Path(folder) / "images.npy"
        model.write_bytes(content)
        np.save(images, image)
        arguments = [str(model), str(images), runtime, precision, str(threads)]
        done = subprocess.run(
            [sys.executable, "-P", "-m", "secateur.search.benchmarks.speed", *arguments],
            capture_output=True,
            text=True,
            check=True,
        )
    return int(done.stdout)


def _print_peak_memory(model: str, images: str, runtime: str, precision: str, threads: str) -> None:
    image = np.load(images)
    # Whatever the runtime needs for itself is there before the model comes.
    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder) / "first.onnx"
        first.write_bytes(_identity(image))
        open_session(first, runtime, int(threads), precision).run(image)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is held now
    session = open_session(model, runtime, int(threads), precision)
    for _ in range(RUNS):
        session.run(image)
    print(max(0, _status("VmHWM") - before))


def _identity(image: np.ndarray) -> bytes:
    """Return a model that gives back its input."""
    from onnx import TensorProto, helper

    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(image.shape)) for name in ("input", "output")]
    graph = helper.make_graph([helper.make_node("Identity", ["input"], ["output"])], "identity", tensors[:1], tensors[1:])
    opset = [helper.make_opsetid("", 18)]
    return helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()


def _status(field: str) -> int:
    """Return a field of this process's status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field + ":")).split()[1])


# --------------------------------------------------------------------------------------------------------------- report


def speed_rows(network: str, versions: Sequence[Version]) -> list[str]:
    """Return Markdown rows, one per version: milliseconds, and how many times faster and smaller than the dense one."""
    dense = versions[0]
    rows = []
    for version in versions:
        memory = (
            "-"
            if version.memory_bytes is None or not dense.memory_bytes
            else (f"{version.memory_bytes / 1e6:,.1f} | {dense.memory_bytes / max(version.memory_bytes, 1):.2f}")
        )
        rows.append(
            f"| {network} | {version.name} | {100 * version.macs:.1f} "
            f"| {version.latency.milliseconds:.2f} ({version.latency.low:.2f} to {version.latency.high:.2f}) "
            f"| {dense.latency.milliseconds / version.latency.milliseconds:.2f} "
            f"| {version.file_bytes / 1e6:,.2f} | {dense.file_bytes / version.file_bytes:.2f} | {memory} |"
        )
    return rows


SPEED_HEADER = (
    "| network | version | MACs % | ms (10 % to 90 %) | times as fast | file MB | times as small | memory MB | times as little |",
    "|---|---|---|---|---|---|---|---|---|",
)


if __name__ == "__main__":
    _print_peak_memory(*sys.argv[1:])
