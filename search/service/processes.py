"""Starts the processes of searches, as many at a time as the service allows, and signals them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from secateur.cost_models.core import InputError
from secateur.search.service.store import CHANGES, LOCK, LOG, OUTCOME, Search, Store, take_lock, write_json

STOP_SECONDS = 0.2
"""How often `cancel` looks whether a search has ended."""


@dataclass
class Processes:
    """The processes of a store.

    Attributes:
        store: the searches.
        limit: largest number of searches that run at the same time; the others wait, oldest first.
    """

    store: Store
    limit: int
    children: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start_waiting(self) -> list[Search]:
        """Start the searches that wait, as far as the limit allows; return them. It is called every second."""
        self.children = [child for child in self.children if child.poll() is None]  # ended children are reaped
        waiting = [search for search in self.store.not_started() if search.state == "queued"]
        if not waiting:  # then no other search is looked at, however many there are
            return []
        free = self.limit - sum(search.state == "running" for search in self.store.list(None))
        return [search for search in waiting[: max(free, 0)] if self._start(search)]

    def _start(self, search: Search) -> bool:
        # The child inherits the lock, so it is held from now on until the child ends.
        lock = take_lock(search.folder)
        if lock is None:
            return False
        self.store.started(search)
        try:
            with (search.folder / LOG).open("ab") as log:
                child = subprocess.Popen(
                    [sys.executable, "-P", "-m", "secateur.search.service.worker", str(search.folder)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # it outlives the server
                    pass_fds=[lock],
                    cwd=search.folder,
                )
            os.ftruncate(lock, 0)
            os.pwrite(lock, str(child.pid).encode(), 0)
        finally:
            os.close(lock)
        self.children.append(child)
        return True

    def cancel(self, search: Search, seconds: float = 0.0) -> None:
        """End a search early; what was found is kept.

        Args:
            search: it waits or runs.
            seconds: how long to wait for its end.
        Raises:
            InputError: if it has ended already.
        """
        state = search.state
        if state == "queued":
            write_json(search.folder / OUTCOME, {"state": "cancelled", "message": "", "time": time.time()})
            return
        if state != "running":
            raise InputError(f"The search is {state}, so there is nothing to cancel.")
        os.kill(int((search.folder / LOCK).read_text()), signal.SIGTERM)
        until = time.monotonic() + seconds
        while search.state == "running" and time.monotonic() < until:
            time.sleep(STOP_SECONDS)

    def resume(self, search: Search, changes: Mapping[str, Any]) -> None:
        """Let a search that has ended go on, with changes of its configuration such as {"search.evaluations": 500}.

        Raises:
            InputError: if it waits or runs.
        """
        state = search.state
        if state in ("queued", "running"):
            raise InputError(f"The search is {state}; cancel it first.")
        write_json(search.folder / CHANGES, changes)
        (search.folder / OUTCOME).unlink(missing_ok=True)
        self.store.queue(search)
