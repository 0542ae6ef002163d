"""Measurements in several processes: each gets what all of them share once, then one item after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")
Found = TypeVar("Found")


def measured(
    measure: Callable[[Any, Item], Found], shared: Any, items: Sequence[Item], processes: int
) -> Iterator[tuple[Item, Found]]:
    """Yield each item with what was measured of it, in the order in which they finish.

    Args:
        measure: (shared, item) -> a picklable result; a function of a module.
        shared: what all measurements need; picklable.
        items: what is measured; picklable.
        processes: of one thread each; 0: in this process.
    """
    if processes == 0:
        yield from ((item, measure(shared, item)) for item in items)
        return
    # Spawned, not forked: torch's threads do not survive a fork.
    pool = ProcessPoolExecutor(processes, get_context("spawn"), initializer=_keep, initargs=(measure, shared))
    try:
        running = {pool.submit(_measure_here, item): item for item in items}
        for done in as_completed(running):
            yield running[done], done.result()
    finally:
        pool.shutdown(cancel_futures=True)


_kept: tuple[Callable[[Any, Any], Any], Any]
"""What a worker process measures with, and what it shares; sent once."""


def _keep(measure: Callable[[Any, Any], Any], shared: Any) -> None:
    global _kept
    torch.set_num_threads(1)
    _kept = measure, shared


def _measure_here(item: Any) -> Any:
    measure, shared = _kept
    return measure(shared, item)
