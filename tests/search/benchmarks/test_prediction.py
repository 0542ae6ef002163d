"""What the reward predicts: rank correlations, and an experiment that goes on where it was stopped."""

import numpy as np
import pytest

from secateur.cost_models.core import InputError
from secateur.envs.evaluator import top1
from secateur.envs.tasks.training import FineTuning
from secateur.search.benchmarks import prediction as measure
from secateur.search.benchmarks.importances import choose_budget
from secateur.search.benchmarks.recovered import with_recoveries


@pytest.fixture
def few_grades(monkeypatch):
    monkeypatch.setattr(measure, "GRADES", {name: measure.GRADES[name] for name in ("none", "least_squares")})


@pytest.fixture
def experiment(problem, settings):
    tuning = FineTuning(batch_size=32, shift=0, flip=False)
    return measure.Experiment(problem, measure.training_images(settings()), "none", tuning)


@pytest.fixture
def budget(problem):
    return choose_budget(problem, "half")


def test_spearman_and_its_interval():
    values = [0.3, 0.1, 0.2, 0.9, 0.5]
    assert measure.spearman(values, np.exp(values)) == pytest.approx(1)
    assert measure.spearman(values, [-v for v in values]) == pytest.approx(-1)
    # Textbook formula 1 - 6 sum d^2 / (n (n^2 - 1)) without ties; ranks 3 1 2 5 4 against 1 2 3 4 5.
    assert measure.spearman(values, [1, 2, 3, 4, 5]) == pytest.approx(1 - 6 * (4 + 1 + 1 + 1 + 1) / (5 * 24))
    # Ties share their mean rank: 1.5 1.5 3 against 1 2 3.
    assert measure.spearman([7, 7, 8], [1, 2, 3]) == pytest.approx(1.5 / np.sqrt(1.5 * 2))
    assert np.isnan(measure.spearman([1, 1, 1], [1, 2, 3]))
    low, high = measure.interval(0.8, 30)
    assert (low, high) == pytest.approx((0.582, 0.911), abs=1e-3)  # tanh(artanh 0.8 -+ 1.96 sqrt(1.32 / 27))
    assert measure.interval(1.0, 30) == pytest.approx((1, 1), abs=1e-4)


def test_the_interval_holds_the_true_correlation_in_95_of_100_samples():
    rng, true, inside = np.random.default_rng(0), 0.8, 0
    pearson = 2 * np.sin(np.pi * true / 6)  # of normal pairs whose rank correlation is `true`
    for pairs in rng.multivariate_normal([0, 0], [[1, pearson], [pearson, 1]], size=(1000, 30)):
        low, high = measure.interval(measure.spearman(*pairs.T), 30)
        inside += low <= true <= high
    assert 0.92 < inside / 1000 < 0.975


def test_policies_are_feasible_distinct_and_do_not_depend_on_their_number(problem, budget):
    policies = measure.random_policies(problem, budget, 6)
    assert measure.random_policies(problem, budget, 3) == policies[:3] and len(set(policies)) == 6
    assert all(problem.space.costs.of_policy(policy)["macs"] <= budget.limits["macs"] for policy in policies)


def test_an_experiment_goes_on_where_it_was_stopped(experiment, budget, few_grades, tmp_path, lines, monkeypatch):
    policies = measure.random_policies(experiment.problem, budget, 3)
    file = tmp_path / "policies.jsonl"
    records = measure.open_records(file, experiment, budget)
    measure.measure_prediction(experiment, policies[1:2], records, 0, lines.append)
    asked = []
    original = measure.outcome
    monkeypatch.setattr(measure, "outcome", lambda *arguments: asked.append(arguments[1]) or original(*arguments))
    records = measure.open_records(file, experiment, budget)
    measure.measure_prediction(experiment, policies, records, 0, lines.append)
    assert asked == [policies[0], policies[2]] and len(lines) == 3
    assert {tuple(row["widths"]) for row in records.rows} == {policy.widths for policy in policies}


def test_scores_before_and_after_training(experiment, budget, few_grades):
    problem = experiment.problem
    (policy,) = measure.random_policies(problem, budget, 1)
    found = measure.outcome(experiment, policy)
    for grade, names in measure.GRADES.items():
        network = with_recoveries(problem.assembler, names).assemble(policy)
        score = top1(network, *problem.data.tensors(problem.data.validation))
        assert found["validation_top1"][grade] == pytest.approx(score, abs=0.006)  # folded batch norms flip a draw
    plain = with_recoveries(problem.assembler, ()).assemble(policy)
    before = top1(plain, *problem.data.tensors(problem.data.test))
    assert before < found["tuned_top1"] and 0.4 < found["macs"] <= 0.5
    assert problem.data.train is None, "the problem that travels to the workers holds no training images"


def test_a_process_finds_what_this_one_finds(experiment, budget, few_grades, tmp_path, lines):
    (policy,) = measure.random_policies(experiment.problem, budget, 1)
    records = measure.open_records(tmp_path / "policies.jsonl", experiment, budget)
    measure.measure_prediction(experiment, [policy], records, 1, lines.append)
    here, there = measure.outcome(experiment, policy), records.find(policy=0)
    assert there["tuned_top1"] == pytest.approx(here["tuned_top1"], abs=0.01)  # threads sum in another order
    assert there["validation_top1"]["none"] == pytest.approx(here["validation_top1"]["none"], abs=0.006)


def test_the_report_counts_policies_and_shows_what_each_grade_would_have_chosen(experiment, budget):
    def row(index):
        scores = {grade: 0.5 + index / 100 for grade in measure.GRADES} | {"none": 0.1}
        return {"validation_top1": scores, "seconds": dict.fromkeys(measure.GRADES, 0.5), "tuned_top1": 0.8 + index / 100,
                "tuning_seconds": 3.0}  # fmt: skip

    report = measure.prediction_report(experiment, budget, [row(index) for index in range(8)]).splitlines()
    assert report[2] == "| none | 10.00 (10.00 to 10.00) | 0.50 | - | - | 80.00 |"
    assert report[4] == "| least_squares | 53.50 (50.00 to 57.00) | 0.50 | 1.00 | 1.00 to 1.00 | 87.00 |"
    assert any("8 random policies" in line for line in report) and any("256 training images" in line for line in report)
    few = measure.prediction_report(experiment, budget, [row(index) for index in range(2)]).splitlines()
    assert "| - | - | 81.00 |" in few[4]


def test_what_cannot_be_measured_is_refused(settings):
    with pytest.raises(InputError, match="no recovery `magic`.*--start: none"):
        measure.check_start("magic")
    assert len(measure.training_images(settings())) == 256
    everything = settings(data={"name": "secateur.envs.tasks.synthetic:load", "validation": 200})
    assert len(measure.training_images(everything)) == 1024
