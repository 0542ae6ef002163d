"""One episode: an actor walks through the environment."""

from __future__ import annotations

import logging

import numpy as np

from secateur.envs.compression_env import CompressionEnv
from secateur.envs.core import Actor, Episode

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
        return Episode(actor.budget.name, env.policy, None, failure=f"{type(error).__name__}: {error}")
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
