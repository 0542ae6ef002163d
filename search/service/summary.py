"""What lists and single searches show; those of searches that have ended are kept in memory, because they do not change."""

from __future__ import annotations

from typing import Any

from secateur.search.service.store import OUTCOME, Search


class Summaries:
    """Summaries of searches."""

    def __init__(self) -> None:
        self._ended: dict[str, tuple[int, dict[str, Any]]] = {}

    def of(self, search: Search) -> dict[str, Any]:
        """Return state, phase, evaluations done, best score per budget and time left of a search."""
        written = _written(search)
        kept = self._ended.get(search.id)
        if kept is not None and kept[0] == written:
            return kept[1]
        found = summary(search)
        if written and found["state"] not in ("queued", "running"):
            self._ended[search.id] = written, found
        return found


def _written(search: Search) -> int:
    """Return when the outcome was written; 0: there is none, for example because the search was resumed."""
    try:
        return (search.folder / OUTCOME).stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def summary(search: Search) -> dict[str, Any]:
    """Return the summary of a search from its files."""
    at = search.progress
    return {
        "id": search.id,
        "label": search.label,
        "owner": search.owner,
        "state": search.state,
        "message": search.message,
        "phase": at.get("text", ""),
        "created": search.created,
        "started": search.started,
        "queue_seconds": None if search.started is None else search.started - search.created,
        "evaluations": at.get("evaluations", 0),
        "total": at.get("total"),
        "failed": at.get("failed", 0),
        "best": at.get("best", {}),
        "time_left": at.get("time_left"),
    }
