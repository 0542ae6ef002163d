"""The commands of `secateur benchmark`: rows as they come, a table at the end, files that a second start continues."""

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from secateur.search.benchmarks import quantizers, recovery_settings
from secateur.search.benchmarks.agent_tables import summary
from secateur.search.benchmarks.data_free import data_free_report
from secateur.search.benchmarks.importances import importance_table
from secateur.search.benchmarks.prediction import prediction_table
from secateur.search.benchmarks.query_tables import query_report
from secateur.search.benchmarks.recoveries import recovery_report
from secateur.search.benchmarks.sensitivities import sensitivity_table
from secateur.search.cli import app
from secateur.search.jsonl import read_lines

RESULTS = Path(__file__).resolve().parents[3] / "results"


@pytest.fixture
def config(tmp_path, settings, problem, monkeypatch):
    """A configuration file; benchmarks that need calibration get the shared problem."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recovery_settings, "build_problem", lambda config, status: problem)
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(settings().model_dump(mode="json", exclude={"output"})))
    return path


def benchmark(*arguments):
    return CliRunner().invoke(app, ["benchmark", *map(str, arguments)])


def check(done, folder, file, rows):
    assert done.exit_code == 0, done.output
    assert done.stdout.rstrip().endswith(f"results: {folder}")
    table = (folder / "results.md").read_text()
    assert table in done.stdout and len((folder / file).read_text().splitlines()) == rows + 1


def test_recoveries(config, tmp_path):
    folder = tmp_path / "out"
    done = benchmark("recoveries", config, config, "--ratio", 0.5, "--output", folder)
    check(done, folder, "results.jsonl", 9)  # the same network twice is measured once
    assert "synthetic, pruned, sequential: " in done.stdout
    assert (folder / "results.md").read_text().count("| synthetic |") == 1


def test_quantizers(config, tmp_path):
    folder = tmp_path / "out"
    options = ("--method", "uniform activations=max", "--bits", "W4", "--bits", "W8A8", "--output", folder)
    done = benchmark("quantizers", config, *options)
    check(done, folder, "results.jsonl", 3)
    assert "uniform activations=max, W8A8: " in done.stdout
    again = benchmark("quantizers", config, *options)
    check(again, folder, "results.jsonl", 3)
    assert "uniform activations=max, W8A8: " not in again.stdout
    assert len(quantizers.variants(quantizers.METHODS, quantizers.BITS)) == 1 + 8 * 3


def test_importances(config, tmp_path, two_settings):
    folder = tmp_path / "out"
    few = ["--budget", "half", "--evaluations", 2, "--agent", "uniform", "--importance", "random", "--output", folder]
    check(benchmark("importances", config, *few), folder, "results.jsonl", 1)
    other = benchmark("importances", config, *few, "--evaluations", 3)
    assert other.exit_code == 2 and "`evaluations` is 2 there, 3 here" in other.stderr
    unknown = benchmark("importances", config, *few, "--importance", "l3_norm")
    assert unknown.exit_code == 2 and "Did you mean" in unknown.stderr


def test_prediction(config, tmp_path, two_settings):
    folder = tmp_path / "out"
    arguments = ["prediction", config, "--budget", "half", "--output", folder]
    check(benchmark(*arguments, "--policies", 1), folder, "policies.jsonl", 1)
    assert "1 random policies" in (folder / "results.md").read_text()
    refused = benchmark(*arguments, "--start", "magic")
    assert refused.exit_code == 2 and "no recovery setting `magic`" in refused.stderr


def test_sensitivities(config, tmp_path):
    folder = tmp_path / "out"
    check(benchmark("sensitivities", config, "--policies", 4, "--output", folder), folder, "results.jsonl", 8)  # two budgets


def test_search(config, tmp_path):
    folder = tmp_path / "out"
    agents = ["--agent", "uniform", "--agent", "random redraws=3", "--seeds", 1]
    check(benchmark("search", config, *agents, "--output", folder), folder, "results.jsonl", 2)
    header = json.loads((folder / "results.jsonl").read_text().splitlines()[0])
    assert header["config"]["search"]["racing"] is False, "no run stops the evaluations of another one"


def test_agent(config):
    small = "{warmup: 8, candidates: 8, training_budgets: 2, updates: 2, batch: 8, planned: 4, hidden: 8, critics: 2}"
    done = benchmark("agent", config, "--set", "search.agent=envelope_ddpg", "--set", f"search.options={small}")
    assert done.exit_code == 0, done.output
    assert "ask, including learning from one episode: " in done.stdout and "% of that" in done.stdout
    assert "nan" not in done.stdout


@pytest.mark.parametrize(
    ("folder", "report"),
    [
        ("ask/results.jsonl", lambda rows: query_report(rows, ("agent: 3 evaluations each", "bee_colony: 60 each"))),
        ("budgets/results.jsonl", summary),
        ("budgets_bits/results.jsonl", summary),
        ("data_free/results.jsonl", data_free_report),
        ("detection/results.jsonl", summary),
        ("importances/results.jsonl", importance_table),
        ("prediction/policies.jsonl", prediction_table),
        ("quantizers/results.jsonl", quantizers.quantizer_report),
        ("quantizers_super_resolution/results.jsonl", quantizers.quantizer_report),
        ("recoveries/results.jsonl", recovery_report),
        ("sensitivities/results.jsonl", lambda rows: sensitivity_table(list(dict.fromkeys(row["budget"] for row in rows)), rows)),
    ],
)
def test_committed_tables_are_those_of_the_committed_rows(folder, report):
    header, *rows = read_lines(RESULTS / folder)
    committed = (RESULTS / folder).with_name("results.md").read_text().splitlines()
    lines = [line for line in report(rows).splitlines() if line.startswith("| ")]
    assert header["schema"] == 1 and len(lines) > 1 and lines == [line for line in committed if line.startswith("| ")]


def test_score(config, tmp_path):
    folder = tmp_path / "out"
    arguments = ("score", config, "--budget", "half", "--policies", 2, "--output", folder)
    done = benchmark(*arguments)
    assert done.exit_code == 0, done.output
    rows = read_lines(folder / "results.jsonl")[1:]
    assert {row["kind"] for row in rows} == {"random", "greedy", "near greedy"}
    assert all(0 < row["scores"]["sequential"]["divergence"]["quality"] <= 1 for row in rows)
    table = (folder / "results.md").read_text()
    assert "| sequential, 128 images: divergence, calibration |" in table and table in done.stdout
    again = benchmark(*arguments)
    assert len(read_lines(folder / "results.jsonl")) == len(rows) + 1 and table in again.stdout
