"""The `secateur` command. Verbs import what they need when they run, so that `--help` comes at once."""

from __future__ import annotations

import json
import logging
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler
from typer.core import TyperGroup

from cost_models.core import InputError
from search.arguments import ConfigPath, Overrides
from search.benchmarks.cli import benchmark

INTERRUPTED = 130
"""The exit code of a process that Ctrl-C has ended."""


class _Verbs(TyperGroup):
    """The one place where errors become messages and exit codes."""

    def invoke(self, context):
        try:
            return super().invoke(context)
        except InputError as error:
            for line in str(error).splitlines():
                print(f"error: {line}", file=sys.stderr)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=_Verbs,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Searches for prune ratios and bit-widths that fit all budgets of a device and cost the least accuracy.",
)

app.add_typer(benchmark, name="benchmark")

RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, e.g. runs/digits-1.")]
BudgetOption = Annotated[str | None, typer.Option("--budget", help="Name of one budget.")]


class Format(StrEnum):
    """How `front` prints."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"


@app.callback()
def main() -> None:
    """Set up logging for every verb; on stderr, because stdout is for results."""
    handler = RichHandler(console=Console(stderr=True), show_path=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])


@app.command()
def init(path: Annotated[Path, typer.Argument(help="File to write.")] = Path("secateur.yaml")) -> None:
    """Write a starter configuration with comments."""
    from search.config import INSTALLED_CONFIGS

    text = (INSTALLED_CONFIGS / "starter.yaml").read_text(encoding="utf-8")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise InputError(f"{path} exists already. Name another file: secateur init other.yaml") from None
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error}") from None
    print(f"wrote {path}; edit it, then: secateur inspect {path}")


@app.command()
def inspect(config: ConfigPath, overrides: Overrides = None) -> None:
    """Show layers, coupled groups, what is never pruned and why, and whether the budgets can be met."""
    from search.config import load_config

    settings = load_config(config, overrides or ())
    from search import tables
    from search.build import build_model_and_graph, build_space, feasibility_table, planned_calibration
    from search.progress import SearchProgress

    with SearchProgress(Console(stderr=True)) as progress:
        data, model, graph = build_model_and_graph(settings, progress.say)
        space, budgets = build_space(settings, graph, dense_top1=float("nan"))
        plans = planned_calibration(settings, model, graph)
    console = Console()
    console.print(tables.layer_table(graph, space.space))
    console.print(tables.group_table(graph))
    if graph.frozen:
        console.print(tables.frozen_table(graph))
    limited = tables.calibration_table(plans or {}, settings.calibration["max_matrix_bytes"])
    if limited.row_count:
        console.print(limited)
    rows = feasibility_table(space, budgets)
    console.print(tables.feasibility_report(rows))
    dense = ", ".join(f"{cost} {tables.amount(cost, value)}" for cost, value in space.dense_costs.items())
    console.print(f"dense: {dense}", highlight=False)
    images = min(len(data.calibration), settings.calibration["max_images"])
    console.print(tables.calibration_line(plans, images), highlight=False)
    console.print(f"data: {data.source}", highlight=False, markup=False)
    if not all(row.satisfiable for row in rows):
        raise InputError("A budget cannot be met. Raise its limit, or allow stronger compression in `space`.")


@app.command()
def search(
    config: ConfigPath,
    overrides: Overrides = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster to use instead of a local one.")] = None,
) -> None:
    """Search, and write a run: study, Pareto front, test scores of the best policies. Ctrl-C ends it early."""
    from search.config import load_config

    settings = load_config(config, [*(overrides or ()), *([f"search.address={address}"] if address else [])])
    from search.progress import SearchProgress
    from search.run import search as run_search

    console = Console()
    with SearchProgress(console) as progress:
        try:
            run_search(settings, progress)
        except KeyboardInterrupt:
            progress.stop()
            if progress.run is None:
                raise
            _show_run(console, progress.run)
            print("interrupted: the run holds what was found until then", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None
    _show_run(console, progress.run)


def _show_run(console: Console, run: Path) -> None:
    from search.front import read_front
    from search.tables import front_tables

    for table in front_tables(read_front(run)):
        console.print(table)
    print(f"run: {run}")


@app.command()
def front(
    run: RunPath,
    budget: BudgetOption = None,
    output: Annotated[Format, typer.Option("--format", help="What to print.")] = Format.TABLE,
) -> None:
    """Print the Pareto front of a run, also while it is still searching."""
    from search.front import front_csv, only_budget, read_front
    from search.tables import front_tables

    document = read_front(run)
    if budget is not None:
        document = only_budget(document, budget)
    if output is Format.JSON:
        print(json.dumps(document, indent=1))
    elif output is Format.CSV:
        print(front_csv(document), end="")
    else:
        for table in front_tables(document, budget):
            Console().print(table)


@app.command()
def export(
    run: RunPath,
    budget: Annotated[str, typer.Option("--budget", help="Name of the budget whose winner is exported.")],
    output: Annotated[Path | None, typer.Option(help="Folder to write; default: RUN/exports/BUDGET.")] = None,
) -> None:
    """Write the best model of a budget: policy.json and safetensors, reloadable without pickles."""
    from search.front import read_front, winner
    from search.run_folder import load_manifest

    settings, _ = load_manifest(run)
    document = read_front(run)
    point = winner(document, budget)
    folder = output or run / "exports" / budget
    from search.build import build_problem
    from search.export import check_free, export_point
    from search.progress import SearchProgress

    check_free(folder)
    with SearchProgress(Console(stderr=True)) as progress:
        problem = build_problem(settings, progress.say)
        progress.say("exporting")
        test = export_point(folder, problem, document, budget)
    print(f"validation top-1 {100 * point['top1']:.2f} %, test top-1 {100 * test.top1:.2f} % of {test.images} images")
    print(f"export: {folder}")


@app.command()
def support(
    models: Annotated[list[str] | None, typer.Argument(help="torchvision classifiers; default: all.")] = None,
    output: Annotated[Path, typer.Option(help="Table to write; rows of other models are kept.")] = Path("SUPPORT.md"),
) -> None:
    """Analyse, slice, compare and train torchvision's classifiers, and rewrite the support matrix. All take 15 minutes."""
    existed = output.exists()
    try:
        output.open("a", encoding="utf-8").close()  # only trying tells whether the result can be written
    except OSError as error:
        raise InputError(f"The table {output} cannot be written: {error.strerror}. Choose another with --output.") from None
    if not existed:
        output.unlink()
    from search.support import support_matrix

    support_matrix(models or None, output, progress=print)
