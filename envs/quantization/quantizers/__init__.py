"""Quantizers: which grid weights and activations are put on. A new one is a file and a line in `QUANTIZERS`."""

from envs.quantization.quantizers.core import ActivationGrid, Quantizer, dequantize
from envs.quantization.quantizers.uniform import Uniform, UniformConfig

__all__ = ["QUANTIZERS", "ActivationGrid", "Quantizer", "dequantize"]

QUANTIZERS = {"uniform": (UniformConfig, Uniform)}
"""Name -> (config, quantizer); a quantizer is made as `quantizer(config())`."""
