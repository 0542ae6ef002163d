"""Who may do what: tokens, roles, and the searches that a caller may see. FastAPI passes these to the routes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Header, Request
from prometheus_client import CollectorRegistry, Counter

from secateur.search.service.processes import Processes
from secateur.search.service.rules import Rules
from secateur.search.service.store import Caller, Role, Search, Store
from secateur.search.service.summary import Summaries

BEARER = "Bearer "


@dataclass(frozen=True)
class Limits:
    """What one owner may take.

    Attributes:
        upload: bytes of one uploaded file.
        waiting: searches that wait or run at the same time.
    """

    upload: int = 2 * 2**30
    waiting: int = 20


@dataclass(frozen=True)
class Service:
    """Everything that requests need.

    Attributes:
        store: what the service remembers.
        processes: starts searches.
        rules: what configurations may name.
        open_to_all: whether requests without a token are those of an administrator.
        limits: of every owner.
        summaries: of searches.
        registry: of the metrics.
        requests: counts requests by kind.
    """

    store: Store
    processes: Processes
    rules: Rules
    open_to_all: bool = False
    limits: Limits = Limits()
    summaries: Summaries = field(default_factory=Summaries)
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def __post_init__(self) -> None:
        object.__setattr__(self, "requests", Counter("secateur_requests", "Requests by kind.", ["kind"], registry=self.registry))

    requests: Counter = field(init=False)


class Problem(Exception):
    """An error for the caller.

    Attributes:
        status: of the answer.
        title: one sentence.
        errors: every mistake, a sentence each.
    """

    def __init__(self, status: int, title: str, errors: list[str] | None = None):
        super().__init__(title)
        self.status, self.title, self.errors = status, title, errors or []


# What follows takes far less than a millisecond. Functions that are not `async` would run in other threads, which wait several
# milliseconds for each other under load.


async def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


TheService = Annotated[Service, Depends(_service)]


async def _caller(service: TheService, authorization: Annotated[str, Header()] = "") -> Caller:
    """Return who sends the request."""
    if service.open_to_all and not authorization:
        return Caller("anyone", "admin")
    found = service.store.caller(authorization.removeprefix(BEARER)) if authorization.startswith(BEARER) else None
    if found is None:
        raise Problem(401, "Send a token: Authorization: Bearer ... The operator makes one with `secateur serve token`.")
    return found


def _with_role(role: Role) -> Callable[..., Awaitable[Caller]]:
    async def check(caller: Annotated[Caller, Depends(_caller)]) -> Caller:
        if not caller.may(role):
            raise Problem(403, f"This needs a token with the role {role}; yours has {caller.role}.")
        return caller

    return check


Reader = Annotated[Caller, Depends(_with_role("read"))]
Submitter = Annotated[Caller, Depends(_with_role("submit"))]


async def _owned(identifier: str, service: TheService, caller: Reader) -> Search:
    found = service.store.find(identifier, caller)
    if found is None:
        raise Problem(404, f"There is no search {identifier}.")
    return found


Owned = Annotated[Search, Depends(_owned)]
"""A search that the caller may see."""


async def _readable(search: Owned) -> Search:
    if not search.has_front:
        raise Problem(409, f"The search has no results yet; it is {search.state}. {search.message}".strip())
    return search


Readable = Annotated[Search, Depends(_readable)]
"""The same, with results."""
