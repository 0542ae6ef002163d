"""Estimators: how quantized weights are trained. An estimator is one file; its name goes into `ESTIMATORS`."""

from secateur.envs.quantization.estimators.asymptotic import Asymptotic
from secateur.envs.quantization.estimators.core import WeightEstimator
from secateur.envs.quantization.estimators.learned_step import LearnedStep
from secateur.envs.quantization.estimators.soft import Soft
from secateur.envs.quantization.estimators.straight_through import StraightThrough

ESTIMATORS: dict[str, type[WeightEstimator]] = {
    "straight_through": StraightThrough,
    "learned_step": LearnedStep,
    "soft": Soft,
    "asymptotic": Asymptotic,
}
"""{name: class}."""

__all__ = ["ESTIMATORS", "WeightEstimator"]
