"""`secateur remote`: searches of a service on another machine."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from secateur.search.arguments import ConfigPath, NewBudgets, Overrides

if TYPE_CHECKING:
    from secateur.search.client import RemoteSearch, Server

remote = typer.Typer(
    no_args_is_help=True,
    help="Use a service of `secateur serve` from another machine. The environment variable SECATEUR_TOKEN holds the token.",
)

ServerUrl = Annotated[
    str, typer.Option("--server", envvar="SECATEUR_SERVER", metavar="URL", help="Address of the service, e.g. https://gpu-box.")
]
Identifier = Annotated[str, typer.Argument(metavar="SEARCH", help="Identifier of a search; `list` shows it.")]
BudgetOption = Annotated[str | None, typer.Option("--budget", help="Name of one budget.")]


@remote.command("search")
def search_command(
    config: ConfigPath,
    server: ServerUrl,
    overrides: Overrides = None,
    follow: Annotated[bool, typer.Option("--follow", help="Print what happens until the search ends.")] = False,
    fetch: Annotated[Path | None, typer.Option(help="Wait, and copy the run into this new folder.")] = None,
) -> None:
    """Start a search on the server and print its identifier. Files of `model.weights` and `device` are uploaded."""
    search = _connect(server).launch(config, overrides or ())
    print(search.id, flush=True)
    if not (follow or fetch):
        return
    with _goes_on(search):
        if follow:
            _print_events(search)
        state = search.wait()
        _print_end(search)
        if fetch is not None:
            print(f"run: {search.fetch(fetch)}")
    if state != "finished":
        raise typer.Exit(1)


@remote.command("list")
def list_command(
    server: ServerUrl,
    state: Annotated[
        str | None, typer.Option(help="queued, running, finished, cancelled, failed or interrupted; default: all.")
    ] = None,
) -> None:
    """List the searches, newest first."""
    table = Table()
    for heading in ("search", "label", "state", "evaluations", "best", "message"):
        table.add_column(heading)
    for one in _connect(server).searches(state):
        total = "" if one.get("total") is None else f" of {one['total']}"
        done = f"{one.get('evaluations', 0)}{total}"
        cells = (one.get("id"), one.get("label"), one.get("state"), done, _best_text(one.get("best")), one.get("message"))
        table.add_row(*(escape(str(cell)) for cell in cells))
    Console().print(table)


@remote.command()
def follow(search: Identifier, server: ServerUrl) -> None:
    """Print what happens in a search until it ends. Exit code 1 unless it finishes."""
    found = _connect(server).search(search)
    with _goes_on(found):
        _print_events(found)
    _print_end(found)
    if found.status != "finished":
        raise typer.Exit(1)


@remote.command()
def stop(search: Identifier, server: ServerUrl) -> None:
    """End a search early. What was found is kept."""
    found = _connect(server).search(search)
    found.stop()
    print(f"{found.id}: {found.wait()}")


@remote.command()
def resume(search: Identifier, server: ServerUrl, overrides: Overrides = None, budget: NewBudgets = None) -> None:
    """Continue a search that has ended, or extend it: --set search.evaluations=500."""
    from secateur.search.config import budget_override, override_values

    changes = [*(overrides or ()), *map(budget_override, budget or ())]
    found = _connect(server).search(search)
    print(f"{found.id}: {found.resume(dict(map(override_values, changes)))['state']}")


@remote.command()
def front(
    search: Identifier,
    server: ServerUrl,
    budget: BudgetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the document of the front.")] = False,
) -> None:
    """Print the Pareto front of a search, also while it runs."""
    from secateur.search.results.tables import check_lines, front_tables

    document = _connect(server).search(search).front(budget)
    if as_json:
        print(json.dumps(document, indent=1))
        return
    for table in front_tables(document, budget):
        Console().print(table)
    for line in check_lines(document):
        Console().print(line, highlight=False, markup=False, soft_wrap=True)


@remote.command()
def query(
    search: Identifier,
    server: ServerUrl,
    where: Annotated[str | None, typer.Option(help='Condition on columns: "top1 >= 0.9 and macs <= 0.5*dense".')] = None,
    sort: Annotated[str | None, typer.Option(help="Columns with commas; a minus before a name: largest first.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Largest number of rows.")] = 50,
) -> None:
    """Print the evaluations of a search that satisfy a condition, as `secateur query` does."""
    from secateur.search.results.query import shown_table

    Console().print(shown_table(_connect(server).search(search).trials(where, sort, limit), limit=limit))


@remote.command()
def ask(
    search: Identifier,
    server: ServerUrl,
    budget: Annotated[str, typer.Option("--budget", help='Any limits, e.g. "macs<=43%,weight_bytes<=20kB".')],
    preference: Annotated[
        str | None, typer.Option("--preference", help='Weights of costs, such as "macs=0.7"; the metric has the rest of 1.')
    ] = None,
    evaluations: Annotated[int, typer.Option(min=1, help="Number of proposals that are evaluated.")] = 3,
) -> None:
    """Ask the agent of a search for policies under any budget; print them as JSON, the best one first."""
    print(json.dumps(_connect(server).search(search).ask(budget, preference, evaluations), indent=1))


@remote.command()
def export(
    search: Identifier,
    server: ServerUrl,
    budget: Annotated[str | None, typer.Option("--budget", help="Name of the budget whose winner is exported.")] = None,
    trial: Annotated[int | None, typer.Option("--trial", help="Number of any trial of the study.")] = None,
) -> None:
    """Write a model of a search on the server; `fetch` copies it from there."""
    for folder in _connect(server).search(search).export(budget, trial):
        print(f"export: {folder}")


@remote.command()
def fetch(
    search: Identifier, folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="New folder.")], server: ServerUrl
) -> None:
    """Copy the run of a search with its exports into a new folder; all other commands read it there."""
    print(f"run: {_connect(server).search(search).fetch(folder)}")


@remote.command()
def logs(search: Identifier, server: ServerUrl) -> None:
    """Print what a search has printed."""
    print(_connect(server).search(search).logs(), end="")


@remote.command()
def upload(file: Annotated[Path, typer.Argument(metavar="FILE", help="Weights or device file.")], server: ServerUrl) -> None:
    """Upload weights (safetensors) or a device file (.json); print the name for `model.weights` or `device`."""
    print(_connect(server).upload(file))


def _connect(url: str) -> Server:
    from secateur.search.client import connect

    return connect(url)


@contextmanager
def _goes_on(search: RemoteSearch) -> Iterator[None]:
    """After Ctrl-C, tell that the search goes on."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"the search goes on; follow it with: secateur remote follow {search.id}", file=sys.stderr)
        raise


def _print_events(search: RemoteSearch) -> None:
    for event in search.events():
        if line := _event_line(event):
            print(line, flush=True)


def _event_line(event: Mapping[str, Any]) -> str:
    """Return one line for an event; "" for those that say what another says."""
    match event.get("event"):
        case "phase" | "note":
            return str(event.get("text", ""))
        case "evaluation":
            return f"evaluation {event.get('evaluations')} of {event.get('total')}, best: {_best_text(event.get('best'))}"
        case _:  # the front changes with an evaluation, and the state is printed at the end
            return ""


def _best_text(best: object) -> str:
    scores = best if isinstance(best, Mapping) else {}
    return ", ".join(f"{name} {'none' if score is None else format(score, '.4g')}" for name, score in scores.items())


def _print_end(search: RemoteSearch) -> None:
    found = search.summary()
    print(f"{search.id}: {found.get('state')} {found.get('message') or ''}".rstrip(), file=sys.stderr)
