"""The verbs of the `secateur` command that run several searches, or run them on a cluster."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from secateur.search.arguments import ConfigPath, Overrides

ClusterAddress = Annotated[str, typer.Option("--address", help="Dashboard of the Ray cluster, e.g. http://head:8265.")]


def submit(
    config: ConfigPath,
    address: ClusterAddress,
    overrides: Overrides = None,
    wheel: Annotated[
        Path | None, typer.Option(help="Wheel of secateur in this folder, for a cluster that has not installed it.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until the job has ended; exit code 1 if it has failed.")] = False,
    follow: Annotated[bool, typer.Option("--follow", help="Wait, and print what the job prints.")] = False,
    fetch: Annotated[Path | None, typer.Option(help="Wait, and copy the run into this folder.")] = None,
) -> None:
    """Send a search to a cluster through Ray Jobs, with this folder, and print the job's id."""
    from secateur.search.jobs import Jobs

    cluster = Jobs(address)
    job = cluster.submit(config, overrides or (), Path.cwd(), wheel)
    print(job, flush=True)
    if not (wait or follow or fetch):
        return
    state = cluster.wait(job, (lambda text: print(text, end="", flush=True)) if follow else (lambda text: None))
    print(f"{job}: {state}", file=sys.stderr)
    if fetch is not None:
        print(f"run: {cluster.fetch(job, fetch)}")
    if state != "SUCCEEDED":
        raise typer.Exit(1)


def jobs(
    address: ClusterAddress,
    log: Annotated[str | None, typer.Option(metavar="JOB", help="Print what a job has printed.")] = None,
    stop: Annotated[str | None, typer.Option(metavar="JOB", help="End a job; its run is saved.")] = None,
    fetch: Annotated[str | None, typer.Option(metavar="JOB", help="Copy the run of a job into the folder --output.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for the runs that are fetched.")] = Path("runs"),
) -> None:
    """List the jobs of a cluster; or print the log of a job, stop it, or fetch its run."""
    from secateur.search.jobs import Jobs

    cluster = Jobs(address)
    if log is not None:
        print(cluster.log(log), end="")
    if stop is not None:
        cluster.stop(stop)
    if fetch is not None:
        print(f"run: {cluster.fetch(fetch, output)}")
    if log is stop is fetch is None:
        for job, state, message in cluster.list():
            print(f"{job}  {state}  {message}")


def sweep(
    config: ConfigPath,
    overrides: Overrides = None,
    agent: Annotated[
        list[str] | None,
        typer.Option(help='Agent, with options if any ("envelope_ddpg updates=3"); repeat for several. Default: the file\'s.'),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds, from the configuration's on.")] = 1,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            "--budget",
            metavar="NAME=LIMITS",
            help='Only budget of a search: "small=macs<=35%"; repeat for several.',
        ),
    ] = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=[VALUE, ...]", help="Values of a key: space.channel_multiple=[1, 8]; repeat for several."),
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Workers of each search; 0: it evaluates in its own process.")] = 0,
    concurrent: Annotated[int | None, typer.Option(min=1, help="Searches at the same time. Default: as the cores allow.")] = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster to use instead of a local one.")] = None,
    output: Annotated[Path, typer.Option(help="Folder of rows, tables and runs; continues what is there.")] = Path(
        "results/sweep"
    ),
) -> None:
    """Run whole searches at the same time: agents x seeds x budgets x any other values. The same command continues a sweep."""
    from secateur.search.config import budget_override, load_config
    from secateur.search.sweep import run_sweep, searches

    settings = load_config(config, [*(overrides or ()), *([f"search.address={address}"] if address else [])])
    chosen = searches(settings, agent, seeds, list(map(budget_override, budget or ())), vary or ())
    run_sweep(settings, chosen, output, workers, concurrent)
