"""Recoveries: repair without training. A new one is a file and a line in `RECOVERIES`."""

from envs.recovery.batch_norm import BatchNorm, BatchNormConfig
from envs.recovery.bias_correction import BiasCorrection, BiasCorrectionConfig
from envs.recovery.core import Recovery
from envs.recovery.data_free import DataFree, DataFreeConfig
from envs.recovery.df_mpc import DFMPC, DFMPCConfig
from envs.recovery.least_squares import LeastSquares, LeastSquaresConfig
from envs.recovery.none import NoRecovery, NoRecoveryConfig
from envs.recovery.sequential import Sequential, SequentialConfig

__all__ = ["RECOVERIES", "Recovery"]

RECOVERIES = {
    "none": (NoRecoveryConfig, NoRecovery),
    "batch_norm": (BatchNormConfig, BatchNorm),
    "bias_correction": (BiasCorrectionConfig, BiasCorrection),
    "least_squares": (LeastSquaresConfig, LeastSquares),
    "data_free": (DataFreeConfig, DataFree),
    "df_mpc": (DFMPCConfig, DFMPC),
    "sequential": (SequentialConfig, Sequential),
}
"""Name -> (config, recovery); a recovery is made as `recovery(config())`."""
