"""Shows how a search goes: a live panel in a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

if TYPE_CHECKING:
    from secateur.search.results.front import Front

SECONDS_PER_LINE = 10.0
"""How often a line is printed where there is no terminal."""


class SearchProgress:
    """Follows one search; a context manager, so that the terminal is restored at the end.

    Args:
        console: where to show it.
        clock: seconds, monotonic.

    Attributes:
        run: folder of the search, once it has started.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic):
        self.run: Path | None = None
        self._front: Front  # known from `on_start` on
        self._console, self._clock = console, clock
        self._status = console.status("") if console.is_terminal else None
        self._live: Live | None = None

    def __enter__(self) -> SearchProgress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def status(self, text: str) -> None:
        """Show what happens before and after the evaluations: training, calibration, final scores."""
        if self._status is None:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)
            return
        self._stop_live()
        self._status.update(text)
        self._status.start()

    def note(self, text: str) -> None:
        """Print a permanent line."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def on_start(self, run: Path, front: Front, total: int, time_limit: float | None = None) -> None:
        """Begin to follow the evaluations.

        Args:
            run: folder of the search.
            front: of the search; it is read again at every episode.
            total: number of evaluations.
            time_limit: seconds from now on, or None.
        """
        self.run, self._front, self._total, self._limit = run, front, total, time_limit
        self._started = self._printed = self._clock()
        self._before = front.evaluations
        if self._status is not None:
            self._status.stop()
            self._live = Live(self._panel(), console=self._console, refresh_per_second=4)
            self._live.start()

    def on_episode(self) -> None:
        """Show the state after one more episode."""
        now = self._clock()
        if self._live is not None:
            self._live.update(self._panel())
        elif now - self._printed >= SECONDS_PER_LINE or self._front.evaluations == self._total:
            self._printed = now
            self._console.print(self.line(), highlight=False, markup=False, soft_wrap=True)

    def stop(self) -> None:
        """Leave the terminal as it was."""
        self._stop_live()
        if self._status is not None:
            self._status.stop()

    def _stop_live(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def facts(self) -> dict[str, str]:
        """Return what is shown, by name."""
        front, done = self._front, self._front.evaluations
        seconds = self._clock() - self._started
        rate = (done - self._before) / seconds if seconds > 0 else 0.0
        shown = {
            "evaluations": f"{done} of {self._total}",
            "speed": f"{rate:.2f} evaluations/s",
            "feasible": f"{100 * front.feasible / done:.0f} %" if done else "-",
        }
        for budget in front.budgets:
            best = front.best_score(budget.name)
            shown[f"best for {budget.name}"] = (
                f"{front.score_metric.text(best)} {front.score_metric.label}" if best is not None else "nothing fits yet"
            )
        shown["dense"] = f"{front.score_metric.text(front.dense_score)} {front.score_metric.label}"
        shown["hypervolume"] = f"{front.hypervolume:.4f}"
        shown["time left"] = self._time_left(done, seconds, rate)
        return shown | ({"failed": str(front.failed)} if front.failed else {})

    def _time_left(self, done: int, seconds: float, rate: float) -> str:
        estimates = [(self._total - done) / rate] if rate else []
        if self._limit is not None:
            estimates.append(max(self._limit - seconds, 0.0))
        return duration(min(estimates)) if estimates else "-"

    def line(self) -> str:
        """Return the state in one line."""
        return ", ".join(f"{name} {value}" for name, value in self.facts().items())

    def _panel(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for name, value in self.facts().items():
            table.add_row(f"[dim]{name}[/]", value)
        bar = Table.grid()
        bar.add_row(ProgressBar(total=self._total, completed=self._front.evaluations, width=60))
        bar.add_row(table)
        return bar


def duration(seconds: float) -> str:
    """Return seconds in the form "45 s", "12 min 05 s", "3 h 20 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
