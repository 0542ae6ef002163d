"""The process of one search: `python -m secateur.search.service.worker FOLDER`. It writes events, and how it ended.

It has its own session, so it goes on when the server ends. SIGTERM and SIGINT end the search early; what was found is kept.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from secateur.cost_models.core import InputError
from secateur.search.config import apply_overrides, parse_config
from secateur.search.named_code import modules_of
from secateur.search.results.front import Front
from secateur.search.run.folder import load_manifest
from secateur.search.run.progress import SearchProgress
from secateur.search.run.search import resume, search
from secateur.search.run.signals import ended_by_signals
from secateur.search.service.store import CHANGES, CONFIG, EVENTS, OUTCOME, PROGRESS, RUN, State, read_json, write_json


class RecordedProgress(SearchProgress):
    """Prints lines, and writes an event for every phase, evaluation and change of the front."""

    def __init__(self, folder: Path):
        super().__init__(Console(width=200))
        self._folder, self._latest = folder, dict[str, Any]()
        self._best: dict[str, float | None] = {}

    def event(self, kind: str, **values: Any) -> None:
        """Append an event."""
        line = json.dumps({"event": kind, "time": time.time(), **values})
        with (self._folder / EVENTS).open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        if kind in ("phase", "evaluation"):
            self._latest |= values
            write_json(self._folder / PROGRESS, self._latest)

    def status(self, text: str) -> None:
        """Report a phase."""
        super().status(text)
        self.event("phase", text=text)

    def note(self, text: str) -> None:
        """Report a sentence."""
        super().note(text)
        self.event("note", text=text)

    def on_start(self, run: Path, front: Front, total: int, time_limit: float | None = None) -> None:
        """Begin to follow the evaluations."""
        super().on_start(run, front, total, time_limit)
        self.event("phase", text="evaluating")

    def on_episode(self) -> None:
        """Report an evaluation."""
        super().on_episode()
        front = self._front
        best = {budget.name: front.best_score(budget.name) for budget in front.budgets}
        changed = self._best != best
        self._best = best
        facts = {"evaluations": front.evaluations, "total": self._total, "best": best, "failed": front.failed}
        self.event("evaluation", **facts, time_left=self.facts()["time left"])
        if changed:
            self.event("front", evaluations=front.evaluations, best=best)


def work(folder: Path) -> State:
    """Run or resume the search in a folder; return how it ended."""
    progress = RecordedProgress(folder)
    progress.event("state", state="running")
    try:
        overrides = read_json(folder / CHANGES)
        if (folder / RUN).is_dir():
            # The service's rules have checked the modules that the configuration names, before the search began.
            resume(folder / RUN, overrides, progress, trust=modules_of(load_manifest(folder / RUN)[0]))
        else:
            values = read_json(folder / CONFIG)
            apply_overrides(values, overrides)  # it was cancelled before it started, and then resumed
            values["output"] = {"root": str(folder), "name": RUN}
            search(parse_config(values, "the configuration"), progress)
        return _ended(folder, progress, "finished")
    except KeyboardInterrupt:
        return _ended(folder, progress, "cancelled")
    except InputError as error:
        return _ended(folder, progress, "failed", str(error))
    except Exception as error:
        Console(stderr=True).print_exception()
        return _ended(folder, progress, "failed", f"{type(error).__name__}: {error}")


def _ended(folder: Path, progress: RecordedProgress, state: State, message: str = "") -> State:
    write_json(folder / OUTCOME, {"state": state, "message": message, "time": time.time()})
    progress.stop()
    progress.event("state", state=state, message=message)
    return state


def main(folder: Path) -> int:
    """Work, and return the exit code."""
    with ended_by_signals():
        return {"finished": 0, "cancelled": 130}.get(work(folder), 1)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
