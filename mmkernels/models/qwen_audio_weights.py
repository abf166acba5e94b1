"""How Hugging Face's ``Qwen2AudioForConditionalGeneration`` names the fields and the tensors of a `QwenAudio`."""

from __future__ import annotations

import re

from mmkernels.models import whisper_weights
from mmkernels.models.blocks.checkpoint import Names
from mmkernels.models.qwen_vl_weights import TEXT_FIELDS, decoder_names

ARCHITECTURES = {"qwen2_audio": "Qwen2AudioForConditionalGeneration"}
"""Model type -> architecture."""

_TEXT_FIELDS = {
    name: theirs for name, theirs in TEXT_FIELDS.items() if name not in ("image_token_id", "tie_embeddings")
}
_AUDIO_FIELDS = {
    name: f"audio_config.{theirs}"
    for name, theirs in whisper_weights.FIELDS.items()
    if name.startswith("audio_") or name == "mel_bins"
}
FIELDS = _TEXT_FIELDS | _AUDIO_FIELDS | {"audio_token_id": "audio_token_index"}
"""Field of `QwenAudioConfig` -> field of transformers' configuration."""

_AUDIO = "audio_tower."
_TEXT = "language_model.model."

# The start of a parameter's name in `QwenAudio` -> in the checkpoint.
_TABLE = {
    **whisper_weights.encoder_names("audio.", _AUDIO),
    "projector.": "multi_modal_projector.linear.",
    **decoder_names(_TEXT),
    "head.": "language_model.lm_head.",
}

# Names in the model of transformers 5, of which it writes those above; version 5.17 writes the first one.
_ALSO = {
    "language_model.model.model.": _TEXT,
    "model.audio_tower.": _AUDIO,
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.language_model.": _TEXT,
    "lm_head.": "language_model.lm_head.",
}

NAMES = Names(_TABLE, re.compile(r"\.rotary_emb\.inv_freq$"), also=_ALSO)
"""The names of checkpoints; constants, which older versions of transformers saved, are left out."""
