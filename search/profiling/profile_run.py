"""Profiling: from a configuration or a model's name to a device file."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from os.path import exists, isdir
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn
from rich.table import Table

from secateur.cost_models.device import Device, read_device, write_device
from secateur.cost_models.latency_table import LatencyTable
from secateur.envs.core import InputError
from secateur.envs.model_graph import analyze
from secateur.envs.tasks.models import build_model
from secateur.search.config import ConfigSource, Overrides, load_config
from secateur.search.profiling.measuring import Journal
from secateur.search.profiling.profiler import Advance, Note, ProfileConfig, Subject, describe_machine
from secateur.search.profiling.profiler import profile as run_profile
from secateur.search.profiling.runtimes import Runtime, find_runtime
from secateur.search.profiling.staircases import plot
from secateur.search.run.progress import SECONDS_PER_LINE, duration


def profile(
    config: ConfigSource | None = None,
    overrides: Overrides = (),
    *,
    model: str | None = None,
    image_shape: Sequence[int] = (3, 224, 224),
    output: str | os.PathLike[str] = "device.json",
    runtime: str = "onnxruntime",
    precisions: Sequence[str] = ("float32", "int8"),
    threads: int = 1,
    batch: int = 1,
    quick: bool = False,
    progress: bool = False,
) -> Device:
    """Measure this machine with a model, write a device file, and return its content.

    An interrupted measurement (Ctrl-C) is kept beside `output`; the same call continues it.

    Args:
        config: configuration of a search (see `secateur.search`), whose model is measured; or give `model`.
        overrides: they win over `config`.
        model: a factory, such as "torchvision:resnet18", in place of `config`.
        image_shape: (channels, height, width), for `model`.
        output: file to write.
        runtime: "onnxruntime", "openvino" or "pytorch".
        precisions: one float precision, and "int8" if wanted.
        threads: number of threads of the runtime.
        batch: images per run.
        quick: True: measure in seconds instead of minutes, fewer channel counts and repeats.
        progress: True: show the progress on stderr.
    Raises:
        InputError: if the model, the output or the runtime cannot be used.
    """
    make = ProfileConfig.quick if quick else ProfileConfig
    settings = make(precisions=tuple(precisions), threads=threads, batch=batch)
    subject = _subject(config, overrides, model, image_shape)
    return profile_to_file(subject, Path(output), runtime, settings, Console(stderr=True, quiet=not progress))


def _subject(config: ConfigSource | None, overrides: Overrides, model: str | None, image_shape: Sequence[int]) -> Subject:
    """Return the model of a configuration, or `model`; neither weights nor data are needed."""
    if model is not None and config is None:
        if len(image_shape) != 3 or min(image_shape) < 1:
            raise InputError(f"`image_shape` must be (channels, height, width), but got {tuple(image_shape)}.")
        return load_subject(model, image_shape)
    if config is None or model is not None:
        either = "Name either a configuration or a model:"
        raise InputError(
            f'{either} secateur.profile(config), or secateur.profile(model="torchvision:resnet18").',
            f"{either} secateur profile CONFIG, or --model torchvision:resnet18.",
        )
    section = load_config(config, overrides)
    return load_subject(section.model.factory, section.model.input, section.model.args, section.space.exclude)


def load_subject(
    factory: str, image_shape: Sequence[int], arguments: Mapping[str, object] | None = None, exclude: Sequence[str] = ()
) -> Subject:
    """Return a factory's network with its own initialization, analyzed.

    Raises:
        InputError: if the factory is unknown or its network cannot be analyzed at this size.
    """
    network = build_model(factory, arguments).float().eval()
    graph = analyze(network, (torch.zeros(1, *image_shape),), exclude=tuple(exclude))
    return Subject(factory, network, graph, tuple(image_shape))


def profile_to_file(subject: Subject, output: Path, runtime_name: str, config: ProfileConfig, console: Console) -> Device:
    """Measure this machine, write the device file and return the device; `console` shows the progress.

    Measurements are kept beside the output until the device file is written. They are used again when the same model is
    profiled with the same settings on the same machine.

    Raises:
        InputError: if the output cannot be written, or the runtime is missing or cannot execute a precision.
    """
    if isdir(output) or not isdir(output.parent):
        wrong = f"{output} cannot be written: name a file in an existing folder with"
        raise InputError(f"{wrong} `output`.", f"{wrong} --output.")
    if exists(output):
        _check_replaceable(output)
    with _Display(console) as display:
        try:
            return measure_device(subject, output, runtime_name, config, display.note, display.advance, display.line)
        except KeyboardInterrupt:
            display.line(f"the measurements so far are kept in {_unfinished(output)}; the same command continues from there")
            raise


def measure_device(
    subject: Subject,
    output: Path,
    runtime_name: str,
    config: ProfileConfig,
    note: Note,
    advance: Advance,
    tell: Callable[[str], None],
) -> Device:
    """Measure this machine, write the device file and return the device; see `profile_to_file`.

    Args:
        subject: the network.
        output: the device file, in an existing folder.
        runtime_name: a key of `RUNTIMES`.
        config: how to measure.
        note, advance: as in `profile`.
        tell: called with a sentence if earlier measurements are used.
    """
    runtime = find_runtime(runtime_name)
    runtime.version()
    unknown = [name for name in config.precisions if name not in runtime.precisions]
    if unknown:
        raise InputError(f"{runtime.name} cannot execute {unknown[0]}; it knows {', '.join(runtime.precisions)}.")
    journal = Journal(_unfinished(output), profile_identity(subject, runtime, config))
    if len(journal):
        tell(f"continuing: {len(journal)} measurements were kept in {_unfinished(output)}")
    device = run_profile(subject, runtime, config, journal, note, advance)
    draft = output.with_name(f".{output.name}.draft-{os.getpid()}")
    write_device(device, draft)
    os.replace(draft, output)
    journal.finish()
    return device


def profile_identity(subject: Subject, runtime: Runtime, config: ProfileConfig) -> dict[str, Any]:
    """Return what a profile depends on, JSON values: model, runtime, settings and machine."""
    return {
        "model": subject.name,
        "input": list(subject.image_shape),
        "layers": [asdict(layer) for layer in subject.graph.geometry.layers],
        "groups": [group.units for group in subject.graph.groups],
        "runtime": [runtime.name, runtime.version()],
        "config": asdict(config),
        "machine": describe_machine(),
    }


def _check_replaceable(output: Path) -> None:
    """Raise InputError unless a file that is there already is a device file, so that nothing else is overwritten."""
    try:
        read_device(output)
    except InputError:
        taken = f"{output} is there already, and is no device file. Choose another"
        raise InputError(f"{taken} `output`.", f"{taken} --output.") from None


def _unfinished(output: Path) -> Path:
    return output.with_name(output.name + ".part")


class _Display:
    """Shows a bar with the time left in a terminal; elsewhere a line every few seconds."""

    def __init__(self, console: Console):
        self._console, self._started, self._printed, self._share = console, time.monotonic(), 0.0, 0.0
        columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[left]}")
        # Drawn only when the text changes: a thread that redraws would disturb the measurements.
        self._progress = Progress(*columns, console=console, auto_refresh=False) if console.is_terminal else None
        self._task = self._progress.add_task("", total=1.0, left="") if self._progress else TaskID(0)

    def __enter__(self) -> _Display:
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._progress:
            self._progress.stop()

    def line(self, text: str) -> None:
        """Print a line that stays."""
        self._console.print(text, highlight=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """Show the current stage."""
        if self._progress:
            self._progress.update(self._task, description=text, refresh=True)
        elif time.monotonic() - self._printed > SECONDS_PER_LINE:
            self._printed = time.monotonic()
            self._console.print(f"{100 * self._share:.0f} %, {self._left()}: {text}", highlight=False, soft_wrap=True)

    def advance(self, share: float) -> None:
        """Show the finished share."""
        self._share = share
        if self._progress:
            self._progress.update(self._task, completed=share, left=self._left(), refresh=True)

    def _left(self) -> str:
        seconds = time.monotonic() - self._started
        return f"{duration(seconds / self._share - seconds)} left" if self._share > 0.02 else "-"


def staircase_lines(table: LatencyTable) -> list[str]:
    """Return the scans as text, each with its preferred multiples and its step."""
    lines = []
    for stairs in table.staircases:
        faster = ", then of ".join(map(str, stairs.multiples))
        meaning = f"multiples of {faster} have kernels of their own" if faster else "no preferred multiple"
        if stairs.step > max(stairs.multiples, default=1):
            meaning += f", cost goes in steps of {stairs.step}"
        lines.append(f"{stairs.precision}, {stairs.axis} channels of {stairs.layer}: {meaning}")
        lines.append(plot(stairs.counts, stairs.milliseconds))
    return lines


def check_table(table: LatencyTable) -> Table:
    """Return the errors of the predictions for whole networks."""
    shown = Table(title=f"whole networks, {table.runtime} {table.runtime_version}", title_justify="left")
    for name in ("precision", "networks", "ms", "error", "uncorrected", "rank corr."):
        shown.add_column(name, justify="left" if name == "precision" else "right")
    for check in table.checks:
        shown.add_row(
            check.precision,
            str(len(check.measured)),
            f"{min(check.measured):.3g} to {max(check.measured):.3g}",
            f"{100 * check.mean_error:.1f} %",
            f"{100 * check.uncorrected_error:.1f} %",
            f"{check.rank_correlation:.3f}",
        )
    return shown
