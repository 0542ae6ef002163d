"""Writes an agent to a folder and reads it back: JSON, safetensors and plain arrays, no pickles.

agent.json             options, goals, where it stands, what is out
networks.safetensors   actor, critics, their targets, the moments of the optimizers, planned transitions
replay.npz             finished episodes, those not yet learned from last; sensitivities
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.agents.envelope_ddpg.config import EnvelopeDdpgConfig
from secateur.agents.envelope_ddpg.replay import Memory, Outstanding
from secateur.envs.core import ActionSpace, Budget, CompressionPolicy, InputError, Sensitivities

if TYPE_CHECKING:
    from secateur.agents.envelope_ddpg.agent import EnvelopeDdpg
    from secateur.agents.envelope_ddpg.learner import Learner

STATE, NETWORKS, REPLAY = "agent.json", "networks.safetensors", "replay.npz"
SCHEMA = 4
"""Of the folder; goes up when older agents would mean something else."""

PARTS = ("critic", "actor", "target_critic", "target_actor")
OPTIMIZERS = ("critic_optimizer", "actor_optimizer")
DAMAGES = (ValueError, LookupError, TypeError, SafetensorError, OSError, RuntimeError, EOFError, BadZipFile)
"""What reading files that were cut or changed happens to raise."""


def write_agent(folder: Path, agent: EnvelopeDdpg) -> None:
    """Write everything that the agent is; the folder must not exist."""
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in _tensors(agent.learner).items()}, folder / NETWORKS)
    told = sorted(agent._told)
    memories = [*agent.learner.memories, *(memory for ticket in told if (memory := agent._told[ticket]) is not None)]
    goals = np.zeros((len(memories), len(agent.goals)), bool)
    for row, memory in zip(goals, memories, strict=True):
        row[memory.goals] = True
    shape = (0, *agent.space.used.shape)
    np.savez_compressed(
        folder / REPLAY,
        sequences=np.stack([m.sequence for m in memories]) if memories else np.empty(shape),
        rewards=np.array([m.reward for m in memories]),
        observations=np.array([m.observations for m in memories]),
        preferences=np.array([m.preference for m in memories]),
        feasible=np.array([m.feasible for m in memories], bool),
        own=np.array([m.goals[0] for m in memories], int),
        goals=goals,
        surprises=np.reshape(agent.learner.surprises, (-1, 2)),
        front=agent.archive.objectives,
        sensitivities=np.empty((0, 0)) if agent.learner.sensitivities is None else agent.learner.sensitivities.curves,
    )
    state = {
        "schema": SCHEMA,
        "agent": "envelope_ddpg",
        "config": asdict(agent.config),
        "preference": agent.preference.tolist(),
        "space": _space_facts(agent.space),
        "budgets": [asdict(budget) for budget in agent.budgets],
        "goals": [asdict(budget) for budget in agent.goals],
        "asked": agent.asked,
        "learned": agent.learned,
        "told": {ticket: agent._told[ticket] is not None for ticket in told},  # whether there is something to learn
        "out": {ticket: [h.budget, h.preference.tolist(), h.sequence.tolist()] for ticket, h in agent._out.items()},
        "rules": [[index, sequence.tolist()] for index, sequence in agent._rules],
        "known": [asdict(policy) for policy in agent._known],
        "front": [asdict(policy) for policy in agent.archive.policies],
        "rng": agent.rng.bit_generator.state,
    }
    (folder / STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")


def _tensors(learner: Learner) -> dict[str, Tensor]:
    """Return every tensor that learning changes, by name."""
    tensors = {f"{part}.{name}": tensor for part in PARTS for name, tensor in getattr(learner, part).state_dict().items()}
    for name in OPTIMIZERS:
        for index, moments in getattr(learner, name).state_dict()["state"].items():
            tensors.update({f"{name}.{index}.{key}": tensor for key, tensor in moments.items()})
    tensors.update({f"pool.{name}": column for name, column in learner.pool.columns.items()})
    return tensors


def read_agent(folder: Path, space: ActionSpace, make: type[EnvelopeDdpg]) -> EnvelopeDdpg:
    """Return the agent; see `EnvelopeDdpg.load`."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if state["schema"] != SCHEMA:
            raise InputError(
                f"{folder / STATE} has schema {state['schema']}; this version reads schema {SCHEMA}. Start "
                "another search, or ask it with the version that wrote it."
            )
        tensors = load_file(folder / NETWORKS)
        with np.load(folder / REPLAY, allow_pickle=False) as archive:
            replay = {name: archive[name] for name in archive.files}
        if state["space"] != (facts := _space_facts(space)):
            raise InputError(
                f"The agent in {folder} belongs to another problem: it knows {state['space']}, but this is {facts}. "
                "Restore the model and the configuration of its run."
            )
        return _restored(state, tensors, replay, space, make)
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{folder} holds no agent: it has no {Path(error.filename).name}.") from None
    except DAMAGES as error:
        raise InputError(f"The agent in {folder} is damaged: {type(error).__name__}: {error}") from None


def _restored(state: dict[str, Any], tensors, replay, space: ActionSpace, make: type[EnvelopeDdpg]) -> EnvelopeDdpg:
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in state["config"].items()}
    budgets = [Budget(**budget) for budget in state["budgets"]]
    agent = make(EnvelopeDdpgConfig(**options), space, budgets, np.random.default_rng(0))
    agent.goals[len(budgets) :] = [Budget(**budget) for budget in state["goals"][len(budgets) :]]
    learner = agent.learner
    learner.goals = agent.goals
    learner.sensitivities = Sensitivities(replay["sensitivities"]) if len(replay["sensitivities"]) else None
    agent.prefer(state["preference"])
    known = _memories(replay)
    told = {int(ticket): scored for ticket, scored in state["told"].items()}
    count = len(known) - sum(told.values())
    waiting = iter(known[count:])
    agent._told = {ticket: next(waiting) if scored else None for ticket, scored in told.items()}
    for memory in known[:count]:
        learner.add(memory)
    learner.surprises = list(replay["surprises"])
    _restore_tensors(learner, tensors)
    agent.archive.policies = [_policy(values) for values in state["front"]]
    agent.archive.objectives = replay["front"]
    agent._known = {_policy(values) for values in state["known"]}
    agent._rules = [(index, np.array(sequence)) for index, sequence in state["rules"]]
    agent._out = {
        int(ticket): Outstanding(index, np.array(preference), np.array(sequence))
        for ticket, (index, preference, sequence) in state["out"].items()
    }
    agent._to_repeat = sorted(agent._out.keys() - agent._told.keys())
    agent.asked, agent.learned = state["asked"], state["learned"]
    agent.rng.bit_generator.state = state["rng"]
    return agent


def _memories(replay: Mapping[str, np.ndarray]) -> list[Memory]:
    memories = []
    for i, sequence in enumerate(replay["sequences"]):
        others = np.setdiff1d(np.flatnonzero(replay["goals"][i]), replay["own"][i])
        goals = np.concatenate([replay["own"][i : i + 1], others])
        facts = (replay[name][i] for name in ("preferences", "feasible"))
        memories.append(Memory(sequence, replay["observations"][i], replay["rewards"][i], goals, *facts))
    return memories


def _restore_tensors(learner: Learner, tensors: Mapping[str, Tensor]) -> None:
    def below(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    for part in PARTS:
        getattr(learner, part).load_state_dict(below(f"{part}."))
    for name in OPTIMIZERS:
        optimizer, moments = getattr(learner, name), {}
        for key, tensor in below(f"{name}.").items():
            index, _, moment = key.partition(".")
            moments.setdefault(int(index), {})[moment] = tensor
        optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    learner.pool.columns = below("pool.")


def _policy(values: Mapping[str, Any]) -> CompressionPolicy:
    return CompressionPolicy(**{name: tuple(choices) for name, choices in values.items()})


def _space_facts(space: ActionSpace) -> dict[str, Any]:
    """What must be the same for the networks to make sense."""
    return {
        "steps": space.num_steps,
        "entries": int(space.used.sum()),
        "observation": space.observation_dim,
        "objectives": list(space.objectives),
    }
