"""Calibration: one pass over some images, from which refits, rounding, ranges and removal orders follow."""

from envs.calibration.calibrate import LayerPlan, calibrate, plan_calibration
from envs.calibration.core import Calibration, CalibrationConfig, LayerStatistics
from envs.calibration.storage import cached_calibration

__all__ = [
    "Calibration",
    "CalibrationConfig",
    "LayerPlan",
    "LayerStatistics",
    "cached_calibration",
    "calibrate",
    "plan_calibration",
]
