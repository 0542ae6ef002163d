"""`secateur benchmark service`: how many requests the service answers, how fast, and how long events take to many listeners.

A server process on this machine has a store with many finished searches. Clients ask for the list as fast as they can; then many
listeners follow the events of one running search.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from secateur.cost_models.core import InputError
from secateur.search.benchmarks.scaffold import markdown_table
from secateur.search.service.store import EVENTS, OUTCOME, PROGRESS, Search, Store, take_lock, write_json

START_SECONDS = 60
"""How long the server may take to start."""

EVENT_COUNT, EVENT_SECONDS = 10, 0.5
"""Events of the running search, and the time between two of them."""


def run_service(searches: int, clients: int, listeners: int, seconds: float, output: Path | None) -> None:
    """Measure and report.

    Args:
        searches: number of finished searches in the store.
        clients: number of clients that ask for the list.
        listeners: number of listeners.
        seconds: how long the clients ask.
        output: Markdown file for the table; None: it is only printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        for number in range(searches):
            _finished(store, number)
        with _server(store) as port:
            times = ask_for_lists(port, clients, seconds)
            delays, lost = follow_events(store, port, listeners)
    per_second = len(delays) / (EVENT_COUNT * EVENT_SECONDS)
    rows = [
        [f"list of {searches} searches, {clients} clients", f"{len(times) / seconds:.0f}", *_milliseconds(times)],
        [
            f"events to {listeners} listeners, {lost} lost",
            f"{per_second:.0f}",
            *_milliseconds(delays),
        ],
    ]
    table = markdown_table(["", "per second", "median ms", "99 % ms"], rows) + "\n"
    print(table)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(table, encoding="utf-8")


def _milliseconds(times: list[float]) -> list[str]:
    return [f"{1000 * value:.1f}" for value in np.percentile(times, [50, 99])] if times else ["-", "-"]


def _finished(store: Store, number: int) -> None:
    search, _ = store.add("someone", {"number": number}, "net")
    store.started(search)
    best = {"phone": 0.9, "watch": 0.8}
    write_json(search.folder / PROGRESS, {"text": "evaluating", "evaluations": 300, "total": 300, "best": best, "failed": 0})
    write_json(search.folder / OUTCOME, {"state": "finished", "message": ""})
    (search.folder / "lock").touch()


@contextmanager
def _server(store: Store) -> Iterator[int]:
    """Give the port of a server on the store."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-P", "-m", "secateur", "serve", "--no-token", "--store", str(store.folder), "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            _wait_for(process, port)
            yield port
        finally:
            process.terminate()


def _wait_for(process: subprocess.Popen[bytes], port: int) -> None:
    until = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < until:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise InputError("The server did not start; `secateur serve --no-token` says why.")


def ask_for_lists(port: int, clients: int, seconds: float) -> list[float]:
    """Return the seconds that each request for the first page took."""

    def ask(_: int) -> list[float]:
        connection, times = http.client.HTTPConnection("127.0.0.1", port), []
        until = time.perf_counter() + seconds
        while (start := time.perf_counter()) < until:
            connection.request("GET", "/v1/searches")
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 200, answer.reason
            times.append(time.perf_counter() - start)
        connection.close()
        return times

    with ThreadPoolExecutor(clients) as pool:
        return [one for times in pool.map(ask, range(clients)) for one in times]


def follow_events(store: Store, port: int, listeners: int) -> tuple[list[float], int]:
    """Return the seconds from the writing of each event to its arrival at each listener, and how many did not arrive."""
    search, _ = store.add("someone", {"number": -1}, "net")
    lock = take_lock(search.folder)  # as its process would hold it
    assert lock is not None
    store.started(search)
    with ThreadPoolExecutor(listeners) as pool:
        running = [pool.submit(_listen, port, search) for _ in range(listeners)]
        for _ in range(EVENT_COUNT):
            time.sleep(EVENT_SECONDS)
            with (search.folder / EVENTS).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"event": "evaluation", "time": time.time()}) + "\n")
        write_json(search.folder / OUTCOME, {"state": "finished", "message": ""})
        os.close(lock)
        found = [one.result() for one in running]
    delays = [delay for one in found for delay in one]
    return delays, listeners * EVENT_COUNT - len(delays)


def _listen(port: int, search: Search) -> list[float]:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", f"/v1/searches/{search.id}/events")
    answer, delays = connection.getresponse(), []
    for line in answer:
        if line.startswith(b"data: "):
            delays.append(time.time() - json.loads(line.removeprefix(b"data: "))["time"])
    connection.close()
    return delays
