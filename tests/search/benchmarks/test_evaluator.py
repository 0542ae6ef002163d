"""The benchmark of the evaluator measures what a search runs, and the straightforward way finds the same scores."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from secateur.envs.pruning.slicing import slice_model
from secateur.envs.recovery import RECOVERIES
from secateur.search.benchmarks import evaluator as measure
from secateur.search.build import make_env, open_runner


def assembler_with(problem, *names):
    recoveries = [RECOVERIES[name][1](RECOVERIES[name][0]()) for name in names]
    return replace(problem, assembler=replace(problem.assembler, recoveries=recoveries))


@pytest.fixture
def policies(problem):
    return [problem.space.decode(table) for table in measure.random_sequences(problem, 3)]


def test_parts_are_those_of_an_evaluation(problem, policies):
    problem, done = assembler_with(problem, "least_squares", "batch_norm"), []
    times = measure.measure_evaluations(problem, policies, None, done.append)
    evaluator = make_env(problem).evaluator
    assert done == [1, 2, 3]
    for policy, measured in zip(policies, times, strict=True):
        assert list(measured.parts) == [
            "slice",
            "quantized inputs",
            "least_squares",
            "quantized weights",
            "batch_norm",
            "fold and convert",
            "forward",
        ]
        assert measured.seconds == pytest.approx(sum(measured.parts.values())) and not measured.straightforward
        assert measured.top1 == evaluator.evaluate(policy).top1
    assert "pip install 'secateur[test]'" in measure.speed_table(times)


def test_the_straightforward_way_finds_the_same(problem, policies):
    pruning = pytest.importorskip("torch_pruning")
    problem = assembler_with(problem, "least_squares")
    assembler = problem.assembler
    image = problem.data.tensors(problem.data.validation)[0][:1]
    for policy in policies:
        theirs = measure.pruned_network(assembler, policy, image, pruning).state_dict()
        ours = slice_model(assembler.model, assembler.graph, assembler.kept(policy)).state_dict()
        assert all(np.array_equal(theirs[name], tensor) for name, tensor in ours.items())
    times = measure.measure_evaluations(problem, policies, pruning, lambda done: None)
    for measured in times:
        assert set(measured.straightforward) == {measure.STRAIGHTFORWARD_BATCH, problem.dense.images}
        assert min(measured.straightforward.values()) > 0
        assert measured.top1 == pytest.approx(measured.straightforward_top1, abs=0.011)
    assert "straightforward way" in measure.speed_table(times)


def test_medians_and_ratios_are_taken_policy_by_policy():
    times = [
        measure.EvaluationTimes({"slice": 0.1, "forward": 0.9}, 0.8, 0.5, 0.25, {128: 8.0}, 0.79),
        measure.EvaluationTimes({"slice": 0.2, "forward": 1.8}, 0.7, 1.6, 0.5, {128: 8.0}, 0.70),
        measure.EvaluationTimes({"slice": 0.3, "forward": 2.7}, 0.6, 2.0, 0.9, {128: 9.0}, 0.61),
    ]
    table = measure.speed_table(times)
    assert "| slice | 200.0 | 10.0 % |" in table and "| evaluation | 2,000.0 | 0.50 evaluations/s |" in table
    assert "1.500 times as long" in table and "| its arithmetic alone | 500.0 | 25 % of the evaluation |" in table
    assert "| straightforward way, 128 images at a time | 8,000.0 | the evaluation is 4.0 times as fast |" in table
    assert "+0.00 points on average, -1.00 to +1.00" in table


def test_arithmetic_is_rated_in_the_number_format():
    assert 0 < measure.seconds_per_mac(torch.float32) < 1e-6


def test_a_runner_evaluates_every_policy_once(problem):
    runner = open_runner(problem)
    tables = measure.random_sequences(problem, 4)
    assert measure.evaluations_per_second(runner, problem, tables) > 0
    assert set(runner._env.evaluator.cache) == {problem.space.decode(table) for table in tables}
