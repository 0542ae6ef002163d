import numpy as np
import pytest

from secateur.cost_models.core import LayerShape, NetworkGeometry


@pytest.fixture
def tiny():
    """stem conv -> depthwise conv -> add (the residual) -> grouped conv -> flatten -> linear, on 3 x 6 x 6 images.

    Groups: "stem" (8 units, the residual stream) and "mid" (6 units, nine features each after the flatten).
    """
    layers = (
        LayerShape("stem", "conv", 3, 8, kernel=(3, 3), out_hw=(6, 6)),
        LayerShape("depthwise", "conv", 8, 8, kernel=(3, 3), out_hw=(6, 6), conv_groups=8, has_bias=True),
        LayerShape("grouped", "conv", 8, 6, stride=(2, 2), out_hw=(3, 3), conv_groups=2),
        LayerShape("head", "linear", 54, 5, has_bias=True),
    )
    # Buffers: image, stem's output, depthwise's output, their sum, grouped's output, logits.
    live = [
        [1, 1, 0, 0, 0, 0],  # stem
        [0, 1, 1, 0, 0, 0],  # depthwise; the stem's output waits for the add
        [0, 1, 1, 1, 0, 0],  # add
        [0, 0, 0, 1, 1, 0],  # grouped
        [0, 0, 0, 0, 1, 1],  # head
    ]
    return NetworkGeometry(
        layers=layers,
        group_names=("stem", "mid"),
        group_units=np.array([8, 6]),
        in_fixed=np.array([3.0, 0, 0, 0]),
        in_per_unit=np.array([[0.0, 1, 1, 0], [0, 0, 0, 9]]),
        out_fixed=np.array([0.0, 0, 0, 5]),
        out_per_unit=np.array([[1.0, 1, 0, 0], [0, 0, 1, 0]]),
        other_fixed=7.0,
        other_per_unit=np.array([2.0, 4.0]),
        fixed_macs=100.0,
        buffer_fixed=np.array([108.0, 0, 0, 0, 0, 5]),
        buffer_per_unit=np.array([[0.0, 36, 36, 36, 0, 0], [0, 0, 0, 0, 9, 0]]),
        buffer_readers=((0,), (), (), (2,), (3,), ()),
        live=np.array(live, bool),
        step_layer=np.array([0, 1, -1, 2, 3]),
    )
