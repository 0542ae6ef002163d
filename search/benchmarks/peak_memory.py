"""How much memory loading and running an ONNX model takes, measured in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from secateur.search.profiling.runtimes import open_session

RUNS = 3
"""Runs of the model whose memory is measured."""


def peak_memory(content: bytes, image: np.ndarray, runtime: str, threads: int) -> int | None:
    """Return the bytes by which loading and running a model raises the peak memory of a fresh process; None except on Linux.

    Args:
        content: the ONNX model.
        image: its input, (1, channels, height, width) float32.
        runtime: name.
        threads: of the runtime.
    """
    if sys.platform != "linux":
        return None
    with tempfile.TemporaryDirectory() as folder:
        model, images = Path(folder) / "model.onnx", Path(folder) / "images.npy"
        model.write_bytes(content)
        np.save(images, image)
        command = [sys.executable, "-P", "-m", "secateur.search.benchmarks.peak_memory"]
        done = subprocess.run(
            [*command, str(model), str(images), runtime, str(threads)], capture_output=True, text=True, check=True
        )
    return int(done.stdout)


def _print_peak_memory(model: str, images: str, runtime: str, threads: str) -> None:
    image = np.load(images)
    # A trivial model first: what the runtime needs for itself is not counted.
    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder) / "first.onnx"
        first.write_bytes(_identity(image))
        open_session(first, runtime, int(threads)).run(image)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current memory
    session = open_session(model, runtime, int(threads))
    for _ in range(RUNS):
        session.run(image)
    print(max(0, _status("VmHWM") - before))


def _identity(image: np.ndarray) -> bytes:
    """Return a model that returns its input."""
    from onnx import TensorProto, helper

    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(image.shape)) for name in ("input", "output")]
    graph = helper.make_graph([helper.make_node("Identity", ["input"], ["output"])], "identity", tensors[:1], tensors[1:])
    opset = [helper.make_opsetid("", 18)]
    return helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()


def _status(field: str) -> int:
    """Return a field of this process's status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field + ":")).split()[1])


if __name__ == "__main__":
    _print_peak_memory(*sys.argv[1:])
