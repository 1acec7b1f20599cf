"""The embedded default model and the small texts that ship beside it."""

from pathlib import Path

_HERE = Path(__file__).parent

MODEL_DIR = _HERE / "model"
CALIBRATION_TEXT = _HERE / "text" / "calibration.txt"
HELDOUT_TEXT = _HERE / "text" / "heldout.txt"
