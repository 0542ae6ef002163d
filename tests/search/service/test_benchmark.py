"""`secateur benchmark service`, with few searches and listeners."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
from secateur.search.benchmarks.service import EVENT_COUNT, run_service


@pytest.mark.slow
def test_the_service_is_measured(tmp_path, capsys):
    run_service(searches=3, clients=2, listeners=4, seconds=0.5, output=tmp_path / "folder" / "service.md")
    table = (tmp_path / "folder" / "service.md").read_text()
    assert table in capsys.readouterr().out
    lists, events = (line.split("|")[1:-1] for line in table.splitlines()[2:])
    assert lists[0].strip() == "list of 3 searches, 2 clients" and int(lists[1]) > 0
    assert events[0].strip() == "events to 4 listeners, 0 lost"
    assert EVENT_COUNT > 1 and float(events[2]) > 0
