"""Shadows: integer tensors of channel identities; along axes on which all entries are equal, they have stride 0."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Shadow = tuple[Tensor, ...]
"""Identities of one value: one tensor. For a parameter one tensor per axis: only its use shows which axis holds channels."""


def filled(entry: int, shape: Sequence[int]) -> Tensor:
    """Return a shadow of this shape with one entry everywhere."""
    return torch.tensor(entry).expand(tuple(shape))


def along(ids: np.ndarray, axis: int, shape: Sequence[int]) -> Tensor:
    """Return a shadow of this shape whose entries differ only along one axis."""
    view = [1] * len(shape)
    view[axis] = -1
    return torch.from_numpy(np.ascontiguousarray(ids)).view(view).expand(tuple(shape))


def as_axis(ids: Tensor, axis: int, rank: int) -> Tensor:
    """Return a one-dimensional shadow with `rank` axes, of size 1 except for this axis."""
    return ids.reshape([-1 if d == axis else 1 for d in range(rank)])


def narrow(ids: Tensor) -> Tensor:
    """Return the shadow with size 1 along the axes of stride 0."""
    for axis in range(ids.dim()):
        if ids.stride(axis) == 0 and ids.size(axis) > 1:
            ids = ids.narrow(axis, 0, 1)
    return ids


def first_entries(ids: Tensor, axis: int) -> Tensor:
    """Return the first entries along one axis, one-dimensional."""
    for other in range(ids.dim()):
        if other != axis:
            ids = ids.narrow(other, 0, 1)
    return ids.reshape(-1)


def concatenate(shadows: Sequence[Tensor], axis: int) -> Tensor:
    """Return `torch.cat` of shadows; axes along which all of them are constant keep stride 0."""
    shape = list(shadows[0].shape)
    shape[axis] = sum(ids.size(axis) for ids in shadows)
    for d in range(len(shape)):
        if d != axis and all(ids.stride(d) == 0 for ids in shadows):
            shadows = [ids.narrow(d, 0, 1) for ids in shadows]
    return torch.cat(list(shadows), axis).expand(shape)
