"""`secateur serve`: the service on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

serve = typer.Typer(
    invoke_without_command=True,
    help="Serve searches over HTTP, with a page to launch and watch them. Ctrl-C ends the server; searches go on.",
)

StoreOption = Annotated[Path, typer.Option(help="Folder of the service.")]


@serve.callback()
def serve_command(
    context: typer.Context,
    host: Annotated[str, typer.Option(help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where to listen.")] = 8265,
    store: StoreOption = Path("service"),
    address: Annotated[str | None, typer.Option(help="Ray cluster that evaluates, instead of a local one per search.")] = None,
    allow: Annotated[list[str] | None, typer.Option(help="Module whose functions configurations may name; repeat.")] = None,
    data: Annotated[list[str] | None, typer.Option(metavar="NAME=FOLDER", help="Folder with data; repeat for several.")] = None,
    running: Annotated[int, typer.Option(min=1, help="Searches at the same time; others wait.")] = 1,
    no_token: Annotated[bool, typer.Option("--no-token", help="Requests need no token; on this machine only.")] = False,
) -> None:
    """Serve searches over HTTP, with a page to launch and watch them. Ctrl-C ends the server; searches go on."""
    if context.invoked_subcommand is not None:
        return
    from secateur.search.service import serve as server

    server.serve(
        store, host, port, address=address, allow=allow or (), data=data or (), running=running, no_token=no_token, status=print
    )


@serve.command("token")
def token_command(
    owner: Annotated[str, typer.Option(help="Name of the owner; searches belong to owners.")],
    role: Annotated[str, typer.Option(help="read, submit or admin.")] = "submit",
    store: StoreOption = Path("service"),
) -> None:
    """Make a token, and print it; the store keeps only its hash."""
    from secateur.cost_models.core import InputError
    from secateur.search.service.store import ROLES, Store

    if role not in ROLES:
        raise InputError(f"--role must be {', '.join(ROLES)}, but got {role}.")
    print(Store(store).new_token(owner, role))
