"""Queries: conditions are parsed, never run; rows, order and columns are what was asked for, in every format."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import pandas
import pytest
from typer.testing import CliRunner

import secateur
from secateur.cost_models.core import InputError
from secateur.envs.core import Episode
from secateur.search.cli import app
from secateur.search.results.expression import MAX_LENGTH, matching_rows
from tests.search.results.recorded import DENSE, WATCH, episode, write_run

EPISODES = (
    episode(45, 0.85, 45.0, 150.0),  # 0
    episode(60, 0.88, 60.0, 150.0),  # 1: not feasible for phone
    episode(30, 0.60, 30.0, 100.0, WATCH),  # 2: loses too much top-1
    Episode("phone", None, None, failure="worker lost twice"),  # 3
    episode(90, 0.89, 79.0, 190.0, WATCH),  # 4
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "first", EPISODES)


@pytest.fixture(scope="module")
def other(run):
    """A run of a dense network with twice the costs."""
    dense = replace(DENSE, costs={"macs": 200.0, "weight_bytes": 800.0})
    return write_run(run.parent / "second", [episode(45, 0.7, 90.0, 300.0), episode(46, 0.7, 110.0, 300.0)], dense)


@pytest.mark.parametrize(
    ("where", "rows"),
    [
        ("top1 >= 0.85", [0, 1, 4]),
        ("top1 >= 0.85 and macs <= 0.5*dense", [0]),
        ("0.5*dense < macs <= 0.6 * dense", [1]),
        ("top1 > dense - 0.03", [1, 4]),
        ("macs <= 0.5*dense and weight_bytes < 0.3*dense", [2]),
        ("budget == 'watch'", [2, 4]),
        ("budget in ('phone', 'other') and feasible", [0]),
        ("budget not in ['phone']", [2, 4]),
        ("not feasible", [1, 2, 3]),
        ("feasible == False and top1 > 0.7", [1]),
        ("state == 'FAIL' or evaluation == 0", [0, 3]),
        ("top1 == None", [3]),
        ("failure != None", [3]),
        ("`weight_bits/conv` == 8 and `prune_ratio/conv` >= 0.55", [0, 2]),
        ("macs + weight_bytes / 10 - 1 < -(-44)", [2]),
        ("1 / (macs - 45) > 0 and macs < 100", [0, 1, 4]),  # one over zero is infinite
        ("not (top1 > 0 or state == 'FAIL')", []),
    ],
)
def test_conditions_select_rows(run, where, rows):
    assert list(secateur.query(run, where)["evaluation"]) == rows
    assert list(secateur.load_run(with_manifest(run)).query(where)["evaluation"]) == rows


def with_manifest(run):
    (run / "manifest.json").write_text('{"schema": 2, "config": {}}')
    return run


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("top2 >= 0.9", r"no column `top2` \(in 'top2 >= 0.9', character 1\). Did you mean `top1`\?.* 2 choices"),
        ("top1 >= 0.9 and mac < 1", r"no column `mac` .*character 17.*`macs`"),
        ("`weight_bits/con` == 8", r"no column `weight_bits/con`.*Did you mean `weight_bits/conv`"),
        ("top1 >=", r"cannot be read \(character 8\)"),
        ("top1", r"`top1` must be a condition, but is a number"),
        ("budget > 'a'", r"is a text: compare it with =="),
        ("top1 == 'phone'", r"`'phone'` is a text, but is compared with a number .*character 9"),
        ("top1 and feasible", r"`top1` must be a truth value, but is a number"),
        ("seconds < dense", r"dense value of `seconds`, but only these have one: top1, macs, weight_bytes"),
        ("macs < weight_bytes * dense", r"must compare `dense` with one column"),
        ("dense", r"stands for the dense value"),
        ("macs < 0.5*dens", r"no column `dens`"),
        ("budget in 'phone'", r"must be a list"),
        ("budget is 'phone'", r"write =="),
        ("", r"cannot be read"),
        ("top1 > 1e999", r"not allowed"),
        ("top1 > 9**9**9", r"`9\*\*9\*\*9` is not allowed"),
        ("__import__('os').system('true')", r"is not allowed"),
        ("budget.__class__ == 1", r"`budget.__class__` is not allowed"),
        ("(lambda: True)()", r"is not allowed"),
        ("[x for x in (1,)]", r"is not allowed"),
        ("f'{budget}' == 'phone'", r"is not allowed"),
        ("macs[0] > 1", r"is not allowed"),
        ("(macs := 1) > 0", r"is not allowed"),
        ("top1 > 0 if feasible else top1 > 1", r"is not allowed"),
        ("budget == b'phone'", r"is not allowed"),
        ("top1 > 1j", r"is not allowed"),
        ("top1 > " + "9" * 5000, r"characters; at most"),
        ("top1 > " + "9" * 3000, r"not allowed"),
        ("not " * 60 + "feasible", r"nested more than 50"),
        ("(" * 1000 + "feasible" + ")" * 1000, r"cannot be read"),
        ("feasible\0", r"cannot be read"),
        ("x" * (MAX_LENGTH + 1), r"characters; at most"),
    ],
)
def test_what_is_no_condition_is_refused_in_one_sentence(run, where, message):
    with pytest.raises(InputError, match=message):
        secateur.query(run, where)


def test_conditions_agree_with_pandas(seed=0):
    rng = np.random.default_rng(seed)
    table = pandas.DataFrame({"a": rng.normal(size=200), "b": rng.integers(0, 3, 200), "c": rng.choice(["x", "y"], 200)})
    table.loc[::7, "a"] = np.nan
    for text in ("a > b - 1 or c == 'x'", "(a < 0) == (b > 1)", "-a <= 2*b and not c in ('y',)", "a != a or b != 1"):
        expected = table.eval(text, engine="python") if "not c" not in text else (-table.a <= 2 * table.b) & (table.c != "y")
        assert list(matching_rows(text, table, {})) == list(expected), text


def test_dense_is_that_of_each_run(run, other):
    found = secateur.query([run, other], "macs <= 0.5*dense")
    assert list(zip(found["run"], found["evaluation"], strict=True)) == [(str(run), 0), (str(run), 2), (str(other), 0)]


def test_rows_are_sorted_and_cut(run, other):
    assert list(secateur.query(run, sort="-top1")["evaluation"]) == [4, 1, 0, 2, 3]  # the failed one has no score
    assert list(secateur.query(run, sort=["weight_bytes", "-macs"], limit=3)["evaluation"]) == [2, 1, 0]
    found = secateur.query([run, other], sort="-macs", limit=2, columns="run, macs,`weight_bits/conv`")
    assert found.to_dict("list") == {"run": [str(other)] * 2, "macs": [110.0, 90.0], "weight_bits/conv": [8, 8]}
    for wrong, place in (
        ({"sort": "latency"}, "in `sort`"),
        ({"columns": ["top"]}, "in `columns`"),
        ({"limit": -1}, "0 or more"),
    ):
        with pytest.raises(InputError, match=place):
            secateur.query(run, **wrong)
    with pytest.raises(InputError, match="at least one run"):
        secateur.query([])


def test_a_run_without_evaluations_has_no_rows(tmp_path):
    found = secateur.query(write_run(tmp_path / "new", []), "top1 > 0.5 and feasible", sort="-macs")
    assert found.empty and {"run", "evaluation", "top1", "macs"} <= set(found)


def test_columns_have_types(run):
    kinds = secateur.query(run).dtypes
    assert [kinds[name].kind for name in ("feasible", "evaluation", "top1", "macs")] == ["b", "i", "f", "f"]


def command(*arguments):
    return CliRunner().invoke(app, ["query", *map(str, arguments)])


def test_the_command_prints_every_format(run, other, tmp_path):
    arguments = (run, other, "--where", "top1 >= 0.7", "--sort", "-macs")
    expected = secateur.query([run, other], "top1 >= 0.7", "-macs")
    table = command(*arguments, "--limit", 1)
    assert table.exit_code == 0 and "1 of 5 evaluations" in table.stdout and "110" in table.stdout
    rows = json.loads(command(*arguments, "--format", "json").stdout)
    assert [row["macs"] for row in rows] == list(expected["macs"]) and rows[0]["failure"] is None
    read = pandas.read_csv(io.StringIO(command(*arguments, "--format", "csv", "--columns", "macs,top1").stdout))
    pandas.testing.assert_frame_equal(read, expected[["macs", "top1"]])
    parquet = command(*arguments, "--format", "parquet").stdout_bytes
    read = pandas.read_parquet(io.BytesIO(parquet))
    pandas.testing.assert_frame_equal(read.drop(columns="failure"), expected.drop(columns="failure"), check_dtype=False)
    done = command(*arguments, "--format", "parquet", "--output", tmp_path / "rows.parquet")
    assert done.exit_code == 0 and (tmp_path / "rows.parquet").read_bytes() == parquet


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--where", "top2 > 1"), "error: There is no column `top2`"),
        (("--format", "xml"), "error: `--format` must be one of table, csv, json, parquet, but got 'xml'."),
        (("--output", "x.csv"), "`--output` needs --format"),
        (("--format", "csv", "--output", "none/x.csv"), "cannot be written"),
    ],
)
def test_the_command_answers_mistakes_with_exit_code_2(run, arguments, message):
    done = command(run, *arguments)
    assert done.exit_code == 2 and message in done.stderr and done.stdout == ""
