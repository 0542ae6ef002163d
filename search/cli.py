"""The `secateur` command. Verbs import what they need when they run, so that `--help` comes at once."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler
from typer.core import TyperGroup

from secateur.cost_models.core import InputError
from secateur.search.arguments import ConfigPath, Overrides
from secateur.search.benchmarks.cli import benchmark

if TYPE_CHECKING:
    from secateur.search.run.progress import SearchProgress

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
    from secateur.search.config import INSTALLED_CONFIGS

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
    from secateur.search.config import load_config

    settings = load_config(config, overrides or ())
    from secateur.envs.projection import FeasibilityProjection
    from secateur.search.build import (
        build_budgets,
        build_costs,
        build_model_and_graph,
        feasibility_table,
        planned_calibration,
        resolve_device,
    )
    from secateur.search.results import tables
    from secateur.search.run.progress import SearchProgress

    with SearchProgress(Console(stderr=True)) as progress:
        data, model, graph = build_model_and_graph(settings, progress.status)
        settings = resolve_device(settings, model, graph, progress.status)
        costs = build_costs(settings, graph)
        budgets, projection = build_budgets(settings, costs), FeasibilityProjection(costs)
        plans = planned_calibration(settings, model, graph)
    console = Console()
    console.print(tables.layer_table(graph, costs.policy_space))
    console.print(tables.group_table(graph))
    if graph.frozen:
        console.print(tables.frozen_table(graph))
    limited = tables.calibration_table(plans or {}, settings.calibration["max_matrix_bytes"])
    if limited.row_count:
        console.print(limited)
    rows = feasibility_table(projection, budgets)
    console.print(tables.feasibility_report(rows))
    dense = ", ".join(f"{cost} {tables.amount(cost, value)}" for cost, value in costs.dense.items())
    console.print(f"dense: {dense}", highlight=False)
    if isinstance(settings.device, Device):
        console.print(tables.device_line(settings.device), highlight=False, markup=False)
    images = min(len(data.calibration), settings.calibration["max_images"])
    console.print(tables.calibration_line(plans, images), highlight=False)
    console.print(f"data: {data.source}", highlight=False, markup=False)
    if not all(row.satisfiable for row in rows):
        raise InputError("A budget cannot be met. Raise its limit, or allow stronger compression in `space`.")
    for budget in budgets:  # all limits of one together
        projection.check(budget)


@app.command()
def search(
    config: ConfigPath,
    overrides: Overrides = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster to use instead of a local one.")] = None,
) -> None:
    """Search, and write a run: study, Pareto front, test scores of the best policies. Ctrl-C ends it early."""
    from secateur.search.config import load_config

    settings = load_config(config, [*(overrides or ()), *([f"search.address={address}"] if address else [])])
    from secateur.search.run.search import search as run_search

    _follow(lambda progress: run_search(settings, progress))


@app.command()
def resume(run: RunPath, overrides: Overrides = None) -> None:
    """Go on with an interrupted run, or with more evaluations (--set search.evaluations=500), as if it had never stopped."""
    from secateur.search.run.search import resume as run_resume

    _follow(lambda progress: run_resume(run, overrides or (), progress))


def _follow(search: Callable[[SearchProgress], Path]) -> None:
    """Show a search while it runs, and what it has found."""
    from secateur.search.run.progress import SearchProgress

    console = Console()
    with SearchProgress(console) as progress:
        try:
            search(progress)
        except KeyboardInterrupt:
            progress.stop()
            if progress.run is None:
                raise
            _show_run(console, progress.run)
            print(f"interrupted: the run holds what was found; go on with: secateur resume {progress.run}", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None
    _show_run(console, progress.run)


def _show_run(console: Console, run: Path) -> None:
    from secateur.search.results.front import read_front
    from secateur.search.results.tables import check_lines, front_tables

    document = read_front(run)
    for table in front_tables(document):
        console.print(table)
    for line in check_lines(document):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    print(f"run: {run}")


@app.command()
def front(
    run: RunPath,
    budget: BudgetOption = None,
    output: Annotated[Format, typer.Option("--format", help="What to print.")] = Format.TABLE,
) -> None:
    """Print the Pareto front of a run, also while it is still searching."""
    from secateur.search.results.front import front_csv, only_budget, read_front
    from secateur.search.results.tables import check_lines, front_tables

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
        for line in check_lines(document):
            Console().print(line, highlight=False, markup=False, soft_wrap=True)


@app.command()
def export(
    run: RunPath,
    budget: Annotated[str | None, typer.Option("--budget", help="Name of the budget whose winner is exported.")] = None,
    trial: Annotated[int | None, typer.Option("--trial", help="Number of any trial of the study.")] = None,
    front: Annotated[bool, typer.Option("--front", help="Every policy of the front, a folder each.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="Folder to write; default: RUN/exports/BUDGET, .../trial-NUMBER or .../front.")
    ] = None,
    pt2: Annotated[bool, typer.Option("--pt2", help="Write model.pt2 of torch.export too.")] = False,
) -> None:
    """Write models of a run: policy.json, safetensors and ONNX, loadable without pickles. Say which with one option."""
    from secateur.search.results.front import read_front
    from secateur.search.run.folder import load_manifest

    settings, _ = load_manifest(run)
    document = read_front(run)
    from secateur.search.results.selection import (
        check_selection,
        chosen_front,
        chosen_trial,
        chosen_winner,
        find_trial,
        trial_folder,
    )

    check_selection(budget, trial, front)
    if budget is not None:
        chosen = [chosen_winner(run, document, budget, output)]
    else:
        chosen = chosen_front(run, document, output) if front else []
    found = None if trial is None else find_trial(run, trial)
    from secateur.search.build import build_problem
    from secateur.search.export.write import check_free, export_point, is_export_of
    from secateur.search.run.progress import SearchProgress

    for one in [one for one in chosen if output is None and is_export_of(one.folder, one.point, one.budget, pt2)]:
        print(f"export: {one.folder} is there already")
        chosen.remove(one)
    if not chosen and found is None:
        return
    for folder in [output or trial_folder(run, trial)] if found else [one.folder for one in chosen]:
        check_free(folder)
    with SearchProgress(Console(stderr=True)) as progress:
        problem = build_problem(settings, progress.status)
        if found is not None:
            chosen = [chosen_trial(run, found, problem.space.policy_space, output)]
        for one in chosen:
            progress.status(f"exporting {one.folder.name}")
            validation, test = export_point(one.folder, problem, document, one.budget, one.point, pt2)
            scores = f"validation top-1 {100 * validation.top1:.2f} %, test top-1 {100 * test.top1:.2f} % of {test.images} images"
            print(f"{scores}\nexport: {one.folder}")


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="EXPORT", help="Folder of an export, e.g. runs/digits-1/exports/phone.")],
    runtime: Annotated[str, typer.Option(help="What executes model.onnx: onnxruntime or openvino.")] = "onnxruntime",
    threads: Annotated[int, typer.Option(min=1, help="Threads of the runtime.")] = 1,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override where the data is: data.root=FOLDER.")
    ] = None,
) -> None:
    """Check what an export promises: outputs, scores, costs, size and latency of its files. Exit code 1 if it is broken."""
    from secateur.search.export.verification_tables import verification_tables
    from secateur.search.export.verify import verify_export

    verification = verify_export(folder, runtime, threads, overrides or ())
    for table in verification_tables(verification):
        Console().print(table)
    for failure in verification.failures:
        print(f"broken: {failure}", file=sys.stderr)
    if not verification.passed:
        raise typer.Exit(1)
    print(f"verified: {folder}")


@app.command()
def profile(
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help="Search configuration; its model is used.")] = None,
    output: Annotated[Path, typer.Option(help="Device file to write.")] = Path("device.json"),
    model: Annotated[str | None, typer.Option(help="Factory in place of CONFIG, e.g. torchvision:resnet18.")] = None,
    image: Annotated[str, typer.Option("--input", help="channels,height,width for --model.")] = "3,224,224",
    runtime: Annotated[str, typer.Option(help="onnxruntime, openvino or pytorch.")] = "onnxruntime",
    precisions: Annotated[str, typer.Option(help="One float precision, and int8 if wanted.")] = "float32,int8",
    threads: Annotated[int, typer.Option(help="Threads of the runtime.")] = 1,
    batch: Annotated[int, typer.Option(help="Images per run.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="Seconds instead of minutes: fewer channel counts and repeats.")] = False,
    overrides: Overrides = None,
) -> None:
    """Measure this machine with a model and write a device file. After Ctrl-C the same command continues."""
    if (config is None) == (model is None):
        raise InputError("Name either a configuration or a model: secateur profile CONFIG, or --model torchvision:resnet18.")
    from secateur.search.profiling import profile_run
    from secateur.search.profiling.profiler import ProfileConfig

    names = tuple(name.strip() for name in precisions.split(",") if name.strip())
    settings = (ProfileConfig.quick if quick else ProfileConfig)(precisions=names, threads=threads, batch=batch)
    shape = profile_run.parse_shape(image)
    subject = profile_run.subject_of_config(config, overrides or ()) if config else profile_run.load_subject(model, shape)
    device = profile_run.profile_to_file(subject, output, runtime, settings, Console(stderr=True))
    for line in profile_run.staircase_lines(device.table):
        print(line)
    Console().print(profile_run.check_table(device.table))
    print(f"recommended: space.channel_multiple: {device.table.channel_multiple}")
    print(f"device: {output}, {device.label}")


@app.command()
def ask(
    run: RunPath,
    budget: Annotated[str, typer.Option("--budget", help='Any limits, e.g. "macs<=43%,weight_bytes<=20kB".')],
    preference: Annotated[
        str | None, typer.Option("--preference", help='Weights of costs, such as "macs=0.7"; top1: the rest.')
    ] = None,
    evaluations: Annotated[int, typer.Option(min=1, help="How many proposals are measured.")] = 3,
    overrides: Overrides = None,
) -> None:
    """Ask the agent of a run for policies under any budget: a few evaluations instead of a search."""
    from secateur.search.ask import ask as ask_agent
    from secateur.search.results.tables import answer_table
    from secateur.search.run.progress import SearchProgress

    with SearchProgress(Console(stderr=True)) as progress:
        reply = ask_agent(run, budget, preference, evaluations, overrides or (), progress.status)
    Console().print(answer_table(reply))


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
    from secateur.search.benchmarks.support import support_matrix

    support_matrix(models or None, output, progress=print)
