"""Calibration: one pass over some images, from which refits, rounding, ranges and removal orders follow."""

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
