"""The one-stage envelope DDPG agent; only its modules import torch, so this package stays as cheap as the other agents.

config.py     every option and switch
networks.py   actor and critics, batched over the ensemble
targets.py    the envelope operator and the losses, in vectors
additive.py   foretells scores from few episodes
replay.py     finished episodes, goals (preference and budget), and planned transitions
learner.py    from episodes to targets to gradient steps
agent.py      chooses what is evaluated; start reading here
storage.py    save and load without pickles
"""

from __future__ import annotations

from secateur.agents.envelope_ddpg.config import EnvelopeDdpgConfig

__all__ = ["EnvelopeDdpgConfig", "make_envelope_ddpg"]


def make_envelope_ddpg(config, space, budgets, rng):
    """Return an `EnvelopeDdpg`; torch is imported only now."""
    from secateur.agents.envelope_ddpg.agent import EnvelopeDdpg

    return EnvelopeDdpg(config, space, budgets, rng)
