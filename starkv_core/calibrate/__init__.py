"""Calibration: learn ranks and factors under a byte budget."""

from starkv_core.calibrate.loop import CalibrationResult, export_run, run_calibration
from starkv_core.calibrate.plan import Plan, plan

__all__ = ["CalibrationResult", "Plan", "export_run", "plan", "run_calibration"]
