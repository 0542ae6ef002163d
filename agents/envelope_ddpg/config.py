"""Options of the envelope DDPG agent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from secateur.agents.core import Share, check_preference
from secateur.cost_models.core import Count, Range, check_fields

OWNER = "envelope DDPG"
"""How messages call the agent."""


@dataclass(frozen=True)
class EnvelopeDdpgConfig:
    """Options. What needs no tuning is a constant in the module that uses it.

    Attributes:
        preference: weights of the reward's components, the quality first, that most episodes search for; None: quality alone.
        warmup: evaluations before the networks choose: first rule-based policies, then random feasible ones.
        candidates: number of policies that the critics compare for one evaluation; 1: no comparison.
        rounds: how often the best candidates are changed and compared again, each time half as many as there were candidates.
        local: share of the choices among changes of the best evaluated policies; the others: rollouts and unguided policies.
        unguided: share of uniform and random policies beside the rollouts.
        exploration_share: share of the episodes that search where the front would gain most, under any budget and preference.
        training_budgets: number of tighter budgets per named one that the agent practices.
        lookahead: evaluations that may be out, so also how many workers can be busy. Choices depend on exactly the evaluations
            before those, not on the speed or the number of the workers. The loop hands out two for each worker, so that none
            waits.
        updates: gradient steps of the critics per finished episode; the actor makes half as many.
        batch: transitions per gradient step.
        planned: transitions that get new targets per finished episode.
        envelope: whether targets take the best over several preferences; off: the transition's own preference alone. Over three
            runs of 300 evaluations each for five budgets of ResNet-56 (results/budgets, results/budgets_bits) it cost 0.3 to 0.8
            points of mean top-1 with pruning and gained 0.003 to 0.006 of hypervolume; with bits it did nothing.
        alternatives: number of preferences among which the envelope chooses, the transition's own included.
        mixing: share of the envelope target; the rest is the plain target.
        relabel_preferences, relabel_budgets: whether stored episodes are practiced under other preferences and budgets. No gain
            beyond the spread of the seeds there, nor in queries under other budgets and preferences (results/ask).
        hidden: width of both hidden layers of all networks.
        critics: number of critics.
        additive: whether the critics' predictions are blended with those of a Gaussian process (additive.py), weighted by how
            well both predicted the latest episodes.
        sensitivity: whether the sensitivity of each choice is measured first (envs/sensitivity.py); the Gaussian process and the
            first policies use it. Off cost 0.4 and 2.6 points there, 0.012 and 0.019 of hypervolume (with the envelope and
            relabeling).
    """

    preference: tuple[float, ...] | None = None
    warmup: Count = 30
    candidates: Count = 128
    rounds: Annotated[int, Range(least=0)] = 4
    local: Share = 0.5
    unguided: Share = 0.5
    exploration_share: Share = 0.2
    training_budgets: Count = 16
    lookahead: Count = 8
    updates: Count = 20
    batch: Count = 64
    planned: Count = 48
    envelope: bool = False
    alternatives: Count = 4
    mixing: Share = 0.5
    relabel_preferences: bool = False
    relabel_budgets: bool = False
    hidden: Count = 64
    critics: Count = 4
    additive: bool = True
    sensitivity: bool = True

    def __post_init__(self) -> None:
        check_fields(self, OWNER)
        if self.preference is not None:
            check_preference(OWNER, self.preference)

    @property
    def needs_sensitivities(self) -> bool:
        """Whether the sensitivities of the choices must be measured first."""
        return self.sensitivity
