"""Search algorithms; a new agent is one file and one line in `AGENTS`."""

from __future__ import annotations

from agents.bee_colony import BeeColony, BeeColonyConfig
from agents.clr_rnf import ClrRnf, ClrRnfConfig
from agents.random_search import RandomConfig, RandomSearch
from agents.uniform import Uniform, UniformConfig

AGENTS: dict[str, tuple[type, type]] = {
    "random": (RandomConfig, RandomSearch),
    "uniform": (UniformConfig, Uniform),
    "clr_rnf": (ClrRnfConfig, ClrRnf),
    "bee_colony": (BeeColonyConfig, BeeColony),
}
"""Every agent by name, with its configuration."""
