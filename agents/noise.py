"""Exploration noise."""

from __future__ import annotations

import numpy as np


def truncated_normal(mean: np.ndarray, spread: float, rng: np.random.Generator) -> np.ndarray:
    """Return normal draws around `mean` inside [0, 1]; entries that ten tries leave outside are clipped."""
    drawn = mean + spread * rng.normal(size=mean.shape)
    for _ in range(10):
        outside = (drawn < 0) | (drawn > 1)
        if not outside.any():
            break
        drawn = np.where(outside, mean + spread * rng.normal(size=mean.shape), drawn)
    return np.clip(drawn, 0, 1)
