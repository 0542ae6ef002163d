"""Rows on disk: none is measured twice, and rows of two measurements are never mixed."""

import json

import pytest

from secateur.cost_models.core import InputError
from secateur.search.benchmarks.records import Records, config_record, difference


def test_rows_are_found_again_after_a_restart(tmp_path):
    file = tmp_path / "new" / "rows.jsonl"
    first = Records(file, {"task": "a", "shape": (1, 2)})
    assert first.add(name="x", widths=(3, 4), top1=0.5)["widths"] == [3, 4]
    again = Records(file, {"task": "a", "shape": (1, 2)})
    assert again.rows == first.rows == [{"name": "x", "widths": [3, 4], "top1": 0.5}]
    assert again.find(name="x", widths=(3, 4)) and again.find(name="x", widths=(3, 5)) is None


def test_a_line_that_was_cut_off_is_dropped_and_the_file_continued(tmp_path):
    file = tmp_path / "rows.jsonl"
    records = Records(file, {})
    records.add(index=0)
    records.add(index=1)
    file.write_text(file.read_text()[:-4])
    again = Records(file, {})
    assert again.rows == [{"index": 0}]
    again.add(index=2)
    assert [json.loads(line) for line in file.read_text().splitlines()] == [{"schema": 1}, {"index": 0}, {"index": 2}]


def test_another_measurement_is_refused_and_the_difference_named(tmp_path):
    file = tmp_path / "rows.jsonl"
    Records(file, {"config": {"data": {"validation": 10}, "seed": 0}}).add(index=0)
    before = file.read_text()
    with pytest.raises(InputError, match=r"`config\.data\.validation` is 10 there, 20 here.*`output`"):
        Records(file, {"config": {"data": {"validation": 20}, "seed": 0}})
    assert file.read_text() == before


def test_a_missing_key_counts_as_null(tmp_path):
    old = {"config": {"seed": 0}}
    Records(tmp_path / "rows.jsonl", old).add(**old, top1=0.5)
    records = Records(tmp_path / "rows.jsonl", {"config": {"seed": 0, "device": None}})
    assert records.find(config={"seed": 0, "device": None}) == {**old, "top1": 0.5}
    assert records.find(config={"seed": 0, "device": "phone"}) is None


def test_the_first_difference_is_named_with_both_values():
    assert difference({"a": [1], "b": {"c": 2}}, {"b": {"c": 3}, "a": [1]}, ("in x", "in y")) == "`b.c` is 2 in x, 3 in y"
    assert difference({"a": [1]}, {"a": [1], "b": None}) is None


def test_damaged_and_impossible_files_are_input_errors(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"schema": 1}\nnothing\n{"index": 1}\n')
    with pytest.raises(InputError, match="line 2 is not valid JSON"):
        Records(tmp_path / "rows.jsonl", {})
    with pytest.raises(InputError, match="cannot be written"):
        Records(tmp_path / "rows.jsonl" / "below" / "rows.jsonl", {})


def test_a_configuration_is_recorded_without_the_machine(settings):
    data = {"name": "cifar10", "root": "/home/me/cifar", "validation": 9}
    model = {"factory": "a:b", "weights": "/home/me/net.pth", "input": [3, 8, 8]}
    record = config_record(settings(data=data, model=model))
    assert "/home/me" not in json.dumps(record) and record["model"]["weights"] == "net.pth"
    assert record == config_record(
        settings(
            data={**data, "root": "x"},
            model={**model, "weights": "net.pth"},
            search={**settings().search.model_dump(), "workers": 2},
            finalize={"verify": False},
            output={"root": "y"},
        )
    )
