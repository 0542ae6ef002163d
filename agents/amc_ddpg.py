"""AMC's agent: deep deterministic policy gradient on one scalar reward, the layers of the network being the steps.

Source: He et al. 2018 (AMC), arXiv:1802.03494, and the authors' code; DDPG: Lillicrap et al. 2016, arXiv:1509.02971. Numbers of
equations are ours. With actor mu, critic Q and their slowly updated copies mu' and Q':

    a_t ~ N(mu(s_t), sigma^2), truncated to [0, 1],    sigma = 0.5 * 0.95 ** (episodes after the warm-up)          (1)
    y_t = R - b + Q'(s_t+1, mu'(s_t+1)),    without the last term at the last step                                 (2)
    the critic descends mean (y_t - Q(s_t, a_t))^2,    the actor ascends mean Q(s_t, mu(s_t))                      (3)
    Q' and mu' move by a share tau towards Q and mu                                                                (4)

R is the reward of the whole episode, given to each of its steps; the discount is 1. b is a moving average of rewards. After every
episode there is one gradient step per layer. Actions are stored as they were executed: the environment projects them onto the
budget, layer by layer, as AMC's algorithm 1 does.

Where we differ and why:

1. The state is the observation of our environment (envs/observation.py), and a step has one action for each kind of choice (prune
   ratio, weight bits, activation bits). AMC has 11 features and one prune ratio.
2. One run searches several budgets in turn with the same networks: the limits are part of the observation. AMC searches one.
3. The reward is the quality, which differs from AMC's -error by a constant. Lower costs than the budget asks for earn nothing.
4. The warm-up has 30 episodes instead of 100, because a search has 200 to 300 of them instead of 400.
5. Evaluations run in parallel: episodes are learned from in the order in which they were asked for, and a choice does not know
   the last `lookahead` of them (episode_queue.py).
6. Failed and early stopped episodes are not learned from.
7. The critic sees state and action side by side. AMC's code adds their first layers' outputs, which is the same function.
8. b is a moving average of the mean rewards of the batches, as in AMC's code. The paper says: of previous rewards.

Results with the label "scalar, as in AMC" (results/budgets, results/budgets_bits) are those of an earlier implementation with
smaller networks and a random warm-up: 6.7 and 14.0 points of mean top-1 below envelope DDPG after 300 evaluations.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.agents.amc_ddpg_config import AmcDdpgConfig
from secateur.agents.core import SequenceActor, fully_scored
from secateur.agents.envelope_ddpg.networks import follow, one_thread
from secateur.agents.episode_queue import EpisodeQueue
from secateur.agents.noise import truncated_normal
from secateur.envs.core import ActionSpace, Actor, Budget, Episode


@dataclass(frozen=True, eq=False)
class Trajectory:
    """The steps of one episode.

    Attributes:
        observations: (num_steps + 1, observation_dim).
        actions: executed, (num_steps, action_dim) in [0, 1].
        reward: quality of the episode; 0 before it is evaluated.
    """

    observations: np.ndarray
    actions: np.ndarray
    reward: float = 0.0


class AmcDdpg:
    """AMC's agent for one or several budgets; see the module."""

    def __init__(self, config: AmcDdpgConfig, space: ActionSpace, budgets: Sequence[Budget], rng: np.random.Generator):
        self.config, self.space, self.budgets, self.rng = config, space, tuple(budgets), rng
        states, actions = space.observation_dim, space.action_dim
        self.actor = nn.Sequential(*_layers(states, actions, config.hidden, rng), nn.Sigmoid())
        self.critic = nn.Sequential(*_layers(states + actions, 1, config.hidden, rng))
        self.target_actor, self.target_critic = copy.deepcopy(self.actor), copy.deepcopy(self.critic)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), config.actor_rate, fused=True)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), config.critic_rate, fused=True)
        self.baseline: float | None = None
        self.queue: EpisodeQueue[Trajectory, Trajectory] = EpisodeQueue(config.lookahead)
        self.replay: list[tuple[Any, ...]] = []
        """Transitions: state, action, reward, next state, whether there is a next step."""

    def ask(self, count: int) -> list[SequenceActor]:
        """Return at most `count` actors; fewer while the evaluations that the next choice builds on are out."""
        actors: list[SequenceActor] = []
        with one_thread():
            while len(actors) < count:
                for trajectory in self.queue.due():
                    self._learn(trajectory)
                if not self.queue.ready:
                    break
                actors.append(self._next())
        return actors

    def tell(self, results: Sequence[tuple[Actor, Episode]]) -> None:
        """Keep the episodes; they are learned from in the order in which they were asked for."""
        for actor, episode in results:
            assert isinstance(actor, SequenceActor)
            sent = self.queue.sent(actor.ticket)
            trajectory = None
            if fully_scored(episode) and episode.reward is not None:
                observations = sent.observations if episode.observations is None else episode.observations
                actions = sent.actions if episode.actions is None else episode.actions
                trajectory = Trajectory(observations, actions, float(episode.reward[0]))
            self.queue.put(actor.ticket, trajectory)

    def _next(self) -> SequenceActor:
        """Return the actor's trajectory in the simulated environment, with noise: eq. (1)."""
        budget = self.budgets[self.queue.asked % len(self.budgets)]
        sigma = self.config.noise * self.config.noise_decay ** max(self.queue.asked - self.config.warmup, 0)

        def act(observations: np.ndarray, sequences: np.ndarray, step: int, rows: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                mean = self.actor(torch.from_numpy(observations.astype(np.float32))).numpy()
            return truncated_normal(mean, sigma, self.rng)

        simulated = self.space.simulate(act, [budget])
        trajectory = Trajectory(simulated.observations[0], simulated.sequences[0])
        return SequenceActor(budget, trajectory.actions, self.queue.add(trajectory))

    def _learn(self, trajectory: Trajectory | None) -> None:
        """Store the steps of an episode, None: it failed; then take one gradient step per layer."""
        if trajectory is not None:
            states, steps = np.asarray(trajectory.observations, np.float32), len(trajectory.actions)
            more = np.arange(steps) < steps - 1
            self.replay += zip(states[:-1], trajectory.actions, [trajectory.reward] * steps, states[1:], more, strict=True)
            self.replay = self.replay[-self.config.capacity :]
        if self.replay and self.queue.learned > self.config.warmup:
            for _ in range(self.space.num_steps):
                self._update()

    def _update(self) -> None:
        """Take one gradient step of both networks."""
        rows = self.rng.integers(len(self.replay), size=self.config.batch)
        columns = zip(*(self.replay[row] for row in rows), strict=True)
        states, actions, rewards, following, more = (torch.from_numpy(np.array(column, np.float32)) for column in columns)
        mean = float(rewards.mean())
        self.baseline = mean if self.baseline is None else self.baseline + self.config.baseline_rate * (mean - self.baseline)
        with torch.no_grad():
            ahead = _value(self.target_critic, following, self.target_actor(following))
            targets = rewards - self.baseline + more * ahead  # eq. (2)
        _descend(self.critic_optimizer, (targets - _value(self.critic, states, actions)).square().mean())  # eq. (3)
        _descend(self.actor_optimizer, -_value(self.critic, states, self.actor(states)).mean())
        follow(self.target_actor, self.actor, self.config.target_rate)  # eq. (4)
        follow(self.target_critic, self.critic, self.config.target_rate)


def _layers(inputs: int, outputs: int, hidden: int, rng: np.random.Generator) -> list[nn.Module]:
    """Return a perceptron with two hidden layers, its weights uniform in +-1 / sqrt(inputs of the layer)."""
    layers: list[nn.Module] = []
    for rows, columns in ((inputs, hidden), (hidden, hidden), (hidden, outputs)):
        layer = nn.utils.skip_init(nn.Linear, rows, columns)  # torch's own generator is left alone
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(torch.from_numpy(rng.uniform(-1, 1, parameter.shape) / np.sqrt(rows)))
        layers += [layer, nn.ReLU()]
    return layers[:-1]


def _value(critic: nn.Module, states: Tensor, actions: Tensor) -> Tensor:
    """Return Q of states, (n, observation_dim), and actions, (n, action_dim): (n,)."""
    return critic(torch.cat([states, actions], dim=1))[:, 0]


def _descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Take one step down the gradient of a loss."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
