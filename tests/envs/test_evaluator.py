"""The evaluator scores fairly, knows what it has scored, and stops what is clearly worse."""

import pickle
from dataclasses import asdict, dataclass, replace

import numpy as np
import pytest
import torch

from secateur.envs.core import CompressionPolicy, Evaluation
from secateur.envs.evaluator import Evaluator, Precision
from secateur.envs.racing import Race, unpack
from secateur.envs.scores.metric import MetricScore, MetricScoreConfig
from tests.scoring import classification

IMAGES, CLASSES = 4096, 4
RACE = Race(("macs",), ({"macs": 10.0},))
LABELS = torch.arange(IMAGES) * CLASSES // IMAGES  # sorted by class, as folders of images are
PIXELS = torch.arange(float(IMAGES)).view(-1, 1, 1, 1)  # each image holds its own number


@dataclass(frozen=True)
class NoAssembler:
    dtype: torch.dtype = torch.float32


class Scripted(Evaluator):
    """The policy's first width says how many percent of the images it classifies correctly, the second what it costs."""

    ran = 0

    def network(self, policy):
        correct = torch.from_numpy(np.random.default_rng(7).random(IMAGES) < policy.widths[0] / 100)
        answers = torch.where(correct, LABELS, (LABELS + 1) % CLASSES)

        def network(images):
            self.ran += len(images)
            return torch.eye(CLASSES)[answers[images.flatten().long()]]

        return network


def evaluator(race):
    task = classification(PIXELS, LABELS, CLASSES)
    score = MetricScore(MetricScoreConfig(), task, torch.nn.Identity(), 0.9)
    return Scripted(NoAssembler(), lambda p: {"macs": p.widths[1]}, score, Precision("float32", "test"), race)


def policy(percent, macs=5):
    return CompressionPolicy((percent, macs), (), ())


def test_all_images_are_scored_whatever_their_order():
    raced, full = evaluator(RACE), evaluator(None)
    for percent in (50, 80, 90, 95):
        found = raced.evaluate(policy(percent))
        assert found == replace(full.evaluate(policy(percent)), seconds=found.seconds)
        assert not found.stopped and found.images == IMAGES and found.score == pytest.approx(percent / 100, abs=0.02)
        assert unpack(found.correct, IMAGES).mean() == found.score


def test_what_is_clearly_worse_is_stopped_and_remembered():
    raced = evaluator(RACE)
    raced.evaluate(policy(90))
    before, found = raced.ran, raced.evaluate(policy(70))
    assert found.stopped and found.images == raced.ran - before == IMAGES / 8 and found.correct is None
    assert found.score == pytest.approx(0.7, abs=0.06)
    assert raced.evaluate(policy(70)) is found
    assert not evaluator(None).evaluate(policy(70)).stopped


def test_first_images_are_a_sample_of_all_classes():
    batches = list(classification(PIXELS, LABELS, CLASSES).batches("validation"))
    first = torch.cat([targets for _, targets in batches[:2]])
    assert (torch.bincount(first, minlength=CLASSES) > IMAGES / 8 / CLASSES * 0.8).all()


def test_only_full_evaluations_of_what_costs_no_more_are_references():
    raced = evaluator(RACE)
    raced.evaluate(policy(90, macs=8))
    assert not raced.evaluate(policy(80, macs=5)).stopped, "the better one costs more"
    assert raced.evaluate(policy(60, macs=5)).stopped
    raced.cache = {key: value for key, value in raced.cache.items() if value.stopped}
    assert not raced.evaluate(policy(40, macs=5)).stopped, "a stopped policy is nobody's reference"


def test_one_batch_is_never_cut():
    task = classification(PIXELS[:200], LABELS[:200], CLASSES)
    score = MetricScore(MetricScoreConfig(), task, torch.nn.Identity(), 0.9)
    small = Scripted(NoAssembler(), lambda p: {"macs": 1.0}, score, Precision("float32", "test"), RACE)
    assert len(list(task.batches("validation"))) == 1
    assert not any(small.evaluate(policy(percent)).stopped for percent in (99, 5))


def test_bits_travel_and_say_nothing_about_equality():
    found = evaluator(RACE).evaluate(policy(80))
    assert pickle.loads(pickle.dumps(found)).correct == found.correct and len(found.correct) == IMAGES / 8
    assert replace(found, correct=None) == found and "correct" not in repr(found)
    assert asdict(Evaluation(0.5, {}))["correct"] is None
