"""Options of AMC's agent; without torch, unlike the agent itself."""

from __future__ import annotations

from dataclasses import dataclass

from secateur.agents.core import check_range

OWNER = "the agent `amc_ddpg`"
"""How messages call the agent."""


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

    warmup: int = 30
    noise: float = 0.5
    noise_decay: float = 0.95
    hidden: int = 300
    batch: int = 64
    capacity: int = 2000
    actor_rate: float = 1e-4
    critic_rate: float = 1e-3
    target_rate: float = 0.01
    baseline_rate: float = 0.5
    lookahead: int = 8

    def __post_init__(self) -> None:
        for name in ("warmup", "hidden", "batch", "capacity", "lookahead"):
            check_range(OWNER, name, getattr(self, name), 1)
        check_range(OWNER, "noise", self.noise, 0)
        for name in ("noise_decay", "actor_rate", "critic_rate", "target_rate", "baseline_rate"):
            check_range(OWNER, name, getattr(self, name), 0, 1, above=True)
