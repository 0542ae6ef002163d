"""Writes an agent to a folder and reads it back: JSON, safetensors and plain arrays, no pickles.

    agent.json             options, goals, where it stands
    networks.safetensors   actor, critics and their targets
    replay.npz             finished episodes
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from agents.envelope_ddpg.config import EnvelopeDdpgConfig
from agents.envelope_ddpg.replay import Memory
from envs.core import ActionSpace, Budget, InputError

if TYPE_CHECKING:
    from agents.envelope_ddpg.agent import EnvelopeDdpg

STATE, NETWORKS, REPLAY = "agent.json", "networks.safetensors", "replay.npz"
PARTS = ("critic", "actor", "target_critic", "target_actor")


def write_agent(folder: Path, agent: EnvelopeDdpg) -> None:
    """Write everything that answers questions; the folder must not exist."""
    folder.mkdir(parents=True)
    learner = agent.learner
    tensors = {
        f"{part}.{name}": tensor.contiguous() for part in PARTS for name, tensor in getattr(learner, part).state_dict().items()
    }
    save_file(tensors, folder / NETWORKS)
    memories = learner.memories
    goals = np.zeros((len(memories), len(agent.goals)), bool)
    for row, memory in zip(goals, memories, strict=True):
        row[memory.goals] = True
    shape = (0, *agent.space.used.shape)
    np.savez_compressed(
        folder / REPLAY,
        tables=np.stack([m.table for m in memories]) if memories else np.empty(shape),
        rewards=np.array([m.reward for m in memories]),
        observations=np.array([m.observations for m in memories]),
        preferences=np.array([m.preference for m in memories]),
        own=np.array([m.goals[0] for m in memories], int),
        goals=goals,
        surprises=np.reshape(learner.surprises, (-1, 2)),
    )
    state = {
        "schema": 1,
        "agent": "envelope_ddpg",
        "config": asdict(agent.config),
        "space": _space_facts(agent.space),
        "budgets": [asdict(budget) for budget in agent.budgets],
        "goals": [asdict(budget) for budget in agent.goals],
        "evaluations": agent.learned,
        "rng": agent.rng.bit_generator.state,
    }
    (folder / STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")


def read_agent(folder: Path, space: ActionSpace, make: type[EnvelopeDdpg]) -> EnvelopeDdpg:
    """Return the agent; see `EnvelopeDdpg.load`."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if state["schema"] != 1:
            raise InputError(f"{folder / STATE} has schema {state['schema']}; this version reads schema 1.")
        tensors = load_file(folder / NETWORKS)
        with np.load(folder / REPLAY, allow_pickle=False) as archive:
            replay = {name: archive[name] for name in archive.files}
        if state["space"] != (facts := _space_facts(space)):
            raise InputError(
                f"The agent in {folder} belongs to another problem: it knows {state['space']}, but this is {facts}. "
                "Restore the model and the configuration of its run."
            )
        return _restored(state, tensors, replay, space, make)
    except FileNotFoundError as error:
        raise InputError(f"{folder} holds no agent: it has no {Path(error.filename).name}.") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, SafetensorError, OSError, RuntimeError) as error:
        raise InputError(f"The agent in {folder} is damaged: {type(error).__name__}: {error}") from None


def _restored(state: dict[str, Any], tensors, replay, space: ActionSpace, make: type[EnvelopeDdpg]) -> EnvelopeDdpg:
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in state["config"].items()}
    budgets = [Budget(**budget) for budget in state["budgets"]]
    agent = make(EnvelopeDdpgConfig(**options), space, budgets, np.random.default_rng(0))
    agent.goals[len(budgets) :] = [Budget(**budget) for budget in state["goals"][len(budgets) :]]
    learner = agent.learner
    learner.goals = agent.goals
    for part in PARTS:
        prefix = f"{part}."
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        getattr(learner, part).load_state_dict(own)
    for i, table in enumerate(replay["tables"]):
        others = np.setdiff1d(np.flatnonzero(replay["goals"][i]), replay["own"][i])
        goals = np.concatenate([replay["own"][i : i + 1], others])
        learner.add(Memory(table, replay["observations"][i], replay["rewards"][i], goals, replay["preferences"][i]))
        agent._known.add(space.decode(table))
    learner.surprises = list(replay["surprises"])
    agent._rules = []
    agent.asked = agent.learned = state["evaluations"]
    agent.rng.bit_generator.state = state["rng"]
    return agent


def _space_facts(space: ActionSpace) -> dict[str, Any]:
    """What must be the same for the networks to make sense."""
    return {
        "steps": space.num_steps,
        "entries": int(space.used.sum()),
        "observation": space.observation_dim,
        "objectives": list(space.objectives),
    }
