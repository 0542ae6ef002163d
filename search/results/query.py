"""Queries: evaluations of one run or many that satisfy a condition, sorted and cut."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path

import pandas
from rich.markup import escape
from rich.table import Table

from secateur.cost_models.writing import replace_file
from secateur.envs.core import InputError
from secateur.search.results.document import read_front
from secateur.search.results.expression import check_column, matching_rows
from secateur.search.run.journal import read_journal, trials_table
from secateur.search.schema import search_score_of

RUN, EVALUATION = "run", "evaluation"

MAX_ROWS = 50
"""Rows that a table in the terminal shows unless `limit` says otherwise."""

LONG = ("state", "images", "seconds", "failure")
"""Columns that a table in the terminal shows only if they are named."""

Columns = Sequence[str] | str
"""Names of columns; a text names several with commas."""


def query(
    runs: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    where: str | None = None,
    sort: Columns = (),
    limit: int | None = None,
    columns: Columns | None = None,
) -> pandas.DataFrame:
    """Return the evaluations of runs that satisfy a condition, one row each.

    Nothing but the runs' studies and front.json is read; no code that they name is imported.

    Args:
        runs: a run, its folder, or several.
        where: such as "top1 >= 0.9 and macs <= 0.5*dense and budget == 'phone'". `dense` is the dense model's value of the column
            that it is compared with; all numbers are in the columns' units. None: all evaluations.
        sort: columns; a minus before a name: largest first. Rows without a value come last.
        limit: largest number of rows; None: all of them.
        columns: columns of the result; None: all of them. `run` is the folder, `evaluation` the number; the others are those of
            `Run.trials`.
    Raises:
        InputError: if a folder is no run, the condition cannot be read, or a column does not exist.
    """
    folders = [runs] if isinstance(runs, str | os.PathLike) else list(runs)
    if not folders:
        raise InputError("Name at least one run, for example runs/digits-1.")
    if limit is not None and limit < 0:
        raise InputError(f"`limit` must be 0 or more, but got {limit}.")
    found = [_evaluations(Path(folder)) for folder in folders]
    dense = [values for _, values in found]
    table: pandas.DataFrame = pandas.concat([rows for rows, _ in found], ignore_index=True)
    if where is not None and len(table):
        every = {name: pandas.concat([one.get(name, pandas.Series(dtype=float)) for one in dense]) for name in _names(dense)}
        of_rows = {name: table[RUN].map(values[~values.index.duplicated()]) for name, values in every.items()}
        table = table[matching_rows(where, table, of_rows)]
    table = _sorted(table, sort)
    chosen = None if columns is None else _split(columns)
    for name in chosen or ():
        check_column(name, table, "in `columns`")
    return (table if chosen is None else table[chosen]).head(len(table) if limit is None else limit).reset_index(drop=True)


def _evaluations(run: Path) -> tuple[pandas.DataFrame, dict[str, pandas.Series]]:
    """Return the evaluations of a run, and {column: dense value}."""
    table = trials_table(read_journal(run)).reset_index()
    table.insert(0, RUN, str(run))
    document = read_front(run)
    metric, _, dense_score = search_score_of(document)
    values = {metric.name: dense_score, **document["dense"]["costs"]}
    return table, {name: pandas.Series([value], [str(run)], dtype=float) for name, value in values.items()}


def _names(dense: Iterable[Mapping[str, pandas.Series]]) -> list[str]:
    return list(dict.fromkeys(name for one in dense for name in one))


def _split(columns: Columns) -> list[str]:
    names = columns.split(",") if isinstance(columns, str) else columns
    return [stripped for name in names if (stripped := name.strip().strip("`"))]


def _sorted(table: pandas.DataFrame, sort: Columns) -> pandas.DataFrame:
    keys = _split(sort)
    names = [key.removeprefix("-").strip("`") for key in keys]
    for name in names:
        check_column(name, table, "in `sort`")
    if not names:
        return table
    ascending = [not key.startswith("-") for key in keys]
    return table.sort_values(names, ascending=ascending, kind="stable", na_position="last")


# ---------------------------------------------------------------------------------------------------------------- output


class TableFormat(StrEnum):
    """Output formats of `query`."""

    TABLE = "table"
    CSV = "csv"
    JSON = "json"
    PARQUET = "parquet"


def write_table(table: pandas.DataFrame, kind: TableFormat, output: Path | None = None) -> None:
    """Write rows as CSV, as a JSON list of objects, or as parquet.

    Args:
        table: the rows.
        kind: any format but TABLE.
        output: file to write; None: standard output.
    Raises:
        InputError: if the file cannot be written, or parquet would go to a terminal.
    """
    if kind is TableFormat.PARQUET:
        content = table.to_parquet(index=False)
    elif kind is TableFormat.CSV:
        content = table.to_csv(index=False).encode()
    else:
        rows = table.astype(object).where(table.notna(), None).to_dict(orient="records")
        content = (json.dumps(rows, indent=1) + "\n").encode()
    if output is None and kind is TableFormat.PARQUET and sys.stdout.isatty():
        raise InputError("Parquet is not text: name a file with --output, or redirect the output.")
    try:
        if output is None:
            sys.stdout.flush()
            sys.stdout.buffer.write(content)
            sys.stdout.buffer.flush()
        else:
            replace_file(output, content)
    except BrokenPipeError:  # `| head` has read enough
        sys.stderr.close()
    except OSError as error:
        raise InputError(f"{output} cannot be written: {error}.") from None


def shown_table(table: pandas.DataFrame, columns: Columns | None = None, limit: int | None = None) -> Table:
    """Return rows as a table for the terminal; numbers are in the units of the columns.

    Args:
        table: the rows.
        columns: those that the user has named; None: facts and costs, no choices.
        limit: the one that the user has named; None: MAX_ROWS.
    """
    names = [str(name) for name in table]
    if columns is None:
        several = RUN in table and table[RUN].nunique() > 1
        names = [name for name in names if "/" not in name and name not in LONG and (name != RUN or several)]
    shown = table[names].head(MAX_ROWS if limit is None else limit)
    rest = f" All: --limit {len(table)}, or --format csv." if len(shown) < len(table) else ""
    found = Table(caption=f"{len(shown):,} of {len(table):,} evaluations.{rest}", caption_justify="left")
    for name in names:
        found.add_column(escape(name), justify="right" if pandas.api.types.is_numeric_dtype(table[name]) else "left")
    for row in shown.itertuples(index=False):
        found.add_row(*(_cell(value) for value in row))
    return found


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "" if pandas.isna(value) else f"{value:.6g}"
    return "" if value is None else escape(str(value))
