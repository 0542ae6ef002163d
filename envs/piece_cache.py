"""Cache of computed pieces of candidates (refitted and rounded weights) with a memory limit."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
import torch


class PieceCache:
    """A least-recently-used cache of tensors and arrays; every process has its own.

    Args:
        max_bytes: memory limit for all values together, in bytes.
    """

    def __init__(self, max_bytes: int = 512_000_000) -> None:
        self.max_bytes = max_bytes
        self._pieces: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._bytes = 0

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return the piece `key`; if it is not cached, `make` computes it. Pieces are shared: never write into a piece."""
        if key in self._pieces:
            self._pieces.move_to_end(key)
            return self._pieces[key][0]
        piece = make()
        size = _nbytes(piece)
        if size <= self.max_bytes:
            self._pieces[key] = piece, size
            self._bytes += size
            while self._bytes > self.max_bytes:
                _, (_, freed) = self._pieces.popitem(last=False)
                self._bytes -= freed
        return piece

    def __reduce__(self) -> tuple:
        return PieceCache, (self.max_bytes,)  # a pickled cache is empty

    def __deepcopy__(self, memo: dict) -> PieceCache:
        return PieceCache(self.max_bytes)


def _nbytes(piece: Any) -> int:
    if isinstance(piece, (torch.Tensor, np.ndarray)):
        return piece.nbytes
    if isinstance(piece, dict):
        return sum(map(_nbytes, piece.values()))
    if isinstance(piece, (tuple, list)):
        return sum(map(_nbytes, piece))
    if hasattr(piece, "__dataclass_fields__"):
        return sum(_nbytes(getattr(piece, name)) for name in piece.__dataclass_fields__)
    return 0
