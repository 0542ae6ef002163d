"""What all benchmarks share: rows as they come, a report at the end, tables, policies, clocks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from secateur.cost_models.core import InputError
from secateur.search.benchmarks.policies import choose_budget, inner_groups, random_policies, uniform_policy
from secateur.search.benchmarks.records import Records
from secateur.search.benchmarks.recovery_settings import RECOVERY_SETTINGS
from secateur.search.benchmarks.scaffold import markdown_table, percent, write_results
from secateur.search.benchmarks.timing import median_seconds, timed


def test_the_report_follows_every_row_and_survives_an_interruption(tmp_path, capsys):
    records, report = Records(tmp_path / "out" / "results.jsonl", {}), tmp_path / "out" / "results.md"

    def lines():
        for index in range(3):
            if index:
                assert report.read_text() == f"{index} rows"
            if index == 2:
                raise KeyboardInterrupt
            records.add(index=index)
            yield f"row {index}"

    with pytest.raises(KeyboardInterrupt):
        write_results(records, lines(), lambda rows: f"{len(rows)} rows")
    assert capsys.readouterr().out == "row 0\nrow 1\n"
    report.unlink()
    write_results(records, [], lambda rows: f"{len(rows)} rows")
    assert capsys.readouterr().out == f"2 rows\nresults: {tmp_path / 'out'}\n" and report.read_text() == "2 rows"


def test_tables_and_percents_are_markdown():
    assert markdown_table(["a", "b"], [["1", "-"], ["x", "y"]]) == "| a | b |\n|---|---|\n| 1 | - |\n| x | y |"
    assert (percent(0.12345), percent(None)) == ("12.35", "-")


def test_the_median_of_the_timed_calls_counts(monkeypatch):
    calls, ticks = [], iter([0, 1, 10, 15, 20, 22, 30, 37])
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    assert median_seconds(lambda: calls.append("called"), 3, warm_up=2) == 2 and len(calls) == 5
    assert timed(divmod, 7, 2) == (7, (3, 1))


def test_a_budget_must_be_named_only_if_there_are_several(problem):
    assert choose_budget(problem, "third").name == "third"
    assert choose_budget(replace(problem, budgets=problem.budgets[:1]), None).name == "half"
    with pytest.raises(InputError, match="There are several budgets; choose a `budget`: half, third"):
        choose_budget(problem, None)
    with pytest.raises(InputError, match="no budget `quarter`"):
        choose_budget(problem, "quarter")


def test_random_policies_are_feasible_distinct_and_do_not_depend_on_their_number(problem):
    budget = problem.budgets[0]
    policies = random_policies(problem, budget, 6)
    assert random_policies(problem, budget, 3) == policies[:3] and len(set(policies)) == 6
    assert all(problem.space.costs.of_policy(policy)["macs"] <= budget.limits["macs"] for policy in policies)


def inner_names(graph):
    return {group.name for group, inner in zip(graph.groups, inner_groups(graph), strict=True) if inner}


def test_inner_groups_are_produced_by_one_layer(resnet_graph, chain_graph):
    assert inner_names(resnet_graph) == {f"layer{stage}.{block}.conv1" for stage in (1, 2, 3) for block in range(3)}
    assert len(inner_names(chain_graph)) == len(chain_graph.groups) == 13


def test_depthwise_followers_do_not_make_a_group_residual(depthwise_graph):
    names, producers = inner_names(depthwise_graph), {group.name: group.producers for group in depthwise_graph.groups}
    for inner in ("features.2.conv.0.0", "features.0.0"):  # an expansion, the stem: each with its depthwise convolution
        assert inner in names and len(producers[inner]) == 2
    assert "features.2.conv.2" not in names and len(producers["features.2.conv.2"]) == 2  # a residual stream


def test_uniform_policies_prune_inner_groups_and_quantize_all_layers(problem):
    pruned = uniform_policy(problem.graph, 0.3)
    # The stream of 8 stays; 8 and 16 channels lose 30 %.
    assert dict(zip((group.name for group in problem.graph.groups), pruned.widths, strict=True)) == {
        "conv1": 8, "conv2": 6, "conv4": 11
    }  # fmt: skip
    assert set(pruned.weight_bits) == set(pruned.activation_bits) == {32}
    quantized = uniform_policy(problem.graph, 0.0, (4, 8))
    assert quantized.widths == (8, 8, 16) and set(quantized.weight_bits) == {4} and set(quantized.activation_bits) == {8}
    assert uniform_policy(problem.graph, 0.95).widths == (8, 1, 1)
    left = uniform_policy(problem.graph, 0.0, (4, 8), exclude=["conv*"])
    assert left.weight_bits == (32, 32, 32, 32, 4) and left.activation_bits == (32, 32, 32, 32, 8)


def test_recovery_settings_name_plugins_that_exist():
    from secateur.envs.recovery import RECOVERIES

    assert all(set(names) <= set(RECOVERIES) and " + ".join(names) in (name, "") for name, names in RECOVERY_SETTINGS.items())
