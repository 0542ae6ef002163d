"""The integer program reaches the optimum that trying all policies finds, where greedy does not."""

import numpy as np
import pytest

from secateur.agents.allocation import LevelProblem, level_harms
from secateur.agents.greedy import allocate
from secateur.agents.integer_program import IntegerProgram, IntegerProgramConfig, solve_program
from secateur.envs.core import InputError
from tests.agents.problems import additive_space, harm_of, least_harm, pruned_and_quantized_space, share_budget


def solution(space, budget, power=1.0, **options):
    config = IntegerProgramConfig(powers=(power,), gap=0.0, **options)
    (actor,) = IntegerProgram(config, space, [budget], np.random.default_rng(0)).ask(5)
    return actor.sequence


@pytest.mark.parametrize("limits", [{"cost0": 0.55}, {"cost0": 0.55, "cost1": 0.5}])
@pytest.mark.parametrize("power", [0.5, 1.0])
def test_optimal_where_costs_are_additive(limits, power):
    greedy_misses = 0
    for seed in range(8):
        space = additive_space(seed, len(limits))
        budget = share_budget(space, **limits)
        best = least_harm(space, budget, power)
        assert harm_of(space, solution(space, budget, power, rounds=1), power) == pytest.approx(best)
        greedy_misses += harm_of(space, allocate(space, space.sensitivities, budget, power), power) > best + 1e-6
    assert greedy_misses >= 2


@pytest.mark.parametrize("shares", [{"macs": 0.5}, {"macs": 0.2}, {"macs": 0.4, "weight_bytes": 0.1}])
def test_nearly_optimal_where_costs_are_not_additive(shares):
    for seed in range(3):
        space = pruned_and_quantized_space(seed)
        budget = share_budget(space, **shares)
        best, found = least_harm(space, budget), harm_of(space, solution(space, budget))
        greedy = harm_of(space, allocate(space, space.sensitivities, budget, 1.0))
        assert found <= greedy + 1e-9
        assert found - best <= 0.05 * best


def test_later_rounds_correct_costs_that_are_not_additive():
    gains = []
    for seed in range(4):
        space = pruned_and_quantized_space(seed)
        problem, harms = LevelProblem(space, share_budget(space, macs=0.3)), level_harms(space, space.sensitivities, 1.0)
        dense_like = problem.levels(problem.executed(problem.last))  # far from the solution
        totals = [harms[np.arange(len(harms)), problem.solve(harms, solve_program, dense_like, n)].sum() for n in (1, 4)]
        assert totals[1] <= totals[0] + 1e-12
        gains.append(totals[0] - totals[1])
    assert max(gains) > 0


def test_levels_that_must_not_be_chosen_are_not():
    harms = np.array([[3.0, 0.0, np.inf], [np.inf, 1.0, 0.5]])
    costs = np.array([[[0.0, -1.0, -2.0], [0.0, 0.0, 1.0]]])
    assert solve_program(harms, costs, np.array([0.0])).tolist() == [1, 2]
    assert solve_program(harms, costs, np.array([-1.0])).tolist() == [1, 1]
    assert solve_program(harms, costs, np.array([-1.5])) is None


def test_a_loose_budget_compresses_nothing(toy):
    assert not solution(toy, share_budget(toy, cost=1.0)).any()


def test_needs_sensitivities(toy, monkeypatch):
    monkeypatch.setattr(toy, "sensitivities", None)
    with pytest.raises(ValueError, match="The integer program needs a space whose sensitivities have been measured"):
        IntegerProgram(IntegerProgramConfig(), toy, toy.budgets, np.random.default_rng(0))


def test_powers_must_be_given():
    with pytest.raises(InputError, match="`powers` of the integer program must be"):
        IntegerProgramConfig(powers=())
