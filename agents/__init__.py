"""Search algorithms; a new agent is one file and one line in `AGENTS`."""

from __future__ import annotations

from collections.abc import Callable

from secateur.agents.bee_colony import BeeColony, BeeColonyConfig
from secateur.agents.clr_rnf import ClrRnf, ClrRnfConfig
from secateur.agents.core import Agent
from secateur.agents.envelope_ddpg import EnvelopeDdpgConfig, make_envelope_ddpg
from secateur.agents.greedy import Greedy, GreedyConfig
from secateur.agents.nsga2 import Nsga2, Nsga2Config
from secateur.agents.random_search import RandomConfig, RandomSearch
from secateur.agents.uniform import Uniform, UniformConfig

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
