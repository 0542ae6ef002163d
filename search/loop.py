"""The search itself: ask, run, record, tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from agents.core import Agent
from envs.core import Actor, Episode


class Runner(Protocol):
    """Carries actors to environments and episodes back."""

    slots: int
    """How many episodes run at the same time."""

    def submit(self, actor: Actor) -> None:
        """Start an episode. At most `slots` may be out."""
        ...

    def wait(self) -> list[tuple[Actor, Episode]]:
        """Block until at least one episode is finished; return all that are, with the very actors that were submitted."""
        ...

    def close(self) -> None:
        """Free what the runner started, and nothing else."""
        ...


def run_loop(
    agent: Agent,
    runner: Runner,
    evaluations: int,
    on_episode: Callable[[Actor, Episode], None],
    out_of_time: Callable[[], bool] = lambda: False,
) -> int:
    """Run until `evaluations` episodes are done, the time is up, or the agent has nothing more to try.

    Args:
        agent: chooses.
        runner: evaluates.
        evaluations: number of episodes.
        on_episode: called for each finished episode, before the agent hears of it: what is recorded is never lost.
        out_of_time: asked before each new episode; those that are out are still waited for.
    Returns:
        The number of episodes done.
    """
    started = done = 0
    while done < evaluations:
        wanted = min(runner.slots - (started - done), evaluations - started)
        actors = agent.ask(wanted) if wanted > 0 and not out_of_time() else []
        for actor in actors:
            runner.submit(actor)
        started += len(actors)
        if started == done:
            break  # nothing is out and nothing more is asked: time is up or the agent is exhausted
        finished = runner.wait()
        for actor, episode in finished:
            on_episode(actor, episode)
        agent.tell(finished)
        done += len(finished)
    return done
