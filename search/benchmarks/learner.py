"""`secateur benchmark agent`: seconds of the learning agent, next to the evaluations that it learns from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from secateur.agents.core import SequenceActor
from secateur.agents.envelope_ddpg import EnvelopeDdpgConfig
from secateur.envs.compression_env import CompressionEnv
from secateur.envs.core import Episode, Evaluation
from secateur.envs.rewards import constraints, reward_vector
from secateur.envs.rollout import rollout
from secateur.search.benchmarks.scaffold import show_progress
from secateur.search.benchmarks.timing import median_seconds, timed
from secateur.search.build import build_options, build_problem, make_env
from secateur.search.config import SearchConfig
from secateur.search.problem import Problem

if TYPE_CHECKING:
    from secateur.agents.envelope_ddpg.agent import EnvelopeDdpg


@dataclass(frozen=True)
class LearnerSpeed:
    """Medians on one thread, in milliseconds.

    Attributes:
        simulate: 256 episodes with random actions, without evaluations.
        plan: the targets of one finished episode.
        critic_update, actor_update: one gradient step.
        ask: one choice, including learning from one episode.
        tell: one episode.
        evaluation: one evaluation of a policy that the agent chose, including the use of cached pieces.
        steps, entries: of a sequence.
    """

    simulate: float
    plan: float
    critic_update: float
    actor_update: float
    ask: float
    tell: float
    evaluation: float
    steps: int
    entries: int

    @property
    def share(self) -> float:
        """Time of the agent divided by the time of the evaluation."""
        return (self.ask + self.tell) / self.evaluation


def run_learner(config: SearchConfig) -> None:
    """Measure `envelope_ddpg` on the search of a configuration and print its speeds.

    The options of the configuration are used if it names this agent.
    """
    options = config.search.options if config.search.agent == "envelope_ddpg" else {}
    with show_progress() as progress:
        problem = build_problem(config, progress.status)
        progress.status("measuring")
        speed = benchmark_learner(problem, build_options(EnvelopeDdpgConfig, options), make_env(problem))
    print("\n".join(speed_lines(speed)))


def benchmark_learner(
    problem: Problem, config: EnvelopeDdpgConfig, env: CompressionEnv, episodes: int = 20, repeats: int = 7, seed: int = 0
) -> LearnerSpeed:
    """Return the speeds after `episodes` learned episodes with random scores.

    Args:
        problem: the search.
        config: of the agent.
        env: evaluates some policies.
        episodes: how many the agent learns from before it is measured.
        repeats: of each measurement.
        seed: random seed.
    """
    from secateur.agents.envelope_ddpg.agent import EnvelopeDdpg
    from secateur.agents.envelope_ddpg.networks import one_thread

    space, rng = problem.space, np.random.default_rng(seed)
    with one_thread():
        agent = EnvelopeDdpg(config, space, problem.budgets, np.random.default_rng(seed))
        while agent.learned < episodes or agent.queue.asked <= agent.config.warmup:
            _turn(problem, agent, rng)
        turns = [_turn(problem, agent, rng) for _ in range(repeats)]
        found = {name: 1000 * median_seconds(call, repeats, warm_up=2) for name, call in _parts(problem, agent, rng).items()}
        actors = [_turn(problem, agent, rng)[0] for _ in range(min(repeats, 6) + 1)]
        evaluation = median_seconds(lambda: rollout(env, actors.pop()), len(actors) - 1, warm_up=1)
    return LearnerSpeed(
        **found,
        ask=1000 * float(np.median([asking for _, asking, _ in turns])),
        tell=1000 * float(np.median([telling for _, _, telling in turns])),
        evaluation=1000 * evaluation,
        steps=space.num_steps,
        entries=int(space.used.sum()),
    )


def _turn(problem: Problem, agent: EnvelopeDdpg, rng: np.random.Generator) -> tuple[SequenceActor, float, float]:
    """Return the actor of one ask and tell, and the seconds of each; the agent learns from a random score."""
    asking, (actor,) = timed(agent.ask, 1)
    telling, _ = timed(agent.tell, [(actor, _random_episode(problem, actor, rng))])
    return actor, asking, telling


def _parts(problem: Problem, agent: EnvelopeDdpg, rng: np.random.Generator) -> dict[str, Callable[[], object]]:
    """Return {field of `LearnerSpeed`: what it measures}."""
    space, learner = problem.space, agent.learner
    rows = [problem.budgets[i % len(problem.budgets)] for i in range(256)]
    actions = rng.random((space.num_steps, len(rows), space.action_dim))
    return {
        "simulate": lambda: space.simulate(lambda o, sequences, step, which: actions[step, which], rows),
        "plan": lambda: learner.plan(agent.config.planned),
        "critic_update": learner.update_critics,
        "actor_update": learner.update_actor,
    }


def _random_episode(problem: Problem, actor: SequenceActor, rng: np.random.Generator) -> Episode:
    """Return the episode of an actor with its real costs and a random score."""
    space = problem.space
    sequence = space.execute(actor.sequence, actor.budget)
    policy = space.decode(sequence)
    evaluation = Evaluation(float(rng.random()), space.costs.of_policy(policy))
    slacks = constraints(evaluation, actor.budget, space.metric, space.dense_score)
    reward = reward_vector(evaluation, space.objectives, space.dense_costs)
    return Episode(actor.budget.name, policy, evaluation, slacks, actions=sequence, reward=reward)


def speed_lines(speed: LearnerSpeed) -> list[str]:
    """Return the measurement in words."""
    return [
        f"{speed.steps} steps, {speed.entries} choices; milliseconds, medians, one thread",
        f"simulate 256 episodes: {speed.simulate:.1f}",
        f"targets of one episode: {speed.plan:.1f}",
        f"one update of the critics: {speed.critic_update:.2f}, of the actor: {speed.actor_update:.2f}",
        f"ask, including learning from one episode: {speed.ask:.1f}, tell: {speed.tell:.2f}",
        f"one evaluation: {speed.evaluation:.0f}; the agent takes {100 * speed.share:.1f} % of that",
    ]
