"""Conversion of networks and images to a number format and to the memory layout with the fastest forward passes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.envs.tasks.core import map_tensors


def prepare_images(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the images in the layout that `convert_network` expects."""
    return images.to(dtype=dtype, memory_format=torch.channels_last if images.dim() == 4 else torch.preserve_format)


@dataclass(frozen=True)
class InputFormat:
    """Forward pre-hook: brings every floating-point input into the format that `convert_network` expects."""

    dtype: torch.dtype

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Return the arguments of the forward pass."""
        return map_tensors(lambda x: prepare_images(x, self.dtype), (args, kwargs))


def output_as_float32(module: nn.Module, args: Any, outputs: Any) -> Any:
    """Forward hook: return the outputs in float32."""
    return map_tensors(Tensor.float, outputs)


def convert_network(network: nn.Module, dtype: torch.dtype, keep: Collection[nn.Module] = ()) -> None:
    """Replace a network's tensors, in place, by tensors in `dtype` with channels last; the old tensors are not changed.

    Args:
        network: the network; other networks may share its tensors, but not its modules.
        dtype: number format of parameters and floating-point buffers.
        keep: modules whose own tensors are not replaced.
    """
    converted: dict[int, Tensor] = {}  # tied tensors stay tied
    for module in network.modules():
        if module in keep:
            continue
        own: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in own:
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_floating_point():
                    if id(tensor) not in converted:
                        converted[id(tensor)] = _converted(tensor, dtype)
                    tensors[name] = converted[id(tensor)]


def _converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    new = prepare_images(tensor.detach(), dtype)
    return nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
