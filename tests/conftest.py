"""A toy search problem that every agent can be tried on: no network, and the best policy is known."""

import os

# The networks of the tests are tiny: more threads would only wait for each other. torch reads this when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import pytest  # noqa: E402

from secateur.cost_models.core import LayerShape, NetworkGeometry  # noqa: E402
from secateur.envs.core import Budget, Episode, Evaluation, Sensitivities  # noqa: E402
from secateur.envs.costs import PolicyCosts  # noqa: E402
from secateur.envs.feasibility import FeasibleSpace  # noqa: E402
from secateur.envs.metric import TOP1
from secateur.envs.model_graph.plan import ChannelGroup, ModelGraph  # noqa: E402
from secateur.envs.policy_space import PolicySpace, SpaceConfig  # noqa: E402

BITS = (8, 7, 6, 5, 4)


class KeptShare:
    """The mean of what is kept over all choices: 1 = nothing is compressed, 0 = everything is at its strongest."""

    name = "cost"

    def __init__(self, choices):
        self.choices = choices

    def per_layer(self, shapes):
        kept = (shapes.widths - 1) / 4  # 5, 4, 3, 2, 1 units
        kept[:, self.choices :] = 0
        if self.choices > 6:
            kept[:, :-1] += np.where(shapes.weight_bits == 32, 1.0, (shapes.weight_bits - 4) / 4)[:, :-1]
        return kept / self.choices

    def total(self, shapes):
        return self.per_layer(shapes).sum(axis=1)


def toy_graph(prunable):
    """Six layers in a row, each with a group of five units; the last one cannot be quantized."""
    layers = tuple(LayerShape(f"layer{i}", "conv", 5, 5, quantizable=i < 5) for i in range(6))
    geometry = NetworkGeometry(
        layers=layers,
        group_names=tuple(layer.name for layer in layers),
        group_units=np.full(6, 5),
        in_fixed=np.full(6, 5.0),
        in_per_unit=np.zeros((6, 6)),
        out_fixed=np.zeros(6),
        out_per_unit=np.eye(6),
        other_fixed=0.0,
        other_per_unit=np.zeros(6),
        fixed_macs=0.0,
        buffer_fixed=np.zeros(1),
        buffer_per_unit=np.zeros((6, 1)),
        buffer_readers=((),),
        live=np.ones((1, 1), bool),
        step_layer=np.array([0]),
    )
    # A group without a producer in the network is never chosen.
    producers = [layer.name if i < prunable else "none" for i, layer in enumerate(layers)]
    groups = tuple(ChannelGroup(n.name, 5, (), (producer,), ()) for n, producer in zip(layers, producers, strict=True))
    return ModelGraph(geometry, groups, (), (), 0.0)


class ToySpace(FeasibleSpace):
    """Six steps with two choices of five levels each; the last step lacks the second choice.

    The space, its costs and its projection are real; only the score is a formula: top-1 falls with the squared distance to
    `best`, which lies on the edge of the budget "half".
    """

    best = np.array([[1, 0], [0.25, 0.75], [0.5, 1], [0, 0.25], [0.75, 0.25], [1, 0]])

    def __init__(self, weight_bits=BITS, groups=6):
        policy_space = PolicySpace(toy_graph(groups), SpaceConfig((0.0, 0.8), weight_bits=weight_bits))
        costs = PolicyCosts(policy_space, {"cost": KeptShare(len(policy_space.decisions))})
        curves = np.random.default_rng(1).uniform(0.5, 1, (11, 1)) * np.linspace(0, 1, 65) ** 2
        sensitivities = Sensitivities(curves[: len(policy_space.decisions)])
        self.best = self.best[: policy_space.num_steps, : policy_space.action_dim]
        super().__init__(costs, ("top1", "cost"), TOP1, 1.0, np.random.default_rng(0).random((6, 5)), sensitivities)

    def cost(self, sequence):
        """The mean of what is left over the used entries."""
        return float(np.mean(1 - sequence[self.used]))

    def score(self, sequence):
        """Top-1 of an executed sequence."""
        return 1 - float(np.mean((sequence - self.best)[self.used] ** 2))

    def episode(self, actor, top1=None):
        """The episode of an actor; `top1` overrides the toy's own score."""
        wanted = np.array([actor.act(np.zeros(self.observation_dim), step) for step in range(self.num_steps)])
        executed = self.execute(wanted, actor.budget).astype(float)
        cost = self.cost(executed)
        score = self.score(executed) if top1 is None else top1
        constraints = {"cost": cost / actor.budget.limits["cost"] - 1}
        if actor.budget.metric_drop is not None:
            constraints["top1_drop"] = (self.dense_score - score) / actor.budget.metric_drop - 1
        return Episode(
            actor.budget.name,
            self.decode(executed),
            Evaluation(score, {"cost": cost}),
            constraints,
            actions=executed.astype(np.float32),
            reward=np.array([score, -cost], np.float32),
        )

    def run(self, agent, evaluations, slots=4):
        """The episodes of a search, in the order in which they were asked for."""
        episodes = []
        while len(episodes) < evaluations and (actors := agent.ask(min(slots, evaluations - len(episodes)))):
            found = [(actor, self.episode(actor)) for actor in actors]
            episodes += [episode for _, episode in found]
            agent.tell(found)
        return episodes


class KnownFront(ToySpace):
    """Separable losses, so that dynamic programming knows the best top-1 of every cost; `bend` shapes the front."""

    losses = np.linspace(0.2, 1.8, 11)
    bend = staticmethod(lambda kept: kept)

    def score(self, sequence):
        return float(self.bend(1 - np.mean(self.losses * sequence[self.used] ** 2) / np.mean(self.losses)))

    def front(self):
        """(costs, top-1) of every total compression."""
        best = np.full(4 * len(self.losses) + 1, np.inf)
        best[0] = 0.0
        for weight in self.losses:
            options = [np.concatenate([np.full(k, np.inf), best[: len(best) - k]]) + weight * (k / 4) ** 2 for k in range(5)]
            best = np.min(options, axis=0)
        kept = 1 - best / self.losses.sum()
        return 1 - np.arange(len(best)) / (len(best) - 1), self.bend(kept)


class ConvexFront(KnownFront):
    """Each step costs more accuracy than the one before."""


class PartlyConcaveFront(KnownFront):
    """Accuracy falls off a cliff and recovers nothing below it: no linear weighting reaches the middle."""

    bend = staticmethod(lambda kept: 0.5 + 0.5 * np.tanh(6 * (kept - 0.75)) / np.tanh(1.5))


@pytest.fixture
def known_fronts():
    """{name: class} of toy problems whose Pareto front is known."""
    return {"convex": ConvexFront, "partly_concave": PartlyConcaveFront}


@pytest.fixture
def toy():
    return with_budgets(ToySpace())


@pytest.fixture
def pruning_toy():
    """The same with one kind of choice."""
    return with_budgets(ToySpace(weight_bits=None))


@pytest.fixture
def one_choice():
    """A toy whose first group alone can be pruned."""
    return with_budgets(ToySpace(weight_bits=None, groups=1))


def with_budgets(space):
    half = space.cost(space.best) + 1e-9  # the sum of the costs may round differently
    space.budgets = (Budget("half", {"cost": half}), Budget("quarter", {"cost": half / 2}))
    return space
