"""Calibration: one pass over some images. Refits, rounding, clipping ranges and removal orders are computed from it."""

from secateur.envs.calibration.calibrate import LayerPlan, calibrate, plan_calibration
from secateur.envs.calibration.core import Calibration, CalibrationConfig, LayerStatistics
from secateur.envs.calibration.storage import cached_calibration

__all__ = [
    "Calibration",
    "CalibrationConfig",
    "LayerPlan",
    "LayerStatistics",
    "cached_calibration",
    "calibrate",
    "plan_calibration",
]
