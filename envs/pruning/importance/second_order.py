"""Second-order removal: units are removed one by one; each step removes the unit with the smallest error after a refit.

A layer with weight W reads the entries u of its input, C = E[u u^T] around the mean. With H = C + lambda I, the smallest
squared error after unit j (entries j) is removed and all other weights are refitted, and this refit, are

    cost_j = tr(W_j [H^-1]_jj^-1 W_j^T)                                                                          (1)
    W     <- W - W_j [H^-1]_jj^-1 [H^-1]_j:                                                                      (2)
    H^-1  <- H^-1 - [H^-1]_:j [H^-1]_jj^-1 [H^-1]_j:                                                             (3)

In each step the unit with the smallest cost, summed over the layers that read it, is removed. A unit's score is its rank in
this order. Both W and H^-1 are updated, so if two channels are redundant, only one of them has a small cost.

Source: Hassibi and Stork 1993 (optimal brain surgeon), eq. (5); Frantar and Alistarh 2022 (optimal brain compression),
arXiv:2208.11580, section 4, eq. (4) and lemma 1, for a layer's squared error; Kurtic et al. 2023 (ZipLM), arXiv:2302.04089,
section 3.1, for structures of several entries.

Where we differ and why:
1. If the layer has a bias or a batch norm, the constant 1 is one of the entries and is never removed: C is then the
   covariance. Eliminating the constant first gives the same result.
2. The damping's own share lambda |W_j|^2 (dense W) is subtracted from (1). The result is exactly the increase of
   E|W' u - W u|^2 + lambda |W' - W|^2 over the remaining entries, which the recovery `least_squares` minimizes. A dead
   channel has no cost, whatever its weights are.
3. Coupled channels are removed from all of their readers at once. Each reader's error is divided by the energy of its
   output, so that the errors of different readers are comparable.
4. If a batch norm is the only reader of a layer, the layer's errors are scaled by this batch norm (ResNet-56 on
   CIFAR-10, half of every block's inner channels removed and refitted, 8,000 test images: 85.9 %, unscaled 85.2 %).
5. Depthwise convolutions do not mix channels and do not count as readers; the layer after them does. Grouped convolutions and
   layers with only known variances are not refitted: they add a fixed cost per unit, the `output_energy`. Groups without a
   calibrated reader are ranked by the L1 norm of their producers.
6. Only the required rows of (2) and (3) are computed in each step; the other rows are computed by matrix products for a
   panel of several removals. W^T W is updated instead of W, because (1) needs nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from secateur.cost_models.core import Positive, check_fields
from secateur.envs.model_graph.plan import ChannelGroup
from secateur.envs.pruning.importance.common.readers import Reader, reader, unit_energy, unit_entries
from secateur.envs.pruning.importance.common.unit_slices import mean_l1_norm
from secateur.envs.pruning.importance.core import DenseModel

_PANEL = 128
"""Number of entries that are eliminated between two updates of the whole matrices."""


@dataclass(frozen=True)
class SecondOrderConfig:
    """Configuration of the errors.

    Attributes:
        damping: lambda, relative to the mean of C's diagonal.
    """

    damping: Positive = 1e-3

    def __post_init__(self) -> None:
        check_fields(self, "the importance `second_order`")


@dataclass(frozen=True)
class SecondOrder:
    """Rank in the order of greedy removal with refits."""

    config: SecondOrderConfig = SecondOrderConfig()
    needs_images: ClassVar[bool] = True

    def scores(self, dense: DenseModel) -> tuple[np.ndarray, ...]:
        """See `Importance.scores`; reads weights and calibration."""
        blocks = _Blocks(dense, self.config.damping)
        return tuple(self._group_scores(dense, group, blocks) for group in dense.graph.groups)

    def _group_scores(self, dense: DenseModel, group: ChannelGroup, blocks: _Blocks) -> np.ndarray:
        parts = [part for name in group.consumers if (part := blocks.of(name, group)) is not None]
        if not parts:
            return mean_l1_norm(dense.model, group)
        fixed = sum((part for part in parts if isinstance(part, np.ndarray)), np.zeros(group.units))
        order = removal_order(fixed, [part for part in parts if isinstance(part, Elimination)])
        scores = np.empty(group.units)
        scores[order] = np.arange(group.units)
        return scores


class _Blocks:
    """The parts of each reader's matrices that belong to each of its groups.

    A reader's matrix is inverted once, although a layer of a dense block reads many groups.
    """

    def __init__(self, dense: DenseModel, damping: float) -> None:
        self.dense, self.damping = dense, damping
        self.waiting: dict[tuple[str, str], Elimination | np.ndarray | None] = {}

    def of(self, name: str, group: ChannelGroup) -> Elimination | np.ndarray | None:
        """Return a reader's part of a group's removal: with refits, or fixed costs (units,); None without statistics.

        Each pair of reader and group can be requested once.
        """
        if (name, group.name) not in self.waiting:
            self._compute(name)
        return self.waiting.pop((name, group.name))

    def _compute(self, name: str) -> None:
        groups = [group for group in self.dense.graph.groups if name in group.consumers]
        found = reader(self.dense, name, after_norm=True)
        matrices = None
        if found is not None and not found.diagonal and len(found.weight) == 1:
            matrices = damped_inverse(found.moments[0], self.damping), found.energy
        for group in groups:
            entries = None if found is None else unit_entries(self.dense, group, name)
            if found is None or entries is None:
                self.waiting[name, group.name] = None
            else:
                self.waiting[name, group.name] = _share(found, entries, matrices)


def _share(found: Reader, entries: np.ndarray, matrices: tuple | None) -> Elimination | np.ndarray:
    if matrices is None:
        return unit_energy(found, entries)
    (inverse, damping), energy = matrices
    flat = torch.tensor(entries.ravel(), device=inverse.device)
    weight = found.weight[0][:, flat]
    return Elimination(inverse[flat[:, None], flat], weight.T @ weight / energy, damping, entries.shape[1])


def damped_inverse(moments: Tensor, damping: float) -> tuple[Tensor, float]:
    """Return H^-1 (entries, entries) and lambda; lambda is multiplied by ten while rounding errors make H indefinite."""
    damping *= max(float(moments.diagonal().mean()), 1e-12)
    while True:
        identity = torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
        factor, failed = torch.linalg.cholesky_ex(moments + damping * identity)
        if not failed:
            return torch.cholesky_inverse(factor), damping
        damping *= 10


class Elimination:
    """One reader during the removal: H^-1 and W^T W of the remaining units.

    Args:
        inverse: H^-1 of the group's entries, (units * block, units * block), ordered by unit.
        gram: W^T W of the same entries.
        damping: lambda.
        block: entries per unit.
    """

    def __init__(self, inverse: Tensor, gram: Tensor, damping: float, block: int) -> None:
        self.inverse, self.gram, self.block = inverse, gram, block
        self.own = damping * gram.diagonal().view(-1, block).sum(1)
        self._start_panel()

    def _start_panel(self) -> None:
        units = torch.arange(len(self.inverse) // self.block, device=self.inverse.device)
        self.inverse_blocks, self.gram_blocks = (
            matrix.view(len(units), self.block, len(units), self.block)[units, :, units].clone()
            for matrix in (self.inverse, self.gram)
        )
        empty = self.inverse.new_zeros(0, len(self.inverse))
        self.rows, self.steps, self.turns = empty, empty, empty

    def costs(self) -> np.ndarray:
        """Return eq. (1) without the damping's share, (remaining units,); not valid for units that were removed in this panel."""
        if self.block == 1:
            costs = (self.gram_blocks / self.inverse_blocks).view(-1)
        else:
            costs = torch.linalg.solve(self.inverse_blocks, self.gram_blocks).diagonal(dim1=1, dim2=2).sum(1)
        return (costs - self.own).cpu().numpy()

    def remove(self, unit: int) -> None:
        """Remove one of the remaining units.

        With K = [H^-1]_jj^-1 [H^-1]_j:, eq. (2) is W (I - E_j K). Therefore M = W^T W is reduced by K^T V + V^T K with
        V = M_j: - M_jj K / 2, and eq. (3) subtracts K^T [H^-1]_j: from H^-1.
        """
        own = slice(unit * self.block, (unit + 1) * self.block)
        row = self.inverse[own] - self.steps[:, own].T @ self.rows
        gram = self.gram[own] - self.steps[:, own].T @ self.turns - self.turns[:, own].T @ self.steps
        step = torch.linalg.solve(row[:, own], row)
        turn = gram - gram[:, own] @ step / 2
        for buffer, new in (("rows", row), ("steps", step), ("turns", turn)):
            setattr(self, buffer, torch.cat([getattr(self, buffer), new]))
        row, step, turn = (x.view(self.block, -1, self.block).transpose(0, 1) for x in (row, step, turn))
        self.inverse_blocks -= step.mT @ row
        change = step.mT @ turn
        self.gram_blocks -= change + change.mT
        self.inverse_blocks[unit] = torch.eye(self.block, dtype=self.inverse.dtype, device=self.inverse.device)

    def end_panel(self, left: Tensor) -> None:
        """Update the matrices of the remaining units and drop those of the others."""
        left = left.to(self.inverse.device)
        entries = (left[:, None] * self.block + torch.arange(self.block, device=left.device)).flatten()
        rows, steps, turns = (buffer[:, entries] for buffer in (self.rows, self.steps, self.turns))
        change = steps.T @ turns
        self.inverse = self.inverse[entries[:, None], entries] - steps.T @ rows
        self.gram = self.gram[entries[:, None], entries] - change - change.T
        self.own = self.own[left]
        self._start_panel()


def removal_order(fixed: np.ndarray, readers: Sequence[Elimination]) -> np.ndarray:
    """Return the units in the order of their removal, the remaining one last, (units,).

    Args:
        fixed: (units,) cost of each removal that does not depend on earlier removals.
        readers: the readers that are refitted; they are changed in place.
    """
    units, order = np.arange(len(fixed)), np.empty(0, int)
    panel = max(1, _PANEL // max((part.block for part in readers), default=1))
    while len(units) > 1:
        gone: list[int] = []
        for _ in range(min(panel, len(units) - 1)):
            costs = sum((part.costs() for part in readers), fixed[units])
            costs[gone] = np.inf
            gone.append(int(costs.argmin()))
            for part in readers:
                part.remove(gone[-1])
        order = np.append(order, units[gone])
        left = np.delete(np.arange(len(units)), gone)
        for part in readers:
            part.end_panel(torch.from_numpy(left))
        units = units[left]
    return np.append(order, units)
