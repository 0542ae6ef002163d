"""Runs the server."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Callable, Sequence
from os.path import isdir
from pathlib import Path

from secateur.cost_models.core import InputError
from secateur.search.service.processes import Processes
from secateur.search.service.rules import Rules
from secateur.search.service.store import Store


def serve(
    store: str | Path,
    host: str = "127.0.0.1",
    port: int = 8265,
    *,
    address: str | None = None,
    allow: Sequence[str] = (),
    data: Sequence[str] = (),
    running: int = 1,
    no_token: bool = False,
    status: Callable[[str], None] = lambda text: None,
) -> None:
    """Serve until the process is ended; searches that run go on.

    Args:
        store: folder of the service.
        host, port: where to listen.
        address: of a Ray cluster that evaluates; None: every search starts a local one.
        allow: names of modules whose functions configurations may name.
        data: texts "NAME=FOLDER": folders with data.
        running: largest number of searches at the same time.
        no_token: whether requests need no token; on the loopback interface only.
        status: called with one line when the server listens.
    Raises:
        InputError: if something among these cannot be used, or the packages of the extra `serve` are not installed.
    """
    try:
        import uvicorn

        from secateur.search.service.access import Service
        from secateur.search.service.app import make_app
    except ImportError as error:
        raise InputError(f"The service needs {error.name}: pip install 'secateur[serve]'.") from None
    if no_token and not _is_loopback(host):
        raise InputError(f"`no_token` is for this machine alone, but `host` is {host}.", f"--no-token is not for --host {host}.")
    folders = dict(_data_folder(text) for text in data)
    own = Store(store)
    service = Service(own, Processes(own, running), Rules(own, tuple(allow), folders, address), open_to_all=no_token)
    config = uvicorn.Config(make_app(service), log_level="warning", timeout_graceful_shutdown=2)
    with _listening(host, port) as listener:
        status(f"secateur serves http://{host}:{port}, store {own.folder}")
        uvicorn.Server(config).run(sockets=[listener])


def _listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
        # Inherited by every connection. Head and body of an answer are sent apart: without it the body waits for 40 ms.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except OSError as error:
        problem = f"http://{host}:{port} cannot be served: {os.strerror(error.errno) if error.errno else error}. Choose another"
        raise InputError(f"{problem} `host` or `port`.", f"{problem} --host or --port.") from None


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _data_folder(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    path = Path(folder).expanduser().absolute()
    if not equals or not isdir(path):
        raise InputError(f"`data` must read NAME=FOLDER with a folder that exists, but got {text!r}.")
    return name, path
