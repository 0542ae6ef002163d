"""Search algorithms. A new agent is one file and one line in `AGENTS`.

Modules that import torch are imported when their agent is made: `import secateur.agents` stays cheap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from secateur.agents.amc_ddpg_config import AmcDdpgConfig
from secateur.agents.bee_colony import BeeColony, BeeColonyConfig
from secateur.agents.catcma import CatCma, CatCmaConfig
from secateur.agents.clr_rnf import ClrRnf, ClrRnfConfig
from secateur.agents.core import Agent, Queryable
from secateur.agents.envelope_ddpg import EnvelopeDdpgConfig
from secateur.agents.evopress import EvoPress, EvoPressConfig
from secateur.agents.greedy import Greedy, GreedyConfig
from secateur.agents.integer_program import IntegerProgram, IntegerProgramConfig
from secateur.agents.nsga2 import Nsga2, Nsga2Config
from secateur.agents.optuna_samplers import OptunaConfig, OptunaSamplers
from secateur.agents.random_search import RandomConfig, RandomSearch
from secateur.agents.spdy import Spdy, SpdyConfig
from secateur.agents.uniform import Uniform, UniformConfig
from secateur.envs.core import ActionSpace, Budget

if TYPE_CHECKING:
    from secateur.agents.amc_ddpg import AmcDdpg
    from secateur.agents.envelope_ddpg.agent import EnvelopeDdpg


def make_amc_ddpg(config: AmcDdpgConfig, space: ActionSpace, budgets: Sequence[Budget], rng: np.random.Generator) -> AmcDdpg:
    """Return an `AmcDdpg`."""
    from secateur.agents.amc_ddpg import AmcDdpg

    return AmcDdpg(config, space, budgets, rng)


def make_envelope_ddpg(
    config: EnvelopeDdpgConfig, space: ActionSpace, budgets: Sequence[Budget], rng: np.random.Generator
) -> EnvelopeDdpg:
    """Return an `EnvelopeDdpg`."""
    from secateur.agents.envelope_ddpg.agent import EnvelopeDdpg

    return EnvelopeDdpg(config, space, budgets, rng)


def load_envelope_ddpg(folder: Path, space: ActionSpace) -> EnvelopeDdpg:
    """Return the `EnvelopeDdpg` that was saved in a folder.

    Raises:
        InputError: if there is none, or it belongs to another space.
    """
    from secateur.agents.envelope_ddpg.agent import EnvelopeDdpg

    return EnvelopeDdpg.load(folder, space)


AGENTS: dict[str, tuple[type, Callable[..., Agent]]] = {
    "random": (RandomConfig, RandomSearch),
    "uniform": (UniformConfig, Uniform),
    "clr_rnf": (ClrRnfConfig, ClrRnf),
    "greedy": (GreedyConfig, Greedy),
    "integer_program": (IntegerProgramConfig, IntegerProgram),
    "evopress": (EvoPressConfig, EvoPress),
    "spdy": (SpdyConfig, Spdy),
    "catcma": (CatCmaConfig, CatCma),
    "bee_colony": (BeeColonyConfig, BeeColony),
    "nsga2": (Nsga2Config, Nsga2),
    "optuna": (OptunaConfig, OptunaSamplers),
    "amc_ddpg": (AmcDdpgConfig, make_amc_ddpg),
    "envelope_ddpg": (EnvelopeDdpgConfig, make_envelope_ddpg),
}
"""Every agent by name, with its configuration and what makes it."""

QUERYABLE: dict[str, Callable[[Path, ActionSpace], Queryable]] = {"envelope_ddpg": load_envelope_ddpg}
"""Agents that leave what they have learned in the run folder and answer queries afterwards, with what loads them."""
