"""Recoveries: they reduce the error of compression without training. A new one is a file and a line in `RECOVERIES`."""

from secateur.envs.recovery.batch_norm import BatchNorm, BatchNormConfig
from secateur.envs.recovery.bias_correction import BiasCorrection, BiasCorrectionConfig
from secateur.envs.recovery.core import Recovery
from secateur.envs.recovery.data_free import DataFree, DataFreeConfig
from secateur.envs.recovery.df_mpc import DFMPC, DFMPCConfig
from secateur.envs.recovery.least_squares import LeastSquares, LeastSquaresConfig
from secateur.envs.recovery.none import NoRecovery, NoRecoveryConfig
from secateur.envs.recovery.sequential import Sequential, SequentialConfig

__all__ = ["RECOVERIES", "Recovery"]

RECOVERIES: dict[str, tuple[type, type]] = {
    "none": (NoRecoveryConfig, NoRecovery),
    "batch_norm": (BatchNormConfig, BatchNorm),
    "bias_correction": (BiasCorrectionConfig, BiasCorrection),
    "least_squares": (LeastSquaresConfig, LeastSquares),
    "data_free": (DataFreeConfig, DataFree),
    "df_mpc": (DFMPCConfig, DFMPC),
    "sequential": (SequentialConfig, Sequential),
}
"""{name: (config class, recovery class)}; `recovery(config())` makes a recovery."""
