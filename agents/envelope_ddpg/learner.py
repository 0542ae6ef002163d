"""From finished episodes to planned targets to gradient steps.

The critics look at *afterstates*: the sequence with the action at hand filled in. At the last step the sequence is complete, and
nothing else decides the accuracy, so everything else is zeroed there: those values are a model of the accuracy of policies.

What they say is a *score*: with `log_odds`, the log-odds of top-1. Compression moves log-odds by nearly the same everywhere, but
top-1 little near the dense model and much under tight budgets, whose errors would drown all others.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from secateur.agents.envelope_ddpg.additive import AdditiveModel
from secateur.agents.envelope_ddpg.config import EnvelopeDdpgConfig
from secateur.agents.envelope_ddpg.networks import Mlp, follow
from secateur.agents.envelope_ddpg.replay import Memory, Pool, sample_preferences
from secateur.agents.envelope_ddpg.targets import critic_loss, envelope_target, pessimistic
from secateur.envs.core import ActionSpace, Budget

ENOUGH = 4
"""Episodes before anything is learned."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch with one thread: for networks this small more cost time, workers need the cores, and sums stay the same."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Learner:
    """The networks and what they learn from.

    Args:
        config: resolved options.
        space: of the environment.
        goals: budgets that are practiced; the first ones are those of the search.
        preference: the main one.
        rng: every random choice.
    """

    def __init__(
        self,
        config: EnvelopeDdpgConfig,
        space: ActionSpace,
        goals: Sequence[Budget],
        preference: np.ndarray,
        rng: np.random.Generator,
    ):
        self.config, self.space, self.goals, self.preference, self.rng = config, space, list(goals), preference, rng
        self.sensitivities = space.sensitivities if config.sensitivity else None
        self.step_of, self.kind_of = np.nonzero(space.used)  # of every entry of a sequence that has an effect
        entries, objectives = len(self.step_of), len(space.objectives)
        inputs = 3 * entries + space.observation_dim + objectives
        self.critic = Mlp(config.critics, inputs, 1, config.hidden, rng, config.dropout)
        self.actor = Mlp(1, inputs, space.action_dim, config.hidden, rng)
        self.target_critic, self.target_actor = copy.deepcopy(self.critic), copy.deepcopy(self.actor)
        self.critic_optimizer = torch.optim.AdamW(
            self.critic.parameters(), config.critic_rate, weight_decay=config.weight_decay, fused=True
        )
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), config.actor_rate, fused=True)
        self.memories: list[Memory] = []
        self.pool = Pool(config.memory * config.planned)
        self.center, self.scale = float(self._score(np.array(space.dense_top1 / 2))), 1.0  # of scores
        self.spread = 1.0  # of top-1
        self._steps, self._kinds = torch.from_numpy(self.step_of), torch.from_numpy(self.kind_of)
        self._ends = torch.empty(0, inputs)  # what the critics see at the end of every episode
        self._scores = torch.empty(0)  # of every episode
        self._model: AdditiveModel | None = None  # of all episodes, once it is asked
        self.surprises: list[np.ndarray] = []  # by how much the networks and the additive model missed scores of new episodes

    # ---------------------------------------------------------------------------------------------------------- inputs

    def features(self, sequences: np.ndarray, steps: np.ndarray, observations: np.ndarray, preferences: np.ndarray, after: bool):
        """Return what a network sees, (n, inputs) float32.

        Args:
            sequences: (n, num_steps, action_dim); what is ahead is ignored.
            steps: (n,) the step at hand.
            observations: before that step, (n, observation_dim).
            preferences: (n, num_objectives).
            after: whether the action at hand counts as taken (critics) or not (actor).
        """
        taken = self.step_of <= steps[:, None] if after else self.step_of < steps[:, None]
        entries = np.where(taken, 2 * sequences[:, self.step_of, self.kind_of] - 1, 0.0)
        rest = np.hstack([2 * observations - 1, preferences])
        if after:
            rest = np.where((steps == self.space.num_steps - 1)[:, None], 0.0, rest)
        squares = np.where(taken, 1.5 * entries**2 - 0.5, 0.0)
        return torch.from_numpy(np.hstack([entries, squares, taken, rest]).astype(np.float32))

    def with_actions(self, inputs: Tensor, steps: Tensor, actions: Tensor) -> Tensor:
        """Return the critics' inputs with other actions, (n, action_dim), at the steps at hand: gradients flow to the actions."""
        entries = len(self.step_of)
        here = self._steps == steps[:, None]
        wanted = 2 * actions[:, self._kinds] - 1
        values = torch.where(here, wanted, inputs[:, :entries])
        squares = torch.where(here, 1.5 * wanted**2 - 0.5, inputs[:, entries : 2 * entries])
        return torch.cat([values, squares, inputs[:, 2 * entries :]], dim=1)

    # ------------------------------------------------------------------------------------------------------- answers

    def actions(self, observations, sequences, step, preferences, target: bool = False) -> np.ndarray:
        """Return the actor's actions, (n, action_dim), at one step of n episodes."""
        steps = np.full(len(sequences), step)
        actor = self.target_actor if target else self.actor
        with torch.inference_mode():
            raw = actor(self.features(sequences, steps, observations, preferences, after=False))
            return torch.sigmoid(raw)[0].numpy()

    def predictions(self, sequences: np.ndarray, target: bool = False) -> np.ndarray:
        """Return the top-1 of complete sequences as each critic expects it, (critics, n).

        With `additive`, they are blended with the additive model: more of whichever has told the latest episodes better, before
        they were learned from. What that model is unsure of, each critic sees in its own way, from pessimistic to optimistic.
        """
        predictions = self._networks(sequences, target)
        if self.surprises:
            networks, additive = np.square(self.surprises[-RECENT:]).mean(axis=0) + 1e-12
            share = networks / (networks + additive)
            mean, deviation = self._additive(sequences)
            predictions = (1 - share) * predictions + share * (mean + _views(len(predictions))[:, None] * deviation)
        return self._top1(predictions)

    def _networks(self, sequences: np.ndarray, target: bool = False) -> np.ndarray:
        """Return the scores of complete sequences as each critic expects them, (critics, n)."""
        predictions = self._evaluate(self._complete(sequences), target)
        if self.memories:
            # Blurred actions cost accuracy on average; what the critics miss on known sequences is given back.
            predictions += (self._scores.numpy() - self._evaluate(self._ends, target)).mean(axis=1, keepdims=True)
        return predictions

    def _additive(self, sequences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the scores of complete sequences as the additive model foretells them, and how unsure it is of each, (n,)."""
        used = self.space.used
        if self._model is None:
            known = np.stack([memory.sequence[used] for memory in self.memories])
            scores = self._scores.numpy().astype(float)
            self._model = AdditiveModel(known, scores, self.kind_of, self.config.ridge, self.sensitivities)
        return self._model.predict(np.asarray(sequences[:, used], float))

    def _complete(self, sequences: np.ndarray) -> Tensor:
        """Return what the critics see at the end of an episode, (n, inputs): the sequence and nothing else."""
        count = len(sequences)
        nothing = np.zeros((count, self.space.observation_dim)), np.zeros((count, len(self.space.objectives)))
        return self.features(sequences, np.full(count, self.space.num_steps - 1), *nothing, after=True)

    def _evaluate(self, inputs: Tensor, target: bool) -> np.ndarray:
        """Return the scores of what the critics see, (critics, n)."""
        critic = self.target_critic if target else self.critic
        with torch.inference_mode():
            return self.center + self.scale * critic(inputs)[..., 0].numpy()

    def _score(self, top1: np.ndarray) -> np.ndarray:
        """Return log-odds, bounded as if 1 of 100 more images were right and another one wrong; without `log_odds`, top-1."""
        if not self.config.log_odds:
            return top1
        share = (np.clip(top1, 0, 1) + EDGE) / (1 + 2 * EDGE)
        return np.log(share / (1 - share))

    def _top1(self, scores):
        """Return what `_score` has turned into scores: arrays or tensors."""
        if not self.config.log_odds:
            return scores
        if isinstance(scores, Tensor):
            return torch.sigmoid(scores) * (1 + 2 * EDGE) - EDGE
        return (1 + 2 * EDGE) / (1 + np.exp(-scores)) - EDGE

    # ---------------------------------------------------------------------------------------------------- planning

    def add(self, memory: Memory) -> None:
        """Remember an episode, and how well it was predicted."""
        if self.config.additive and len(self.memories) >= ENOUGH:
            predicted = self._networks(memory.sequence[None]).mean(), self._additive(memory.sequence[None])[0][0]
            self.surprises.append(np.array(predicted) - self._score(memory.reward[0]))
        self.memories.append(memory)
        self._model = None
        self._ends = torch.cat([self._ends, self._complete(memory.sequence[None])])
        self._scores = torch.cat([self._scores, _float(self._score(memory.reward[:1]))])
        self.center, self.scale = float(self._scores.mean()), max(float(self._scores.std(correction=0)), 1e-3)
        self.spread = max(float(np.std([memory.reward[0] for memory in self.memories])), 1e-3)

    def plan(self, count: int) -> None:
        """Compute envelope targets of `count` transitions under practiced goals, and pool them."""
        config, space, rng = self.config, self.space, self.rng
        objectives = len(space.objectives)
        chosen = rng.integers(len(self.memories), size=count)
        memories = [self.memories[i] for i in chosen]
        steps = rng.integers(max(space.num_steps - 1, 1), size=count)  # the last step needs no plan: its return is known
        preferences = self._goals_preferences(memories)
        goals = [m.goals[rng.integers(len(m.goals)) if config.relabel_budgets else 0] for m in memories]
        budgets = [self.goals[goal] for goal in goals]
        sequences = np.stack([m.sequence for m in memories])
        observations = space.with_limits(np.stack([m.observations[s] for m, s in zip(memories, steps, strict=True)]), budgets)

        # Rows: K completions of every (s, a), under w'_0 = w, w'_1 ...; then two of every s with shifted actions.
        k = config.alternatives if config.envelope else 1
        others = sample_preferences(rng, count * k, objectives).reshape(count, k, objectives)
        others[:, 0] = preferences
        shifted = np.flatnonzero((preferences[:, 1:] > 0).any(axis=1))
        signs = rng.choice([-1.0, 1.0], size=(len(shifted), space.action_dim))
        owner = np.concatenate([np.repeat(np.arange(count), k), shifted, shifted])
        row_preferences = np.concatenate([others.reshape(-1, objectives), preferences[shifted], preferences[shifted]])
        starts = steps[owner] + 1
        starts[count * k :] -= 1
        shift = np.zeros((len(owner), space.action_dim))
        shift[count * k :] = np.concatenate([SHIFT * signs, -SHIFT * signs])
        noise = np.clip(rng.normal(size=(len(owner), space.action_dim)), -2.5, 2.5) * config.target_noise
        noise[count * k :] = 0

        def act(seen, so_far, step, rows):
            wanted = self.actions(seen, so_far, step, row_preferences[rows], target=True)
            first = (starts[rows] == step)[:, None]
            return np.clip(wanted + np.where(first, noise[rows] + shift[rows], 0), 0, 1)

        ahead = space.simulate(act, [budgets[i] for i in owner], sequences[owner], starts)
        completed, costs = ahead.sequences[: count * k], ahead.costs[: count * k]
        if config.ahead == "end":
            top1 = self.predictions(completed, target=True)
        else:
            seen = ahead.observations[np.arange(count * k), starts[: count * k]]
            inputs = self.features(completed, starts[: count * k], seen, row_preferences[: count * k], after=True)
            top1 = self._top1(self._evaluate(inputs, target=True))
        vectors = pessimistic(top1, costs, np.repeat(preferences, k, axis=0)).reshape(count, k, objectives)
        if config.episodic:
            returns = np.stack([m.reward for m in memories])
            vectors = np.concatenate([vectors, returns[:, None]], axis=1)
        low, high = ahead.costs[count * k + len(shifted) :], ahead.costs[count * k : count * k + len(shifted)]
        slopes = np.zeros((count, space.action_dim))  # d(w_costs @ costs) / d action
        slopes[shifted] = signs * ((high - low) * preferences[shifted, 1:]).sum(axis=1, keepdims=True) / (2 * SHIFT)
        seen = sequences, steps, observations, preferences
        self.pool.add(
            before=self.features(*seen, after=False),
            after=self.features(*seen, after=True),
            steps=torch.from_numpy(steps),
            preferences=_float(preferences),
            targets=_float(envelope_target(vectors, preferences, config.mixing)),
            costs=_float(costs.reshape(count, k, -1)[:, 0]),
            slopes=_float(slopes),
        )

    def _goals_preferences(self, memories: Sequence[Memory]) -> np.ndarray:
        """Half the main preference, half random ones; without relabelling, those of the episodes."""
        if not self.config.relabel_preferences:
            return np.stack([m.preference for m in memories])
        drawn = sample_preferences(self.rng, len(memories), len(self.space.objectives))
        main = self.rng.random(len(memories)) < 0.5
        return np.where(main[:, None], self.preference, drawn)

    # ---------------------------------------------------------------------------------------------------- learning

    def learn(self, updates: int, scalarized: float) -> None:
        """Take gradient steps on the pool and on known returns."""
        for update in range(updates):
            self.update_critics(scalarized)
            if len(self.pool) and update % 2:
                self.update_actor()
                follow(self.target_actor, self.actor, self.config.tau)
            follow(self.target_critic, self.critic, self.config.tau)

    def update_critics(self, scalarized: float) -> None:
        """Take one step towards known returns and planned targets."""
        known = torch.from_numpy(self.rng.integers(len(self.memories), size=self.config.batch))
        values = self.critic(self._smoothed(self._ends[known]), drop=True)[..., 0]
        loss = (values - (self._scores[known] - self.center) / self.scale).square().mean()
        if len(self.pool):
            rows = self.pool.sample(self.rng, self.config.batch)
            scores = self.center + self.scale * self.critic(self._smoothed(rows["after"]), drop=True)[..., 0]
            vectors = self._top1(scores) / self.spread, rows["costs"] / self.spread, rows["targets"] / self.spread
            loss = loss + critic_loss(*vectors, rows["preferences"], scalarized)
        self.critic_optimizer.zero_grad()
        loss.backward()
        self.critic_optimizer.step()

    def _smoothed(self, inputs: Tensor) -> Tensor:
        """Return inputs of the critics whose actions are blurred: a few noisy scores must not be learned by heart."""
        if not self.config.smoothing:
            return inputs
        entries = len(self.step_of)
        taken = inputs[:, 2 * entries : 3 * entries]
        noise = torch.from_numpy(self.rng.standard_normal((len(inputs), entries), np.float32))
        # As much as is known allows: the spread of a density estimate shrinks as episodes come in.
        spread = self.config.smoothing * (1 + len(self.memories) / self.config.sharpening) ** -0.5
        blurred = inputs[:, :entries] + 2 * spread * noise * taken
        return torch.cat([blurred, (1.5 * blurred**2 - 0.5) * taken, inputs[:, 2 * entries :]], dim=1)

    def update_actor(self) -> None:
        """Take one step along the deterministic policy gradient: the critics' for top-1, the simulated slopes for the costs."""
        rows = self.pool.sample(self.rng, self.config.batch)
        actions = torch.sigmoid(self.actor(rows["before"])[0])
        inputs = self.with_actions(rows["after"], rows["steps"], actions)
        top1 = self._top1(self.center + self.scale * self.critic(inputs)[..., 0]).mean(dim=0)
        gain = (rows["preferences"][:, 0] * top1 - (rows["slopes"] * actions).sum(-1)) / self.spread
        self.actor_optimizer.zero_grad()
        (-gain.mean()).backward(inputs=list(self.actor.parameters()))
        self.actor_optimizer.step()


EDGE = 0.01
"""What keeps the log-odds of 0 and 100 % finite."""

RECENT = 40
"""Episodes whose scores the networks and the additive model were to predict."""

SHIFT = 0.1
"""By how much an action is moved, both ways, to see how the costs of the completion follow."""


def _views(critics: int) -> np.ndarray:
    """Return how many standard deviations above the mean each critic looks, (critics,): evenly apart, 0 and 1 on average."""
    evenly = np.linspace(-1, 1, critics) if critics > 1 else np.zeros(1)
    return evenly / max(evenly.std(), 1e-9)


def _float(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(values, np.float32))
