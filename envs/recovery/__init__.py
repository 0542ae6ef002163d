"""Recoveries: repair without training. A new one is a file and a line in `RECOVERIES`."""

from envs.recovery.batch_norm import BatchNorm, BatchNormConfig
from envs.recovery.core import Recovery
from envs.recovery.least_squares import LeastSquares, LeastSquaresConfig
from envs.recovery.none import NoRecovery, NoRecoveryConfig

__all__ = ["RECOVERIES", "Recovery"]

RECOVERIES = {
    "none": (NoRecoveryConfig, NoRecovery),
    "batch_norm": (BatchNormConfig, BatchNorm),
    "least_squares": (LeastSquaresConfig, LeastSquares),
}
"""Name -> (config, recovery); a recovery is made as `recovery(config())`."""
