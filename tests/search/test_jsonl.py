"""Files of JSON lines survive a killed process."""

import pytest

from secateur.cost_models.core import InputError
from secateur.search.jsonl import append_line, as_read, read_lines, write_lines


def test_values_are_read_as_they_were_written(tmp_path):
    file = tmp_path / "a.jsonl"
    assert read_lines(file) == []
    write_lines(file, [{"a": (1, 2)}])
    append_line(file, ["ü", None])
    assert read_lines(file) == [as_read({"a": (1, 2)}), ["ü", None]] == [{"a": [1, 2]}, ["ü", None]]


@pytest.mark.parametrize("cut", range(1, 12))
def test_only_an_unfinished_last_line_is_lost(tmp_path, cut):
    file = tmp_path / "a.jsonl"
    write_lines(file, [{"a": 1}, {"b": 234}])
    file.write_bytes(file.read_bytes()[:-cut])
    left = [{"a": 1}] + [{"b": 234}] * (cut == 1)
    assert read_lines(file) == left
    write_lines(file, read_lines(file))
    append_line(file, 5)
    assert read_lines(file) == [*left, 5] and list(tmp_path.iterdir()) == [file]


def test_a_damaged_line_is_named(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": 1}\nnothing\n{"b": 2}\n')
    with pytest.raises(InputError, match=r"a\.jsonl: line 2 is not valid JSON"):
        read_lines(file)
