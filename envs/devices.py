"""Torch devices: which one computes, and how tensors and networks get there.

`find_device` decides once per process. From there the device travels with the objects of a search: `Problem.on`, `Task.on`,
`Assembler.on` and `Score.on` move them, and everything else computes where its tensors are. Random numbers are drawn on the
CPU and then moved, so every device sees the same ones.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.cost_models.core import InputError

CPU = torch.device("cpu")
AUTO = "auto"


def find_device(name: str) -> torch.device:
    """Return the device that `compute.device` names; on a GPU, float32 then means float32, not TF32.

    Args:
        name: "cpu", "cuda", "cuda:1", ...; "auto": a GPU if there is one.
    Raises:
        InputError: if there is no such GPU.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device(("cuda" if count else "cpu") if name == AUTO else name)
    if device.type != "cuda":
        return device
    if not count:
        raise InputError(
            f"`compute.device: {name}` asks for a GPU, but PyTorch finds none on this machine. Write `cpu`, or `auto`, which "
            "takes a GPU only where there is one."
        )
    if device.index is not None and device.index >= count:
        raise InputError(f"`compute.device: {name}` is not there: this machine has {count} GPUs, cuda:0 to cuda:{count - 1}.")
    # PyTorch's default differs: convolutions with 10 bits of mantissa, matrix products with 23.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


def describe_device(device: torch.device) -> str:
    """Return a device in words: "NVIDIA H200 without TF32", "2 torch threads"."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} without TF32"
    return f"{torch.get_num_threads()} torch threads" if device == CPU else str(device)


def move(x: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device: itself if it is there. Copies to a GPU run while the processor goes on."""
    if x.device == device:
        return x
    if device.type == "cuda" and x.device == CPU:
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def move_tree(tree: Any, device: torch.device) -> Any:
    """Return a tree with all of its tensors on a device."""
    return pytree.tree_map(lambda leaf: move(leaf, device) if isinstance(leaf, Tensor) else leaf, tree)


def move_network(network: nn.Module, device: torch.device) -> nn.Module:
    """Return a network on a device: itself if it is there, else a copy."""
    if all(x.device == device for x in chain(network.parameters(), network.buffers())):
        return network
    return copy.deepcopy(network).to(device)


def device_of(network: nn.Module) -> torch.device:
    """Return where a network is; the CPU for one without tensors."""
    return next((x.device for x in chain(network.parameters(), network.buffers())), CPU)


@contextmanager
def called_from_anywhere(network: Any, device: torch.device) -> Iterator[None]:
    """Within it, a network on `device` takes inputs from any device, and its outputs return to where its inputs were.

    This lets functions that know nothing of devices score the network. On the CPU, and for what is no module, nothing changes.
    """
    if device == CPU or not isinstance(network, nn.Module):
        yield
        return
    homes: list[torch.device] = []

    def enter(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        homes.append(next((leaf.device for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), device))
        return move_tree(args, device), move_tree(kwargs, device)

    def leave(module: nn.Module, args: Any, outputs: Any) -> Any:
        return move_tree(outputs, homes.pop())

    hooks = [network.register_forward_pre_hook(enter, prepend=True, with_kwargs=True), network.register_forward_hook(leave)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
