"""The stages of a `VisionLanguageModel` behind its encoder: the prompt is read, then the text goes on by tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmkernels.models.blocks.context import ContextCache
from mmkernels.models.blocks.visual import Visual
from mmkernels.profiling.adapter import Stage

DECODE_TOKENS = 8
"""Tokens over which the time of one is averaged."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What the stages take.

    Args:
        input_ids: int64 ``[1, L]``, with a marker for each visual token.
        text_ids: every token below this number is text.
        medium: the model's argument for what is encoded.
    """

    input_ids: Tensor
    text_ids: int
    medium: str = "images"


@dataclass(frozen=True)
class Read:
    """The state after the prompt, ready for the next token."""

    kv_cache: ContextCache
    token: Tensor  # [1, 1]


def _prefill(model: Any, inputs: Prompt, state: Visual) -> Read:
    length = inputs.input_ids.shape[1] - sum(state.marked) + sum(state.lengths)
    cache = ContextCache(len(model.decoder.blocks), reserve=length + DECODE_TOKENS)
    out = model(inputs.input_ids, **{inputs.medium: state}, kv_cache=cache, last_logits_only=True)
    return Read(cache, _next_token(out.logits, inputs))


def _decode(model: Any, inputs: Prompt, state: Read) -> Read:
    token = state.token
    for _ in range(DECODE_TOKENS):
        token = _next_token(model(token, kv_cache=state.kv_cache, last_logits_only=True).logits, inputs)
    return Read(state.kv_cache, token)


def _next_token(logits: Tensor, inputs: Prompt) -> Tensor:
    """Returns the most likely text token ``[1, 1]``. A marker, which random weights may like, would need an image."""
    return logits[:, -1:, : inputs.text_ids].argmax(-1)


PREFILL = Stage("prefill", "the prompt through the language model, up to the next token's scores", _prefill)
DECODE = Stage(
    "decode",
    f"one more token, the mean of {DECODE_TOKENS}",
    _decode,
    DECODE_TOKENS,
    lambda state: Read(state.kv_cache.fork(), state.token),
)


def random_text(text_ids: int, marker: int, *, length: int, images: int, seed: int) -> list[int]:
    """Returns `length` random tokens below `text_ids`, and markers evenly between them, one for each image."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(text_ids, (length,), generator=generator).tolist()
    for image in reversed(range(images)):  # the first one in front
        ids.insert(image * length // images, marker)
    return ids


def with_markers(text: list[int], marker: int, tokens: int) -> Tensor:
    """Returns a text ``[1, L]`` in which each image's marker stands `tokens` times."""
    return torch.tensor([[token for token in text for _ in range(tokens if token == marker else 1)]])
