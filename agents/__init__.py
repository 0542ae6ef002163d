"""Search algorithms; a new agent is one file and one line in `AGENTS`."""

from __future__ import annotations

from collections.abc import Callable

from agents.bee_colony import BeeColony, BeeColonyConfig
from agents.clr_rnf import ClrRnf, ClrRnfConfig
from agents.core import Agent
from agents.envelope_ddpg import EnvelopeDdpgConfig, make_envelope_ddpg
from agents.greedy import Greedy, GreedyConfig
from agents.nsga2 import Nsga2, Nsga2Config
from agents.random_search import RandomConfig, RandomSearch
from agents.uniform import Uniform, UniformConfig

AGENTS: dict[str, tuple[type, Callable[..., Agent]]] = {
    "random": (RandomConfig, RandomSearch),
    "uniform": (UniformConfig, Uniform),
    "clr_rnf": (ClrRnfConfig, ClrRnf),
    "greedy": (GreedyConfig, Greedy),
    "bee_colony": (BeeColonyConfig, BeeColony),
    "nsga2": (Nsga2Config, Nsga2),
    "envelope_ddpg": (EnvelopeDdpgConfig, make_envelope_ddpg),
}
"""Every agent by name, with its configuration and what makes it."""
