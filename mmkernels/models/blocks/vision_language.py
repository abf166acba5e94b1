"""`VisionLanguageModel`: what models share in which images are tokens of the text (Qwen-VL, InternVL, BLIP-2)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.models.blocks.context import ContextCache, ContextPolicy
from mmkernels.models.blocks.decoder import Decoder, Deep
from mmkernels.models.blocks.generation import continue_text, next_token_loss
from mmkernels.models.blocks.media import last_of
from mmkernels.models.blocks.model import Model
from mmkernels.models.blocks.text import check_ids, check_tokens
from mmkernels.models.blocks.visual import Media, Visual, check_markers, positions_of, shorten, token_numbers
from mmkernels.models.blocks.visual_reduction import VisualReducer
from mmkernels.nn.checks import check_positive
from mmkernels.nn.linear_layer import linear
from mmkernels.ops.tokens.ranking import image_of
from mmkernels.ops.tokens.scatter_tokens import scatter_tokens

Encode = Callable[[], list[Visual]]
"""Encodes the images of a call: one `Visual` for each `Media`."""


@dataclass
class VisionLanguageOutput:
    """The result of `VisionLanguageModel.forward`.

    Attributes:
        logits: ``[B, L, vocab_size]``, or ``[B, 1, vocab_size]`` of the last token of each row; None with labels, where
            they were not asked for. With a reducer L is the length of the shortened prompt.
        loss: the mean cross-entropy of the next token, fp32 (fp64 for fp64 weights); None without labels.
        kv_cache: an argument of the next call; None with labels, if none was given.
        hidden: what the last layer makes logits of, ``[B, L, width]``, or ``[B, 1, width]`` of the last token; None
            where it was not asked for.
    """

    logits: Tensor | None
    loss: Tensor | None
    kv_cache: ContextCache | None
    hidden: Tensor | None = None


@dataclass
class VisionLanguageGeneration:
    """The result of `VisionLanguageModel.generate`.

    Attributes:
        tokens: int64 ``[B, n]``, n at most `max_new_tokens`; padding follows the end-of-text token of a row.
        kv_cache: an argument of the next turn, which gets only its new tokens and new images.
    """

    tokens: Tensor
    kv_cache: ContextCache


class VisionLanguageModel(Model):
    """Base class: encodes images (or sounds), puts their tokens into the text's embeddings, and continues the text.

    A subclass has an encoder, `_media`, which reads its visual inputs, and a configuration with `text_length`,
    `vocab_size`, `eos_token_ids` and `pad_token_id`.

    Attributes:
        decoder: the language model.
        head: the last layer.
        reducer: what leaves fewer visual tokens; None: all stay. See `set_reducer`.
    """

    decoder: Decoder
    head: nn.Linear
    reducer: VisualReducer | None
    _inputs: ClassVar[tuple[str, ...]] = ()  # the arguments of `_media`: what `forward` takes beside its own

    def _make_decoder(self, decoder: Decoder, tied: bool) -> None:
        self.decoder, sizes = decoder, decoder.sizes
        self.head = nn.Linear(sizes.width, sizes.vocab, bias=False)
        if tied:
            self.head.weight = self.decoder.embed.weight

    def set_reducer(self, text: str | None) -> None:
        """Leaves fewer visual tokens from now on: the prompts stay as they are, and the markers without a token go.

        Args:
            text: as `TokenReducer.parse` reads it, such as "pool:2" or "select:0.25", one without weights; None: all
                tokens stay.

        Raises:
            ValueError: there is no such reducer, or it has weights.
        """
        self.reducer = None if text is None else VisualReducer(text, self.decoder.sizes.width)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        names = inspect.signature(cls._media).parameters
        cls._inputs = tuple(name for name in names if name not in ("self", "input_ids"))

    def _check_names(self, visual: dict[str, Any]) -> None:
        """Raises unless all visual inputs are ones that the model has."""
        for name in visual:
            if name not in self._inputs:
                known = ", ".join(self._inputs)
                raise TypeError(f"inputs of {type(self).__name__} beside the text must be of {known}; got {name}")

    def _media(self, input_ids: Tensor, **visual: Any) -> tuple[list[Media], Encode]:
        """Checks visual inputs; returns what the prompts must mark, and a function that encodes it.

        Args:
            input_ids: ``[B, L]``.
            visual: what `forward` was given beside its own arguments.
        """
        raise NotImplementedError

    def _nothing(self) -> Visual:
        """Returns no images."""
        weight = self.head.weight
        return Visual(weight.new_zeros(0, weight.shape[1]), (), ())

    def _check_encoded(self, name: str, visual: Visual) -> None:
        """Raises unless an argument is what `encode` of a model with this width returns."""
        if not isinstance(visual, Visual):
            raise TypeError(f"{name} must be what encode returns, got {type(visual).__name__}")
        width = self.decoder.sizes.width
        if visual.tokens.shape[1:] != (width,):
            got = f"{visual.tokens.dtype} {tuple(visual.tokens.shape)}"
            raise ValueError(f"{name} must be [tokens, {width}], as encode returns, got {got}")

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        kv_cache: ContextCache | None = None,
        policy: ContextPolicy | None = None,
        labels: Tensor | None = None,
        last_logits_only: bool = False,
        return_logits: bool | None = None,
        return_hidden: bool = False,
        **visual: Any,
    ) -> VisionLanguageOutput:
        """Returns the logits of the next token, for a text or, with a cache, for its continuation; or the loss.

        Args:
            input_ids: the new tokens, integers ``[B, L]``, in which each visual token has a marker, as transformers'
                processors write them.
            pixel_values: the new images, in the order of their markers, row after row.
            attention_mask: ``[B, L]``, 0: padding, on either side.
            kv_cache: of earlier calls; it is updated.
            policy: what is forgotten where the images of `kv_cache` and the new ones are too many; None: nothing is.
            labels: ``[B, L]``, -100: ignored. Token i is predicted from the tokens before i. If all are ignored, the
                loss is NaN, as in ``F.cross_entropy``. The loss builds no logits, and rows that predict an ignored
                token are not multiplied: see `mmkernels.linear_cross_entropy`.
            last_logits_only: whether to compute the logits of the last token of each row only.
            return_logits: whether to compute logits at all; None: unless labels are given.
            return_hidden: whether to return what the logits are computed from, as `mmkernels.linear_logprobs` takes it.
            visual: the model's other visual inputs, which `encode` of the model names.

        Raises:
            TypeError, ValueError: an input has the wrong shape, dtype or values (values are checked on a CPU only), or
                a text is too long; found before anything is encoded. Only where a reducer or a policy makes room, texts
                that are too long are found behind the encoder.
        """
        if labels is not None and last_logits_only:
            raise ValueError("labels need the logits of every token: last_logits_only must be False")
        cache = self._checked_cache(kv_cache)
        if policy is not None and not isinstance(policy, ContextPolicy):
            raise TypeError(f"policy must be a ContextPolicy or None, got {type(policy).__name__}")
        valid, padded = check_tokens(input_ids, attention_mask, labels, self.config.vocab_size, cache)
        if pixel_values is not None:
            visual["pixel_values"] = pixel_values
        self._check_names(visual)
        media, encode = self._media(input_ids, **visual)
        check_markers(input_ids, valid, media)
        markers = [(input_ids == kind.marker) & valid for kind in media]
        if self.reducer is None and not any(_is_reduced(x) for x in visual.values()):  # each marker will be a token
            if policy is None:
                self._check_length(input_ids.shape[1] + int(cache.pending is not None), cache)
            elif any(kind.marked for kind in media):
                policy.check(_count(markers))
        visuals = encode()

        given, labels = _shortened(_Tokens(input_ids, valid, padded, markers), labels, visuals)
        ids, valid, padded, markers = _with_pending(given, cache)
        if ids.shape[1] == 0:
            raise ValueError("input_ids must have at least one token, got none")
        if policy is not None and any(sum(visual.lengths) for visual in visuals):
            cache.make_room(policy, _count(markers))

        self._check_length(ids.shape[1], cache)
        positions = self._positions(valid, markers, visuals, cache)
        mask = cache.extend_with(valid, padded, *_images(markers, visuals))
        store = cache if kv_cache is not None or labels is None else None
        x, deep = self._embed(ids, markers, visuals)
        x = self.decoder(x, positions, mask, store, deep)
        cache.pending = None
        x = last_of(x, valid)[:, None] if last_logits_only else x[:, x.shape[1] - given.ids.shape[1] :]
        x = self.decoder.norm(x)
        loss = None if labels is None else next_token_loss(self.head, x, labels)
        wanted = labels is None if return_logits is None else return_logits
        return VisionLanguageOutput(linear(self.head, x) if wanted else None, loss, store, x if return_hidden else None)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        kv_cache: ContextCache | None = None,
        policy: ContextPolicy | None = None,
        max_new_tokens: int = 32,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        **visual: Any,
    ) -> VisionLanguageGeneration:
        """Continues a text. Images are encoded once: a later turn passes its new tokens and images, and the cache.

        Args:
            input_ids, pixel_values, attention_mask, kv_cache, policy, visual: as in `forward`.
            max_new_tokens: the largest number of tokens to generate; a text ends too where it has `text_length` tokens.
            temperature, top_p: as in `blocks.sampling.sample`; temperature 0 takes the most likely token.
            seed: for a reproducible draw; None: PyTorch's global generator.
            eos_token_id: the tokens that end a row; None: those of the configuration; (): none.
        """
        check_positive("max_new_tokens", max_new_tokens)
        check_ids(input_ids)
        most = self.config.text_length
        if kv_cache is None:  # a reducer leaves fewer tokens, which are not known yet
            reserve = 0 if self.reducer is not None else min(input_ids.shape[1] + max_new_tokens, most)
            kv_cache = ContextCache(len(self.decoder.blocks), reserve=reserve)

        def step(ids: Tensor, **inputs: Any) -> Tensor:
            out = self(ids, kv_cache=kv_cache, policy=policy, last_logits_only=True, **inputs)
            return out.logits[:, 0]

        tokens = continue_text(
            step,
            input_ids,
            kv_cache,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            eos_token_id=self.config.eos_token_ids if eos_token_id is None else eos_token_id,
            pad_token_id=self.config.pad_token_id,
            most=most,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            **visual,
        )
        return VisionLanguageGeneration(tokens, kv_cache)

    def _checked_cache(self, kv_cache: ContextCache | None) -> ContextCache:
        layers = len(self.decoder.blocks)
        if kv_cache is None:
            return ContextCache(layers)
        if not isinstance(kv_cache, ContextCache):
            raise TypeError(f"kv_cache must be a ContextCache or None, got {type(kv_cache).__name__}")
        if kv_cache.num_layers != layers:
            raise ValueError(f"kv_cache must have {layers} layers, got {kv_cache.num_layers}")
        return kv_cache

    def _embed(self, ids: Tensor, markers: list[Tensor], visuals: list[Visual]) -> tuple[Tensor, list[Deep]]:
        """Returns the embeddings ``[B, L, width]`` of words and visual tokens, and what is added to them later."""
        x, deep = self.decoder.embed(ids), []
        for where, visual in zip(markers, visuals, strict=True):
            if visual.lengths:
                x = scatter_tokens(x, visual.tokens.to(x.dtype), where)
                deep.append(Deep(visual.deep, where))
        return x, deep

    def _positions(self, valid: Tensor, markers: list[Tensor], visuals: list[Visual], cache: ContextCache) -> Tensor:
        """Returns the new tokens' positions, ``[3, B, L]`` with M-RoPE, else ``[B, L]``; moves the cache's on.

        The next call goes on as in one prompt with everything in it, and as transformers' `generate` does: behind all
        of the last image, also where a reducer left none of its last row, whatever positions a video's times reach.
        """
        first = cache.next_position
        if first is None:
            first = torch.zeros(valid.shape[0], dtype=torch.long, device=valid.device)
        if self.decoder.sizes.sections is None:
            cache.next_position = first + valid.sum(1)
            return (valid.long().cumsum(1) - 1 + first[:, None]) * valid
        more = F.pad(valid, (0, 1), value=True)  # with the next token, which is text
        positions = positions_of(more, [F.pad(mask, (0, 1)) for mask in markers], visuals, first)
        cache.next_position = positions[0, :, -1]
        return positions[..., :-1]

    def _check_length(self, new: int, cache: ContextCache) -> None:
        most, held = self.config.text_length, cache.num_tokens
        if held + new > most:
            must = f"input_ids must have at most {most} tokens (text_length) with {held} in kv_cache"
            raise ValueError(f"{must}, got {new}")


class _Tokens(NamedTuple):
    """New tokens of a call.

    Attributes:
        ids: ``[B, L]``.
        valid: bool ``[B, L]``, False: padding.
        padded: False promises that there is none.
        markers: for each kind of media where its tokens stand, bool ``[B, L]``.
    """

    ids: Tensor
    valid: Tensor
    padded: bool
    markers: list[Tensor]


def _shortened(given: _Tokens, labels: Tensor | None, visuals: list[Visual]) -> tuple[_Tokens, Tensor | None]:
    """Returns tokens and labels without the markers that reducers left no token for."""
    short = shorten(given.valid, given.markers, visuals)
    if short is None:
        return given, labels
    ids, valid = given.ids.gather(1, short.columns), short.valid
    markers = [mask.gather(1, short.columns) & valid for mask in given.markers]
    labels = None if labels is None else labels.gather(1, short.columns).masked_fill(~valid, -100)
    return _Tokens(ids, valid, given.padded or ids.shape[0] > 1, markers), labels


def _with_pending(given: _Tokens, cache: ContextCache) -> _Tokens:
    """Returns the tokens behind the one with which the last turn ended, which was not processed yet."""
    if cache.pending is None:
        return given
    token, alive = cache.pending
    ids, valid = torch.cat([token, given.ids], dim=1), torch.cat([alive, given.valid], dim=1)
    markers = [torch.cat([torch.zeros_like(alive), mask], dim=1) for mask in given.markers]
    return _Tokens(ids, valid, given.padded or ids.shape[0] > 1, markers)  # a row may have ended before the others


def _is_reduced(x: Any) -> bool:
    """Whether an input of `forward` is encoded images with fewer tokens than markers."""
    return isinstance(x, Visual) and x.lengths != x.marked


def _count(markers: list[Tensor]) -> Tensor:
    """Returns how many visual tokens each row has, int64 ``[B]``."""
    return torch.stack(markers).sum((0, 2))


def _images(markers: list[Tensor], visuals: list[Visual]) -> tuple[Tensor, int]:
    """Returns which of the new images each token belongs to, int64 ``[B, L]``, -1: text; and how many images there are.

    Images are numbered kind by kind.
    """
    first, of_token = 0, None
    for mask, visual in zip(markers, visuals, strict=True):
        numbers = token_numbers(mask)
        if visual.tokens.shape[0]:
            images = image_of(visual.lengths, mask.device)[numbers.clamp(min=0, max=visual.tokens.shape[0] - 1)] + first
            numbers = torch.where(numbers >= 0, images, -1)
        of_token = numbers if of_token is None else torch.where(numbers >= 0, numbers, of_token)
        first += len(visual.lengths)
    assert of_token is not None
    return of_token, first
