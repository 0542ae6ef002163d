"""Learning in the order of asking: what makes results depend on the seed and not on which worker is faster."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

from secateur.agents.core import check_out

Sent = TypeVar("Sent")
Result = TypeVar("Result")


class EpisodeQueue(Generic[Sent, Result]):
    """Gives back results in the order of their tickets, whenever they come in.

    A choice builds on exactly the episodes before the last `lookahead`: so neither the speed nor the number of the workers
    changes it, as long as at most `lookahead` episodes are out.

    Args:
        lookahead: evaluations that may be out, at least 1.
    """

    def __init__(self, lookahead: int):
        self.lookahead = lookahead
        self.asked = self.learned = 0
        self._sent: dict[int, Sent] = {}
        self._results: dict[int, Result | None] = {}

    @property
    def ready(self) -> bool:
        """Whether everything that the next choice builds on has been given back by `due`."""
        return self.learned > self.asked - self.lookahead

    def add(self, sent: Sent) -> int:
        """Return the ticket of a new episode."""
        self._sent[self.asked] = sent
        self.asked += 1
        return self.asked - 1

    def sent(self, ticket: int) -> Sent:
        """Return what was added with this ticket.

        Raises:
            ValueError: if it was never added, or its result is here already.
        """
        check_out(ticket, self._sent.keys() - self._results.keys())
        return self._sent[ticket]

    def put(self, ticket: int, result: Result | None) -> None:
        """Keep the result of an episode; None: there is nothing to learn from."""
        self._results[ticket] = result

    def due(self) -> Iterator[Result | None]:
        """Give back results in order, until the next choice may be made or an earlier result is missing."""
        while not self.ready and self.learned in self._results:
            yield self._take(self.learned)

    def rest(self) -> Iterator[Result | None]:
        """Give back all results that are here, in order, and forget the episodes that are out."""
        for ticket in sorted(self._results):
            yield self._take(ticket)
        self.learned = self.asked
        self._sent = {}

    def _take(self, ticket: int) -> Result | None:
        self.learned = ticket + 1
        del self._sent[ticket]
        return self._results.pop(ticket)
