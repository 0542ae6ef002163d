"""From the files of a run to plain values: what a report says is what the run holds."""

from __future__ import annotations

import json

import numpy as np
import pytest

from secateur.envs.core import InputError
from secateur.envs.metric import TOP1, Metric
from secateur.search.config import load_config
from secateur.search.inspection import inspect
from secateur.search.report.charts import PEAK, anytime, limits
from secateur.search.report.data import ANY, FRONT, OUTSIDE, WITHIN, read_run
from secateur.search.report.finalist_charts import latency, steps
from secateur.search.report.front_chart import FrontData
from secateur.search.report.steps import interval
from secateur.search.results.document import read_front
from secateur.search.run.folder import load_manifest
from secateur.search.run.journal import read_journal, trials_table
from secateur.search.run.network import NETWORK, read_network


def test_every_trial_has_its_score_costs_and_status(run, data):
    table, document = trials_table(read_journal(run)), read_front(run)
    assert list(data.trials) == list(table.index)
    for number, trial in data.trials.items():
        row = table.loc[number]
        assert trial.values == {name: row[name] for name in trial.values} and {"top1", "macs", "weight_bytes"} <= set(
            trial.values
        )
        for name, budget in document["budgets"].items():
            kept = all(row[cost] <= limit for cost, limit in budget["limits"].items())
            front = number in budget["front"]
            assert trial.status[name] == (FRONT if front else WITHIN if kept else OUTSIDE)
    assert any(trial.status["watch"] == OUTSIDE and trial.status[ANY] != OUTSIDE for trial in data.trials.values())


def test_a_two_dimensional_front_dominates_all_other_trials_within_the_budget(data):
    line = data.front_lines("macs", "top1", "phone")
    costs, scores = ([trial.values[name] for trial in line] for name in ("macs", "top1"))
    assert costs == sorted(costs) and scores == sorted(scores) and len(set(costs)) == len(costs)
    for trial in data.trials.values():
        if trial.status["phone"] != OUTSIDE:
            assert any(c <= trial.values["macs"] and s >= trial.values["top1"] for c, s in zip(costs, scores, strict=True))


def test_improvements_are_the_running_best(data):
    found, best = data.improvements("watch"), -1.0
    expected = []
    for number, trial in data.trials.items():
        if trial.status["watch"] != OUTSIDE and trial.values["top1"] > best:
            best = trial.values["top1"]
            expected.append(number)
    assert [trial.number for trial in found] == expected
    rows = [row for row in anytime([data]).rows["best"] if row["budget"] == "watch"]
    assert rows[-1]["evaluation"] == max(data.trials) and rows[-1]["score"] == pytest.approx(100 * best)


def test_the_network_is_read_as_it_was_traced(run):
    written, config = read_network(run), load_manifest(run)[0]
    traced = inspect(config).graph
    assert written.geometry.layers == traced.geometry.layers and written.frozen == traced.frozen
    for name in ("in_per_unit", "out_per_unit", "buffer_per_unit", "live", "in_fixed", "out_fixed", "buffer_fixed", "step_layer"):
        np.testing.assert_array_equal(getattr(written.geometry, name), getattr(traced.geometry, name), err_msg=name)
    assert written.geometry.buffer_readers == traced.geometry.buffer_readers


def test_layers_of_a_policy_add_up_to_its_costs(data):
    view = data.layers
    for trial in list(data.trials.values())[:4]:
        levels = view.levels(trial.choices)
        shapes = view.shapes([levels])
        for name, model in view.costs.items():
            assert model.total(shapes)[0] == pytest.approx(trial.values[name], rel=1e-6), name
        rows = view.rows(levels, ["macs", "weight_bytes"])
        assert sum(row.shares["macs"] for row in rows) == pytest.approx(1, abs=1e-6)
        for row in rows:
            if (ratio := trial.choices.get(f"prune_ratio/{row.layer}")) is not None:
                assert row.channels == pytest.approx((1 - ratio) * row.dense_channels, abs=0.01)
            if (bits := trial.choices.get(f"weight_bits/{row.layer}")) is not None:
                assert row.weight_bits == bits


def test_a_sensitivity_is_that_of_the_chosen_levels(run, data):
    view, curves = data.layers, json.loads((run / "sensitivities.json").read_text())["curves"]
    strongest = view.rows(view.space.strongest.tolist(), [])
    for row in strongest:
        own = [curve[-1] for name, curve in curves.items() if name.partition("/")[2].partition("#")[0] == row.layer]
        assert row.sensitivity == pytest.approx(sum(own), rel=1e-5)
    weakest = view.rows(view.space.weakest.tolist(), [])
    assert sum(row.sensitivity for row in weakest) < sum(row.sensitivity for row in strongest)


def test_limits_show_how_much_the_winner_uses(data):
    rows = limits(data).rows["limits"]
    for name, budget in data.budgets.items():
        for cost, limit in budget.limits.items():
            own = [row for row in rows if row["limit"] == f"{name}: {cost.replace('_', ' ')}"]
            assert own[-1]["end"] == pytest.approx(data.winner(name).values[cost] / limit)
            assert cost == PEAK or own[0]["share"] >= own[1]["share"]


def test_what_is_never_pruned_has_a_reason(data):
    reasons = {one.layer: one.reason for one in data.layers.unpruned()}
    (output,) = [reason for reason in reasons.values() if reason == "model output"]
    assert all(reasons.values())


def test_steps_go_from_the_search_to_the_export_of_the_trained_network(run, data):
    final = read_front(run)["final"]["points"][0]
    own = [step for step in data.steps if (step.budget, step.evaluation) == (final["budget"], final["evaluation"])]
    scores = {(step.step, step.split): step.score for step in own}
    assert scores[("search", "validation")] == data.trials[final["evaluation"]].values["top1"]
    assert scores[("repair", "test")] == final["score"] and scores[("repair", "validation")] == final["validation_score"]
    assert scores[("export", "test")] == 0.5 and scores[("export of trained", "test")] == 0.625
    assert scores[("epoch 1", "validation")] == 0.25 and scores[("epoch 2", "validation")] == 0.5
    assert scores[("trained", "test")] == 0.5625
    order = steps(data).spec["spec"]["layer"][0]["encoding"]["x"]["sort"]
    assert order == ["search", "repair", "export", "epoch 1", "epoch 2", "trained", "export of trained"]
    assert all(step.low <= step.score <= step.high for step in data.steps)


def test_latencies_are_those_of_the_verifications(data):
    rows = latency(data).rows["latency"]
    assert [(row["predicted"], row["measured"], row["measured_here"]) for row in rows] == [(0.5, 0.75, False)] * 2


@pytest.mark.parametrize(("score", "samples", "low", "high"), [(0.5, 100, 0.4038, 0.5962), (1.0, 10, 0.7225, 1.0)])
def test_intervals_are_wilsons(score, samples, low, high):
    """Reference values of Wilson's score interval at 95 %."""
    assert interval(TOP1, score, samples) == pytest.approx((low, high), abs=1e-4)


def test_metrics_that_are_no_shares_have_no_interval():
    assert interval(Metric("psnr", unit="dB"), 0.5, 100) == (None, None)


def test_runs_are_compared_in_the_quantities_that_both_have(run, other_run, data):
    front = FrontData([data, read_run(other_run, "second")])
    rows = front.trials()
    assert {row["run"] for row in rows} == {"first", "second"} and len(rows) == len({row["key"] for row in rows})
    assert front.budgets == [ANY, "phone", "watch"]
    assert len([box for box in front.boxes() if box["budget"] == "phone"]) == 1  # the same limits are drawn once
    assert [mark["label"] for mark in front.marks() if mark["what"] == "dense model"] == ["dense"]


def test_runs_with_different_scores_are_refused(run, copy):
    document = json.loads((copy / "front.json").read_text())
    document["search"]["metric"]["name"] = "miou"
    (copy / "front.json").write_text(json.dumps(document))
    first, second = read_run(run, "first"), read_run(copy, "second")
    with pytest.raises(InputError, match="different scores"):
        _ = FrontData([first, second]).quantities


def test_a_run_of_an_earlier_version_has_no_layers(copy):
    (copy / NETWORK).unlink()
    found = read_run(copy, "old")
    assert found.layers is None and limits(found).rows["limits"] == [] and found.trials


@pytest.mark.parametrize(
    "damage", ["{", '{"schema": 2}', '{"schema": 2, "layers": 3, "groups": [], "frozen": [], "geometry": {}}']
)
def test_a_damaged_network_is_an_error_that_names_the_file(copy, damage):
    (copy / NETWORK).write_text(damage)
    with pytest.raises(InputError, match=NETWORK):
        read_run(copy, "damaged")


def test_files_that_do_not_fit_together_are_an_error(copy):
    document = json.loads((copy / NETWORK).read_text())
    document["groups"] = [{**group, "name": f"other.{group['name']}"} for group in document["groups"]]
    (copy / NETWORK).write_text(json.dumps(document))
    (copy / "sensitivities.json").unlink()
    with pytest.raises(InputError, match="do not fit together.*other"):
        read_run(copy, "other")


def test_the_configuration_in_the_report_repeats_the_search(data, tmp_path):
    from secateur.search.report.origin import configuration

    (tmp_path / "config.yaml").write_text(configuration(data))
    (tmp_path / "device.json").write_bytes((data.folder / "device.json").read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert load_config("config.yaml") == data.config
