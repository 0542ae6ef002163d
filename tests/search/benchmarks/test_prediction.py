"""How well scores before fine-tuning predict those after it: an experiment that is continued where it was stopped."""

import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest

from secateur.cost_models.core import InputError
from secateur.envs.training.fine_tuning import FineTuning
from secateur.search.benchmarks import prediction as measure
from secateur.search.benchmarks import processes as pools
from secateur.search.benchmarks.policies import random_policies
from secateur.search.benchmarks.recovery_settings import RECOVERY_SETTINGS, with_recoveries
from tests.scoring import top1


@pytest.fixture(scope="module")
def experiment(problem, settings):
    tuning = FineTuning(batch_size=32, shift=0, flip=False)
    return measure.Experiment(problem, measure.training_images(settings()), "none", tuning)


@pytest.fixture(scope="module")
def policies(problem):
    return random_policies(problem, problem.budgets[0], 3)


@pytest.fixture
def outcomes(monkeypatch):
    """The policies whose outcomes are asked for; the outcomes are made up."""
    asked = []

    def outcome(experiment, policy):
        asked.append(policy)
        return {"validation_top1": {"none": 0.5}, "tuned_top1": 0.75}

    monkeypatch.setattr(measure, "outcome", outcome)
    return asked


@pytest.mark.parametrize("processes", [0, 2])
def test_an_experiment_is_continued_where_it_was_stopped(experiment, policies, outcomes, processes, tmp_path, monkeypatch):
    monkeypatch.setattr(pools, "ProcessPoolExecutor", lambda count, context, **rest: ThreadPoolExecutor(count, **rest))
    budget, file = experiment.problem.budgets[0], tmp_path / "policies.jsonl"
    records = measure.open_records(file, experiment, budget)
    list(measure.measure_prediction(experiment, policies[1:2], records, processes))
    records = measure.open_records(file, experiment, budget)
    lines = list(measure.measure_prediction(experiment, policies, records, processes))
    assert outcomes[0] == policies[1] and set(outcomes[1:]) == {policies[0], policies[2]} and len(outcomes) == 3
    assert sorted(lines) == [f"policy {i}: 75.00 % after fine-tuning; before: none 50.00" for i in (0, 2)]
    assert {tuple(row["widths"]) for row in records.rows} == {policy.widths for policy in policies}


def test_another_experiment_is_refused(experiment, tmp_path):
    measure.open_records(tmp_path / "policies.jsonl", experiment, experiment.problem.budgets[0])
    with pytest.raises(InputError, match='`budget` is "half" there, "third" here'):
        measure.open_records(tmp_path / "policies.jsonl", experiment, experiment.problem.budgets[1])


def test_an_outcome_has_the_scores_before_and_after_fine_tuning(experiment, policies, two_settings, monkeypatch):
    problem, trained = experiment.problem, []

    def fine_tune(network, data, tuning):
        trained.append((data.train, tuning))
        return network

    monkeypatch.setattr(measure, "fine_tune", fine_tune)
    found = measure.outcome(experiment, policies[0])
    networks = {name: with_recoveries(problem.assembler, names).assemble(policies[0]) for name, names in two_settings.items()}
    validation, test = (problem.task.data.tensors(split) for split in (problem.task.data.validation, problem.task.data.test))
    expected = {name: pytest.approx(top1(network, *validation), abs=0.011) for name, network in networks.items()}
    assert found["validation_top1"] == expected, "folded batch norms may flip a close decision"
    assert found["tuned_top1"] == top1(networks[experiment.start], *test)
    assert trained == [(experiment.train, experiment.tuning)]
    assert found["macs"] == problem.space.costs.of_policy(policies[0])["macs"] / problem.space.dense_costs["macs"] <= 0.5


def test_a_pickled_experiment_has_the_same_outcome(experiment, policies, two_settings):
    assert experiment.problem.task.data.train is None, "the training images are sent once"
    here, there = (measure.outcome(one, policies[0]) for one in (experiment, pickle.loads(pickle.dumps(experiment))))
    assert all(here[name] == there[name] for name in ("macs", "validation_top1", "tuned_top1"))


@pytest.mark.slow
def test_a_process_finds_what_this_one_finds(experiment, policies, tmp_path):
    records = measure.open_records(tmp_path / "policies.jsonl", experiment, experiment.problem.budgets[0])
    list(measure.measure_prediction(experiment, policies[:1], records, 1))
    here, there = measure.outcome(experiment, policies[0]), records.find(policy=0)
    assert there["tuned_top1"] == pytest.approx(here["tuned_top1"], abs=0.02)  # threads sum in another order
    assert there["validation_top1"]["none"] == pytest.approx(here["validation_top1"]["none"], abs=0.011)


def test_the_report_counts_policies_and_shows_what_each_setting_would_have_chosen(experiment):
    def row(index):
        scores = {setting: 0.5 + index / 100 for setting in RECOVERY_SETTINGS} | {"none": 0.1}
        return {"validation_top1": scores, "seconds": dict.fromkeys(scores, 0.5), "tuned_top1": 0.8 + index / 100,
                "tuning_seconds": 3.0}  # fmt: skip

    budget = experiment.problem.budgets[0]
    report = measure.prediction_report(experiment, budget, [row(index) for index in range(8)]).splitlines()
    assert report[2] == "| none | 10.00 (10.00 to 10.00) | 0.50 | - | - | 80.00 |"
    assert report[4] == "| least_squares | 53.50 (50.00 to 57.00) | 0.50 | 1.00 | 1.00 to 1.00 | 87.00 |"
    assert any("8 random policies" in line for line in report) and any("256 training images" in line for line in report)
    few = measure.prediction_report(experiment, budget, [row(index) for index in range(2)]).splitlines()
    assert "| - | - | 81.00 |" in few[4]


def test_an_unknown_start_is_refused():
    with pytest.raises(InputError, match="no recovery setting `magic`.*another `start`: none"):
        measure.check_start("magic")


def test_all_images_are_for_training_where_the_configuration_names_no_number(settings):
    everything = settings(data={"name": "synthetic", "validation": 200})
    assert len(measure.training_images(everything)) == 1024
