"""What the learning agent costs beside the evaluations that it learns from."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from secateur.agents.envelope_ddpg import EnvelopeDdpgConfig
from secateur.envs.compression_env import CompressionEnv
from secateur.envs.core import Actor, Episode, Evaluation
from secateur.envs.rewards import constraints, reward_vector
from secateur.envs.rollout import rollout
from secateur.search.problem import Problem


@dataclass(frozen=True)
class LearnerSpeed:
    """Medians on one thread, in milliseconds.

    Attributes:
        simulate: rolling 256 episodes out, random actions.
        plan: the targets of one finished episode.
        critic_update, actor_update: one gradient step.
        ask: one choice, the learning of one episode included.
        tell: handing one episode over.
        evaluation: one evaluation of a random policy, cached pieces included; NaN if none was made.
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
        """Time of the agent by the time of the evaluation, per evaluation."""
        return (self.ask + self.tell) / self.evaluation


def benchmark_learner(
    problem: Problem, config: EnvelopeDdpgConfig, env: CompressionEnv | None, episodes: int = 20, repeats: int = 7, seed: int = 0
) -> LearnerSpeed:
    """Return the speeds after `episodes` learned episodes with made-up scores.

    Args:
        problem: what is searched.
        config: of the agent.
        env: evaluates some real policies; None: none.
    """
    from secateur.agents.envelope_ddpg.agent import EnvelopeDdpg
    from secateur.agents.envelope_ddpg.learner import one_thread

    space, rng = problem.space, np.random.default_rng(seed)
    with one_thread():
        agent = EnvelopeDdpg(config, space, problem.budgets, np.random.default_rng(seed))
        asking, telling = [], []

        def turn() -> None:
            start = time.perf_counter()
            actors = agent.ask(1)
            asking.append(time.perf_counter() - start)
            told = [(actor, _made_up(problem, actor, rng)) for actor in actors]
            start = time.perf_counter()
            agent.tell(told)
            telling.append(time.perf_counter() - start)

        while agent.learned < episodes or agent.asked <= agent.config.warmup:
            turn()
        asking.clear(), telling.clear()
        for _ in range(repeats):
            turn()
        rows = [problem.budgets[i % len(problem.budgets)] for i in range(256)]
        actions = rng.random((space.num_steps, len(rows), space.action_dim))
        learner = agent.learner
        parts: dict[str, Callable[[], object]] = {
            "simulate": lambda: space.simulate(lambda o, sequences, step, which: actions[step, which], rows),
            "plan": lambda: learner.plan(agent.config.planned),
            "critic_update": lambda: learner.update_critics(0.5),
            "actor_update": learner.update_actor,
        }
        found = {name: _milliseconds(call, repeats) for name, call in parts.items()}
        evaluation = float("nan")
        if env is not None:
            actors = []
            for _ in range(min(repeats, 6) + 1):
                (actor,) = agent.ask(1)
                agent.tell([(actor, _made_up(problem, actor, rng))])
                actors.append(actor)
            evaluation = _milliseconds(lambda: rollout(env, actors.pop()), min(repeats, 6), warm=1)
    return LearnerSpeed(
        **found,
        ask=1000 * float(np.median(asking)),
        tell=1000 * float(np.median(telling)),
        evaluation=evaluation,
        steps=space.num_steps,
        entries=int(space.used.sum()),
    )


def _made_up(problem: Problem, actor: Actor, rng: np.random.Generator) -> Episode:
    """Return an episode that costs what it costs and scores anything."""
    space = problem.space
    sequence = space.execute(actor.sequence, actor.budget)
    policy = space.decode(sequence)
    evaluation = Evaluation(float(rng.random()), space.costs.of_policy(policy))
    slacks = constraints(evaluation, actor.budget, space.dense_top1)
    reward = reward_vector(evaluation, space.objectives, space.dense_costs)
    return Episode(actor.budget.name, policy, evaluation, slacks, actions=sequence, reward=reward)


def _milliseconds(call: Callable[[], object], repeats: int, warm: int = 2) -> float:
    for _ in range(warm):
        call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return 1000 * float(np.median(seconds))


def speed_lines(speed: LearnerSpeed) -> list[str]:
    """Return the measurement in words."""
    return [
        f"{speed.steps} steps, {speed.entries} choices; milliseconds, medians, one thread",
        f"simulate 256 episodes: {speed.simulate:.1f}",
        f"targets of one episode: {speed.plan:.1f}",
        f"one update of the critics: {speed.critic_update:.2f}, of the actor: {speed.actor_update:.2f}",
        f"ask, learning of one episode included: {speed.ask:.1f}, tell: {speed.tell:.2f}",
        f"one evaluation: {speed.evaluation:.0f}; the agent takes {100 * speed.share:.1f} % of that",
    ]
