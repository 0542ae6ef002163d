"""Signals that ask this process to end: Ctrl-C, and the SIGTERM that a scheduler sends."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
NOTICE = b"\nfinishing the running evaluations; once more stops now\n"


class Ended(KeyboardInterrupt):
    """This process was asked to end by a signal.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int):
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.number = number


def exit_code(error: KeyboardInterrupt) -> int:
    """Return the exit code of a process that this exception ends: 130 after Ctrl-C, 143 after SIGTERM."""
    return 128 + (error.number if isinstance(error, Ended) else signal.SIGINT)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Raise `Ended` at each signal within the block, so that everything is closed on the way out."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Ended(number)

    with _handled(end):
        yield


@contextmanager
def first_signal_waits() -> Iterator[Callable[[], bool]]:
    """Only note the first signal within the block; raise `Ended` at the second one, or at the end of the block.

    Yields:
        A function that returns whether a signal was noted.
    """
    noted: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if noted:
            raise Ended(number)
        noted.append(number)
        os.write(2, NOTICE)  # print() may be interrupted in the middle of its own work

    with _handled(note):
        yield lambda: bool(noted)
    if noted:
        raise Ended(noted[0])


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ignore the signals within the block, which ends something: interrupted, it would leave processes and folders behind."""
    with _handled(lambda number, frame: None):
        yield


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Use a handler for the signals within the block; signals that are ignored (nohup) stay ignored.

    Only the main thread can do so; in other threads this has no effect.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    used = [number for number in SIGNALS if before[number] not in (signal.SIG_IGN, None)]
    for number in used:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in used:
            signal.signal(number, before[number])
