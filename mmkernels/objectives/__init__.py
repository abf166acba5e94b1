"""Training objectives in plain PyTorch, over the ops that never build logits.

Each module has one objective with its equation: conditional generation, masked language modelling, image-text matching,
direct preference optimisation and group relative policy optimisation.
"""

from mmkernels.objectives.conditional_generation import (
    conditional_generation_loss,
    generation_targets,
    shifted_targets,
)
from mmkernels.objectives.dpo import DPOResult, dpo_loss
from mmkernels.objectives.grpo import GRPOResult, group_advantages, grpo_loss
from mmkernels.objectives.image_text_matching import MatchingPairs, image_text_matching_loss, matching_pairs
from mmkernels.objectives.masked_language_modelling import (
    MaskedTokens,
    mask_tokens,
    masked_language_modelling_loss,
)
from mmkernels.objectives.sequences import sequence_logprobs

__all__ = [
    "DPOResult",
    "GRPOResult",
    "MaskedTokens",
    "MatchingPairs",
    "conditional_generation_loss",
    "dpo_loss",
    "generation_targets",
    "group_advantages",
    "grpo_loss",
    "image_text_matching_loss",
    "mask_tokens",
    "masked_language_modelling_loss",
    "matching_pairs",
    "sequence_logprobs",
    "shifted_targets",
]
