"""From a configuration to scores: the problem and its evaluator, on the synthetic task."""

from __future__ import annotations

import copy
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from secateur.cost_models.core import InputError
from secateur.envs import evaluator as evaluator_module
from secateur.envs.assembler import Assembler
from secateur.envs.evaluator import Evaluator, Precision, choose_precision, processor_has_bfloat16
from secateur.envs.model_graph import analyze
from secateur.envs.pruning.slicing import masked_model, slice_model
from secateur.envs.rollout import rollout
from secateur.envs.scores.metric import MetricScore, MetricScoreConfig
from secateur.envs.tasks.data import Split
from secateur.search.build import build_agent, build_problem, feasibility_table, make_env, prepare
from secateur.search.config import parse_config
from tests.scoring import classification

VALUES = {
    "model": {"factory": "secateur:synthetic", "weights": "trained", "input": [3, 8, 8]},
    "data": {"name": "synthetic", "train": "rest", "calibration": 64, "validation": 200},
    "search": {"agent": "random", "evaluations": 6, "workers": 0},
    "space": {"prune_ratio": [0.0, 0.75], "weight_bits": [4, 8], "activation_bits": [8]},
    "recovery": ["least_squares", "batch_norm"],
    "budgets": {"small": {"macs": "<= 50%"}, "tiny": {"macs": "<= 30%", "weight_bytes": "<= 10%", "top1_drop": "<= 60"}},
}


def build(**changes):
    return build_problem(parse_config({**VALUES, **changes}, "test.yaml"))


@pytest.fixture(scope="module")
def problem():
    return build()


@pytest.fixture
def policies(problem):
    """Ten policies of the first budget."""
    rng, space = np.random.default_rng(0), problem.space
    return [space.decode(space.scale_to_budget(rng.uniform(size=space.used.shape), problem.budgets[0])) for _ in range(10)]


class Infinite(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(8, 6)

    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3))) * float("inf")


def test_a_dense_network_without_finite_outputs_is_refused(monkeypatch):
    monkeypatch.syspath_prepend(__file__.rsplit("/", 1)[0])
    with pytest.raises(InputError, match="outputs for 200 of 200 samples before any compression"):
        build(model={"factory": "test_build:Infinite", "input": [3, 8, 8]})


def test_limits_are_absolute_and_drops_are_fractions(problem):
    small, tiny = problem.budgets
    assert small.limits == {"macs": pytest.approx(0.5 * problem.dense.costs["macs"])} and small.metric_drop is None
    assert tiny.limits["weight_bytes"] == pytest.approx(0.1 * problem.dense.costs["weight_bytes"])
    assert tiny.metric_drop == pytest.approx(0.6)
    assert problem.space.objectives == ("top1", "macs", "weight_bytes")


@pytest.mark.numerics
def test_dense_costs_are_those_of_the_model(problem):
    parameters = sum(p.numel() for p in problem.assembler.model.parameters())
    assert problem.dense.costs["weight_bytes"] == 4 * parameters
    assert problem.dense.score > 0.9, "the task must be learnt, or nothing below means anything"


def test_reachable_is_what_the_strongest_policy_costs(problem):
    rows = feasibility_table(problem.space.projection, problem.budgets)
    assert [(row.budget, row.cost) for row in rows] == [("small", "macs"), ("tiny", "macs"), ("tiny", "weight_bytes")]
    assert all(row.satisfiable and row.least < row.limit < row.dense for row in rows)


def test_an_impossible_budget_ends_the_build():
    with pytest.raises(InputError, match=r"Budget 'x' cannot be met: it needs at least \d.*% of the dense macs"):
        build(budgets={"x": {"macs": "<= 1%"}})


def test_a_model_with_other_classes_than_the_data_is_refused():
    model = {"factory": "secateur:resnet20", "input": [3, 8, 8]}
    with pytest.raises(InputError, match="10 outputs, but the data has 6 classes"):
        build(model=model)


@pytest.mark.numerics
def test_evaluator_scores_what_the_assembled_network_scores(problem, policies):
    images, labels = problem.task.data.tensors(problem.task.data.validation)
    precision = Precision("float32", "test")
    evaluator = Evaluator(problem.assembler, problem.space.costs.of_policy, problem.score, precision)
    for policy in policies[:4]:
        evaluation = evaluator.evaluate(policy)
        with torch.inference_mode():
            scores, folded = problem.assembler.assemble(policy)(images), evaluator.network(policy)(images)
        torch.testing.assert_close(folded, scores, rtol=1e-3, atol=1e-3)
        expected = float((scores.argmax(1) == labels).float().mean())
        # Rounding decides only for images whose two best classes have equal scores.
        ties = float((scores.topk(2).values.diff().abs() < 3e-3).float().mean())
        assert abs(evaluation.score - expected) <= ties + 1e-6
        assert evaluation.images == len(labels) and evaluation.fidelity == "proxy"


def test_no_policy_is_evaluated_twice(problem, policies, monkeypatch):
    calls, original = [], Assembler.assemble
    monkeypatch.setattr(Assembler, "assemble", lambda self, policy: calls.append(policy) or original(self, policy))
    evaluator = make_env(problem).evaluator
    first = evaluator.evaluate(policies[0])
    assert evaluator.evaluate(policies[0]) is first and len(calls) == 1


def test_candidates_leave_the_dense_model_alone(problem, policies):
    before = {name: tensor.clone() for name, tensor in problem.assembler.model.state_dict().items()}
    evaluator = make_env(problem).evaluator
    for policy in policies:
        evaluator.evaluate(policy)
    after = problem.assembler.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.numerics
def test_simulated_pruning_is_real_pruning(problem, policies):
    """The score of a pruned network is the score of the full one with the same channels silenced."""
    assembler, images = problem.assembler, problem.assembler.images
    for policy in policies:
        kept = assembler.kept(policy)
        sliced, masked = (cut(assembler.model, assembler.graph, kept)(images) for cut in (slice_model, masked_model))
        assert torch.allclose(sliced, masked, atol=1e-4)


def test_bits_and_widths_of_the_network_are_those_of_the_policy(problem, policies):
    network = problem.assembler.assemble(policies[0])
    shapes = problem.space.policy_space.geometry.shapes(*(np.array([row]) for row in vars(policies[0]).values()))
    for layer, weights in zip(shapes.geometry.layers, shapes.weights[0], strict=True):
        assert network.get_submodule(layer.name).weight.numel() == weights
    for name, (bits, _) in problem.assembler.layer_bits(policies[0]).items():
        for channel in network.get_submodule(name).weight:
            assert len(channel.unique()) <= 2**bits


class WrongInBfloat16(torch.nn.Module):
    """Answers what the images hold, except that some answers differ in bfloat16."""

    def __init__(self, moved):
        super().__init__()
        self.moved, self.weight = moved, torch.nn.Parameter(torch.zeros(1))

    def forward(self, images):
        numbers = images[:, 0, 0, 0].float().round().long()
        wrong = (numbers < self.moved) & (self.weight.dtype == torch.bfloat16)
        return torch.eye(6)[torch.where(wrong, (numbers + 1) % 6, numbers % 6)]


@pytest.mark.parametrize(("moved", "dtype"), [(0, "bfloat16"), (2, "bfloat16"), (3, "float32"), (200, "float32")])
def test_precision_is_float32_unless_bfloat16_is_harmless(moved, dtype, problem, monkeypatch):
    """`moved` of 1,000 predictions differ in bfloat16; 0.2 points are accepted. Images hold numbers that bfloat16 has."""
    numbers = torch.arange(1000)
    numbers = torch.where(numbers < 256, numbers, 256 + 6 * 8 * (numbers % 5))
    task = classification(numbers.float().view(-1, 1, 1, 1).expand(-1, 1, 8, 8), numbers % 6, 6)
    monkeypatch.setenv(evaluator_module.BFLOAT16_VARIABLE, "1")
    monkeypatch.setattr(evaluator_module, "fold_batch_norms", lambda network, graph: None)
    found = choose_precision(lambda: WrongInBfloat16(moved), problem.graph, task, 1.0)
    assert found.dtype == dtype
    assert f"moves the dense model's top-1 by {moved / 10:g} points on 1000 validation samples" in found.reason


@pytest.mark.numerics
def test_the_dense_model_runs_in_bfloat16(problem, monkeypatch):
    monkeypatch.setenv(evaluator_module.BFLOAT16_VARIABLE, "1")
    found = choose_precision(lambda: copy.deepcopy(problem.assembler.model), problem.graph, problem.task, problem.dense.score)
    assert float(re.search(r"moves the dense model's top-1 by (\S+) points", found.reason)[1]) < 5


def test_bfloat16_can_be_switched_off_and_on(problem, monkeypatch):
    given = lambda: copy.deepcopy(problem.assembler.model), problem.graph, problem.task, problem.dense.score  # noqa: E731
    monkeypatch.setenv(evaluator_module.BFLOAT16_VARIABLE, "1")
    assert processor_has_bfloat16()
    monkeypatch.setenv(evaluator_module.BFLOAT16_VARIABLE, "0")
    assert choose_precision(*given) == Precision("float32", "bfloat16 is switched off")
    monkeypatch.delenv(evaluator_module.BFLOAT16_VARIABLE)
    monkeypatch.setattr(evaluator_module, "processor_has_bfloat16", lambda: False)
    assert choose_precision(*given) == Precision("float32", "this processor has no bfloat16 arithmetic")


class WithConstant(torch.nn.Module):
    """A user's module that keeps a float32 tensor of its own: bfloat16 weights then meet float32 activations."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(8, 6)
        self.scale = [torch.full((1, 3, 1, 1), 2.0)]

    def forward(self, x):
        return self.linear(self.conv(x * self.scale[0]).mean((2, 3)))


def test_a_model_that_does_not_run_in_bfloat16_is_searched_in_float32(problem, monkeypatch):
    monkeypatch.setenv(evaluator_module.BFLOAT16_VARIABLE, "1")
    graph = analyze(WithConstant().eval(), (torch.zeros(1, 3, 8, 8),))
    found = choose_precision(lambda: WithConstant().eval(), graph, problem.task, problem.dense.score)
    assert found.dtype == "float32" and "does not run in bfloat16" in found.reason


def test_options_are_used_as_they_were_checked():
    agent = build_agent(build(), "bee_colony", {"sources": 4.0}, 0)  # 4.0 means 4; a list cannot be repeated 4.0 times
    assert len(agent.ask(4)) == 4


@pytest.mark.numerics
def test_sensitivities_are_measured_once_and_only_for_agents_that_need_them():
    problem, told = build(recovery=[], space={"prune_ratio": [0.0, 0.75]}), []
    assert prepare(problem, "bee_colony", {"sensitivity": False}, told.append) is problem
    assert prepare(problem, "envelope_ddpg", {"sensitivity": False}, told.append) is problem and not told
    prepared = prepare(problem, "greedy", {}, told.append)
    measured = prepared.space.sensitivities
    assert told[-1].startswith("measuring the sensitivity of choice") and measured.seconds > 0
    assert prepare(prepared, "envelope_ddpg", {}).space.sensitivities is measured
    assert problem.space.sensitivities is None
    strongest = measured(np.ones(len(problem.space.level_actions)))
    assert (strongest >= 0).all() and strongest.max() > 0.01


@pytest.mark.numerics
def test_greedy_compresses_what_changes_nothing(problem, tmp_path):
    """The residual branch adds zero, so it can be pruned for nothing; the labels are what the dense network predicts."""
    model = copy.deepcopy(problem.assembler.model)
    for parameter in (model.bn3.weight, model.bn3.bias):
        torch.nn.init.zeros_(parameter)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    constructed = build(
        model={**VALUES["model"], "weights": str(tmp_path / "weights.pth")},
        recovery=[],
        space={"prune_ratio": [0.0, 0.75]},
        budgets={"small": {"macs": "<= 60%"}},
    )
    images = constructed.task.data.validation.images
    with torch.inference_mode():
        labels = model(constructed.task.data.tensors(constructed.task.data.validation)[0]).argmax(1).numpy()
    data = replace(constructed.task.data, validation=Split(images, labels))
    task = replace(constructed.task, data=data)
    constructed = replace(constructed, task=task, score=MetricScore(MetricScoreConfig(), task, model, 1.0))
    constructed = prepare(constructed, "greedy", {})
    env = make_env(constructed)

    def best(agent, count):
        actors = build_agent(constructed, agent, {}, 0).ask(count)
        return max(rollout(env, actor).evaluation.score for actor in actors)

    assert best("greedy", 3) >= 0.99
    assert best("uniform", 3) < 0.9


def test_one_prune_ratio_is_applied_everywhere_without_a_decision():
    problem = build(space={"prune_ratio": [0.5, 0.5], "weight_bits": [4, 8]}, budgets={"any": {"macs": "<= 100%"}})
    assert {decision.kind for decision in problem.space.policy_space.decisions} == {"weight_bits"}
    policy = problem.space.policy_space.levels_to_policy(problem.space.policy_space.weakest)
    assert policy.widths == tuple(group.units // 2 for group in problem.graph.groups)


def test_a_model_that_returns_something_else_than_scores_is_refused():
    with pytest.raises(InputError, match="one tensor of scores"):
        build(model={"factory": "torch.nn:Identity", "input": [3, 8, 8]})


def test_batches_cover_all_images_in_order():
    images = torch.arange(130.0).view(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    task = classification(images, torch.arange(130), 130)
    test = list(task.batches("test"))
    assert [len(batch.targets) for batch in test] == [64, 64, 2]
    assert torch.equal(torch.cat([batch.inputs[:, 0, 0, 0] for batch in test]), torch.arange(130.0))
    assert task.evaluate(lambda batch: torch.eye(130)[batch[:, 0, 0, 0].long()], "validation").score == 1
