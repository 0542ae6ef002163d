"""What a user sees while a search runs, in a terminal and in a log file."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from secateur.envs.core import Budget, CompressionPolicy, Episode, Evaluation
from secateur.envs.metric import TOP1
from secateur.search.results.front import Front
from secateur.search.run.progress import SECONDS_PER_LINE, SearchProgress, duration

BUDGETS = (Budget("phone", {"macs": 50.0}), Budget("watch", {"macs": 20.0}))


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def episode(number, macs):
    evaluation = Evaluation(0.8, {"macs": macs}, images=100)
    return Episode("phone", CompressionPolicy((number,), (), ()), evaluation, {"macs": macs / 50 - 1}, reward=np.zeros(2))


@pytest.fixture
def front():
    return Front(("top1", "macs"), BUDGETS, Evaluation(0.9, {"macs": 100.0}, images=100), replace(TOP1, chance=0.1))


def follow(console, front, count, seconds_each, time_limit=None):
    clock = Clock()
    with SearchProgress(console, clock) as progress:
        progress.status("calibrating [256 images]")
        progress.on_start(Path("runs/a-1"), front, 20, time_limit)
        for number in range(count):
            clock.now += seconds_each
            front.add(episode(number, 40.0))
            progress.on_episode()
    return progress


def test_a_log_gets_a_line_every_few_seconds_and_one_at_the_end(front):
    output = io.StringIO()
    progress = follow(Console(file=output, width=80), front, 20, seconds_each=SECONDS_PER_LINE / 4)
    lines = output.getvalue().splitlines()
    assert lines[0] == "calibrating [256 images]"
    assert len(lines) == 1 + 5
    assert lines[1].startswith("evaluations 4 of 20, speed 0.40 evaluations/s, feasible 100 %, best for phone 80.00 % top-1")
    assert "best for watch nothing fits yet" in lines[1] and "hypervolume 0.4200" in lines[1]
    assert lines[1].endswith("time left 40 s") and lines[-1].endswith("time left 0 s")
    assert progress.run == Path("runs/a-1")


def test_the_time_limit_shortens_the_time_left(front):
    progress = follow(Console(file=io.StringIO()), front, 4, seconds_each=5.0, time_limit=30.0)
    assert progress.facts()["time left"] == "10 s"
    progress = follow(Console(file=io.StringIO()), front, 0, seconds_each=5.0)
    assert progress.facts()["time left"] == "-"


def test_a_terminal_shows_the_same_facts_in_place(front):
    output = io.StringIO()
    follow(Console(file=output, width=100, force_terminal=True), front, 3, seconds_each=1.0)
    shown = output.getvalue()
    assert "3 of 20" in shown and "80.00 % top-1" in shown and "nothing fits yet" in shown
    assert shown.rstrip().endswith("\x1b[?25h")  # the cursor is back


def test_failures_are_counted_once_there_are_any(front):
    clock = Clock()
    progress = SearchProgress(Console(file=io.StringIO()), clock)
    progress.on_start(Path("runs/a-1"), front, 20)
    assert "failed" not in progress.facts()
    front.add(Episode("phone", None, None, failure="worker lost twice"))
    assert progress.facts()["failed"] == "1" and progress.facts()["feasible"] == "0 %"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (725, "12 min 05 s"), (12000, "3 h 20 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
