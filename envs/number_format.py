"""Networks and images in the number format and memory layout in which they run fastest."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

import torch
from torch import Tensor, nn


def prepare_images(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the images in the layout that `convert_network` expects."""
    return images.to(dtype=dtype, memory_format=torch.channels_last if images.dim() == 4 else torch.preserve_format)


def convert_network(network: nn.Module, dtype: torch.dtype, keep: Collection[nn.Module] = ()) -> None:
    """Give a network new tensors, in place: channels last, in `dtype`; the old tensors stay as they are.

    Args:
        network: its own modules, with tensors that others may share.
        dtype: of parameters and floating buffers.
        keep: modules whose own tensors are left alone.
    """
    converted: dict[int, Tensor] = {}  # tied tensors stay tied
    for module in network.modules():
        if module in keep:
            continue
        for tensors in cast(tuple[dict[str, Any], ...], (module._parameters, module._buffers)):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_floating_point():
                    if id(tensor) not in converted:
                        converted[id(tensor)] = _converted(tensor, dtype)
                    tensors[name] = converted[id(tensor)]


def _converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    new = prepare_images(tensor.detach(), dtype)
    return nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
