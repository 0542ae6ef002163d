"""The folder of a run: created once, never overwritten, with a manifest of the configuration, versions and facts."""

from __future__ import annotations

import errno
import json
import logging
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from os.path import exists, isdir, isfile
from pathlib import Path
from types import ModuleType
from typing import Any

from secateur.cost_models.reading import parse_json, read_text
from secateur.cost_models.writing import replace_file
from secateur.envs.core import InputError
from secateur.search.config import OutputSection, Overrides, SearchConfig, apply_overrides, parse_config
from secateur.search.config.errors import shorten
from secateur.search.schema import SCHEMA, upgrade

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # on Windows, where nothing keeps two processes apart
    fcntl = None

log = logging.getLogger(__name__)

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a full disk, an exhausted quota, and a limit of the file size."""

MANIFEST = "manifest.json"
AGENT = "agent"
DEVICE = "device.json"
"""Files of a run: its manifest, the folder of the stored agent, if the agent can be queried, and its device, if there is one."""
PACKAGES = ("secateur", "torch", "torchvision", "ray", "optuna", "gymnasium", "numpy", "moocore")


def create_run_folder(output: OutputSection) -> Path:
    """Make and return the folder of a new run: the named one, or the first free number after the prefix.

    Raises:
        InputError: if the named folder exists, or none can be made.
    """
    root = Path(output.root).expanduser()
    names = [output.name] if output.name is not None else (f"{output.prefix}-{number}" for number in count(1))
    try:
        root.mkdir(parents=True, exist_ok=True)
        for name in names:
            try:
                (root / name).mkdir()
                return root / name
            except FileExistsError:
                continue
    except OSError as error:
        raise InputError(f"`output.root: {output.root}` cannot hold runs: {error}.") from None
    raise _taken(root / str(output.name))


def check_run_folder(output: OutputSection) -> None:
    """Raise InputError if the named folder exists, before any time is spent on the calibration."""
    if output.name is not None and exists(folder := Path(output.root).expanduser() / output.name):
        raise _taken(folder)


def _taken(folder: Path) -> InputError:
    return InputError(
        f"The run folder {folder} exists already. Choose another `output.name`, or leave it out: runs are then numbered."
    )


@contextmanager
def held(run: Path) -> Iterator[None]:
    """Lock the folder against other processes; the operating system releases the lock when this process ends.

    On file systems without such locks, the folder is not locked.

    Raises:
        InputError: if another process searches in the folder.
    """
    if fcntl is None:
        yield
        return
    if not isdir(run):
        raise InputError(f"{run} is not a run: there is no such folder.")
    folder = os.open(run, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"Another process searches in {run}. Wait until it has finished, or end it.") from None
        except OSError as error:
            log.info("%s cannot be locked: %s", run, error)
        yield
    finally:
        os.close(folder)


def check_links(folder: Path) -> None:
    """Raise InputError if an entry of a run or export, or of a folder in it, is a link that leads out of the folder.

    A folder that somebody else has made could otherwise have files read, written or removed anywhere on this machine.
    """
    home = folder.resolve()
    for entry in folder.glob("*") if isdir(folder) else ():
        for inner in (entry, *(entry.glob("*") if isdir(entry) else ())):
            if inner.is_symlink() and not inner.resolve().is_relative_to(home):
                raise InputError(
                    f"{inner} is a link that leads out of {folder}, to {os.readlink(inner)}. Replace it by its target."
                )


@contextmanager
def full_disk_is_an_error(run: Path) -> Iterator[None]:
    """Turn the errors of a full disk within the block into one sentence."""
    try:
        yield
    except Exception as error:
        # Not every library raises OSError: those written in Rust and C++ pass on the text.
        full = error.errno in FULL if isinstance(error, OSError) else os.strerror(errno.ENOSPC) in str(error)
        if not full:
            raise
        problem = f"{run} cannot be written: {error}. What was recorded is kept. Make room, then continue"
        raise InputError(f"{problem}: secateur.resume({str(run)!r})", f"{problem}: secateur resume {run}") from error


def lock_file(path: str | os.PathLike[str]) -> int | None:
    """Return the descriptor of a locked file, made if there is none; None: another process has locked it.

    The operating system releases the lock when the descriptor is closed, or this process ends.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
    return descriptor


def write_manifest(run: Path, config: SearchConfig, facts: Mapping[str, Any]) -> None:
    """Write the resolved configuration, the versions that ran it, and `facts` (JSON values) about the run."""
    manifest = {
        "schema": SCHEMA,
        "config": config.model_dump(mode="json"),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "versions": {package: _version(package) for package in PACKAGES},
        "commit": _commit(),
        **facts,
    }
    replace_file(run / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def load_manifest(run: str | os.PathLike[str], overrides: Overrides = ()) -> tuple[SearchConfig, dict[str, Any]]:
    """Return a run's configuration and its whole manifest.

    Args:
        run: folder of the run.
        overrides: they win over the recorded configuration; see `load_config`.
    Raises:
        InputError: if the folder is no run, or the manifest is damaged.
    """
    path = Path(run) / MANIFEST
    manifest = read_json(path, "a run")
    if not isinstance(manifest.get("config"), dict):
        raise InputError(f"{path} is damaged: it has no `config`.")
    overridden = apply_overrides(manifest["config"], overrides)
    return parse_config(manifest["config"], str(path), overridden), manifest


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Return the content of a JSON file of ours.

    Args:
        path: of the file.
        what: the folder around it should be, for the error: "a run".
    Raises:
        InputError: if there is no such file, it is damaged, or another version wrote it.
    """
    if not isfile(path):
        raise InputError(f"{path.parent} is not {what}: it has no {path.name}.")
    document = parse_json(read_text(path), str(path))
    if not isinstance(document, dict) or "schema" not in document:
        raise InputError(f"{path} is damaged: it must be a mapping with a `schema`.")
    if document["schema"] not in (1, SCHEMA):
        raise InputError(f"{path} has schema {shorten(document['schema'])}; this version reads schemas 1 and {SCHEMA}.")
    try:
        return upgrade(document)
    except RecursionError:
        raise InputError(f"{path} is damaged: it is nested too deeply.") from None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # a checkout that is not installed
        return None


def _commit() -> str | None:
    """Return the commit of the checkout that this code runs from, with "-dirty" if it was changed; None without one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
