"""Whole models, one file a system, over the modules and ops."""

from mmkernels.models.flamingo import Flamingo
from mmkernels.models.flamingo_config import FlamingoConfig

__all__ = ["Flamingo", "FlamingoConfig"]
