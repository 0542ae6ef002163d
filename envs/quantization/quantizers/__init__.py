"""Quantizers: which grid weights and activations are put on. A new one is a file and a line in `QUANTIZERS`."""

from secateur.envs.quantization.quantizers.core import ActivationGrid, QuantizedWeight, Quantizer
from secateur.envs.quantization.quantizers.gptq import GPTQ, GPTQConfig
from secateur.envs.quantization.quantizers.power_of_two import PowerOfTwo, PowerOfTwoConfig
from secateur.envs.quantization.quantizers.uniform import Uniform, UniformConfig

__all__ = ["QUANTIZERS", "ActivationGrid", "QuantizedWeight", "Quantizer"]

QUANTIZERS = {
    "uniform": (UniformConfig, Uniform),
    "gptq": (GPTQConfig, GPTQ),
    "power_of_two": (PowerOfTwoConfig, PowerOfTwo),
}
"""Name -> (config, quantizer); a quantizer is made as `quantizer(config())`."""
