"""The device of a search that asks for a profile: this machine, measured with the model and kept in the cache directory."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from os.path import isfile
from pathlib import Path

from torch import nn

from secateur.cost_models.device import Device, read_device
from secateur.envs.core import InputError
from secateur.envs.model_graph import ModelGraph
from secateur.envs.tasks.training import cache_directory
from secateur.search.config import DeviceProfile, SearchConfig
from secateur.search.profiling.profile_run import measure_device, profile_identity
from secateur.search.profiling.profiler import ProfileConfig, Subject
from secateur.search.profiling.runtimes import Runtime, find_runtime

SECONDS_PER_STATUS = 5.0
"""The shortest time between two reports of the progress."""


def with_measured_device(
    config: SearchConfig, model: nn.Module, graph: ModelGraph, status: Callable[[str], None]
) -> SearchConfig:
    """Return the configuration with the measured device in place of the profile that it asks for.

    The device is measured once for each machine, model, runtime and settings, and then read from the cache directory.

    Args:
        config: the configuration; its `device` is a profile.
        model: its dense model in eval mode.
        graph: the plan of the model.
        status: called with each stage, in a few words.
    Raises:
        InputError: if the runtime is unknown or not installed, or the cache directory cannot be written.
    """
    if not isinstance(config.device, DeviceProfile):
        raise ValueError(f"`device` must be a profile, but is {type(config.device).__name__}.")
    runtime = find_runtime(config.device.runtime)
    subject = Subject(config.model.factory, model, graph, config.model.input)
    return config.model_copy(update={"device": _cached_device(subject, runtime, _settings(config.device, runtime), status)})


def _settings(device: DeviceProfile, runtime: Runtime) -> ProfileConfig:
    precisions = tuple(name for name in ("float32", "int8") if name in runtime.precisions)
    make = ProfileConfig.quick if device.profile == "quick" else ProfileConfig
    return make(precisions=precisions, threads=device.threads, batch=device.batch)


def _cached_device(subject: Subject, runtime: Runtime, settings: ProfileConfig, status: Callable[[str], None]) -> Device:
    identity = json.dumps(profile_identity(subject, runtime, settings), sort_keys=True)
    path = cache_directory() / "devices" / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.json"
    if isfile(path):
        status(f"reading the profile of this machine from {path}; remove the file to measure again")
        return read_device(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return _measured(subject, path, runtime, settings, status)
    except OSError as error:
        raise InputError(
            f"The profile of this machine cannot be kept in {path.parent}: {error.strerror}. Set another SECATEUR_CACHE."
        ) from None


def _measured(subject: Subject, path: Path, runtime: Runtime, settings: ProfileConfig, status: Callable[[str], None]) -> Device:
    share, told = 0.0, time.monotonic()

    def advance(done: float) -> None:
        nonlocal share
        share = done

    def note(stage: str) -> None:
        nonlocal told
        if time.monotonic() - told > SECONDS_PER_STATUS:
            told = time.monotonic()
            status(f"profiling this machine, {100 * share:.0f} %: {stage}")

    status("profiling this machine with the model")
    return measure_device(subject, path, runtime.name, settings, note, advance, status)
