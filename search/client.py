"""A client of `secateur serve`: launches searches on another machine, follows them, and fetches their results.

Only JSON and files travel. Nothing that a server sends is executed, unpickled, or written outside the folder that the user names.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from os.path import isfile, lexists
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from secateur.cost_models.core import InputError
from secateur.cost_models.device import find_device_file
from secateur.cost_models.reading import MAX_BYTES, parse_json
from secateur.search.config import ConfigSource, Overrides, config_values
from secateur.search.connection import Connection, Unreachable, server_address, token_from_environment
from secateur.search.results.document import only_budget, winner

if TYPE_CHECKING:
    import pandas

ACTIVE = ("queued", "running")
"""States of a search that has not ended."""

DIGEST = "sha256:"
"""Start of the name of an uploaded file."""

POLL_SECONDS = 0.5
"""How often `wait` asks for the state."""

PATIENCE_SECONDS = 60.0
"""How long `wait` and `events` wait for a server that does not answer: it may start again."""

LONG_SECONDS = 3600.0
"""How long requests may take that build the model on the server."""

PIECE, MAX_LINE = 2**20, 2**20
"""Bytes that are read of a file at a time, and of a line of the event stream."""

Result = TypeVar("Result")


def connect(url: str, token: str | None = None, timeout: float = 30.0) -> Server:
    """Return the service at an address; its address and the token are checked.

    Args:
        url: that `secateur serve` prints, such as "https://gpu-box:8265".
        token: of `secateur serve token`. None: the environment variable SECATEUR_TOKEN, if it is set.
        timeout: seconds until a server that does not answer is an error.
    Raises:
        InputError: if there is no secateur service at the address, or it does not accept the token.
    """
    connection = Connection(server_address(url), token_from_environment() if token is None else token, timeout)
    health = connection.ask("GET", "/healthz")
    if health.get("status") != "ok" or not isinstance(health.get("version"), str):
        raise connection.no_service("its /healthz has no version")
    connection.ask("GET", "/v1/data")
    return Server(connection, health["version"])


class Server:
    """A secateur service; `connect` makes it.

    Attributes:
        url: its address.
        version: of secateur on the server.
    """

    def __init__(self, connection: Connection, version: str):
        self.url, self.version = connection.url, version
        self._connection = connection

    def __repr__(self) -> str:
        return f"Server({self.url!r})"

    def searches(self, state: str | None = None) -> list[dict[str, Any]]:
        """Return the summaries of the searches that the token may see, newest first.

        Args:
            state: queued, running, finished, cancelled, failed or interrupted; None: all.
        """
        found: list[dict[str, Any]] = []
        query: dict[str, Any] = {"page_size": 200} | ({} if state is None else {"state": state})
        while True:
            page = self._connection.ask("GET", "/v1/searches", query=query)
            found += self._connection.part(page, "searches", list)
            if (token := page.get("next_page_token")) is None:
                return found
            query["page_token"] = repr(token)

    def search(self, identifier: str) -> RemoteSearch:
        """Return a search of the service.

        Raises:
            InputError: if there is none with this identifier.
        """
        if not (identifier.isascii() and identifier.isalnum()):
            raise InputError(f"There is no search {identifier[:200]!r}: identifiers have letters and digits only.")
        search = RemoteSearch(self._connection, identifier)
        search.summary()
        return search

    def launch(self, config: ConfigSource, overrides: Overrides = (), key: str | None = None) -> RemoteSearch:
        """Start a search on the server and return it at once.

        The files that `model.weights` and `device` name are uploaded; everything else that the configuration names must be on
        the server.

        Args:
            config: path of a YAML file, the same content as a dict, or a configuration.
            overrides: ["search.evaluations=50"] or {"search.evaluations": 50}; they win over the configuration.
            key: of your own; requests with the same key start one search, however often they are sent.
        Raises:
            InputError: every mistake in the configuration, in the words of the server; nothing is started then.
        """
        values = config_values(config, overrides)
        self._upload_named_files(values)
        headers = {"Content-Type": "application/json"} | ({} if key is None else {"Idempotency-Key": key})
        body = json.dumps(values, default=str).encode()
        found = self._connection.ask("POST", "/v1/searches", body=body, headers=headers)
        return RemoteSearch(self._connection, self._connection.part(found, "id", str))

    def upload(self, file: str | os.PathLike[str]) -> str:
        """Upload weights (safetensors) or a device file (.json); return its name for `model.weights` or `device`.

        Raises:
            InputError: if there is no such file, or the server does not take it.
        """
        path = Path(file).expanduser()
        if not isfile(path):
            raise InputError(f"{path}: there is no such file to upload.")
        resource = "devices" if path.suffix == ".json" else "models"
        try:
            with path.open("rb") as content:
                headers = {"Content-Type": "application/octet-stream", "Content-Length": str(path.stat().st_size)}
                answer = self._connection.ask("POST", f"/v1/{resource}", body=content, headers=headers, seconds=LONG_SECONDS)
                content.seek(0)
                name = DIGEST + hashlib.file_digest(content, "sha256").hexdigest()
        except Unreachable as error:
            raise InputError(f"{path} was not uploaded: {error} The file may be larger than the server takes.") from None
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}.") from None
        if answer.get("name") != name:
            raise InputError(f"{path} arrived damaged at {self.url}. Upload it again.")
        return name

    def _upload_named_files(self, values: dict[str, Any]) -> None:
        """Replace the local files in a configuration by the names of their uploads."""
        model, device = values.get("model"), values.get("device")
        weights = model.get("weights") if isinstance(model, dict) else None
        if isinstance(model, dict) and isinstance(weights, str) and weights != "trained" and not weights.startswith(DIGEST):
            model["weights"] = self.upload(weights)
        if isinstance(device, str) and device != "profile" and not device.startswith(DIGEST):
            values["device"] = self.upload(find_device_file(device))


class RemoteSearch:
    """A search of a service; `Server.launch` and `Server.search` make it.

    Attributes:
        id: its identifier on the server.
    """

    def __init__(self, connection: Connection, identifier: str):
        self.id = identifier
        self._connection = connection
        self._path = f"/v1/searches/{identifier}"

    def __repr__(self) -> str:
        return f"RemoteSearch({self.id!r}, {self._connection.url!r})"

    @property
    def status(self) -> str:
        """queued, running, finished, cancelled, failed or interrupted."""
        return self._connection.part(self.summary(), "state", str)

    def summary(self) -> dict[str, Any]:
        """Return state, message, phase, evaluations, best score per budget, time left, configuration and other facts."""
        return self._connection.ask("GET", self._path)

    def wait(self, timeout: float | None = None) -> str:
        """Return the state of the search once it has ended.

        Args:
            timeout: seconds; None: as long as it takes.
        Raises:
            TimeoutError: if the search has not ended by then. It goes on.
            InputError: if the server does not answer for a minute.
        """
        until = float("inf") if timeout is None else time.monotonic() + timeout
        while (state := _patiently(lambda: self.status)) in ACTIVE:
            if (left := until - time.monotonic()) <= 0:
                raise TimeoutError(f"The search {self.id} is still {state} after {timeout:g} seconds.")
            time.sleep(min(POLL_SECONDS, left))
        return state

    def events(self, after: int = 0) -> Iterator[dict[str, Any]]:
        """Iterate over the events of the search until it ends; a connection that breaks is made again, and no event is lost.

        Args:
            after: number of an event; those that follow it are given.
        Yields:
            {"id": number, "event": kind, "time": seconds since 1970, ...}; the kinds are state, phase, note, evaluation, front.
        """
        latest = after
        while True:
            new = False
            try:
                for event in self._stream(latest):
                    latest, new = event["id"], True
                    yield event
            except Unreachable:  # the server starts again, or no event came for longer than the timeout
                pass
            # A stream ends with the search, or breaks: only one without new events after the end was complete.
            active = _patiently(lambda: self.status) in ACTIVE
            if not new:
                if not active:
                    return
                time.sleep(POLL_SECONDS)

    def _stream(self, after: int) -> Iterator[dict[str, Any]]:
        """Yield the events after the one with this number, as long as one connection lasts."""
        with self._connection.open("GET", f"{self._path}/events", headers={"Last-Event-ID": str(after)}) as answer:
            self._connection.check_type(answer, "text/event-stream")
            data = ""
            while line := answer.readline(MAX_LINE):
                text = line.decode("utf-8", errors="replace").rstrip("\r\n")
                if text.startswith("data:"):
                    data += text[5:]
                elif not text and data:
                    event, data = parse_json(data, f"An event of {self._connection.url}"), ""
                    self._connection.part(event, "id", int)
                    yield event

    def front(self, budget: str | None = None) -> dict[str, Any]:
        """Return the document of the Pareto front (front.json of a run), of all budgets or of one, also during the search."""
        front = self._connection.ask("GET", f"{self._path}/front")
        return front if budget is None else only_budget(front, budget)

    def best(self, budget: str | None = None) -> dict[str, Any]:
        """Return the best policy of a budget: its evaluation, score, costs and choices.

        Args:
            budget: name of the budget; None: the only one.
        Raises:
            InputError: if there is no such budget, none is named and there are several, or no policy fits it.
        """
        front = self.front()
        names = list(self._connection.part(front, "budgets", dict))
        if budget is None and len(names) != 1:
            raise InputError(f"Name one of the budgets {', '.join(names)}.")
        return winner(front, names[0] if budget is None else budget)

    def trials(self, where: str | None = None, sort: str | None = None, limit: int = 1000) -> pandas.DataFrame:
        """Return the evaluations that satisfy a condition, as `secateur.query` does."""
        import pandas

        chosen = {"where": where, "sort": sort, "limit": limit}
        query = {name: value for name, value in chosen.items() if value is not None}
        return pandas.DataFrame(self._connection.ask_list(f"{self._path}/trials", query))

    def ask(
        self, budget: str | Mapping[str, str], preference: str | Mapping[str, float] | None = None, evaluations: int = 3
    ) -> dict[str, Any]:
        """Return policies for any budget from the agent of a finished search, measured on the server; see `secateur.ask`.

        Returns:
            {"metric": name, "budget": limits, "preference": weights, "answers": [...]}, the best answer first.
        """
        wanted = {"budget": budget, "preference": preference, "evaluations": evaluations}
        return self._connection.send(f"{self._path}/asks", wanted, LONG_SECONDS)

    def export(self, budget: str | None = None, trial: int | None = None) -> list[str]:
        """Write the model of a budget's winner, or of any evaluation, on the server; return the folders in the run."""
        answer = self._connection.send(f"{self._path}/exports", {"budget": budget, "trial": trial}, LONG_SECONDS)
        return [str(one["folder"]) for one in self._connection.part(answer, "exports", list)]

    def stop(self) -> dict[str, Any]:
        """End the search early and return its summary; what was found is kept. `wait` returns when it has ended."""
        return self._connection.send(f"{self._path}:cancel", {})

    def resume(self, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Continue a search that has ended, or extend it: {"search.evaluations": 500}; return its summary."""
        return self._connection.send(f"{self._path}:resume", {"overrides": dict(overrides or {})})

    def logs(self) -> str:
        """Return what the search has printed."""
        with self._connection.open("GET", f"{self._path}/logs") as answer:
            self._connection.check_type(answer, "text/plain")
            return answer.read(MAX_BYTES).decode("utf-8", errors="replace")

    def fetch(self, folder: str | os.PathLike[str]) -> Path:
        """Copy the run with its exports into a new folder, which exists only when it is complete; return it.

        `secateur.load_run` reads it, and `secateur.load_compressed` the exports in it.

        Raises:
            InputError: if the folder exists or cannot be written, the search has not ended, a file does not arrive as it is on
                the server, or the name of a file leads out of the folder.
        """
        target = Path(os.path.abspath(Path(folder).expanduser()))
        if lexists(target):
            taken = f"{target} exists already. Name another"
            raise InputError(f"{taken} `folder`.", f"{taken} folder.")
        if (state := self.status) in ACTIVE:
            raise InputError(f"The search {self.id} is {state}. Fetch it when it has ended: wait for it, or stop it.")
        listed = self._connection.ask("GET", f"{self._path}/artifacts")
        files = self._connection.part(listed, "artifacts", list)
        if not files:
            raise InputError(f"The search {self.id} has no files; it is {state}.")
        draft = target.parent / f".{target.name}.draft-{os.getpid()}"
        paths = [self._path_in(draft, file) for file in files]
        try:
            draft.mkdir(parents=True)
            try:
                for file, path in zip(files, paths, strict=True):
                    self._download(file, path)
                os.replace(draft, target)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
        except OSError as error:
            raise InputError(f"{target} cannot be written: {error.strerror}. Name another folder.") from None
        return target

    def _path_in(self, folder: Path, file: object) -> Path:
        """Return where to write a file of the server; refuse places outside the folder."""
        name = self._connection.part(file, "name", str)
        path = folder if "\0" in name else Path(os.path.normpath(folder / name))
        if folder not in path.parents:
            raise InputError(
                f"{self._connection.url} offers the file {name[:200]!r}, which leads out of the folder. Nothing was written."
            )
        return path

    def _download(self, file: Mapping[str, Any], path: Path) -> None:
        """Write a file, and check its digest."""
        name, left = file["name"], self._connection.part(file, "bytes", int)
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with self._connection.open("GET", f"{self._path}/artifacts/{quote(name)}") as answer, path.open("xb") as written:
            while left >= 0 and (piece := answer.read(PIECE)):
                left -= len(piece)
                digest.update(piece)
                written.write(piece)
            expected = answer.headers.get("X-SHA256")
        if digest.hexdigest() != expected:
            raise InputError(f"{name} did not arrive as it is on {self._connection.url}. Fetch again.")


def _patiently(call: Callable[[], Result]) -> Result:
    """Return what a call returns; try again for a while if the server does not answer."""
    until = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return call()
        except Unreachable:
            if time.monotonic() > until:
                raise
        time.sleep(POLL_SECONDS)
