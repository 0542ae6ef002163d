"""Finds the range of each layer's input on the calibration images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from envs.core import InputError

SAMPLES_PER_BATCH = 20_000
"""Values kept per layer and batch when percentiles are asked for; the memory that a layer takes is bounded by it."""


class _RangeObserver:
    """A forward pre-hook that follows the range of a layer's first input."""

    def __init__(self, percentile: float) -> None:
        self.percentile = percentile
        self.low, self.high = float("inf"), float("-inf")
        self.samples: list[Tensor] = []

    def __call__(self, module: nn.Module, inputs: tuple) -> None:
        values = inputs[0].flatten()
        low, high = values.aminmax()
        self.low, self.high = min(self.low, float(low)), max(self.high, float(high))
        if self.percentile < 100:
            self.samples.append(values[:: -(-len(values) // SAMPLES_PER_BATCH)].clone())

    def range(self) -> tuple[float, float]:
        if not self.samples:
            return self.low, self.high
        values = torch.cat(self.samples)
        tail = round(len(values) * (1 - self.percentile / 100))
        high = values.topk(tail + 1).values[-1]
        low = values.topk(tail + 1, largest=False).values[-1]
        return float(low), float(high)


def calibrate_activations(
    model: nn.Module,
    layer_names: Sequence[str],
    images: Tensor,
    percentile: float = 100.0,
    batch_size: int = 128,
) -> dict[str, tuple[float, float]]:
    """Return the range {layer: (low, high)} of each layer's input, over all of its calls.

    Args:
        model: the dense network, in eval mode.
        layer_names: convolutions and linear layers.
        images: calibration images, (N, C, H, W) float32 normalised.
        percentile: 100 is the whole range; 99.9 leaves out the largest and the smallest thousandth of a sample.
    Raises:
        InputError: if `percentile` is not in (50, 100], or a layer never ran or saw NaN or infinite values.
    """
    if not 50 < percentile <= 100:
        raise InputError(f"`percentile` of the activation ranges must be in (50, 100], but got {percentile}.")
    modules = dict(model.named_modules())
    observers = {name: _RangeObserver(percentile) for name in layer_names}
    hooks = [modules[name].register_forward_pre_hook(observer) for name, observer in observers.items()]
    try:
        with torch.inference_mode():
            for batch in images.split(batch_size):
                model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    for name, observer in observers.items():
        if not float("-inf") < observer.low <= observer.high < float("inf"):
            raise InputError(
                f"The input of layer `{name}` has no finite range on the calibration images "
                f"({observer.low} to {observer.high}). Check the weights, or exclude the layer from the search."
            )
    return {name: observer.range() for name, observer in observers.items()}
