import numpy as np

from secateur.agents.noise import truncated_normal


def test_noise_stays_in_the_range_without_accumulating_at_its_ends():
    drawn = truncated_normal(np.full(20_000, 0.1), 0.5, np.random.default_rng(0))
    assert drawn.min() >= 0 and drawn.max() <= 1
    assert np.mean((drawn == 0) | (drawn == 1)) < 0.01
