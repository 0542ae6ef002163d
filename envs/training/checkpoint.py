"""Checkpoints of trainings: one safetensors file each, with JSON in its header; replaced at once, so it is never half-written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from secateur.cost_models.core import InputError
from secateur.envs.devices import CPU, device_of
from secateur.envs.training.descent import Descent

SCHEMA = 1
HEADER = "training"
MOMENTUM = "momentum_buffer"


@dataclass
class State:
    """What a training continues from, after some epochs.

    Attributes:
        tensors: of the network, the optimizer, the running average and the random generators; copies in main memory.
        optimizer, schedule: their other values, as JSON has them.
        epochs: a record of each finished epoch.
        note: why the training stopped early, in one sentence; "": it did not.
    """

    tensors: dict[str, Tensor]
    optimizer: list[dict[str, Any]]
    schedule: dict[str, Any]
    epochs: list[dict[str, Any]] = field(default_factory=list)
    note: str = ""


def network_tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Return all parameters and buffers by name, also the buffers that no state dict has; tied ones once."""
    yield from network.named_parameters()
    yield from network.named_buffers()


def capture(descent: Descent, average: Mapping[str, Tensor]) -> State:
    """Return the state of a training, for use inside its own random numbers of torch."""
    tensors = {f"network.{name}": tensor for name, tensor in network_tensors(descent.network)}
    tensors |= {f"average.{name}": tensor for name, tensor in average.items()}
    for number, values in descent.optimizer.state_dict()["state"].items():
        tensors[f"{MOMENTUM}.{number}"] = values[MOMENTUM]
    tensors |= {"random.order": descent.generator.get_state(), "random.torch": torch.get_rng_state()}
    if (device := device_of(descent.network)).type == "cuda":
        tensors["random.cuda"] = torch.cuda.get_rng_state(device)
    copies = {name: tensor.detach().to(CPU, copy=True, memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    return State(copies, descent.optimizer.state_dict()["param_groups"], dict(descent.schedule.state_dict()))


def restore(state: State, descent: Descent, average: Mapping[str, Tensor]) -> None:
    """Put a training of the same network into a state, in place.

    Tensors keep their memory formats, because kernels may sum in another order in another format.

    Raises:
        KeyError, RuntimeError: if the state is that of another network.
    """
    with torch.no_grad():
        for name, tensor in network_tensors(descent.network):
            tensor.copy_(state.tensors[f"network.{name}"])
        for name, tensor in average.items():
            tensor.copy_(state.tensors[f"average.{name}"])
        momentum = {
            number: {MOMENTUM: torch.empty_like(parameter).copy_(stored)}
            for number, parameter in enumerate(descent.optimizer.param_groups[0]["params"])
            if (stored := state.tensors.get(f"{MOMENTUM}.{number}")) is not None
        }
    descent.optimizer.load_state_dict({"state": momentum, "param_groups": state.optimizer})
    descent.schedule.load_state_dict(state.schedule)
    descent.generator.set_state(state.tensors["random.order"])
    torch.set_rng_state(state.tensors["random.torch"])
    if (device := device_of(descent.network)).type == "cuda" and "random.cuda" in state.tensors:
        torch.cuda.set_rng_state(state.tensors["random.cuda"], device)


def write_checkpoint(path: Path, state: State, identity: Mapping[str, Any]) -> None:
    """Replace the checkpoint; `identity` (JSON values) says which training it belongs to."""
    header = {
        "schema": SCHEMA,
        "identity": identity,
        "optimizer": state.optimizer,
        "schedule": state.schedule,
        "epochs": state.epochs,
        "note": state.note,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.draft")
    save_file(state.tensors, draft, {HEADER: json.dumps(header)})
    os.replace(draft, path)


def read_checkpoint(path: Path, identity: Mapping[str, Any]) -> State | None:
    """Return the state in a checkpoint; None if there is no file.

    Raises:
        InputError: if the file is damaged, or belongs to another training than `identity` says.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            header = json.loads(file.metadata()[HEADER])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        state = State(tensors, header["optimizer"], header["schedule"], header["epochs"], header["note"])
        found = dict(header["identity"])
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise InputError(f"The checkpoint {path} is damaged: {type(error).__name__}: {error}. Remove it to train anew.") from None
    wanted = json.loads(json.dumps(identity))
    differing = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
    if differing:
        what = f"the checkpoint of another training: its {differing[0]} differs"
        raise InputError(f"{path} is {what}. Remove it to train anew.")
    return state
