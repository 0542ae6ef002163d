"""The rows of a long measurement: each is on disk as soon as it is measured, and no row is measured twice."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from secateur.cost_models.core import InputError
from secateur.envs.metric import TOP1, Metric
from secateur.search.config import SearchConfig
from secateur.search.jsonl import append_line, as_read, read_lines, write_lines

Row = Mapping[str, Any]


def _choose_another(problem: str) -> InputError:
    return InputError(f"{problem}. Choose another `output` folder.", f"{problem}. Choose another folder with --output.")


class Records:
    """The rows of one measurement in a file of JSON lines; its first line, the header, says what is measured.

    Args:
        file: created if missing; an existing one is continued.
        header: JSON values.

    Attributes:
        file: see above.
        rows: all rows, those of earlier runs first.

    Raises:
        InputError: if the file holds another measurement, or cannot be read or written.
    """

    def __init__(self, file: Path, header: Mapping[str, Any]):
        self.file, header = file, as_read({"schema": 1, **header})
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            found = read_lines(file)
            if found and (other := difference(found[0], header)):
                raise _choose_another(f"{file} holds another measurement ({other})")
            self.rows: list[dict[str, Any]] = found[1:]
            write_lines(file, found or [header])
        except OSError as error:
            raise _choose_another(f"{file} cannot be written: {error}") from None

    def find(self, **key: Any) -> dict[str, Any] | None:
        """Return the first row with these values, or None."""
        wanted = as_read(key)
        return next((row for row in self.rows if all(not difference(row.get(n), wanted[n]) for n in wanted)), None)

    def add(self, **row: Any) -> dict[str, Any]:
        """Append a row to the file; return it as it will be read again."""
        append_line(self.file, row)
        self.rows.append(as_read(row))
        return self.rows[-1]


def difference(found: Any, wanted: Any, where: tuple[str, str] = ("there", "here"), place: str = "") -> str | None:
    """Return the first place where two JSON values differ, with both values; None if they are equal.

    A missing key counts as null: sections that were added to the configuration later are null by default.

    Args:
        found, wanted: the values.
        where: what to call the origin of each.
        place: where both values are, in a larger value.
    """
    if isinstance(found, dict) and isinstance(wanted, dict):
        parts = (difference(found.get(n), wanted.get(n), where, f"{place}.{n}".removeprefix(".")) for n in (wanted | found))
        return next(filter(None, parts), None)
    if found == wanted:
        return None
    return f"`{place}` is {json.dumps(found)} {where[0]}, {json.dumps(wanted)} {where[1]}"


def config_record(config: SearchConfig) -> dict[str, Any]:
    """Return the configuration without what no measurement depends on.

    This is what belongs to the machine (folders, workers), where runs are written, and whether winners are verified and trained.
    """
    excluded = {
        "data": {"root"},
        "search": {"workers", "address", "time_limit", "evaluation_timeout", "check_score"},
        "finalize": {"verify", "training"},
        "output": True,
    }
    record: dict[str, Any] = config.model_dump(mode="json", exclude=excluded)  # type: ignore[arg-type]
    if record["search"]["score"]["name"] == "metric":
        del record["search"]["score"]  # results of earlier versions name no score
    record["model"]["weights"] = config.model.weights and Path(config.model.weights).name
    return record


def network_name(config: SearchConfig) -> str:
    """Return what tables call the network: the name of its factory."""
    return config.model.factory.rpartition(":")[2]


def row_metric(row: Row) -> Metric:
    """Return the metric of the scores in a row."""
    return Metric(**row["metric"]) if "metric" in row else TOP1  # rows of version 0.1 have none


def metric_heading(metric: Metric) -> str:
    """Return what tables write above scores, such as "top-1 %"."""
    return f"{metric.label} {metric.unit}".rstrip()


def shown_score(metric: Metric, score: float) -> float:
    """Return a score as the number that stands before the metric's unit."""
    return 100 * score if metric.unit == "%" else score


def mean_test_score(rows: Sequence[Row]) -> str:
    """Return the test scores of rows that differ in their seeds as "mean ± standard deviation"; "-": there are none."""
    scores = [shown_score(row_metric(row), row["test_score"]) for row in rows]
    if not scores:
        return "-"
    return f"{np.mean(scores):.2f}" + (f" ± {np.std(scores, ddof=1):.2f}" if len(scores) > 1 else "")
