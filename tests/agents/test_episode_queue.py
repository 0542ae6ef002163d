import numpy as np
import pytest

from secateur.agents.episode_queue import EpisodeQueue


def learned_before_each_choice(lookahead, slots, seed, count=40):
    """The results that were given back before each choice, with up to `slots` out that return in a random order."""
    queue, rng = EpisodeQueue(lookahead), np.random.default_rng(seed)
    out, given, before = [], [], []
    while len(before) < count:
        given += queue.due()
        if queue.ready and len(out) < slots:
            before.append(list(given))
            out.append(queue.add("sent"))
        else:
            ticket = out.pop(int(rng.integers(len(out))))
            queue.put(ticket, ticket)
    return before


@pytest.mark.parametrize("lookahead", [1, 3, 8])
def test_a_choice_builds_on_all_episodes_before_the_last_ones(lookahead):
    wanted = [list(range(max(0, choice - lookahead + 1))) for choice in range(40)]
    for slots, seed in ((1, 0), (2, 1), (8, 2), (20, 3)):
        assert learned_before_each_choice(lookahead, slots, seed) == wanted


def test_what_was_sent_comes_back_once():
    queue = EpisodeQueue(4)
    ticket = queue.add("this")
    assert queue.sent(ticket) == "this"
    queue.put(ticket, None)
    for wrong in (ticket, 7):
        with pytest.raises(ValueError, match=f"ticket {wrong} is not out"):
            queue.sent(wrong)


def test_the_rest_is_given_back_in_order_and_missing_episodes_are_forgotten():
    queue = EpisodeQueue(8)
    tickets = [queue.add("sent") for _ in range(5)]
    for ticket in (tickets[3], tickets[0], tickets[4]):
        queue.put(ticket, ticket)
    assert list(queue.rest()) == [0, 3, 4]
    assert queue.learned == queue.asked == 5 and queue.ready
    with pytest.raises(ValueError, match="not out"):
        queue.sent(tickets[1])
