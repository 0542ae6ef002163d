"""`secateur profile`: from a configuration or a model's name to a device file."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table

from secateur.cost_models.device import Device, write_device
from secateur.cost_models.latency_table import LatencyTable
from secateur.envs.core import InputError
from secateur.envs.model_graph import analyze
from secateur.envs.tasks.models import build_model
from secateur.search.config import load_config
from secateur.search.profiling.measuring import Journal
from secateur.search.profiling.profiler import Advance, Note, ProfileConfig, Subject, describe_machine, profile
from secateur.search.profiling.runtimes import Runtime, find_runtime
from secateur.search.profiling.staircases import plot
from secateur.search.run.progress import SECONDS_PER_LINE, duration


def subject_of_config(path: str | Path, overrides: Sequence[str] = ()) -> Subject:
    """Return the network of a search configuration; neither its weights nor its data are needed."""
    config = load_config(path, overrides)
    return load_subject(config.model.factory, config.model.input, config.model.args, config.space.exclude)


def load_subject(
    factory: str, image_shape: Sequence[int], arguments: Mapping[str, object] | None = None, exclude: Sequence[str] = ()
) -> Subject:
    """Return a factory's network with its own initialization, and its plan.

    Raises:
        InputError: if the factory is unknown or its network cannot be analyzed at this size.
    """
    network = build_model(factory, arguments).float().eval()
    graph = analyze(network, (torch.zeros(1, *image_shape),), exclude=tuple(exclude))
    return Subject(factory, network, graph, tuple(image_shape))


def parse_shape(text: str) -> tuple[int, ...]:
    """Return (channels, height, width) of "3,224,224"."""
    sizes = tuple(int(size) if size.strip().isdigit() else 0 for size in text.split(","))
    if len(sizes) != 3 or min(sizes) < 1:
        raise InputError(f"`--input` must be channels,height,width such as 3,224,224, but got {text!r}.")
    return sizes


def profile_to_file(subject: Subject, output: Path, runtime_name: str, config: ProfileConfig, console: Console) -> Device:
    """Measure this machine, write the device file and return the device; `console` shows the progress.

    Measurements are kept beside the output until the device file is written. They are used again when the same model is
    profiled with the same settings on the same machine.

    Raises:
        InputError: if the output cannot be written, or the runtime is missing or cannot execute a precision.
    """
    if output.is_dir() or not output.parent.is_dir():
        raise InputError(f"{output} cannot be written: name a file in an existing folder with --output.")
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
    device = profile(subject, runtime, config, journal, note, advance)
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


def _unfinished(output: Path) -> Path:
    return output.with_name(output.name + ".part")


class _Display:
    """Shows a bar with the time left in a terminal; elsewhere a line every few seconds."""

    def __init__(self, console: Console):
        self._console, self._started, self._printed, self._share = console, time.monotonic(), 0.0, 0.0
        columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[left]}")
        # Drawn only when the text changes: a thread that redraws would disturb the measurements.
        self._progress = Progress(*columns, console=console, auto_refresh=False) if console.is_terminal else None
        self._task = self._progress.add_task("", total=1.0, left="") if self._progress else None

    def __enter__(self) -> _Display:
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, *exception) -> None:
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
