"""Reports of a training while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable

from secateur.envs.training.distillation import BatchProgress
from secateur.search.problem import StatusCallback
from secateur.search.run.progress import SECONDS_PER_LINE, duration


def batch_reporter(status: StatusCallback, name: str) -> Callable[[BatchProgress], None]:
    """Return a callback for every batch, which reports the progress every few seconds.

    Args:
        status: called with one line.
        name: what is trained.
    """
    shown = [float("-inf")]

    def report(at: BatchProgress) -> None:
        now = time.monotonic()
        if now - shown[0] >= SECONDS_PER_LINE:
            shown[0] = now
            status(
                f"training {name}, epoch {at.epoch} of {at.epochs}, {100 * at.done:.0f} %: loss {at.loss:.3f}, "
                f"{duration(at.seconds_left)} left"
            )

    return report
