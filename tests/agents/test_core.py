"""Preferences, and the protocols of what only some agents can do."""

import numpy as np
import pytest

from secateur.agents import AGENTS, QUERYABLE
from secateur.agents.core import needs_sensitivities, simplex
from secateur.envs.core import InputError


def test_preferences_are_scaled_to_a_sum_of_one():
    assert simplex("it", None, ("top1", "cost")).tolist() == [1, 0]
    assert simplex("it", (1, 3), ("top1", "cost")).tolist() == [0.25, 0.75]
    with pytest.raises(InputError, match="one weight for each of top1, cost, but got 3"):
        simplex("it", (1, 0, 0), ("top1", "cost"))
    for wrong in ((0.0, 0.0), (-1.0, 2.0), (np.nan, 1.0), (np.inf, 1.0)):
        with pytest.raises(InputError, match="weights >= 0, not all zero"):
            simplex("it", wrong, ("top1", "cost"))


def test_agents_say_whether_they_need_sensitivities():
    needing = {name for name, (config, _) in AGENTS.items() if needs_sensitivities(config())}
    assert needing == {"bee_colony", "catcma", "envelope_ddpg", "evopress", "greedy", "integer_program", "spdy"}
    assert not needs_sensitivities(AGENTS["envelope_ddpg"][0](sensitivity=False))


def test_queryable_agents_are_registered():
    assert set(QUERYABLE) <= set(AGENTS)
