"""The `secateur` command: options in, tables out. The work is done by the functions of the public API.

Verbs import what they need when they run, so that `--help` is fast.
"""

from __future__ import annotations

import json
import logging
import shlex
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table
from typer.core import TyperGroup

from secateur.cost_models.core import InputError
from secateur.search.arguments import ConfigPath, NewBudgets, Overrides, Trust
from secateur.search.benchmarks.cli import benchmark, support
from secateur.search.cluster_cli import jobs, submit, sweep
from secateur.search.remote_cli import remote
from secateur.search.run.signals import ended_by_signals, exit_code
from secateur.search.service.cli import serve

if TYPE_CHECKING:
    from secateur.search.run.handle import Run
    from secateur.search.run.progress import SearchProgress
    from secateur.search.training.winners import TrainedWinner


class _Verbs(TyperGroup):
    """The one place where errors become messages and exit codes."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with ended_by_signals():
                return super().invoke(ctx)
        except InputError as error:
            for line in error.command.splitlines():
                print(f"error: {line}", file=sys.stderr)
            raise typer.Exit(2) from None
        except KeyboardInterrupt as error:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(exit_code(error)) from None


app = typer.Typer(
    cls=_Verbs,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Searches for prune ratios and bit-widths that fit all budgets of a device and cost the least accuracy.",
)

app.add_typer(benchmark, name="benchmark")
app.add_typer(serve, name="serve")
app.add_typer(remote, name="remote")

RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, e.g. runs/digits-1.")]
BudgetOption = Annotated[str | None, typer.Option("--budget", help="Name of one budget.")]


class Format(StrEnum):
    """Output formats of `front`."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"


class Channels(StrEnum):
    """Which channels `apply` keeps."""

    RANK = "rank"
    KEEP = "keep"


@app.callback()
def main() -> None:
    """Set up logging for every verb; on stderr, because stdout is for results."""
    handler = RichHandler(console=Console(stderr=True), show_path=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("secateur.yaml"),
    agent: Annotated[str | None, typer.Option(help="Agent of the search; the file lists all.")] = None,
) -> None:
    """Write a starter configuration with comments."""
    from secateur.search.starter import write_starter

    write_starter(path, agent)
    print(f"wrote {path}; edit it, then: secateur inspect {path}")


@app.command()
def inspect(config: ConfigPath, overrides: Overrides = None) -> None:
    """Show layers, coupled groups, what is never pruned and why, and whether the budgets can be met."""
    from secateur.search import inspection
    from secateur.search.run.progress import SearchProgress

    with SearchProgress(Console(stderr=True)) as progress:
        found = inspection.inspect(config, overrides or (), progress.status)
    for shown in inspection.report(found):
        if isinstance(shown, Table):
            Console().print(shown)
        else:
            Console().print(shown, highlight=False, markup=False)
    found.check()


@app.command()
def search(
    config: ConfigPath,
    overrides: Overrides = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster to use instead of a local one.")] = None,
) -> None:
    """Search, and write a run: study, Pareto front, test scores of the best policies. Ctrl-C ends it early."""
    from secateur.search.run import handle

    changes = [*(overrides or ()), *([f"search.address={address}"] if address else [])]
    _follow(lambda progress: handle.search(config, changes, progress))


for verb in (submit, jobs, sweep):
    app.command()(verb)


@app.command()
def resume(
    run: RunPath,
    overrides: Overrides = None,
    budget: NewBudgets = None,
    trust: Trust = None,
) -> None:
    """Continue an interrupted run, or one with more evaluations (--set search.evaluations=500), as if it had never stopped."""
    from secateur.search.config import budget_override
    from secateur.search.run import handle

    changes = [*(overrides or ()), *map(budget_override, budget or ())]
    _follow(lambda progress: handle.resume(run, changes, progress, trust or ()))


def _follow(search: Callable[[SearchProgress], Run]) -> None:
    """Show a search while it runs, and its result."""
    from secateur.search.run.progress import SearchProgress

    with SearchProgress(Console()) as progress:
        try:
            folder = search(progress).folder
        except KeyboardInterrupt as error:
            progress.stop()
            if progress.run is None:
                raise
            _show_run(progress.run)
            command = f"secateur resume {progress.run}{_trust_options(progress.run)}"
            print(f"interrupted: the run holds what was found; continue it with: {command}", file=sys.stderr)
            raise typer.Exit(exit_code(error)) from None
    _show_run(folder)
    _show_trained(_trained_at_the_end(folder))


def _trust_options(run: Path) -> str:
    """Return the options that allow a run to name the modules that the user's configuration has named."""
    from secateur.search.named_code import modules_of
    from secateur.search.run.folder import load_manifest

    return "".join(f" --trust {module}" for module in modules_of(load_manifest(run)[0]))


def _trained_at_the_end(folder: Path) -> list[TrainedWinner]:
    """Return the winners that the search has trained."""
    from secateur.search.results.document import read_front
    from secateur.search.run.folder import load_manifest
    from secateur.search.training.finalize import training_config
    from secateur.search.training.winners import finished_winners

    config, document = load_manifest(folder)[0], read_front(folder)
    if not (config.finalize.training or {}).get("epochs"):
        return []
    return finished_winners(document, folder, training_config(config), list(document["budgets"])) or []


def _show_run(folder: Path) -> None:
    from secateur.search.results.document import read_front
    from secateur.search.results.score_check import check_lines

    _show_front(read_front(folder))
    for line in check_lines(folder):
        Console().print(line, highlight=False, markup=False, soft_wrap=True)
    print(f"report: secateur report {shlex.quote(str(folder))}")
    print(f"run: {folder}")


def _show_front(document: dict[str, Any], budget: str | None = None) -> None:
    from secateur.search.results.tables import check_lines, front_tables

    for table in front_tables(document, budget):
        Console().print(table)
    for line in check_lines(document):
        Console().print(line, highlight=False, markup=False, soft_wrap=True)


@app.command()
def front(
    run: RunPath,
    budget: BudgetOption = None,
    output: Annotated[Format, typer.Option("--format", help="Output format.")] = Format.TABLE,
) -> None:
    """Print the Pareto front of a run, also while it is still searching."""
    from secateur.search.results.document import front_csv, only_budget, read_front

    document = read_front(run)
    if budget is not None:
        document = only_budget(document, budget)
    if output is Format.JSON:
        print(json.dumps(document, indent=1))
    elif output is Format.CSV:
        print(front_csv(document), end="")
    else:
        _show_front(document, budget)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs; several are compared.")],
    output: Annotated[
        Path | None, typer.Option(help="HTML file to write; default: RUN/report.html, or report.html for several runs.")
    ] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder for every plot as SVG and CSV.")] = None,
) -> None:
    """Write a self-contained HTML page about runs: fronts, progress, layers, limits, finalists, latencies, origin."""
    from secateur.search.report.write import report as write_report

    page = write_report(runs, output, plots)
    if plots is not None:
        print(f"plots: {plots}")
    print(f"report: {page}")


@app.command()
def query(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, e.g. runs/digits-*.")],
    where: Annotated[
        str | None, typer.Option(help="Condition on columns: \"top1 >= 0.9 and macs <= 0.5*dense and budget == 'phone'\".")
    ] = None,
    sort: Annotated[str, typer.Option(help="Columns with commas; a minus before a name: largest first.")] = "",
    limit: Annotated[int | None, typer.Option(min=0, help="Largest number of rows; default: all, in a table 50.")] = None,
    columns: Annotated[str | None, typer.Option(help="Columns with commas; default: all, in a table no choices.")] = None,
    kind: Annotated[str, typer.Option("--format", metavar="table|csv|json|parquet", help="Output format.")] = "table",
    output: Annotated[Path | None, typer.Option(help="File to write instead of standard output; not for tables.")] = None,
) -> None:
    """Print evaluations of runs that satisfy a condition, also during the search. Numbers are in the columns' units."""
    from secateur.search.results.query import TableFormat, shown_table, write_table
    from secateur.search.results.query import query as find

    if kind not in list(TableFormat):
        raise InputError(f"`--format` must be one of {', '.join(TableFormat)}, but got {kind!r}.")
    if kind == TableFormat.TABLE:
        if output is not None:
            raise InputError("`--output` needs --format csv, json or parquet.")
        found = find(runs, where, sort, None, columns)
        Console().print(shown_table(found, columns, limit))
    else:
        write_table(find(runs, where, sort, limit, columns), TableFormat(kind), output)


@app.command()
def finalize(
    run: RunPath,
    budget: BudgetOption = None,
    top: Annotated[int, typer.Option(min=1, help="Number of policies per budget that are trained; the best is exported.")] = 1,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs; default: finalize.training.epochs of the run, or 5.")] = None,
    overrides: Overrides = None,
    trust: Trust = None,
) -> None:
    """Train the winners of a run with distillation, export and verify them. After Ctrl-C the same command continues."""
    from secateur.search.run import handle
    from secateur.search.run.progress import SearchProgress

    with SearchProgress(Console(stderr=True)) as progress:
        options: dict[str, Any] = {
            "budget": budget,
            "top": top,
            "epochs": epochs,
            "overrides": overrides or (),
            "trust": trust or (),
        }
        winners = handle.finalize(run, progress=progress, **options)
    _show_trained(winners)
    if any(winner.verified is not True for winner in winners):
        raise typer.Exit(1)


def _show_trained(winners: list[TrainedWinner]) -> None:
    from secateur.search.training.tables import curve_table

    for winner in winners:
        Console().print(curve_table(winner))
        for note in winner.notes:
            Console().print(note, highlight=False, markup=False, soft_wrap=True)


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
    overrides: Overrides = None,
    trust: Trust = None,
) -> None:
    """Write models of a run: policy.json, safetensors and ONNX, loadable without pickles. Choose them with one option."""
    from secateur.search.export import run_exports
    from secateur.search.run.progress import SearchProgress

    with SearchProgress(Console(stderr=True)) as progress:
        chosen: dict[str, Any] = {"budget": budget, "trial": trial, "front": front, "output": output, "pt2": pt2}
        exports = run_exports.export(run, **chosen, overrides=overrides or (), status=progress.status, trust=trust or ())
    for one in exports:
        if not one.written:
            print(f"export: {one.folder} is there already")
            continue
        validation, test = one.metric.text(one.validation_score), one.metric.text(one.test_score)
        print(f"validation {one.metric.label} {validation}, test {one.metric.label} {test} of {one.test_images} samples")
        print(f"export: {one.folder}")


@app.command()
def apply(
    policy: Annotated[Path, typer.Argument(metavar="EXPORT", help="Folder of an export, or its policy.json.")],
    weights: Annotated[Path, typer.Option(help="File with the other weights, of the same architecture.")],
    channels: Annotated[
        Channels, typer.Option(help="Rank the channels again in the new weights, or keep those of the export.")
    ] = Channels.RANK,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of training with distillation; default: none.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to write; default: EXPORT-applied.")] = None,
    overrides: Overrides = None,
    trust: Trust = None,
) -> None:
    """Put a policy on other weights of the same architecture; repair, perhaps train, export and verify the network."""
    from secateur.search.apply import apply as apply_policy
    from secateur.search.export.verification_tables import verification_tables
    from secateur.search.run.progress import SearchProgress

    with SearchProgress(Console(stderr=True)) as progress:
        found = apply_policy(
            policy,
            weights,
            channels=channels.value,
            epochs=epochs,
            output=output,
            overrides=overrides or (),
            trust=trust or (),
            status=progress.status,
            note=progress.note,
        )
    for table in verification_tables(found.verification):
        Console().print(table)
    text = found.metric.text
    trained = "" if epochs is None else f", after the training {text(found.validation)}"
    print(f"validation {found.metric.label}: dense {text(found.dense)}, after the repair {text(found.repaired)}{trained}")
    print(f"export: {found.folder}")
    for failure in found.verification.failures:
        print(f"broken: {failure}", file=sys.stderr)
    if not found.verification.passed:
        raise typer.Exit(1)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="EXPORT", help="Folder of an export, e.g. runs/digits-1/exports/phone.")],
    runtime: Annotated[str, typer.Option(help="Runtime of model.onnx: onnxruntime or openvino.")] = "onnxruntime",
    threads: Annotated[int, typer.Option(min=1, help="Threads of the runtime.")] = 1,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Override where the data is, or a function of the task: data.root=FOLDER."
        ),
    ] = None,
    factory: Annotated[
        str | None, typer.Option(help="Factory of the network, in place of the one that policy.json names.")
    ] = None,
    trust: Trust = None,
) -> None:
    """Check what an export promises: outputs, scores, costs, size and latency of its files. Exit code 1 if it is broken."""
    from secateur.search.export.verification_tables import verification_tables
    from secateur.search.export.verify import verify_export

    verification = verify_export(folder, runtime, threads, overrides or (), factory=factory, trust=trust or ())
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
    shape = _parse_shape(image)
    from secateur.search.profiling import profile_run

    device = profile_run.profile(
        config,
        overrides or (),
        model=model,
        image_shape=shape,
        output=output,
        runtime=runtime,
        precisions=[name.strip() for name in precisions.split(",") if name.strip()],
        threads=threads,
        batch=batch,
        quick=quick,
        progress=True,
    )
    if device.table is not None:
        for line in profile_run.staircase_lines(device.table):
            print(line)
        Console().print(profile_run.check_table(device.table))
        print(f"recommended: space.channel_multiple: {device.table.channel_multiple}")
    print(f"device: {output}, {device.label}")


def _parse_shape(text: str) -> tuple[int, ...]:
    """Return (channels, height, width) of "3,224,224"."""
    sizes = tuple(int(size) if size.strip().isdigit() else 0 for size in text.split(","))
    if len(sizes) != 3 or min(sizes) < 1:
        raise InputError(f"`--input` must be channels,height,width such as 3,224,224, but got {text!r}.")
    return sizes


@app.command()
def ask(
    run: RunPath,
    budget: Annotated[str, typer.Option("--budget", help='Any limits, e.g. "macs<=43%,weight_bytes<=20kB".')],
    preference: Annotated[
        str | None, typer.Option("--preference", help='Weights of costs, such as "macs=0.7"; the metric has the rest of 1.')
    ] = None,
    evaluations: Annotated[int, typer.Option(min=1, help="Number of proposals that are evaluated.")] = 3,
    overrides: Overrides = None,
    trust: Trust = None,
) -> None:
    """Ask the agent of a run for policies under any budget: a few evaluations instead of a search."""
    from secateur.search.ask import ask as ask_agent
    from secateur.search.results.tables import answer_table
    from secateur.search.run.progress import SearchProgress

    with SearchProgress(Console(stderr=True)) as progress:
        reply = ask_agent(run, budget, preference, evaluations, overrides or (), progress.status, trust=trust or ())
    Console().print(answer_table(reply))


app.command()(support)
