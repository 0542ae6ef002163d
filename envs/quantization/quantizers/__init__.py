"""Quantizers: they choose the grids of weights and activations. A new one is a file and a line in `QUANTIZERS`."""

from secateur.envs.quantization.quantizers.core import ActivationGrid, QuantizedWeight, Quantizer
from secateur.envs.quantization.quantizers.dual_bounds import DualBounds, DualBoundsConfig
from secateur.envs.quantization.quantizers.gptq import GPTQ, GPTQConfig
from secateur.envs.quantization.quantizers.power_of_two import PowerOfTwo, PowerOfTwoConfig
from secateur.envs.quantization.quantizers.uniform import Uniform, UniformConfig

__all__ = ["QUANTIZERS", "ActivationGrid", "QuantizedWeight", "Quantizer"]

QUANTIZERS: dict[str, tuple[type, type]] = {
    "uniform": (UniformConfig, Uniform),
    "gptq": (GPTQConfig, GPTQ),
    "power_of_two": (PowerOfTwoConfig, PowerOfTwo),
    "dual_bounds": (DualBoundsConfig, DualBounds),
}
"""{name: (config class, quantizer class)}; `quantizer(config())` makes a quantizer."""
