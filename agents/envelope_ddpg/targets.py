"""The envelope operator on vectors.

Sources: Yang, Sun & Narasimhan 2019 (arXiv:1908.08342), optimality filter; QENV_CTN (continuous envelope in the repository of
CAPQL, Lu et al. 2023), the pessimistic minimum inside the maximum and the mixing with the plain target; PD-MORL (Basaklar et al.
2023), the whole vector of the critic with the smaller scalarized value.
"""

from __future__ import annotations

import numpy as np


def pessimistic(quality: np.ndarray, costs: np.ndarray, preferences: np.ndarray) -> np.ndarray:
    """Return the vector of the critic with the smallest scalarized value, (..., num_objectives).

    Args:
        quality: predictions of each critic, (critics, ...).
        costs: (..., num_objectives - 1), exact, so the same for all critics.
        preferences: (..., num_objectives).
    """
    vectors = np.concatenate([quality[..., None], np.broadcast_to(-costs, (*quality.shape, costs.shape[-1]))], axis=-1)
    smallest = (preferences * vectors).sum(-1).argmin(axis=0)
    return np.take_along_axis(vectors, smallest[None, ..., None], axis=0)[0]


def envelope_target(vectors: np.ndarray, preferences: np.ndarray, mixing: float) -> np.ndarray:
    """Return the mixed envelope target, (n, num_objectives).

    y = mixing * argmax_k (w @ v_k) + (1 - mixing) * v_0, where v_0 is the completion under the transition's own preference w.

    Args:
        vectors: values of the candidates, (n, candidates, num_objectives); candidate 0 is the plain one.
        preferences: the transitions' own, (n, num_objectives).
        mixing: share of the maximum, in [0, 1].
    """
    utility = np.einsum("nkm,nm->nk", vectors, preferences)
    best = np.take_along_axis(vectors, utility.argmax(axis=1)[:, None, None], axis=1)[:, 0]
    return mixing * best + (1 - mixing) * vectors[:, 0]
