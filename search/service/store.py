"""What the service remembers: tokens and searches in SQLite, everything else as files.

STORE/service.sqlite                tokens (hashed), searches (owner, time, idempotency key)
STORE/searches/ID/config.json       the accepted configuration
STORE/searches/ID/run/              the run folder
STORE/searches/ID/events.jsonl      what happened, one event per line; written by the search's process
STORE/searches/ID/progress.json     the values of the latest events
STORE/searches/ID/log.txt           what the search printed
STORE/searches/ID/outcome.json      how its last process ended
STORE/searches/ID/lock              locked as long as a process works on it
STORE/files/SHA256                  uploaded weights and device files
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import shutil
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from secateur.cost_models.core import InputError
from secateur.cost_models.writing import replace_file
from secateur.search.results.document import FRONT_JSON
from secateur.search.run.folder import lock_file

Role = Literal["read", "submit", "admin"]
ROLES: tuple[Role, ...] = ("read", "submit", "admin")
"""What a token allows, each role with what the ones before it allow: to look, to search, to see the searches of all owners."""

State = Literal["queued", "running", "finished", "cancelled", "failed", "interrupted"]
"""`interrupted`: the process ended without a word, for example with the machine; `:resume` continues it."""

CONFIG, RUN, EVENTS, LOG, OUTCOME, LOCK = "config.json", "run", "events.jsonl", "log.txt", "outcome.json", "lock"
PROGRESS = "progress.json"
"""The values of the latest events of a search."""

CHANGES = "changes.json"
"""Overrides of the configuration for a search that is resumed or extended."""

_TABLES = """
CREATE TABLE IF NOT EXISTS tokens (digest TEXT PRIMARY KEY, owner TEXT NOT NULL, role TEXT NOT NULL, created REAL NOT NULL);
CREATE TABLE IF NOT EXISTS searches (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, created REAL NOT NULL, started REAL, key TEXT, body TEXT, label TEXT NOT NULL
);
CREATE UNIQUE INDEX IF NOT EXISTS keys ON searches (owner, key) WHERE key IS NOT NULL;
CREATE INDEX IF NOT EXISTS times ON searches (created);
"""


@dataclass(frozen=True)
class Caller:
    """Who sends a request.

    Attributes:
        owner: name of the token's owner.
        role: of the token.
    """

    owner: str
    role: Role

    def may(self, role: Role) -> bool:
        """Return whether the token has this role or a larger one."""
        return ROLES.index(self.role) >= ROLES.index(role)


@dataclass(frozen=True)
class Search:
    """A search of the service.

    Attributes:
        id: its identifier.
        owner: name of its owner.
        label: the name that the user gave it, or the model's.
        created, started: seconds since 1970; None: it has not started.
        folder: its folder in the store.
    """

    id: str
    owner: str
    label: str
    created: float
    started: float | None
    folder: Path

    @property
    def run(self) -> Path:
        """The run folder; it exists as soon as the search evaluates."""
        return self.folder / RUN

    @property
    def has_front(self) -> bool:
        """Whether there is anything to read in the run."""
        return (self.run / FRONT_JSON).is_file()

    @property
    def state(self) -> State:
        """What the search does; read from its files, so it is right after any restart."""
        if is_locked(self.folder):
            return "running"
        outcome: State | None = read_json(self.folder / OUTCOME).get("state")
        return outcome or ("queued" if self.started is None else "interrupted")

    @property
    def message(self) -> str:
        """Why the search failed, or ""."""
        return str(read_json(self.folder / OUTCOME).get("message", ""))

    @property
    def progress(self) -> dict[str, Any]:
        """Return phase, evaluations, total, best score per budget, failed evaluations and time left, as far as they are known."""
        return read_json(self.folder / PROGRESS)

    def events(self, after: int = 0) -> list[dict[str, Any]]:
        """Return the events after the one with this number; the first has the number 1."""
        try:
            lines = (self.folder / EVENTS).read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return []
        return [{"id": number, **json.loads(line)} for number, line in enumerate(lines[after:], after + 1)]


class Store:
    """The folder of the service.

    Args:
        folder: made if it does not exist, readable by this user alone.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder).expanduser().absolute()
        self.searches, self.files = self.folder / "searches", self.folder / "files"
        try:
            for made in (self.folder, self.searches, self.files):
                made.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._database() as database:
                database.executescript(_TABLES)
        except (OSError, sqlite3.Error) as error:
            raise InputError(f"The store {self.folder} cannot be used: {error}. Choose another with --store.") from None

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        """Give a connection whose changes are kept if nothing fails."""
        with closing(sqlite3.connect(self.folder / "service.sqlite", timeout=30)) as connection, connection:
            connection.row_factory = sqlite3.Row
            connection.execute("PRAGMA journal_mode=WAL")
            yield connection

    # ------------------------------------------------------------------------------------------------------------ tokens

    def new_token(self, owner: str, role: Role) -> str:
        """Return a new token; only its hash is stored."""
        token = f"sct_{secrets.token_urlsafe(32)}"
        with self._database() as database:
            database.execute("INSERT INTO tokens VALUES (?, ?, ?, ?)", (_digest(token), owner, role, time.time()))
        return token

    def caller(self, token: str) -> Caller | None:
        """Return who a token belongs to; None: nobody."""
        with self._database() as database:
            row = database.execute("SELECT owner, role FROM tokens WHERE digest = ?", (_digest(token),)).fetchone()
        return None if row is None else Caller(row["owner"], row["role"])

    # ---------------------------------------------------------------------------------------------------------- searches

    def add(self, owner: str, config: Mapping[str, Any], label: str, key: str | None = None) -> tuple[Search, bool]:
        """Store a search, and return it with whether it is new: the same key and configuration give the search of before.

        Args:
            owner: name of the owner.
            config: the accepted configuration, as JSON values.
            label: its name.
            key: idempotency key of the request.
        Raises:
            InputError: if the key was used with another configuration.
        """
        text = json.dumps(config, sort_keys=True)
        if key is not None and (known := self._with_key(owner, key, _digest(text))) is not None:
            return known, False
        identifier = secrets.token_hex(6)
        folder = self.searches / identifier
        folder.mkdir(mode=0o700)
        write_json(folder / CONFIG, config)
        row = (identifier, owner, time.time(), None, key, _digest(text), label)
        try:
            with self._database() as database:
                database.execute("INSERT INTO searches VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        except sqlite3.IntegrityError:  # another request with this key was faster
            known = self._with_key(owner, str(key), _digest(text))
            assert known is not None
            return known, False
        return self._search(identifier), True

    def _with_key(self, owner: str, key: str, body: str) -> Search | None:
        with self._database() as database:
            row = database.execute("SELECT * FROM searches WHERE owner = ? AND key = ?", (owner, key)).fetchone()
        if row is not None and row["body"] != body:
            raise InputError("`Idempotency-Key` was used with another configuration. Send a new key.")
        return None if row is None else self._of(row)

    def find(self, identifier: str, caller: Caller) -> Search | None:
        """Return a search that the caller may see; None: there is none."""
        with self._database() as database:
            row = database.execute("SELECT * FROM searches WHERE id = ?", (identifier,)).fetchone()
        return None if row is None or (row["owner"] != caller.owner and not caller.may("admin")) else self._of(row)

    def list(self, caller: Caller | None, before: float = float("inf"), count: int = 1000) -> list[Search]:
        """Return the latest searches that were created before a time, newest first; None: of all owners."""
        everyone = caller is None or caller.may("admin")
        where, values = ("", ()) if everyone or caller is None else (" AND owner = ?", (caller.owner,))
        query = f"SELECT * FROM searches WHERE created < ?{where} ORDER BY created DESC LIMIT ?"
        with self._database() as database:
            rows = database.execute(query, (before, *values, count)).fetchall()
        return [self._of(row) for row in rows]

    def not_started(self) -> Sequence[Search]:
        """Return the searches that wait for their start, or were cancelled before it, oldest first."""
        with self._database() as database:
            rows = database.execute("SELECT * FROM searches WHERE started IS NULL ORDER BY created").fetchall()
        return [self._of(row) for row in rows]

    def remove(self, search: Search) -> None:
        """Forget a search that has not started."""
        with self._database() as database:
            database.execute("DELETE FROM searches WHERE id = ?", (search.id,))
        shutil.rmtree(search.folder, ignore_errors=True)

    def started(self, search: Search) -> None:
        """Note that a search has started."""
        with self._database() as database:
            database.execute("UPDATE searches SET started = ? WHERE id = ?", (time.time(), search.id))

    def queue(self, search: Search) -> None:
        """Note that a search waits for its start again."""
        with self._database() as database:
            database.execute("UPDATE searches SET started = NULL WHERE id = ?", (search.id,))

    def _search(self, identifier: str) -> Search:
        with self._database() as database:
            return self._of(database.execute("SELECT * FROM searches WHERE id = ?", (identifier,)).fetchone())

    def _of(self, row: sqlite3.Row) -> Search:
        return Search(row["id"], row["owner"], row["label"], row["created"], row["started"], self.searches / row["id"])

    # ------------------------------------------------------------------------------------------------------------- files

    def file(self, digest: str) -> Path | None:
        """Return an uploaded file; None: there is none with this SHA-256."""
        known = len(digest) == 64 and set(digest) <= set("0123456789abcdef")
        path = self.files / digest
        return path if known and path.is_file() else None


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a file that this service has written; empty if there is no file."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Replace a file by a JSON object."""
    replace_file(path, json.dumps(document) + "\n")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# ----------------------------------------------------------------------------------------------------------------- locks


def take_lock(folder: Path) -> int | None:
    """Return the open, locked file of a search; None: a process works on it. The lock ends when the last process that has the
    file open ends, however it ends."""
    return lock_file(folder / LOCK)


def is_locked(folder: Path) -> bool:
    """Return whether a process works on a search."""
    try:
        file = os.open(folder / LOCK, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared, so that two readers do not take each other for a process
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False
