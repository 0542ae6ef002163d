"""What executes ONNX models, and how long it takes. Every runtime hides its library here and imports it when it is used."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from secateur.envs.core import InputError

FASTEST_SHARE = 0.5
"""An operator's time is the mean of this share of its repeats, the fastest ones; the others were disturbed."""
WARM_UP = 2
"""Runs that are not timed."""
LEAST_REPEATS = 4
"""Timed runs of operators, however long they take."""
TURN = 3
"""Timed runs of a session before it is the next one's turn."""
TICK_MS = 1e-3
"""The profiles of the runtimes count whole microseconds, rounded down; half of one is missing on average."""


class Session(Protocol):
    """A model, ready to run."""

    threads: int

    def run(self, *inputs: np.ndarray) -> list[np.ndarray]:
        """Return the outputs of a batch of inputs, float32; most networks have one of each."""
        ...


@dataclass(frozen=True)
class Latency:
    """How long one run takes.

    Attributes:
        milliseconds: median over the repeats.
        low, high: 10 % and 90 % quantiles.
        repeats: how many runs were timed.
    """

    milliseconds: float
    low: float
    high: float
    repeats: int


class Runtime(Protocol):
    """A library that executes ONNX models."""

    @property
    def name(self) -> str:
        """Its key in `RUNTIMES`."""
        ...

    @property
    def precisions(self) -> tuple[str, ...]:
        """What it executes: "float32", "int8", ..."""
        ...

    def version(self) -> str:
        """Return the version of the library; InputError if it is not installed."""
        ...

    def open(self, model: Any, threads: int, precision: str) -> Session:
        """Return a session for the path or the bytes of a model; PyTorch takes a module.

        Raises:
            InputError: if the library is not installed or cannot load the model.
        """
        ...

    def operator_times(
        self, model: bytes, feeds: Mapping[str, np.ndarray], threads: int, precision: str, seconds: float, repeats: int
    ) -> dict[str, np.ndarray]:
        """Return milliseconds of each run, (repeats,), by the name of the operator, as its own profile tells them.

        Args:
            seconds: when to stop, though not before `LEAST_REPEATS` runs.
            repeats: largest number of runs.
        """
        ...


class OnnxRuntimeSession:
    """A model in ONNX Runtime on the processor."""

    def __init__(self, model: str | Path | bytes, threads: int = 1, profile: str | None = None):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # its warnings are about the graph; errors come as exceptions
        # Without it, sums of 8-bit products saturate on x64 processors that have no VNNI; it has no effect on others.
        options.add_session_config_entry("session.x64quantprecision", "1")
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = profile
        self.threads = threads
        source = model if isinstance(model, bytes) else str(model)
        try:
            self.session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions have no common base but Exception
            raise InputError(f"ONNX Runtime cannot load {_named(model)}: {_first_line(error)}") from error
        self._inputs = [given.name for given in self.session.get_inputs()]

    def run(self, *inputs: np.ndarray) -> list[np.ndarray]:
        """Return the outputs of a batch of inputs."""
        return self.session.run(None, dict(zip(self._inputs, inputs, strict=True)))


class OnnxRuntime:
    """ONNX Runtime, the default."""

    name = "onnxruntime"
    precisions = ("float32", "int8")

    def version(self) -> str:
        """Return the version of ONNX Runtime."""
        import onnxruntime

        return onnxruntime.__version__

    def open(self, model: str | Path | bytes, threads: int, precision: str) -> OnnxRuntimeSession:
        """Return a session; the precision is that of the model."""
        return OnnxRuntimeSession(model, threads)

    def operator_times(
        self, model: bytes, feeds: Mapping[str, np.ndarray], threads: int, precision: str, seconds: float, repeats: int
    ) -> dict[str, np.ndarray]:
        """Return milliseconds of each run by operator, from the session's profile."""
        with tempfile.TemporaryDirectory() as folder:
            session = OnnxRuntimeSession(model, threads, profile=f"{folder}/profile").session
            names = [output.name for output in session.get_outputs()]
            _repeat(lambda: session.run(names, dict(feeds)), seconds, repeats)
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        times = defaultdict(list)
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                times[event["name"].removesuffix("_kernel_time")].append(event["dur"] * 1e-3)
        return {name: np.array(values[WARM_UP:]) for name, values in times.items()}


class OpenVinoSession:
    """A compiled model in OpenVINO on the processor."""

    def __init__(self, model: str | Path | bytes, threads: int, precision: str, profile: bool = False):
        openvino = _openvino()
        properties = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": {"bfloat16": "bf16", "float16": "f16"}.get(precision, "f32"),
            "PERF_COUNT": profile,
        }
        try:
            source = openvino.Core().read_model(model if isinstance(model, bytes) else str(model))
            self._request = openvino.Core().compile_model(source, "CPU", properties).create_infer_request()
        except RuntimeError as error:
            raise InputError(f"OpenVINO cannot load {_named(model)}: {_first_line(error)}") from error
        self.threads = threads

    def run(self, *inputs: np.ndarray) -> list[np.ndarray]:
        """Return the outputs of a batch of inputs."""
        return [np.array(output) for output in self._request.infer(list(inputs)).values()]

    def profiled(self, feeds: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Run once; return milliseconds by operator."""
        self._request.infer(dict(feeds))
        return {info.node_name: info.real_time.total_seconds() * 1e3 for info in self._request.profiling_info}


class OpenVino:
    """OpenVINO, an optional dependency."""

    name = "openvino"
    precisions = ("float32", "bfloat16", "float16", "int8")

    def version(self) -> str:
        """Return the version of OpenVINO."""
        return _openvino().__version__.partition("-")[0]  # what follows names the build

    def open(self, model: str | Path | bytes, threads: int, precision: str) -> OpenVinoSession:
        """Return a session; floating-point layers are executed in this precision."""
        return OpenVinoSession(model, threads, precision)

    def operator_times(
        self, model: bytes, feeds: Mapping[str, np.ndarray], threads: int, precision: str, seconds: float, repeats: int
    ) -> dict[str, np.ndarray]:
        """Return milliseconds of each run by operator, from its performance counters."""
        session = OpenVinoSession(model, threads, precision, profile=True)
        times = defaultdict(list)

        def run() -> None:
            for name, milliseconds in session.profiled(feeds).items():
                times[name].append(milliseconds)

        _repeat(run, seconds, repeats)
        return {name: np.array(values[WARM_UP:]) for name, values in times.items()}


class EagerSession:
    """A module, called as it is."""

    def __init__(self, network: Any, threads: int, precision: str):
        import torch

        torch.set_num_threads(threads)
        self.threads, self._dtype = threads, getattr(torch, precision)
        self._network = network.to(self._dtype)

    def run(self, *inputs: np.ndarray) -> list[np.ndarray]:
        """Return the outputs of a batch of inputs."""
        import torch

        from secateur.envs.tasks.core import tensors_of

        with torch.inference_mode():
            outputs = self._network(*(torch.from_numpy(array).to(self._dtype) for array in inputs))
            return [output.float().numpy() for output in tensors_of(outputs)]


class PyTorch:
    """PyTorch, eager; it executes modules, so it is for profiling only."""

    name = "pytorch"
    precisions = ("float32", "bfloat16")

    def version(self) -> str:
        """Return the version of PyTorch."""
        import torch

        return torch.__version__

    def open(self, model: Any, threads: int, precision: str) -> EagerSession:
        """Return a session for a module; InputError for a file."""
        if isinstance(model, (str, Path, bytes)):
            raise InputError(f"pytorch executes modules, but {_named(model)} is an ONNX model: choose onnxruntime or openvino.")
        return EagerSession(model, threads, precision)

    def operator_times(
        self, model: bytes, feeds: Mapping[str, np.ndarray], threads: int, precision: str, seconds: float, repeats: int
    ) -> dict[str, np.ndarray]:
        """Raise InputError: layers in PyTorch are timed as modules (`secateur.search.profiling.eager`)."""
        raise InputError("pytorch has no operator times of ONNX models: choose onnxruntime or openvino.")


_ALL: tuple[Runtime, ...] = (OnnxRuntime(), OpenVino(), PyTorch())
RUNTIMES: dict[str, Runtime] = {runtime.name: runtime for runtime in _ALL}
"""Every runtime by name."""


def open_session(path: str | Path | bytes, runtime: str = "onnxruntime", threads: int = 1, precision: str = "float32") -> Session:
    """Return a session for an .onnx file or a serialised model.

    Args:
        precision: how layers that are not quantized in the model are executed.
    Raises:
        InputError: if the runtime is unknown or not installed, cannot execute the precision, or cannot load the model.
    """
    chosen = find_runtime(runtime)
    if precision not in chosen.precisions:
        raise InputError(f"{runtime} cannot execute {precision}; it knows {', '.join(chosen.precisions)}.")
    return chosen.open(path, threads, precision)


def find_runtime(name: str) -> Runtime:
    """Return a runtime by name; InputError if it is unknown."""
    if name not in RUNTIMES:
        raise InputError(f"There is no runtime `{name}`; choose one of {', '.join(RUNTIMES)}.")
    return RUNTIMES[name]


def measure_latency(session: Session, image: np.ndarray, seconds: float = 1.0, least_repeats: int = 10) -> Latency:
    """Return how long one run takes, after warming up.

    Args:
        session: what to run.
        image: its input, (N, C, H, W) float32.
        seconds: for how long to repeat.
        least_repeats: repeats even if they take longer.
    """
    return measure_latencies([session], image, seconds, least_repeats)[0]


def measure_latencies(
    sessions: Sequence[Session], image: np.ndarray | Sequence[np.ndarray], seconds: float = 1.0, least_repeats: int = 10
) -> list[Latency]:
    """Return how long one run of each session takes; all take turns, so that disturbances of the machine affect all of them.

    Args:
        sessions: what to run.
        image: its input, (N, C, H, W) float32, or several inputs.
        seconds: for each session.
        least_repeats: repeats even if they take longer.
    """
    inputs = [image] if isinstance(image, np.ndarray) else list(image)
    for session in sessions:
        for _ in range(WARM_UP):
            session.run(*inputs)
    times: list[list[list[float]]] = []  # (turns, sessions, TURN)
    started = _clock()
    while len(times) * TURN < least_repeats or _clock() - started < seconds * len(sessions):
        times.append([_turn(session, inputs) for session in sessions])
    milliseconds = 1e3 * np.array(times).swapaxes(0, 1).reshape(len(sessions), -1)
    low, median, high = np.quantile(milliseconds, [0.1, 0.5, 0.9], axis=1)
    repeats = milliseconds.shape[1]
    return [Latency(float(m), float(lo), float(hi), repeats) for m, lo, hi in zip(median, low, high, strict=True)]


def _turn(session: Session, inputs: Sequence[np.ndarray]) -> list[float]:
    """Return the seconds of `TURN` runs, after one that brings the model back into the caches."""
    session.run(*inputs)
    return [_timed(session, inputs) for _ in range(TURN)]


def fastest(milliseconds: np.ndarray) -> float:
    """Return the time of an operator: the mean of its fastest repeats, plus half a tick of its profile's clock."""
    count = max(1, round(FASTEST_SHARE * len(milliseconds)))
    return float(np.sort(milliseconds)[:count].mean()) + TICK_MS / 2


def _timed(session: Session, inputs: Sequence[np.ndarray]) -> float:
    """Return the seconds of one run; for one thread without the time in which other processes held its core."""
    wall, processor = time.perf_counter(), time.process_time()
    session.run(*inputs)
    processor, wall = time.process_time() - processor, time.perf_counter() - wall
    # Only Linux is known to count processor time in nanoseconds.
    return min(wall, processor) if session.threads == 1 and sys.platform == "linux" else wall


def _repeat(run: Callable[[], object], seconds: float, repeats: int) -> None:
    for _ in range(WARM_UP):
        run()
    started = _clock()
    for count in range(repeats):
        if count >= LEAST_REPEATS and _clock() - started > seconds:
            break
        run()


def _clock() -> float:
    """Return the processor seconds of this process: on a busy machine a measurement takes longer, and is as precise."""
    return time.process_time()


def _openvino() -> Any:
    try:
        import openvino
    except ImportError:
        raise InputError("OpenVINO is not installed: pip install 'secateur[openvino]'.") from None
    return openvino


def _named(model: str | Path | bytes) -> str:
    return "the model" if isinstance(model, bytes) else str(model)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
