"""``attn_implementation="mmkernels"`` for transformers models."""

from mmkernels.integrations.transformers.counts import Calls, counting
from mmkernels.integrations.transformers.registration import NAME, register

__all__ = ["NAME", "Calls", "counting", "register"]
