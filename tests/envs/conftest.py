"""A network geometry small enough to check by enumeration."""

import numpy as np
import pytest

from secateur.cost_models import COST_MODELS
from secateur.cost_models.core import LayerShape, NetworkGeometry
from secateur.envs.costs import PolicyCosts
from secateur.envs.feasibility import FeasibleSpace
from secateur.envs.metric import TOP1
from secateur.envs.model_graph.plan import ChannelGroup, ModelGraph, TensorSlice
from secateur.envs.policy_space import PolicySpace, SpaceConfig


def _chain_graph(units=(8, 6), size=4):
    """image (3) -> conv a -> conv b -> linear c (5 classes); a and b are prunable; four positions per map."""
    layers = (
        LayerShape("a", "conv", 3, units[0], (3, 3), out_hw=(size, size)),
        LayerShape("b", "conv", units[0], units[1], (3, 3), out_hw=(size, size)),
        LayerShape("c", "linear", units[1], 5, has_bias=True),
    )
    geometry = NetworkGeometry(
        layers=layers,
        group_names=("a", "b"),
        group_units=np.array(units),
        in_fixed=np.array([3.0, 0, 0]),
        in_per_unit=np.array([[0, 1.0, 0], [0, 0, 1.0]]),
        out_fixed=np.array([0.0, 0, 5]),
        out_per_unit=np.array([[1.0, 0, 0], [0, 1.0, 0]]),
        other_fixed=5.0,
        other_per_unit=np.zeros(2),
        fixed_macs=0.0,
        buffer_fixed=np.array([3.0 * size**2, 0, 0, 5]),
        buffer_per_unit=np.array([[0, size**2, 0, 0], [0, 0, size**2, 0]], float),
        buffer_readers=((0,), (1,), (2,), ()),
        live=np.array([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]], bool),
        step_layer=np.array([0, 1, 2]),
    )
    groups = tuple(
        ChannelGroup(
            name,
            n,
            (TensorSlice(f"{name}.weight", 0, np.arange(n)[:, None]), TensorSlice(f"{reader}.weight", 1, np.arange(n)[:, None])),
            (name,),
            (reader,),
        )
        for name, reader, n in (("a", "b", units[0]), ("b", "c", units[1]))
    )
    return ModelGraph(geometry, groups, (), (), 0.0)


def _feasible_space(**config):
    space = PolicySpace(_chain_graph(), SpaceConfig(**config))
    return FeasibleSpace(PolicyCosts(space, {name: model() for name, model in COST_MODELS.items()}), ("top1", "macs"), TOP1, 0.9)


@pytest.fixture
def chain_graph():
    """A function (units, size) -> ModelGraph."""
    return _chain_graph


@pytest.fixture
def feasible_space():
    """A function (**SpaceConfig fields) -> FeasibleSpace of the chain under every cost model."""
    return _feasible_space
