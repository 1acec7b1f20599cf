"""Calibration: learn ranks and factors under a byte budget."""

from starkv_core.calibrate.loop import CalibrationResult, export_run, run_calibration

__all__ = ["CalibrationResult", "export_run", "run_calibration"]
