"""The verbs of `secateur benchmark`: rows as they come, a table at the end, files that a second start goes on with."""

import json

import pytest
import yaml
from typer.testing import CliRunner

from secateur.search.benchmarks import importances, prediction, quantizers
from secateur.search.cli import app


@pytest.fixture
def config(tmp_path, settings, monkeypatch):
    monkeypatch.chdir(tmp_path)
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
    assert "synthetic_net, pruned, sequential: " in done.stdout
    assert (folder / "results.md").read_text().count("| synthetic_net |") == 1
    more = benchmark("recoveries", config, "--ratio", 0.25, "--output", folder)
    check(more, folder, "results.jsonl", 18)
    (folder / "results.md").unlink()
    check(benchmark("recoveries", config, "--ratio", 0.25, "--output", folder), folder, "results.jsonl", 18)  # all there already


def test_quantizers(config, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    monkeypatch.setattr(quantizers, "METHODS", (("uniform", ()), ("gptq", ("sequential",))))
    done = benchmark("quantizers", config, "--output", folder)
    check(done, folder, "results.jsonl", 7)
    lines = (folder / "results.md").read_text().splitlines()
    assert lines[2].startswith("| uniform |") and lines[3].startswith("| gptq + sequential |") and "| - |" not in done.stdout
    rows = {row["variant"]: row for row in map(json.loads, (folder / "results.jsonl").read_text().splitlines()[1:])}
    sizes = [rows[name]["shares"]["weight_bytes"] for name in ("dense", "uniform, 4 bits", "uniform, 2 bits")]
    assert sizes[0] == 1 > sizes[1] > sizes[2]


def test_importances(config, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    monkeypatch.setattr(importances, "GRADES", {"none": (), "least_squares": ("least_squares",)})
    few = ["--budget", "half", "--evaluations", 2, "--agent", "uniform", "--output", folder]
    check(benchmark("importances", config, *few, "--importance", "l2_norm"), folder, "results.jsonl", 1)
    done = benchmark("importances", config, *few, "--importance", "l2_norm", "--importance", "random")
    check(done, folder, "results.jsonl", 2)
    assert "l2_norm, uniform, 1 evaluations:" not in done.stdout and "random, uniform, 1 evaluations:" in done.stdout
    other = benchmark("importances", config, *few, "--importance", "random", "--evaluations", 3)
    assert other.exit_code == 2 and "`evaluations` is 2 there, 3 here" in other.stderr
    unknown = benchmark("importances", config, *few, "--importance", "l3_norm")
    assert unknown.exit_code == 2 and "Did you mean" in unknown.stderr


def test_prediction(config, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    monkeypatch.setattr(prediction, "GRADES", {"none": (), "least_squares": ("least_squares",)})
    arguments = ["prediction", config, "--budget", "half", "--output", folder]
    check(benchmark(*arguments, "--policies", 1), folder, "policies.jsonl", 1)
    check(benchmark(*arguments, "--policies", 2), folder, "policies.jsonl", 2)
    assert "2 random policies" in (folder / "results.md").read_text()
    refused = benchmark(*arguments, "--start", "magic")
    assert refused.exit_code == 2 and "no recovery `magic`" in refused.stderr


def test_sensitivities(config, tmp_path):
    folder = tmp_path / "out"
    check(benchmark("sensitivities", config, "--policies", 4, "--output", folder), folder, "results.jsonl", 8)  # two budgets
    done = benchmark("sensitivities", config, "--policies", 6, "--output", folder)
    check(done, folder, "results.jsonl", 12)
    assert "policy 3: " not in done.stdout and "policy 4: " in done.stdout
    row = json.loads((folder / "results.jsonl").read_text().splitlines()[1])
    assert 0 <= row["top1"] <= 1 and row["sums"]["0.5"] > row["sums"]["1.0"] > 0
    assert "| half | 6 | " in (folder / "results.md").read_text() and "nan" not in done.stdout


def test_agent(config):
    small = "{warmup: 8, candidates: 8, goals: 2, updates: 2, batch: 8, planned: 4, hidden: 8, critics: 2, lookahead: 2}"
    done = benchmark("agent", config, "--set", "search.agent=envelope_ddpg", "--set", f"search.options={small}")
    assert done.exit_code == 0, done.output
    assert "ask, learning of one episode included: " in done.stdout and "% of that" in done.stdout
    assert "nan" not in done.stdout
