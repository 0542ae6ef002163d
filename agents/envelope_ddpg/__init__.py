"""Envelope DDPG: actor and critics take the preference and the budget as inputs, so one run serves all of its budgets.

Only the modules below import torch, so this package is as cheap to import as the other agents.

config.py       options and switches
networks.py     actor and critics, batched over the ensemble
targets.py      the envelope operator on vectors
additive.py     predicts scores from few episodes
replay.py       finished episodes, training budgets, and planned transitions
planning.py     targets of stored transitions, from simulated completions
learner.py      from episodes to targets to gradient steps
candidates.py   the sequences among which the critics choose
agent.py        chooses what is evaluated; start reading here
storage.py      the stored state, without pickles
"""

from __future__ import annotations

from secateur.agents.envelope_ddpg.config import EnvelopeDdpgConfig

__all__ = ["EnvelopeDdpgConfig"]
