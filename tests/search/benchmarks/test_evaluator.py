"""The benchmark of the evaluator measures what a search runs, and the straightforward way finds the same scores."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from secateur.envs.pruning.slicing import slice_model
from secateur.envs.recovery import RECOVERIES
from secateur.search.benchmarks import evaluator as measure
from secateur.search.benchmarks.policies import random_actors, random_policies
from secateur.search.benchmarks.straightforward import pruned_network
from secateur.search.build import make_env
from secateur.search.run.local_runner import LocalRunner


@pytest.fixture(autouse=True)
def small_matrix(monkeypatch):
    monkeypatch.setattr(measure, "MATRIX_SIZE", 64)


def assembler_with(problem, *names):
    recoveries = [RECOVERIES[name][1](RECOVERIES[name][0]()) for name in names]
    return replace(problem, assembler=replace(problem.assembler, recoveries=recoveries))


@pytest.fixture(scope="module")
def policies(problem):
    return random_policies(problem, problem.budgets[0], 2)


def test_parts_are_those_of_an_evaluation(problem, policies):
    problem = assembler_with(problem, "least_squares", "batch_norm")
    times = list(measure.measure_evaluations(problem, policies, None))
    evaluator = make_env(problem).evaluator
    for policy, measured in zip(policies, times, strict=True):
        parts = "slice, quantized inputs, least_squares, quantized weights, batch_norm, fold and convert, forward"
        assert ", ".join(measured.parts) == parts
        assert measured.seconds == pytest.approx(sum(measured.parts.values())) and not measured.straightforward
        assert measured.top1 == evaluator.evaluate(policy).score
    assert "pip install 'secateur[test]'" in measure.speed_table(times)


def test_the_straightforward_way_finds_the_same(problem, policies):
    pruning = pytest.importorskip("torch_pruning")
    problem = assembler_with(problem, "least_squares")
    assembler = problem.assembler
    image = problem.task.data.tensors(problem.task.data.validation)[0][:1]
    for policy in policies:
        theirs = pruned_network(assembler, policy, image, pruning).state_dict()
        ours = slice_model(assembler.model, assembler.graph, assembler.kept(policy)).state_dict()
        assert all(np.array_equal(theirs[name], tensor) for name, tensor in ours.items())
    (times,) = measure.measure_evaluations(problem, policies[:1], pruning)
    assert set(times.straightforward) == {measure.STRAIGHTFORWARD_BATCH, problem.dense.images}
    for seconds, score in times.straightforward.values():
        assert seconds > 0 and times.top1 == pytest.approx(score, abs=0.021)  # folded batch norms may flip close decisions
    assert "straightforward way" in measure.speed_table([times])


def test_medians_and_ratios_are_taken_policy_by_policy():
    times = [
        measure.EvaluationTimes({"slice": 0.1, "forward": 0.9}, 0.8, 0.5, 0.25, {128: (8.0, 0.79)}),
        measure.EvaluationTimes({"slice": 0.2, "forward": 1.8}, 0.7, 1.6, 0.5, {128: (8.0, 0.70)}),
        measure.EvaluationTimes({"slice": 0.3, "forward": 2.7}, 0.6, 2.0, 0.9, {128: (9.0, 0.61)}),
    ]
    table = measure.speed_table(times)
    assert "| slice | 200.0 | 10.0 % |" in table and "| evaluation | 2,000.0 | 0.50 evaluations/s |" in table
    assert "1.500 times as long" in table and "| its arithmetic alone | 500.0 | 25 % of the evaluation |" in table
    assert "| straightforward way, 128 images at a time | 8,000.0 | the evaluation is 4.0 times as fast |" in table
    assert "+0.00 points on average, -1.00 to +1.00" in table


def test_arithmetic_is_measured_in_the_number_format(monkeypatch):
    formats = []

    def seconds(function, first, second):
        formats.append(first.dtype)
        return 64.0**3, None

    monkeypatch.setattr(measure, "timed", seconds)
    assert measure.seconds_per_mac(torch.bfloat16, torch.device("cpu")) == 1 and set(formats) == {torch.bfloat16}


def test_a_runner_evaluates_every_policy_once(problem):
    env = make_env(problem)
    actors = random_actors(problem, problem.budgets[0], 3)
    assert measure.evaluations_per_second(LocalRunner(lambda: env), actors) > 0
    assert set(env.evaluator.cache) == {problem.space.decode(actor.sequence) for actor in actors}
