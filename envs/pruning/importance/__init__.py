"""Channel importances: which units of a group go first. A new one is a file and a line in `IMPORTANCES`."""

from envs.pruning.importance.bn_scale import BnScale, BnScaleConfig
from envs.pruning.importance.clr_rnf import ClrRnf, ClrRnfConfig
from envs.pruning.importance.core import Importance
from envs.pruning.importance.hrank import HRank, HRankConfig
from envs.pruning.importance.l1_norm import L1Norm, L1NormConfig
from envs.pruning.importance.l2_norm import L2Norm, L2NormConfig
from envs.pruning.importance.output_energy import OutputEnergy, OutputEnergyConfig
from envs.pruning.importance.random import Random, RandomConfig
from envs.pruning.importance.second_order import SecondOrder, SecondOrderConfig
from envs.pruning.importance.taylor import Taylor, TaylorConfig
from envs.pruning.importance.white_box import WhiteBox, WhiteBoxConfig

__all__ = ["IMPORTANCES", "Importance"]

IMPORTANCES = {
    "l1_norm": (L1NormConfig, L1Norm),
    "l2_norm": (L2NormConfig, L2Norm),
    "bn_scale": (BnScaleConfig, BnScale),
    "output_energy": (OutputEnergyConfig, OutputEnergy),
    "second_order": (SecondOrderConfig, SecondOrder),
    "taylor": (TaylorConfig, Taylor),
    "hrank": (HRankConfig, HRank),
    "clr_rnf": (ClrRnfConfig, ClrRnf),
    "white_box": (WhiteBoxConfig, WhiteBox),
    "random": (RandomConfig, Random),
}
"""Name -> (config, importance); an importance is made as `importance(config())`."""
