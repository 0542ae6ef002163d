"""Channel importances: the order in which the units of a group are removed. A new one is a file and a line in `IMPORTANCES`."""

from secateur.envs.pruning.importance.bn_scale import BnScale, BnScaleConfig
from secateur.envs.pruning.importance.clr_rnf import ClrRnf, ClrRnfConfig
from secateur.envs.pruning.importance.core import Importance
from secateur.envs.pruning.importance.hrank import HRank, HRankConfig
from secateur.envs.pruning.importance.l1_norm import L1Norm, L1NormConfig
from secateur.envs.pruning.importance.l2_norm import L2Norm, L2NormConfig
from secateur.envs.pruning.importance.output_energy import OutputEnergy, OutputEnergyConfig
from secateur.envs.pruning.importance.random import Random, RandomConfig
from secateur.envs.pruning.importance.second_order import SecondOrder, SecondOrderConfig
from secateur.envs.pruning.importance.taylor import Taylor, TaylorConfig
from secateur.envs.pruning.importance.white_box import WhiteBox, WhiteBoxConfig

__all__ = ["IMPORTANCES", "Importance"]

IMPORTANCES: dict[str, tuple[type, type]] = {
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
"""{name: (config class, importance class)}; `importance(config())` makes an importance."""
