"""The connection of this process to Ray: a cluster of its own on this machine, or one that runs already."""

from __future__ import annotations

import glob
import logging
import os
import secrets
import shutil
import socket
import sys
import tempfile
from types import ModuleType
from typing import Any

from secateur.envs.core import InputError
from secateur.search.run.folder import lock_file
from secateur.search.run.signals import undisturbed

LOCAL = "local"

_FOLDERS = "/tmp" if os.path.isdir("/tmp") else tempfile.gettempdir()
"""Where Ray's folders lie. Paths of sockets end at 107 characters, so this path must be short whatever TMPDIR says."""
_PREFIX, _OWNER = "secateur-", "owner.lock"


def available_cores() -> int:
    """Return how many cores this process may use: what `workers: auto` means on this machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class RayConnection:
    """Connects this process to Ray. A connection that it already has is used and left open.

    Args:
        address: of a running cluster; "local": start one, and end it in `close`.
        resources: of the local cluster: arguments of `ray.init`.

    Attributes:
        ray: the module; it reads the environment when it is imported, so it is imported here.
        folder: Ray's own files on this machine; None: this process has not started the cluster.
    Raises:
        InputError: if there is no cluster at `address`.
    """

    def __init__(self, address: str = LOCAL, **resources: Any):
        set_ray_environment(address)
        import ray

        self.ray: ModuleType = ray
        self.folder: str | None = None
        self._lock: int | None = None
        self._opened = not ray.is_initialized()
        if not self._opened:
            return
        options: dict[str, Any] = {}
        if address == LOCAL:
            self._make_folder()
            # Ray opens its folder to all users; the one around it stays ours.
            temporary = os.path.join(os.path.realpath(str(self.folder)), "r")
            options = {"include_dashboard": False, "_temp_dir": temporary, **resources}
        try:
            if address != LOCAL:
                _knock(address)
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            self._remove_folder()
            if address == LOCAL:
                raise
            raise InputError(
                f"`search.address: {address}` cannot be joined: {first_line(error)}. Leave it out to search on this "
                "machine. If there is a cluster, both sides need RAY_AUTH_MODE=token and the same token."
            ) from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the connection, and the cluster if it was started here."""
        with undisturbed():
            if self._opened and self.ray.is_initialized():
                self.ray.shutdown()
            self._remove_folder()

    def _make_folder(self) -> None:
        remove_left_folders()
        self.folder = tempfile.mkdtemp(prefix=_PREFIX, dir=_FOLDERS)
        self._lock = lock_file(os.path.join(self.folder, _OWNER))

    def _remove_folder(self) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def remove_left_folders() -> None:
    """Remove the folders of processes that were killed: nobody holds their locks any more."""
    for owner in glob.glob(os.path.join(_FOLDERS, f"{_PREFIX}*", _OWNER)):
        try:
            lock = lock_file(owner)
        except OSError:  # of another user
            continue
        if lock is not None:
            shutil.rmtree(os.path.dirname(owner), ignore_errors=True)
            os.close(lock)


def _knock(address: str) -> None:
    """Raise OSError unless something listens at "host:port"; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def first_line(error: Exception) -> str:
    """Return the first line of an error's text; Ray's errors have many."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def last_line(error: Exception) -> str:
    """Return the last line of an error's text: in Ray's errors, the cause."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip()


def set_ray_environment(address: str) -> None:
    """Set what Ray reads from the environment when it is imported; the processes it starts inherit it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the behavior to come; unset, Ray warns
    if address != LOCAL:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        return
    # Ray starts workers at a niceness of 15: anything else on the machine would run first, also the search's own driver.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Ray reads this when it is imported; on Linux too, its processes then listen on the loopback interface only. A cluster of
    # ours always asks for a token as well: programs may have imported Ray before, and other users share the interface.
    if "ray" not in sys.modules:
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        os.environ["RAY_AUTH_MODE"] = "token"
    else:
        # Ray has cached the mode when it was imported. Only while the variable is unset does `ray.init` turn the token
        # on and refresh that; otherwise this process and the cluster would disagree.
        os.environ.pop("RAY_AUTH_MODE", None)
    # A token that lives in our environment only keeps Ray from writing one to a file that every user can read.
    if "RAY_AUTH_TOKEN" not in os.environ and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
