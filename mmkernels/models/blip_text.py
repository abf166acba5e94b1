"""The texts of a `BLIP`: their first token, prompts as tokenizers write them; its cache, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mmkernels.models.blocks.kv_cache import KVCache
from mmkernels.nn.cross_attention import KeyValue
from mmkernels.runtime.checks import can_look


class Texts(NamedTuple):
    """Checked texts.

    Attributes:
        ids: integers ``[B, L]``.
        valid: bool ``[B, L]``, False: padding.
        padded: False promises that there is none.
    """

    ids: Tensor
    valid: Tensor
    padded: bool

    @property
    def first(self) -> Tensor:
        """Which token is the first one of its row that is no padding, bool ``[B, L]``."""
        return self.valid & (self.valid.long().cumsum(1) == 1)

    def begun(self, token: int | None) -> Texts:
        """Returns the texts with another first token; None: as they are."""
        return self if token is None else self._replace(ids=self.ids.masked_fill(self.first, token))

    def of_first(self, x: Tensor) -> Tensor:
        """Returns what ``x [B, L, C]`` has for the first token of each row, ``[B, C]``."""
        if not self.padded:
            return x[:, 0]
        return x[torch.arange(x.shape[0], device=x.device), self.valid.to(torch.uint8).argmax(1)]

    def rows(self, index: Tensor) -> Texts:
        """Returns the texts of these rows, int64 ``[n]``."""
        return Texts(self.ids[index], self.valid[index], self.padded)

    @property
    def labels(self) -> Tensor:
        """What the language model predicts: each token but the first one and padding, -100 there. ``[B, L]``"""
        return self.ids.masked_fill(~self.valid | self.first, -100)

    def opening(self, begin: int, end: int) -> Texts:
        """Returns prompts: texts that begin with the token `begin`, without an `end` behind them.

        Tokenizers write their own first token, in whose place `begin` comes, and their last one, which becomes padding.

        Raises:
            ValueError: a row is empty. (Looked at on a CPU only.)
        """
        count = self.valid.sum(1, keepdim=True)
        on_cpu = self.valid.device.type == "cpu" and can_look(self.valid)
        if on_cpu and not bool(count.all()):
            row = int((count[:, 0] == 0).nonzero()[0])
            raise ValueError(f"attention_mask must show a token of each row, got none in row {row}")
        last = self.valid & (self.valid.long().cumsum(1) == count)
        valid = self.valid & ~(last & (self.ids == end) & (count > 1))
        texts = Texts(self.ids, valid, True)
        if on_cpu:
            length = int(valid.any(0).nonzero()[-1]) + 1  # what is padding in all rows is left out
            texts = Texts(self.ids[:, :length], valid[:, :length], not bool(valid[:, :length].all()))
        return texts.begun(begin)


def alone(images: Tensor, token: int) -> Texts:
    """Returns a text of one token for each image."""
    ids = torch.full((images.shape[0], 1), token, device=images.device)
    return Texts(ids, torch.ones_like(ids, dtype=torch.bool), False)


def check_length(new: int, cache: KVCache, most: int) -> None:
    """Raises unless as many new tokens fit behind those of a cache, with the pending one, into the longest text."""
    pending = 0 if cache.pending is None else 1
    held = cache.num_tokens + pending
    if held > most:
        raise ValueError(f"kv_cache must have fewer tokens than text_length = {most}, got {held}")
    if not 1 - pending <= new <= most - held:
        behind = f" behind {held} in kv_cache" if held else ""
        raise ValueError(f"input_ids must have {1 - pending} to {most - held} tokens{behind}, got {new}")


@dataclass
class BLIPOutput:
    """The result of `BLIP.forward`.

    Attributes:
        logits: ``[B, L, vocab_size]``, or ``[B, 1, vocab_size]`` of the last token of each row; None with labels, where
            they were not asked for.
        loss: the mean cross-entropy of the next token; None without labels.
        kv_cache: of the text so far, an argument of the next call; None with labels, if none was given.
    """

    logits: Tensor | None
    loss: Tensor | None
    kv_cache: BLIPCache | None


class BLIPCache(KVCache):
    """A `KVCache` that also holds the keys and values of the images.

    Attributes:
        images: what `BLIP.project` returned for them; None: there are none yet.
    """

    def __init__(self, num_layers: int, *, reserve: int = 0) -> None:
        super().__init__(num_layers, reserve=reserve)
        self.images: list[KeyValue] | None = None


@dataclass
class BLIPGeneration:
    """The result of `BLIP.generate`.

    Attributes:
        tokens: int64 ``[B, n]``, n at most `max_new_tokens`; padding follows the end-of-text token of a row.
        kv_cache: an argument of the next call, which gets only its new tokens.
    """

    tokens: Tensor
    kv_cache: BLIPCache
