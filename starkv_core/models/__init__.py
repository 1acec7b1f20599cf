"""Model families that starkv understands, and how to load them."""

from starkv_core.models.load import LoadedModel, load
from starkv_core.models.spec import ModelSpec, Rope

__all__ = ["LoadedModel", "ModelSpec", "Rope", "load"]
