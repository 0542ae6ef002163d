"""`secateur report`: reads runs, and writes the page and the plots."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from secateur.cost_models.writing import replace_file
from secateur.envs.core import InputError
from secateur.search.report.data import RunData, read_run
from secateur.search.report.page import render
from secateur.search.report.plots import write_plots

REPORT = "report.html"


def report(
    runs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str] | None = None,
    plots: str | os.PathLike[str] | None = None,
) -> Path:
    """Write a report about one run, or a comparison of several, and return the path of the HTML file.

    Only files of the runs are read: no model is loaded, and nothing that they name is called. An existing report is replaced.

    Args:
        runs: a run or its folder, or several.
        output: HTML file; None: report.html in the folder of the run, or in the working directory if there are several runs.
        plots: folder for every plot as SVG and CSV; None: they are not written.
    Raises:
        InputError: if a folder is no run, a file is damaged or cannot be written, or the runs have different scores.
    """
    folders = [Path(runs)] if isinstance(runs, str | os.PathLike) else [Path(run) for run in runs]
    if not folders:
        raise InputError("`runs` is empty. Name at least one run.")
    found = _read(folders)
    path = Path(output) if output is not None else (folders[0] / REPORT if len(folders) == 1 else Path(REPORT))
    page = render(found)
    if plots is not None:
        write_plots(found, Path(plots))
    _replace(path, page)
    return path


def _read(folders: Sequence[Path]) -> list[RunData]:
    """Return the runs; two of the same name are told apart by their paths, and several runs show their agents."""
    names = [folder.resolve().name for folder in folders]
    shared = {name for name, count in Counter(names).items() if count > 1}
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError("A run is named twice. Name each run once.")
    pairs = zip(folders, names, strict=True)
    found = [read_run(folder, str(folder) if name in shared else name) for folder, name in pairs]
    if len(found) == 1:
        return found
    return [replace(run, name=f"{run.name} ({run.config.search.agent})") for run in found]


def _replace(path: Path, text: str) -> None:
    try:
        replace_file(path, text)
    except OSError as error:
        problem = f"{path} cannot be written: {error.strerror}. Choose another"
        raise InputError(f"{problem} `output`.", f"{problem} --output.") from None
