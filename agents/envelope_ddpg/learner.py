"""From finished episodes to planned targets to gradient steps.

The critics see *afterstates*: the sequence with the current action filled in. At the last step the sequence is complete. It alone
decides the accuracy, so all other inputs are zero there: the critics' values at the last step predict the accuracy of policies.

The critics predict *scores*: log-odds of qualities. Compression changes log-odds by a similar amount everywhere, but top-1 little
near the dense model and much under tight budgets, where large errors would dominate all others.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from secateur.agents.envelope_ddpg.additive import AdditiveModel
from secateur.agents.envelope_ddpg.config import EnvelopeDdpgConfig
from secateur.agents.envelope_ddpg.networks import Mlp, follow
from secateur.agents.envelope_ddpg.planning import Transitions, plan_targets
from secateur.agents.envelope_ddpg.replay import Memory, Pool, sample_preferences
from secateur.envs.core import ActionSpace, Budget

ENOUGH = 4
"""Episodes before anything is learned."""

POOLED = 20
"""Planned transitions that are kept, in episodes."""

RIDGE = 0.1
"""Variance of what the additive model leaves unexplained, in units of that of single entries."""

SMOOTHING, SHARPENING = 0.3, 30
"""Standard deviation of the noise on the actions that the critics learn from: SMOOTHING / sqrt(1 + episodes / SHARPENING)."""

LEARNING_RATE, WEIGHT_DECAY, TAU = 1e-3, 1e-2, 0.02
"""Of Adam, for actor and critics; of the critics; of the soft target updates."""

EDGE = 0.01
"""Keeps the log-odds of 0 and 100 % finite."""

RECENT = 40
"""Episodes whose prediction errors weight the critics against the additive model."""


class Learner:
    """The networks and what they learn from.

    Args:
        config: options.
        space: of the environment.
        budgets: training budgets; the first ones are those of the search.
        preference: the main one.
        rng: every random choice.
    """

    def __init__(
        self,
        config: EnvelopeDdpgConfig,
        space: ActionSpace,
        budgets: Sequence[Budget],
        preference: np.ndarray,
        rng: np.random.Generator,
    ):
        self.config, self.space, self.budgets, self.preference, self.rng = config, space, list(budgets), preference, rng
        self.sensitivities = space.sensitivities if config.sensitivity else None
        self.step_of, self.kind_of = np.nonzero(space.used)  # of every entry of a sequence that has an effect
        inputs = 3 * len(self.step_of) + space.observation_dim + len(space.objectives)
        self.critic = Mlp(config.critics, inputs, 1, config.hidden, rng)
        self.actor = Mlp(1, inputs, space.action_dim, config.hidden, rng)
        self.target_critic, self.target_actor = copy.deepcopy(self.critic), copy.deepcopy(self.actor)
        self.critic_optimizer = torch.optim.AdamW(self.critic.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), LEARNING_RATE, fused=True)
        self.memories: list[Memory] = []
        self.pool = Pool(POOLED * config.planned)
        self.center, self.scale = float(_logit(np.array(space.dense_quality / 2))), 1.0  # of scores
        self.spread = 1.0  # of qualities
        self.errors: list[np.ndarray] = []  # of the critics and the additive model, on the scores of episodes that were new, (2,)
        self._steps, self._kinds = torch.from_numpy(self.step_of), torch.from_numpy(self.kind_of)
        self._ends = torch.empty(0, inputs)  # the critics' inputs at the end of every episode
        self._scores = torch.empty(0)  # of every episode
        self._additive_model: AdditiveModel | None = None  # of all episodes; fitted when it is needed

    # ---------------------------------------------------------------------------------------------------------- inputs

    def features(
        self, sequences: np.ndarray, steps: np.ndarray, observations: np.ndarray, preferences: np.ndarray, after: bool
    ) -> Tensor:
        """Return the inputs of a network, (n, inputs) float32.

        Args:
            sequences: (n, num_steps, action_dim); later steps are ignored.
            steps: (n,) the current step.
            observations: before that step, (n, observation_dim).
            preferences: (n, num_objectives).
            after: whether the current action counts as taken (critics) or not (actor).
        """
        taken = self.step_of <= steps[:, None] if after else self.step_of < steps[:, None]
        entries = np.where(taken, 2 * sequences[:, self.step_of, self.kind_of] - 1, 0.0)
        rest = np.hstack([2 * observations - 1, preferences])
        if after:
            rest = np.where((steps == self.space.num_steps - 1)[:, None], 0.0, rest)
        squares = np.where(taken, 1.5 * entries**2 - 0.5, 0.0)
        return torch.from_numpy(np.hstack([entries, squares, taken, rest]).astype(np.float32))

    def with_actions(self, inputs: Tensor, steps: Tensor, actions: Tensor) -> Tensor:
        """Return the critics' inputs with other current actions, (n, action_dim): gradients flow to the actions."""
        entries = len(self.step_of)
        here = self._steps == steps[:, None]
        changed = 2 * actions[:, self._kinds] - 1
        values = torch.where(here, changed, inputs[:, :entries])
        squares = torch.where(here, 1.5 * changed**2 - 0.5, inputs[:, entries : 2 * entries])
        return torch.cat([values, squares, inputs[:, 2 * entries :]], dim=1)

    # ----------------------------------------------------------------------------------------------------- predictions

    def actions(
        self, observations: np.ndarray, sequences: np.ndarray, step: int, preferences: np.ndarray, target: bool = False
    ) -> np.ndarray:
        """Return the actor's actions, (n, action_dim), at one step of n episodes."""
        steps = np.full(len(sequences), step)
        actor = self.target_actor if target else self.actor
        with torch.inference_mode():
            raw = actor(self.features(sequences, steps, observations, preferences, after=False))
            return torch.sigmoid(raw)[0].numpy()

    def predictions(self, sequences: np.ndarray, target: bool = False) -> np.ndarray:
        """Return the quality that each critic expects of complete sequences, (critics, n).

        With `additive`, they are blended with the additive model: the one with the smaller errors on the latest episodes gets the
        larger share. The standard deviation of the additive model is spread over the critics, from pessimistic to optimistic.
        """
        predictions = self._critics(sequences, target)
        if self.errors:
            critics, additive = np.square(self.errors[-RECENT:]).mean(axis=0) + 1e-12
            share = critics / (critics + additive)
            mean, deviation = self._additive(sequences)
            predictions = (1 - share) * predictions + share * (mean + _offsets(len(predictions))[:, None] * deviation)
        return (1 + 2 * EDGE) / (1 + np.exp(-predictions)) - EDGE

    def _critics(self, sequences: np.ndarray, target: bool = False) -> np.ndarray:
        """Return the scores that each critic expects of complete sequences, (critics, n)."""
        predictions = self._evaluate(self._complete(sequences), target)
        if self.memories:
            # Noise on the actions shifts the critics; their mean error on the evaluated sequences is taken back.
            predictions += (self._scores.numpy() - self._evaluate(self._ends, target)).mean(axis=1, keepdims=True)
        return predictions

    def _additive(self, sequences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the scores that the additive model expects of complete sequences, and their standard deviations, (n,)."""
        used = self.space.used
        if self._additive_model is None:
            evaluated = np.stack([memory.sequence[used] for memory in self.memories])
            scores = self._scores.numpy().astype(float)
            self._additive_model = AdditiveModel(evaluated, scores, self.kind_of, RIDGE, self.sensitivities)
        return self._additive_model.predict(np.asarray(sequences[:, used], float))

    def _complete(self, sequences: np.ndarray) -> Tensor:
        """Return the critics' inputs at the end of an episode, (n, inputs): the sequence and nothing else."""
        count = len(sequences)
        nothing = np.zeros((count, self.space.observation_dim)), np.zeros((count, len(self.space.objectives)))
        return self.features(sequences, np.full(count, self.space.num_steps - 1), *nothing, after=True)

    def _evaluate(self, inputs: Tensor, target: bool) -> np.ndarray:
        """Return the scores of inputs, (critics, n)."""
        critic = self.target_critic if target else self.critic
        with torch.inference_mode():
            return self.center + self.scale * critic(inputs)[..., 0].numpy()

    # ---------------------------------------------------------------------------------------------------- planning

    def test(self, memory: Memory) -> None:
        """Note how well a new episode is predicted; to be called before `add`."""
        if self.config.additive and len(self.memories) >= ENOUGH:
            predicted = self._critics(memory.sequence[None]).mean(), self._additive(memory.sequence[None])[0][0]
            self.errors.append(np.array(predicted) - _logit(memory.reward[0]))

    def add(self, memory: Memory) -> None:
        """Remember an episode."""
        self.memories.append(memory)
        self._additive_model = None
        self._ends = torch.cat([self._ends, self._complete(memory.sequence[None])])
        self._scores = torch.cat([self._scores, _float(_logit(memory.reward[:1]))])
        self.center, self.scale = float(self._scores.mean()), max(float(self._scores.std(correction=0)), 1e-3)
        self.spread = max(float(np.std([memory.reward[0] for memory in self.memories])), 1e-3)

    def plan(self, count: int) -> None:
        """Compute the targets of `count` transitions under training budgets and preferences, and add them to the pool."""
        config, transitions = self.config, self._transitions(count)
        targets, slopes = plan_targets(
            self.space, self.rng, transitions,
            policy=partial(self.actions, target=True),
            predict=partial(self.predictions, target=True),
            alternatives=config.alternatives if config.envelope else 1,
            mixing=config.mixing,
        )  # fmt: skip
        seen = transitions.sequences, transitions.steps, transitions.observations, transitions.preferences
        self.pool.add(
            before=self.features(*seen, after=False),
            after=self.features(*seen, after=True),
            steps=torch.from_numpy(transitions.steps),
            preferences=_float(transitions.preferences),
            targets=_float(targets),
            slopes=_float(slopes),
        )

    def _transitions(self, count: int) -> Transitions:
        """Return random steps of stored episodes, under the budgets and preferences that are practiced."""
        rng = self.rng
        memories = [self.memories[i] for i in rng.integers(len(self.memories), size=count)]
        steps = rng.integers(max(self.space.num_steps - 1, 1), size=count)
        preferences = self._practiced_preferences(memories)
        relabel = self.config.relabel_budgets
        budgets = [self.budgets[m.budgets[rng.integers(len(m.budgets)) if relabel else 0]] for m in memories]
        observations = np.stack([m.observations[step] for m, step in zip(memories, steps, strict=True)])
        observations = self.space.with_limits(observations, budgets)
        return Transitions(np.stack([m.sequence for m in memories]), steps, observations, preferences, budgets)

    def _practiced_preferences(self, memories: Sequence[Memory]) -> np.ndarray:
        """Return half the main preference, half random ones; without relabeling, those of the episodes."""
        if not self.config.relabel_preferences:
            return np.stack([m.preference for m in memories])
        drawn = sample_preferences(self.rng, len(memories), len(self.space.objectives))
        main = self.rng.random(len(memories)) < 0.5
        return np.where(main[:, None], self.preference, drawn)

    # ---------------------------------------------------------------------------------------------------- learning

    def learn(self, updates: int) -> None:
        """Take gradient steps on the pool and on known returns."""
        for update in range(updates):
            self.update_critics()
            if len(self.pool) and update % 2:
                self.update_actor()
                follow(self.target_actor, self.actor, TAU)
            follow(self.target_critic, self.critic, TAU)

    def update_critics(self) -> None:
        """Take one step towards known returns and planned targets.

        The costs of a completion are known, so only the quality part of the envelope's vector loss has a gradient.
        """
        chosen = torch.from_numpy(self.rng.integers(len(self.memories), size=self.config.batch))
        values = self.critic(self._smoothed(self._ends[chosen]))[..., 0]
        loss = (values - (self._scores[chosen] - self.center) / self.scale).square().mean()
        if len(self.pool):
            rows = self.pool.sample(self.rng, self.config.batch)
            quality = _quality(self.center + self.scale * self.critic(self._smoothed(rows["after"]))[..., 0])
            loss = loss + (rows["targets"] / self.spread - quality / self.spread).square().mean()
        self.critic_optimizer.zero_grad()
        loss.backward()
        self.critic_optimizer.step()

    def _smoothed(self, inputs: Tensor) -> Tensor:
        """Return inputs of the critics with noise on the actions: otherwise they overfit a few noisy scores."""
        entries = len(self.step_of)
        taken = inputs[:, 2 * entries : 3 * entries]
        noise = torch.from_numpy(self.rng.standard_normal((len(inputs), entries), np.float32))
        # Like the bandwidth of a density estimate, the noise shrinks as episodes come in.
        spread = SMOOTHING * (1 + len(self.memories) / SHARPENING) ** -0.5
        noisy = inputs[:, :entries] + 2 * spread * noise * taken
        return torch.cat([noisy, (1.5 * noisy**2 - 0.5) * taken, inputs[:, 2 * entries :]], dim=1)

    def update_actor(self) -> None:
        """Take one step along the deterministic policy gradient: the critics' for it, the simulated slopes for the costs."""
        rows = self.pool.sample(self.rng, self.config.batch)
        actions = torch.sigmoid(self.actor(rows["before"])[0])
        inputs = self.with_actions(rows["after"], rows["steps"], actions)
        quality = _quality(self.center + self.scale * self.critic(inputs)[..., 0]).mean(dim=0)
        gain = (rows["preferences"][:, 0] * quality - (rows["slopes"] * actions).sum(-1)) / self.spread
        self.actor_optimizer.zero_grad()
        (-gain.mean()).backward(inputs=list(self.actor.parameters()))
        self.actor_optimizer.step()

    # ------------------------------------------------------------------------------------------------------- storage

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor that learning changes, by name."""
        tensors = {f"{part}.{name}": value for part, net in self._networks().items() for name, value in net.state_dict().items()}
        for part, optimizer in self._optimizers().items():
            for index, moments in optimizer.state_dict()["state"].items():
                tensors |= {f"{part}.{index}.{name}": value for name, value in moments.items()}
        return tensors | {f"pool.{name}": column for name, column in self.pool.columns.items()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` returned."""

        def below(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

        for part, network in self._networks().items():
            network.load_state_dict(below(f"{part}."))
        for part, optimizer in self._optimizers().items():
            moments: dict[int, dict[str, Tensor]] = {}
            for key, value in below(f"{part}.").items():
                index, _, name = key.partition(".")
                moments.setdefault(int(index), {})[name] = value
            optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
        self.pool.columns = below("pool.")

    def _networks(self) -> dict[str, nn.Module]:
        return {
            "critic": self.critic, "actor": self.actor, "target_critic": self.target_critic, "target_actor": self.target_actor,
        }  # fmt: skip

    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"critic_optimizer": self.critic_optimizer, "actor_optimizer": self.actor_optimizer}


def _logit(quality: np.ndarray) -> np.ndarray:
    """Return log-odds, bounded as if 1 of 100 more images were right and another one wrong."""
    share = (np.clip(quality, 0, 1) + EDGE) / (1 + 2 * EDGE)
    return np.log(share / (1 - share))


def _quality(scores: Tensor) -> Tensor:
    """Return the quality of scores: the inverse of `_logit`."""
    return torch.sigmoid(scores) * (1 + 2 * EDGE) - EDGE


def _offsets(critics: int) -> np.ndarray:
    """Return each critic's distance from the mean in standard deviations, (critics,): even, with mean 0 and variance 1."""
    evenly = np.linspace(-1, 1, critics) if critics > 1 else np.zeros(1)
    return evenly / max(evenly.std(), 1e-9)


def _float(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(values, np.float32))
