"""Options of the envelope DDPG agent."""

from __future__ import annotations

from dataclasses import dataclass, replace

from secateur.envs.core import InputError


@dataclass(frozen=True)
class EnvelopeDdpgConfig:
    """Options; every ingredient is a switch.

    Attributes:
        preference: weights of the reward's components, "top1" first, that most episodes search for; None: top-1 alone.
        warmup: evaluations before the networks choose: rule-based ones first, then random feasible ones.
        rules: how many policies of each rule (greedy where sensitivities are known, uniform, CLR-RNF) each budget starts with.
        candidates: policies that are rolled out or moved, and screened by the critics, for one evaluation; 1: no screening.
        rounds: how often the best candidates are moved on and screened, half as many moves each time as there were candidates.
        local: share of the choices that are made among moves of the best known policies; the others: rollouts and blind ones.
        blind: share of uniform and random policies beside the rollouts.
        screening: how the critics' predictions become one: "mean", "optimistic", "pessimistic" (one standard deviation up, down),
            "bound" (0 to 2 of them up, drawn for each choice; randomised upper confidence bounds, Berk et al. 2020), or
            "thompson" (one of the critics, drawn). Questions to a run's agent are answered by the mean.
        edge: whether candidates are bent to the edge of their budget when the preference is top-1 alone.
        elsewhere: share of the episodes that look where the front would gain most, under any budget and preference.
        noise, noise_decay: of the truncated normal exploration: noise * noise_decay ** (episodes after the warm-up).
        least_noise: where the decay ends.
        goals: how many tighter budgets per named one, and random preferences, the agent practices.
        lookahead: evaluations that may be out, so also how many workers can be busy. Choices depend on exactly what came before
            those: not on which worker is faster, nor on how many there are. The loop hands out two for each worker, so that none
            waits.
        updates: gradient steps of the critics per finished episode; the actor makes half as many.
        batch: transitions per gradient step.
        planned: transitions that get new targets per finished episode.
        memory: planned transitions that are kept, in episodes.
        alternatives: preferences w' among which the envelope chooses, the transition's own included.
        mixing: delta, the share of the envelope target; the rest is the plain one.
        ahead: "end" values a completion by the critics at its last step, "next" by those at the next step (bootstrapping).
        envelope: the sup over preferences; off: the transition's own alone. Over three runs of 300 evaluations each for five
            budgets of ResNet-56 (results/budgets, results/budgets_bits) it cost 0.3 to 0.8 points of mean top-1 with pruning and
            gained 0.003 to 0.006 of hypervolume; with bits it did nothing.
        relabel_preferences, relabel_budgets: practice stored episodes under other goals. No gain beyond the seeds there, nor in
            questions under other budgets and preferences (results/ask).
        homotopy: move from the vector loss to the scalarised loss; off: vector loss. Off until an ablation shows a gain.
        homotopy_episodes: after so many episodes the loss is the scalarised one.
        episodic: whether the stored end of an episode is one more candidate of the envelope. Off until an ablation shows a gain.
        log_odds: learn the log-odds of top-1; off: top-1 itself.
        hidden: width of both hidden layers of all networks.
        critics: how many.
        additive: blend the critics' predictions on complete sequences with an additive Gaussian process (additive.py), by how
            well both predicted the latest episodes.
        sensitivity: measure how far each choice by itself moves the model's outputs (envs/sensitivity.py), and build the additive
            model and the first policies on that. Off cost 0.4 and 2.6 points there, 0.012 and 0.019 of hypervolume
            (with the envelope and relabelling).
        ridge: variance of what that process leaves unexplained, above 0, in units of that of single entries.
        dropout: in the critics.
        smoothing: standard deviation of the noise on the actions that the critics learn from, before anything is known.
        sharpening: episodes n after which that noise has shrunk to 1 / sqrt(2); it goes with 1 / sqrt(1 + episodes / n).
        weight_decay: of the critics.
        actor_rate, critic_rate: learning rates of Adam.
        tau: of the soft target updates.
        target_noise: standard deviation of the target actor's first action, clipped at 2.5 of them.
        scalar: AMC's plain DDPG instead: one critic, one preference, bootstrapping, one update per step, no planning, and none of
            what else helps. It cost 6.7 and 14.0 points there, 0.07 and 0.08 of hypervolume.
    """

    preference: tuple[float, ...] | None = None
    warmup: int = 30
    rules: int = 1
    candidates: int = 128
    local: float = 0.5
    blind: float = 0.5
    rounds: int = 4
    screening: str = "mean"
    edge: bool = True
    elsewhere: float = 0.2
    noise: float = 0.5
    noise_decay: float = 0.95
    least_noise: float = 0.03
    goals: int = 16
    lookahead: int = 8
    updates: int = 20
    batch: int = 64
    planned: int = 48
    memory: int = 20
    alternatives: int = 4
    mixing: float = 0.5
    ahead: str = "end"
    envelope: bool = False
    relabel_preferences: bool = False
    relabel_budgets: bool = False
    homotopy: bool = False
    homotopy_episodes: int = 140
    episodic: bool = False
    log_odds: bool = True
    hidden: int = 64
    critics: int = 4
    additive: bool = True
    sensitivity: bool = True
    ridge: float = 0.1
    dropout: float = 0.0
    smoothing: float = 0.3
    sharpening: int = 30
    weight_decay: float = 1e-2
    actor_rate: float = 1e-3
    critic_rate: float = 1e-3
    tau: float = 0.02
    target_noise: float = 0.1
    scalar: bool = False

    def __post_init__(self):
        least = {
            "warmup": 1, "rules": 0, "candidates": 1, "noise": 0, "least_noise": 0, "goals": 1, "lookahead": 1, "updates": 1,
            "batch": 1, "planned": 1, "memory": 1, "alternatives": 1, "rounds": 0, "homotopy_episodes": 1, "hidden": 1,
            "critics": 1, "weight_decay": 0, "sharpening": 1, "smoothing": 0, "target_noise": 0,
        }  # fmt: skip
        for name, value in least.items():
            if not getattr(self, name) >= value:
                raise InputError(f"`{name}` of envelope DDPG must be at least {value}, but got {getattr(self, name)}.")
        for name in ("local", "blind", "elsewhere", "mixing"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"`{name}` of envelope DDPG must be a share in [0, 1], but got {getattr(self, name)}.")
        for name in ("noise_decay", "actor_rate", "critic_rate", "tau"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"`{name}` of envelope DDPG must be in (0, 1], but got {getattr(self, name)}.")
        if not 0 <= self.dropout < 1:
            raise InputError(f"`dropout` of envelope DDPG must be in [0, 1), but got {self.dropout}.")
        if not self.ridge > 0:
            raise InputError(f"`ridge` of envelope DDPG must be above 0, but got {self.ridge}.")
        choices = {"screening": ("mean", "optimistic", "pessimistic", "thompson", "bound"), "ahead": ("end", "next")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise InputError(f"`{name}` of envelope DDPG must be one of {', '.join(known)}, but got {getattr(self, name)}.")
        if self.preference is not None and not (min(self.preference, default=0) >= 0 and sum(self.preference) > 0):
            raise InputError(
                f"`preference` of envelope DDPG must be weights >= 0, not all zero, but got {list(self.preference)}."
            )

    @property
    def needs_sensitivities(self) -> bool:
        """Whether the choices' sensitivities must be measured first."""
        return self.sensitivity and not self.scalar

    def resolved(self, num_steps: int) -> EnvelopeDdpgConfig:
        """Return what is really used: `scalar` switches everything off that AMC does not have."""
        if not self.scalar:
            return self
        return replace(
            self, rules=0, candidates=1, local=0.0, blind=0.0, elsewhere=0.0, edge=False, updates=num_steps, planned=num_steps,
            alternatives=1, ahead="next", envelope=False, relabel_preferences=False, relabel_budgets=False, homotopy=False,
            episodic=False, log_odds=False, critics=1, additive=False, sensitivity=False, rounds=0, dropout=0.0, smoothing=0.0,
            weight_decay=0.0, target_noise=0.0,
        )  # fmt: skip
