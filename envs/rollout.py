"""One episode: an actor walks through the environment; and the same walk without its evaluation."""

from __future__ import annotations

import logging

import numpy as np

from secateur.envs.compression_env import CompressionEnv
from secateur.envs.core import Actor, CompressionPolicy, Episode, failure_text
from secateur.envs.feasibility import FeasibleSpace

log = logging.getLogger(__name__)


def rollout(env: CompressionEnv, actor: Actor) -> Episode:
    """Return the episode of `actor` under its budget; a candidate that breaks is an episode with `failure`, no exception."""
    observations, actions, policy = [], [], None
    try:
        observation, _ = env.reset(options={"budget": actor.budget})
        observations.append(observation)
        for step in range(env.space.num_steps):
            observation, reward, terminated, _, info = env.step(actor.act(observation, step))
            observations.append(observation)
            actions.append(info["action"])
            policy = info.get("policy")
    except (Exception, SystemExit) as error:  # whatever a model, a plug-in or an actor raises must not end the search
        log.info("an episode under budget '%s' failed", actor.budget.name, exc_info=True)
        return Episode(actor.budget.name, env.policy, None, failure=failure_text(error))
    assert terminated, "the environment has as many steps as the space"
    return Episode(
        budget=actor.budget.name,
        policy=policy,
        evaluation=info["evaluation"],
        constraints=info["constraints"],
        observations=np.stack(observations),
        actions=np.stack(actions),
        reward=reward,
    )


def chosen_policy(space: FeasibleSpace, actor: Actor) -> CompressionPolicy | None:
    """Return the policy that an actor chooses, without an evaluation; None if the actor itself fails."""
    walk, only = space.episodes([actor.budget]), np.zeros(1, int)
    try:
        for step in range(space.num_steps):
            walk.advance(np.asarray(actor.act(walk.observe(only)[0], step))[None], only)
    except Exception:
        log.info("an actor under budget '%s' failed", actor.budget.name, exc_info=True)
        return None
    return space.policy_space.levels_to_policy(walk.levels[0])
