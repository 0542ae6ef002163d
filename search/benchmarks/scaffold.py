"""What all benchmarks share: progress on the terminal, workers, rows and tables in the folder of the results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console

from secateur.search.benchmarks.records import Records, Row
from secateur.search.build import open_runner
from secateur.search.loop import Runner
from secateur.search.problem import Problem
from secateur.search.run.progress import SearchProgress

ROWS, REPORT = "results.jsonl", "results.md"


def show_progress() -> SearchProgress:
    """Return a progress display on stderr, because stdout is for results; use it in a `with` statement."""
    return SearchProgress(Console(stderr=True))


@contextmanager
def workers(problem: Problem, progress: SearchProgress) -> Iterator[Runner]:
    """Give the runner of a problem, and close it after use."""
    progress.status("starting the workers")
    runner = open_runner(problem)
    progress.stop()
    try:
        yield runner
    finally:
        runner.close()


def write_results(records: Records, lines: Iterable[str], report: Callable[[Sequence[Row]], str]) -> None:
    """Print what is measured, row by row, then the report; results.md holds the report of all rows so far.

    Args:
        records: the rows.
        lines: adds rows to `records` while it is consumed; one line of text for each.
        report: returns the report of all rows, Markdown.
    """
    file = records.file.with_name(REPORT)
    for line in lines:
        print(line, flush=True)
        file.write_text(report(records.rows), encoding="utf-8")
    text = report(records.rows)
    file.write_text(text, encoding="utf-8")
    print(text)
    print(f"results: {file.parent}")


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown; `rows` are its cells."""
    lines = [f"| {' | '.join(cells)} |" for cells in (heads, *rows)]
    return "\n".join([lines[0], f"|{'---|' * len(heads)}", *lines[1:]])


def percent(share: float | None) -> str:
    """Return a share in percent with two decimals, without the sign; "-" if there is none."""
    return "-" if share is None else f"{100 * share:.2f}"
