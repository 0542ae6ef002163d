"""Union-find over the positions of a model's tensors: which positions are the same channel, and which are frozen."""

from __future__ import annotations

import numpy as np
from torch import Tensor

EXPANDED = np.iinfo(np.int64).min
"""The negative entry of a repeated value without channels: it fits any number of channels, unless the code fixes its size."""


class Identities:
    """Union-find over (tensor, axis, position), with the reasons why classes are frozen.

    Attributes:
        keys: (tensor name, axis) of each axis.
        starts: (len(keys) + 1,) first element of each axis; the last entry is the number of elements.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.keys = [(name, axis) for name, shape in shapes.items() for axis in range(len(shape))]
        sizes = [size for shape in shapes.values() for size in shape]
        self.starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)
        self._index = {key: i for i, key in enumerate(self.keys)}
        self._parent = np.arange(self.starts[-1])
        self._frozen: list[tuple[np.ndarray, str]] = []
        self._origins: list[str] = []

    def of(self, tensor: str, axis: int) -> np.ndarray:
        """Return the elements of one axis, in order of position."""
        i = self._index[tensor, axis]
        return np.arange(self.starts[i], self.starts[i + 1])

    def constant(self, origin: str) -> int:
        """Return the negative entry that marks values without channels; `origin` describes where they come from."""
        if origin not in self._origins:
            self._origins.append(origin)
        return -1 - self._origins.index(origin)

    def find(self, ids: np.ndarray) -> np.ndarray:
        """Return the representative of each element's class, same shape; constants are not changed."""
        ids = np.asarray(ids)
        real = ids >= 0
        found = self._parent[ids[real]]
        while ((above := self._parent[found]) != found).any():
            found = above
        self._parent[ids[real]] = found
        out = ids.copy()
        out[real] = found
        return out

    def merge(self, first: np.ndarray, second: np.ndarray) -> None:
        """Merge the classes of first[i] and second[i]. If one of them is a constant, the class of the other is frozen."""
        first, second = self.find(first).ravel(), self.find(second).ravel()
        self._freeze_constants(first, second)
        self._freeze_constants(second, first)
        while (differ := (first != second) & (first >= 0) & (second >= 0)).any():
            pairs = np.unique(np.sort(np.stack([first[differ], second[differ]], axis=1), axis=1), axis=0)
            # If one representative has several partners, only the last write counts; the loop repeats for the others.
            self._parent[pairs[:, 1]] = pairs[:, 0]
            first, second = self.find(pairs[:, 0]), self.find(pairs[:, 1])

    def _freeze_constants(self, ids: np.ndarray, others: np.ndarray) -> None:
        constants = others[(ids >= 0) & (others < 0) & (others != EXPANDED)]
        for entry in np.unique(constants):
            self.freeze(ids[others == entry], f"meets {self._origins[-1 - entry]}")

    def freeze(self, ids: np.ndarray | Tensor, reason: str) -> None:
        """Freeze the classes of these elements: they cannot be removed. If a class is frozen twice, the first reason is kept."""
        ids = np.unique(np.asarray(ids))
        if len(ids) and ids[-1] >= 0:
            self._frozen.append((ids[ids >= 0], reason))

    def reasons(self) -> dict[int, str]:
        """Return {representative: reason} of the frozen classes."""
        return {root: reason for ids, reason in reversed(self._frozen) for root in self.find(ids).tolist()}
