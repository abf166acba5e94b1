"""The models whose attention transformers gives no slot for, and which `patch` knows by their classes."""

from __future__ import annotations

from mmkernels.integrations.patching.bart_like import BART_LIKE
from mmkernels.integrations.patching.bert_like import BERT_LIKE
from mmkernels.integrations.patching.blip import BLIP
from mmkernels.integrations.patching.lilt import LILT
from mmkernels.integrations.patching.perceiver import PERCEIVER
from mmkernels.integrations.patching.sam import SAM
from mmkernels.integrations.patching.swin import SWIN

TABLE = (*BLIP, *BERT_LIKE, *LILT, *PERCEIVER, *SAM, *SWIN, *BART_LIKE)
