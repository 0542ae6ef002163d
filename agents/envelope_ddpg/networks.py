"""Actor and critics: small multilayer perceptrons, all members of an ensemble in one batched product.

The initial weights come from the agent's numpy generator: torch's global seed is never touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn


class Mlp(nn.Module):
    """`members` perceptrons with two hidden layers and a linear path past them: (B, inputs) to (members, B, outputs).

    The linear path learns the additive part at once; the hidden layers learn the rest.
    """

    def __init__(self, members: int, inputs: int, outputs: int, hidden: int, rng: np.random.Generator):
        super().__init__()
        sizes = [(inputs, hidden), (hidden, hidden), (hidden, outputs), (inputs, outputs)]
        scales = [1.0, 1.0, 0.1, 0.03]  # the last two: the first outputs are near zero
        self.weights = nn.ParameterList(
            _parameter(rng.normal(0, scale / np.sqrt(rows), (members, rows, columns)))
            for (rows, columns), scale in zip(sizes, scales, strict=True)
        )
        self.biases = nn.ParameterList(torch.zeros(members, 1, columns) for _, columns in sizes[:3])
        self.gains = nn.ParameterList(torch.ones(members, 1, hidden) for _ in range(2))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return (members, B, outputs)."""
        inputs = inputs.expand(len(self.weights[0]), *inputs.shape[-2:])
        x = inputs
        for weight, bias, gain in zip(self.weights[:2], self.biases[:2], self.gains, strict=True):
            x = torch.bmm(x, weight)
            x = nn.functional.layer_norm(x, x.shape[-1:]) * gain + bias
            x = torch.relu(x)
        return torch.bmm(x, self.weights[2]) + self.biases[2] + torch.bmm(inputs, self.weights[3])


def _parameter(values: np.ndarray) -> nn.Parameter:
    return nn.Parameter(torch.from_numpy(values.astype(np.float32)))


def follow(target: nn.Module, online: nn.Module, rate: float) -> None:
    """Move the target network a share `rate` towards the online one."""
    with torch.no_grad():
        torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), rate)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch with one thread: networks this small get slower with more, workers need the cores, and sums stay the same."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
