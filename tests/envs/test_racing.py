"""Racing stops what is clearly worse, and almost never anything else."""

from math import comb

import numpy as np
import pytest

from secateur.envs.core import Evaluation
from secateur.envs.racing import ERROR_RATE, LOOKS, Race, binomial_tail, is_clearly_worse, pack, unpack

IMAGES = 800


def evaluation(top1=0.8, correct=b"\xff", **costs):
    return Evaluation(top1, {"macs": 100.0, "weight_bytes": 10.0, **costs}, images=8, correct=correct)


def stops(correct, reference):
    """Return whether a race over all looks stops a candidate, images in the order given."""
    return any(is_clearly_worse(correct[: int(share * len(correct))], reference) for share in LOOKS)


def pair(both, only_reference, only_candidate):
    """Return (candidate, reference): which of IMAGES each has correct."""
    counts = (both, only_reference, only_candidate, IMAGES - both - only_reference - only_candidate)
    return np.repeat([True, False, True, False], counts), np.repeat([True, True, False, False], counts)


def share_stopped(races, *counts):
    candidate, reference = pair(*counts)
    rng = np.random.default_rng(0)
    orders = (rng.permutation(IMAGES) for _ in range(races))
    return sum(stops(candidate[order], reference[order]) for order in orders) / races


def test_tail_is_that_of_fair_coins():
    assert binomial_tail(10, 8) == pytest.approx((45 + 10 + 1) / 1024)
    assert binomial_tail(7, 0) == 1 and binomial_tail(7, 7) == 1 / 128 and binomial_tail(0, 0) == 1
    assert binomial_tail(5000, 2750) == pytest.approx(sum(comb(5000, k) for k in range(2750, 5001)) / 2**5000)


def test_drawing_without_replacement_has_the_lighter_tail():
    """Half of `total` discordant images are the candidate's at least, `seen` of them were drawn."""
    for total in range(2, 31):
        theirs = total // 2
        for seen in range(1, total + 1):
            for worse in range(seen // 2 + 1, seen + 1):
                hits = range(worse, min(theirs, seen) + 1)
                tail = sum(comb(theirs, k) * comb(total - theirs, seen - k) for k in hits) / comb(total, seen)
                assert tail <= binomial_tail(seen, worse)


def test_an_equal_policy_is_stopped_less_often_than_the_error_rate():
    assert share_stopped(10_000, 500, 120, 120) <= ERROR_RATE


def test_a_better_policy_is_not_stopped():
    assert share_stopped(2_000, 500, 100, 130) == 0


def test_a_clearly_worse_policy_is_stopped():
    assert share_stopped(200, 500, 160, 40) > 0.95
    assert share_stopped(200, 500, 100, 90) < 0.05, "one point is not clear"


def test_what_only_one_of_them_has_right_decides():
    seen = np.ones(100, bool)
    worse = seen.copy()
    worse[:20] = False
    assert is_clearly_worse(worse, seen) and not is_clearly_worse(seen, worse) and not is_clearly_worse(seen, seen)
    assert is_clearly_worse(worse, np.concatenate([seen, ~seen])), "images that were not run do not count"


RACE = Race(("macs", "weight_bytes"), ({"macs": 100.5}, {"weight_bytes": 50.0}))
COSTS = {"macs": 100.0, "weight_bytes": 10.0}


@pytest.mark.parametrize(
    ("other", "comparable"),
    [
        (evaluation(), True),
        (evaluation(macs=50.0), True),
        (evaluation(macs=100.5), True),
        (evaluation(macs=100.9), False),  # within the tolerance, but over the limit that the candidate meets
        (evaluation(weight_bytes=10.09), True),
        (evaluation(weight_bytes=10.2), False),
        (evaluation(correct=None), False),
    ],
)
def test_a_reference_costs_no_more_and_meets_the_same_limits(other, comparable):
    assert (RACE.reference(COSTS, [other]) is not None) == comparable


def test_the_best_reference_is_taken():
    known = [evaluation(0.7, b"\x01"), evaluation(0.9, b"\x02"), evaluation(0.99, b"\x03", macs=1000.0)]
    assert RACE.reference(COSTS, known).tolist() == unpack(b"\x02", 8).tolist()
    assert RACE.reference(COSTS, []) is None


def test_bits_come_back():
    correct = np.random.default_rng(0).random(101) < 0.5
    assert unpack(pack(correct), 101).tolist() == correct.tolist() and len(pack(correct)) == 13
