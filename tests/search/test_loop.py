"""The loop: how much is out at a time, what is recorded, and when it stops."""

from dataclasses import dataclass

from secateur.envs.core import Budget, Episode
from secateur.search.loop import run_loop

BUDGET = Budget("b", {})


@dataclass
class Ticket:
    number: int
    budget: Budget = BUDGET


class Counting:
    """Hands out numbered actors, at most `batch` before it hears of the earlier ones, `total` in all."""

    def __init__(self, total=100, batch=100):
        self.total, self.batch, self.out, self.given, self.told = total, batch, 0, 0, []

    def ask(self, count):
        count = min(count, self.batch - self.out, self.total - self.given)
        actors = [Ticket(self.given + i) for i in range(count)]
        self.given, self.out = self.given + count, self.out + count
        return actors

    def tell(self, results):
        self.out -= len(results)
        self.told += [actor.number for actor, _ in results]


class LastInFirstOut:
    """Finishes the newest episode first, one per wait."""

    slots = 3

    def __init__(self):
        self.queue, self.most = [], 0

    def submit(self, actor):
        self.queue.append(actor)
        self.most = max(self.most, len(self.queue))

    def wait(self):
        return [(self.queue.pop(), Episode("b", None, None))]

    def close(self):
        pass


def test_runs_exactly_the_evaluations_and_fills_the_slots():
    agent, runner, recorded = Counting(), LastInFirstOut(), []
    assert run_loop(agent, runner, 10, lambda actor, episode: recorded.append(actor.number)) == 10
    assert runner.most == 3
    assert sorted(recorded) == list(range(10)) and recorded == agent.told
    assert runner.queue == []


def test_the_agent_chooses_what_comes_next_while_the_workers_evaluate():
    agent, runner, chosen = Counting(), LastInFirstOut(), []
    wait = runner.wait
    runner.wait = lambda: (chosen.append((agent.given, len(runner.queue))), wait())[1]
    run_loop(agent, runner, 10, lambda *_: None)
    assert chosen[:3] == [(6, 3), (7, 3), (8, 3)]


def test_waits_for_an_agent_that_waits():
    agent, runner = Counting(batch=2), LastInFirstOut()
    assert run_loop(agent, runner, 9, lambda *_: None) == 9
    assert runner.most == 2


def test_stops_when_the_agent_is_exhausted():
    agent, runner = Counting(total=4), LastInFirstOut()
    assert run_loop(agent, runner, 10, lambda *_: None) == 4
    assert runner.queue == []


def test_time_limit_asks_no_more_but_waits_for_what_is_out():
    agent, runner, recorded = Counting(), LastInFirstOut(), []
    done = run_loop(agent, runner, 10, lambda a, e: recorded.append(a), out_of_time=lambda: len(recorded) >= 2)
    assert done == len(recorded) == 4 and runner.queue == []


def test_the_agent_hears_of_an_episode_after_it_is_recorded():
    events = []
    agent = Counting()
    tell = agent.tell
    agent.tell = lambda results: (events.append("tell"), tell(results))
    run_loop(agent, LastInFirstOut(), 2, lambda *_: events.append("record"))
    assert events == ["record", "tell", "record", "tell"]
