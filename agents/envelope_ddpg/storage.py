"""Writes what an agent has learned to a folder and reads it back: JSON, safetensors and plain arrays, no pickles.

agent.json             options, budgets, number of evaluations, state of the random generator
networks.safetensors   actor, critics, their targets, the moments of the optimizers, planned transitions
replay.npz             finished episodes, errors of the predictions, sensitivities
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.agents.envelope_ddpg.config import EnvelopeDdpgConfig
from secateur.agents.envelope_ddpg.replay import Memory
from secateur.envs.core import ActionSpace, Budget, InputError, Sensitivities

FACTS, NETWORKS, REPLAY = "agent.json", "networks.safetensors", "replay.npz"
SCHEMA = 5
"""Of the folder; goes up when older agents would mean something else."""

DAMAGES = (ValueError, LookupError, TypeError, SafetensorError, OSError, RuntimeError, EOFError, BadZipFile)
"""What reading a damaged file may raise."""


@dataclass(frozen=True, eq=False)
class AgentState:
    """What an agent has learned, apart from the space in which it searched.

    Attributes:
        config: its options.
        space: sizes of the space (`space_facts`).
        preference: the main one, (num_objectives,) on the simplex.
        budgets: those of the search.
        training_budgets: the same, then the tighter ones.
        learned: number of evaluations that were learned from, failed ones included.
        memories: the scored episodes, in order.
        errors: of the critics and the additive model on episodes that were new to them, (n, 2).
        sensitivities: of the choices; None: not used.
        tensors: of the networks, the optimizers and the planned transitions, by name.
        rng: state of the random generator.
    """

    config: EnvelopeDdpgConfig
    space: Mapping[str, Any]
    preference: np.ndarray
    budgets: Sequence[Budget]
    training_budgets: Sequence[Budget]
    learned: int
    memories: Sequence[Memory]
    errors: np.ndarray
    sensitivities: Sensitivities | None
    tensors: Mapping[str, Tensor]
    rng: Mapping[str, Any]


def space_facts(space: ActionSpace) -> dict[str, Any]:
    """Return what must be the same for the networks to make sense."""
    return {
        "steps": space.num_steps,
        "entries": int(space.used.sum()),
        "observation": space.observation_dim,
        "objectives": list(space.objectives),
    }


def write_state(folder: Path, state: AgentState) -> None:
    """Write the state to a new folder."""
    folder.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in state.tensors.items()}, folder / NETWORKS)
    np.savez_compressed(folder / REPLAY, **_replay(state))
    facts = {
        "schema": SCHEMA,
        "agent": "envelope_ddpg",
        "config": asdict(state.config),
        "preference": state.preference.tolist(),
        "space": state.space,
        "budgets": [asdict(budget) for budget in state.budgets],
        "training_budgets": [asdict(budget) for budget in state.training_budgets],
        "learned": state.learned,
        "rng": state.rng,
    }
    (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _replay(state: AgentState) -> dict[str, Any]:
    """Return episodes, errors and sensitivities as arrays; of the episodes, one row each."""
    memories = state.memories
    practiced = np.zeros((len(memories), len(state.training_budgets)), bool)
    for row, memory in zip(practiced, memories, strict=True):
        row[memory.budgets] = True
    return {
        "sequences": np.array([memory.sequence for memory in memories]),
        "observations": np.array([memory.observations for memory in memories]),
        "rewards": np.array([memory.reward for memory in memories]),
        "preferences": np.array([memory.preference for memory in memories]),
        "feasible": np.array([memory.feasible for memory in memories], bool),
        "own_budget": np.array([memory.budgets[0] for memory in memories], int),
        "budgets": practiced,
        "errors": state.errors,
        "sensitivities": np.empty((0, 0)) if state.sensitivities is None else state.sensitivities.curves,
    }


@contextmanager
def damage_refused(folder: Path) -> Iterator[None]:
    """Turn whatever reading an agent's folder may raise into one sentence.

    Raises:
        InputError: if the folder holds no agent, or it is damaged.
    """
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{folder} holds no agent: it has no {Path(error.filename).name}.") from None
    except DAMAGES as error:
        raise InputError(f"The agent in {folder} is damaged: {type(error).__name__}: {error}") from None


def read_state(folder: Path, space: ActionSpace) -> AgentState:
    """Return the state in a folder; use it inside `damage_refused`.

    Raises:
        InputError: if it is of another version, or belongs to another space.
    """
    facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    if facts["schema"] != SCHEMA:
        raise InputError(
            f"{folder / FACTS} has schema {facts['schema']}, but this version reads schema {SCHEMA}: search again, or query the "
            "agent with the version that wrote it."
        )
    if facts["space"] != (own := space_facts(space)):
        raise InputError(
            f"The agent in {folder} belongs to another problem: its space has {facts['space']}, but this one has {own}. "
            "Restore the model and the configuration of its run."
        )
    with np.load(folder / REPLAY, allow_pickle=False) as archive:
        replay = {name: archive[name] for name in archive.files}
    return _state(facts, replay, load_file(folder / NETWORKS))


def _state(facts: Mapping[str, Any], replay: Mapping[str, np.ndarray], tensors: Mapping[str, Tensor]) -> AgentState:
    options: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in facts["config"].items()}
    curves = replay["sensitivities"]
    return AgentState(
        config=EnvelopeDdpgConfig(**options),
        space=facts["space"],
        preference=np.array(facts["preference"]),
        budgets=[Budget(**budget) for budget in facts["budgets"]],
        training_budgets=[Budget(**budget) for budget in facts["training_budgets"]],
        learned=facts["learned"],
        memories=_memories(replay),
        errors=replay["errors"],
        sensitivities=Sensitivities(curves) if len(curves) else None,
        tensors=tensors,
        rng=facts["rng"],
    )


def _memories(replay: Mapping[str, np.ndarray]) -> list[Memory]:
    names = ("sequences", "observations", "rewards", "own_budget", "budgets", "preferences", "feasible")
    memories = []
    for sequence, observations, reward, own, practiced, preference, feasible in zip(*(replay[n] for n in names), strict=True):
        budgets = np.array([own, *np.setdiff1d(np.flatnonzero(practiced), own)])
        memories.append(Memory(sequence, observations, reward, budgets, preference, bool(feasible)))
    return memories
