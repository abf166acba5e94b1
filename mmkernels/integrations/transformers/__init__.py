"""``attn_implementation="mmkernels"`` for transformers models, and `co_attention` for those that have one."""

from mmkernels.integrations.transformers.counts import Calls, counting
from mmkernels.integrations.transformers.fusion import fuse_co_attention, restore_co_attention
from mmkernels.integrations.transformers.registration import NAME, register

__all__ = ["NAME", "Calls", "counting", "fuse_co_attention", "register", "restore_co_attention"]
