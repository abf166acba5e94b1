"""How a `Janus` learns and writes the tokens of an image."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.masks import SpanMask
from mmkernels.models.blocks.kv_cache import KVCache
from mmkernels.models.blocks.media import last_of
from mmkernels.models.blocks.sampling import check_sampling, sample
from mmkernels.models.blocks.text import check_tokens
from mmkernels.models.blocks.visual import check_markers
from mmkernels.nn.linear_layer import linear
from mmkernels.ops.linear.linear_cross_entropy import linear_cross_entropy
from mmkernels.runtime.checks import check_number

if TYPE_CHECKING:
    from mmkernels.models.janus import Janus


class Options(NamedTuple):
    """How tokens are drawn: arguments of `Janus.generate_image`."""

    guidance_scale: float
    temperature: float
    top_p: float
    seed: int | None


def checked_prompt(model: Janus, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, bool]:
    """Checks prompts ``[B, L]``; returns which tokens are valid, bool ``[B, L]``, and whether any may be padding."""
    c = model.config
    valid, padded = check_tokens(input_ids, attention_mask, None, c.vocab_size, KVCache(0))
    length, most = input_ids.shape[1], c.text_length - c.image_tokens + 1  # the last image token is not read
    if not 1 <= length <= most:
        must = f"[B, L], L from 1 to {most} (text_length, less an image)"
        raise ValueError(f"input_ids must be {must}, got shape {tuple(input_ids.shape)}")
    check_markers(input_ids, valid, [model._marked(())])
    return valid, padded


# Training.


def image_hidden(model: Janus, input_ids: Tensor, image_tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Returns the hidden states ``[B, N, text_width]`` from which image tokens ``[B, N]`` behind prompts are predicted.

    Args:
        input_ids, attention_mask: the prompts ``[B, L]``.
    """
    valid, padded = checked_prompt(model, input_ids, attention_mask)
    if image_tokens.shape[0] != input_ids.shape[0]:
        must = f"of {input_ids.shape[0]} images, one for each row of input_ids"
        raise ValueError(f"image_tokens must be {must}, got {image_tokens.shape[0]}")
    read = image_tokens[:, :-1]
    x = torch.cat([model.decoder.embed(input_ids), model.embed_image(read)], dim=1)
    positions, mask = KVCache(0).extend(torch.cat([valid, torch.ones_like(read, dtype=torch.bool)], dim=1), padded)
    hidden = model.decoder.norm(model.decoder(x, positions, mask))
    length = valid.shape[1]
    return torch.cat([last_of(hidden[:, :length], valid)[:, None], hidden[:, length:]], dim=1)


def image_loss(head: nn.Sequential, hidden: Tensor, image_tokens: Tensor) -> Tensor:
    """Returns the mean cross-entropy of image tokens, fp32; it builds no logits.

    Args:
        head: the layers that predict image tokens. A last layer put in the place of theirs, such as LoRA's, is called,
            and all logits are computed.
        hidden: ``[B, N, text_width]``.
        image_tokens: ``[B, N]``.
    """
    *first, last = head
    for layer in first:
        hidden = layer(hidden)
    if getattr(last.forward, "__func__", None) is nn.Linear.forward:
        assert isinstance(last, nn.Linear)
        return linear_cross_entropy(hidden, last.weight, image_tokens, linear_bias=last.bias)
    return F.cross_entropy(last(hidden).flatten(0, 1).float(), image_tokens.flatten())


# Generation.


def generate_image(model: Janus, input_ids: Tensor, attention_mask: Tensor | None, options: Options) -> Tensor:
    """Returns the tokens of an image for each prompt ``[B, L]``, int64 ``[B, N]``."""
    scale, temperature, top_p, seed = options
    scale = check_number("guidance_scale", scale, "a number from 0 on", 0.0)
    check_sampling(temperature, top_p)
    valid, padded = checked_prompt(model, input_ids, attention_mask)
    if scale == 0.0:
        input_ids = model.unconditional(input_ids)
    elif scale != 1.0:
        input_ids = torch.cat([input_ids, model.unconditional(input_ids)])
        valid = valid.repeat(2, 1)
    generator = None if seed is None else torch.Generator(input_ids.device).manual_seed(seed)
    guided = scale not in (0.0, 1.0)
    writer = _Writer(model, valid, padded)
    hidden = writer.read(input_ids)
    tokens: list[Tensor] = []
    while True:
        tokens.append(sample(_scores(model.image_head, hidden, scale, guided), temperature, top_p, generator))
        if len(tokens) == model.config.image_tokens:
            return torch.stack(tokens, dim=1)
        x = model.embed_image(tokens[-1])
        hidden = writer.step(x.repeat(2, 1) if guided else x)


def _scores(head: nn.Sequential, hidden: Tensor, scale: float, guided: bool) -> Tensor:
    """Returns the logits ``[B, codes]`` of the next image token.

    Args:
        hidden: ``[B, text_width]``; where guided ``[2 B, text_width]``, first those with the prompts.
    """
    *first, last = head
    for layer in first:
        hidden = linear(layer, hidden)
    if guided:  # a linear layer of the combined states gives the combined logits
        given, nothing = hidden.unflatten(0, (2, -1))
        hidden = torch.add(nothing, given - nothing, alpha=scale)
    return linear(last, hidden)


class _Writer:
    """Calls the language model, one image token after the other.

    Args:
        model: the model.
        valid, padded: of the prompts ``[R, L]``, as `checked_prompt` returns them.
    """

    def __init__(self, model: Janus, valid: Tensor, padded: bool) -> None:
        self.decoder, steps = model.decoder, model.config.image_tokens - 1
        self.length, self.padded, self.valid = valid.shape[1], padded, F.pad(valid, (0, steps), value=True)
        self.cache = KVCache(len(self.decoder.blocks), reserve=self.length + steps)
        behind = valid.sum(1)[:, None] + torch.arange(steps, device=valid.device)  # [R, steps]: the tokens' positions
        angles = self.decoder.angles(behind, self.decoder.embed.weight.dtype)  # of all of them at once
        self.angles = [(cos, sin) for cos, sin in zip(*(x.split(1, dim=2) for x in angles), strict=True)]
        self.written = 0

    def read(self, input_ids: Tensor) -> Tensor:
        """Returns what the first image token is predicted from, ``[R, width]``."""
        valid = self.valid[:, : self.length]
        positions, mask = self.cache.extend(valid, self.padded)
        x = self.decoder(self.decoder.embed(input_ids), positions, mask, self.cache)
        hidden: Tensor = self.decoder.norm(last_of(x, valid))
        return hidden

    def step(self, x: Tensor) -> Tensor:
        """Returns what the next image token is predicted from, ``[R, width]``, of the embedded last one."""
        angles = self.angles[self.written]
        self.written += 1
        # One query behind all keys: without padding it sees all of them.
        mask = SpanMask.from_key_mask(self.valid[:, : self.length + self.written]) if self.padded else None
        x = x[:, None]
        for layer, block in enumerate(self.decoder.blocks):
            x = block(x, angles, mask, self.cache, layer)
        hidden: Tensor = self.decoder.norm(x[:, 0])
        return hidden
