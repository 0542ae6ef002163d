"""Options of AMC's agent; without torch, unlike the agent itself."""

from __future__ import annotations

from dataclasses import dataclass

from secateur.agents.core import Rate
from secateur.cost_models.core import Count, NonNegative, check_fields


@dataclass(frozen=True)
class AmcDdpgConfig:
    """Options; the defaults are AMC's but for `warmup`, which AMC sets to 100 of 400 episodes.

    Attributes:
        warmup: episodes with constant noise and without learning.
        noise: standard deviation of the truncated normal noise on the actions.
        noise_decay: factor of the noise per episode after the warm-up.
        hidden: width of both hidden layers of both networks.
        batch: transitions per gradient step.
        capacity: transitions that are kept.
        actor_rate, critic_rate: learning rates of Adam.
        target_rate: tau of the soft target updates.
        baseline_rate: share of a new reward in the moving average that is subtracted from the rewards.
        lookahead: evaluations that may be out, so also how many workers can be busy. Choices depend on exactly the evaluations
            before those, not on the speed or the number of the workers.
    """

    warmup: Count = 30
    noise: NonNegative = 0.5
    noise_decay: Rate = 0.95
    hidden: Count = 300
    batch: Count = 64
    capacity: Count = 2000
    actor_rate: Rate = 1e-4
    critic_rate: Rate = 1e-3
    target_rate: Rate = 0.01
    baseline_rate: Rate = 0.5
    lookahead: Count = 8

    def __post_init__(self) -> None:
        check_fields(self, "the agent `amc_ddpg`")
