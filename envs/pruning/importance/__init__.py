"""Channel importances: which units of a group go first. A new one is a file and a line in `IMPORTANCES`."""

from envs.pruning.importance.bn_scale import BnScale, BnScaleConfig
from envs.pruning.importance.core import Importance
from envs.pruning.importance.l1_norm import L1Norm, L1NormConfig
from envs.pruning.importance.l2_norm import L2Norm, L2NormConfig
from envs.pruning.importance.random import Random, RandomConfig
from envs.pruning.importance.taylor import Taylor, TaylorConfig

__all__ = ["IMPORTANCES", "Importance"]

IMPORTANCES = {
    "l1_norm": (L1NormConfig, L1Norm),
    "l2_norm": (L2NormConfig, L2Norm),
    "bn_scale": (BnScaleConfig, BnScale),
    "taylor": (TaylorConfig, Taylor),
    "random": (RandomConfig, Random),
}
"""Name -> (config, importance); an importance is made as `importance(config())`."""
