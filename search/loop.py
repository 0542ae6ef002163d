"""The search itself: ask, run, record, tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from secateur.agents.core import Agent
from secateur.envs.core import Actor, Episode


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
        """Stop and free only what the runner has started."""
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
        on_episode: called for each finished episode before the agent gets it, so that no evaluation is lost.
        out_of_time: checked before new episodes start; running episodes are still awaited.
    Returns:
        The number of episodes done.
    """
    done = out = 0
    ready: list[Actor] = []
    while done < evaluations:
        in_time = not out_of_time()
        # First fill the workers, then let the agent choose the next actors while they evaluate.
        for _ in range(2 if in_time else 0):
            while ready and out < runner.slots:
                runner.submit(ready.pop(0))
                out += 1
            wanted = min(2 * runner.slots, evaluations - done) - out - len(ready)
            ready += agent.ask(wanted) if wanted > 0 else []
        if not out:
            break  # no episode is running and none is requested: time is up or the agent has no more policies
        finished = runner.wait()
        for actor, episode in finished:
            on_episode(actor, episode)
        agent.tell(finished)
        out -= len(finished)
        done += len(finished)
    return done
