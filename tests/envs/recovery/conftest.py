"""What the tests of the refits in sequence share."""

import pytest
import torch

from tests.envs.recovery.sequential_cases import Residual, pictures, with_statistics


@pytest.fixture(scope="module")
def residual():
    torch.manual_seed(0)
    return with_statistics(Residual()), pictures(), pictures(200, seed=1)
