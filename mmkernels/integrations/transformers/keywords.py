"""Which keyword arguments of an attention call are obeyed, change nothing, or are refused. None is not refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmkernels.integrations.transformers.model_mask import USE_ANOTHER

REFUSED = {
    "softcap": "cap on the scores",
    "cache": "paged cache",
    "indices": "sparse attention by indices",
    "block_indices": "sparse attention by blocks",
    "sinks": "sinks by query",
}
"""Keyword arguments that change the result, by what `cross_attention` lacks."""

DECIDED_BY_NAME = ("indices", "block_indices", "sinks")
"""Those that a model passes or puts into the mask, depending on its attention's name."""

_MASK = "the mask function reads it, and transformers' eager takes it from the mask alone"
_LENGTHS = "an upper bound of lengths that cu_seq_lens_q and cu_seq_lens_k give exactly"
_MODEL = "for the model's outputs, losses or cache, which the attention function does not make"

WITHOUT_EFFECT = {
    "sliding_window": _MASK,
    "position_ids": _MASK,
    "max_length_q": _LENGTHS,
    "max_length_k": _LENGTHS,
    "max_seqlen": _LENGTHS,
    "grid_thw": "rows and columns of the images, for a convolution between attention and attention",
    "deterministic": "gradients are deterministic in any case",
    "use_cache": _MODEL,
    "output_hidden_states": _MODEL,
    "output_router_logits": _MODEL,
    "num_items_in_batch": _MODEL,
    "return_dict": _MODEL,
    "logits_to_keep": _MODEL,
    "max_new_tokens": _MODEL,
    "cache_position": _MASK,
}
"""Keyword arguments that models pass through their layers and that change no attention, by why they don't."""

_ONLY_PACKED = {"seq_idx": "cu_seq_lens_q"}
"""Repeats what another argument says, and is refused without it."""

_NOT_PACKED = ("sliding_window",)
"""Beside packed sequences nothing but the mask can say it."""


def check_keywords(module: Any, keywords: Mapping[str, Any], packed: bool, masked: bool) -> None:
    """Refuses a keyword argument that would be ignored.

    Args:
        packed: the call gives ``cu_seq_lens_q``. masked: it gives a mask.

    Raises:
        NotImplementedError: with the argument's name and what to do.
    """
    for name, value in keywords.items():
        if value is None:
            continue
        if name in REFUSED:
            raise NotImplementedError(
                f'attn_implementation="mmkernels" has no {REFUSED[name]} ({name}), which {type(module).__name__} '
                'needs; use "eager" there'
            )
        if name in _ONLY_PACKED and packed:
            continue
        if name not in WITHOUT_EFFECT or (packed and not masked and name in _NOT_PACKED):
            raise NotImplementedError(
                f'attn_implementation="mmkernels" is not for {type(module).__name__}: it passes {name}='
                f"{_described(value)}, which mmkernels does not know in this place; {USE_ANOTHER}"
            )


def _described(value: Any) -> str:
    return repr(value) if isinstance(value, bool | int | float | str) else type(value).__name__
