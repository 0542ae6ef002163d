"""The envelope operator and the losses, in vectors.

Sources: Yang, Sun & Narasimhan 2019 (arXiv:1908.08342), optimality filter and losses; QENV_CTN (continuous envelope in the
repository of CAPQL, Lu et al. 2023), the pessimistic minimum inside the sup and the mixing with the plain target; PD-MORL
(Basaklar et al. 2023), the whole vector of the critic with the smaller scalarised value.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def pessimistic(top1: np.ndarray, costs: np.ndarray, preferences: np.ndarray) -> np.ndarray:
    """Return the vector of the critic with the smallest scalarised value, (..., num_objectives).

    Args:
        top1: each critic's opinion, (critics, ...).
        costs: (..., num_objectives - 1), exact, so the same for all critics.
        preferences: (..., num_objectives).
    """
    vectors = np.concatenate([top1[..., None], np.broadcast_to(-costs, (*top1.shape, costs.shape[-1]))], axis=-1)
    smallest = (preferences * vectors).sum(-1).argmin(axis=0)
    return np.take_along_axis(vectors, smallest[None, ..., None], axis=0)[0]


def envelope_target(vectors: np.ndarray, preferences: np.ndarray, mixing: float, valid: np.ndarray | None = None) -> np.ndarray:
    """Return the mixed envelope target, (n, num_objectives).

    y = mixing * argmax_k (w @ v_k) + (1 - mixing) * v_0, where v_0 is the completion under the transition's own preference.

    Args:
        vectors: values of the candidates, (n, candidates, num_objectives); candidate 0 is the plain one.
        preferences: the transitions' own, (n, num_objectives).
        mixing: delta.
        valid: (n, candidates) which candidates there are; default: all. Candidate 0 always is.
    """
    utility = np.einsum("nkm,nm->nk", vectors, preferences)
    if valid is not None:
        utility = np.where(valid, utility, -np.inf)
    best = np.take_along_axis(vectors, utility.argmax(axis=1)[:, None, None], axis=1)[:, 0]
    return mixing * best + (1 - mixing) * vectors[:, 0]


def critic_loss(values: Tensor, costs: Tensor, targets: Tensor, preferences: Tensor, scalarized: float) -> Tensor:
    """Return (1 - scalarized) * vector loss + scalarized * scalarised loss, each a mean over critics and batch.

    The vectors are (top1, -costs). Costs are known, so of |y - Q|^2 only the top-1 part has a gradient: that is the vector
    loss. In (w @ y - w @ Q)^2 the known costs remain: the envelope's completion may cost less than the plain one, and what
    it gains there counts as top-1 gained.

    Args:
        values: top-1 of every critic, (critics, n).
        costs: of the plain completion, (n, num_objectives - 1): the cost part of every critic's vector.
        targets: (n, num_objectives).
        preferences: (n, num_objectives).
        scalarized: lambda of the homotopy.
    """
    vectors = torch.cat([values[..., None], (-costs).expand(*values.shape, costs.shape[-1])], dim=-1)
    error = targets - vectors
    loss = (1 - scalarized) * error[..., 0].square().mean()
    if scalarized:
        loss = loss + scalarized * (preferences * error).sum(-1).square().mean()
    return loss
