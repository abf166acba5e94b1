"""Flamingo for the profiler: one prompt with several images."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mmkernels.models.blocks.encoder import Heads, Sizes
from mmkernels.models.blocks.images import to_pixels
from mmkernels.models.blocks.reduction import PatchReducer
from mmkernels.models.blocks.vision import VisionTransformer
from mmkernels.models.flamingo import Flamingo, FlamingoCache
from mmkernels.models.flamingo_config import SIZES
from mmkernels.nn import VisualCache
from mmkernels.options import BadInput
from mmkernels.profiling.adapter import Reduction, Stage
from mmkernels.profiling.options import MOST_TOKENS, Choice, Options, Row
from mmkernels.profiling.reading import DECODE_TOKENS


@dataclass(frozen=True)
class Inputs:
    pixel_values: Tensor  # [1, N, 3, S, S]
    input_ids: Tensor  # [1, L]
    media_index: Tensor  # [1, L]: the last image at or before each token


@dataclass(frozen=True)
class Read:
    """The state after the prompt, ready for the next token."""

    visual_cache: VisualCache
    kv_cache: FlamingoCache
    token: Tensor  # [1, 1]


def _encode(model: Flamingo, inputs: Inputs, state: None) -> tuple[Tensor, Heads | None]:
    return model.encode_with_heads(inputs.pixel_values)


def _resample(model: Flamingo, inputs: Inputs, state: tuple[Tensor, Heads | None]) -> VisualCache:
    return model.cache_images(model.resample(*state))


def _prefill(model: Flamingo, inputs: Inputs, state: VisualCache) -> Read:
    room = FlamingoCache(model.config.text_layers, reserve=inputs.input_ids.shape[1] + DECODE_TOKENS)
    out = model(
        inputs.input_ids, media_index=inputs.media_index, visual_cache=state, kv_cache=room, last_logits_only=True
    )
    return Read(state, out.kv_cache, out.logits[:, -1:].argmax(-1))


def _decode(model: Flamingo, inputs: Inputs, state: Read) -> Read:
    token = state.token
    for _ in range(DECODE_TOKENS):
        out = model(
            token,
            media_index=inputs.media_index[:, -1:],
            visual_cache=state.visual_cache,
            kv_cache=state.kv_cache,
            last_logits_only=True,
        )
        token = out.logits.argmax(-1)
    return Read(state.visual_cache, state.kv_cache, token)


def _fork(state: Read) -> Read:
    return Read(state.visual_cache, copy.deepcopy(state.kv_cache), state.token)


def _marker(model: Flamingo) -> int:
    """The token that stands for an image, the last of the vocabulary in every size."""
    assert model.config.image_token_id is not None
    return model.config.image_token_id


def _labels(model: Flamingo, inputs: Inputs) -> Tensor:
    """Every token is learned but the images' markers."""
    return inputs.input_ids.masked_fill(torch.eq(inputs.input_ids, _marker(model)), -100)


_ENCODE = Stage("encode", "the image encoder, all images", _encode)
_RESAMPLE = Stage("resample", "the resampler, and its tokens projected to visual keys and values", _resample)
_REDUCE = Stage("reduce", "scores and reducer, and the tokens left projected to visual keys and values", _resample)
_PREFILL = Stage("prefill", "the prompt through the language model, up to the next token's scores", _prefill)
_DECODE = Stage("decode", f"one more token, the mean of {DECODE_TOKENS}", _decode, DECODE_TOKENS, _fork)


class FlamingoAdapter:
    sizes = tuple(SIZES)
    about: Mapping[str, str] = {}
    total = "first token"
    square = True
    stages: tuple[Stage, ...] = (_ENCODE, _RESAMPLE, _PREFILL, _DECODE)

    def check(self, options: Options) -> None:
        """Any number of tokens suits."""

    def build(self, options: Options, row: Row) -> nn.Module:
        return Flamingo.from_size(options.size or "", num_latents=row, seed=options.seed)

    def inputs(self, options: Options, model: Flamingo, photos: list[Image.Image], row: Row) -> Inputs:
        assert options.images is not None and options.text_length is not None
        marker = _marker(model)
        weight = model.embed.weight
        ids = torch.randint(marker, (1, options.text_length), generator=torch.Generator().manual_seed(options.seed))
        places = torch.arange(options.images) * options.text_length // options.images  # evenly, the first token first
        ids[0, places] = marker
        media_index = (ids == marker).long().cumsum(1) - 1
        pixels = to_pixels(photos, model.config.image_size)[None]
        return Inputs(pixels.to(weight), ids.to(weight.device), media_index.to(weight.device))

    def logits(self, model: Flamingo, inputs: Inputs) -> Tensor:
        return model(inputs.input_ids, inputs.pixel_values, media_index=inputs.media_index).logits

    def loss(self, model: Flamingo, inputs: Inputs) -> Tensor:
        labels = _labels(model, inputs)
        return model(inputs.input_ids, inputs.pixel_values, media_index=inputs.media_index, labels=labels).loss

    def naive_loss(self, model: Flamingo, inputs: Inputs) -> Tensor:
        logits, labels = self.logits(model, inputs), _labels(model, inputs)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


class ReducingFlamingoAdapter(FlamingoAdapter):
    stages = (_ENCODE, _REDUCE, _PREFILL, _DECODE)

    def check(self, options: Options) -> None:
        config = SIZES[options.size or ""]
        for side in options.resolutions or (config.image_size,):
            if side % config.patch_size:
                raise BadInput(f"--resolutions must be multiples of {config.patch_size}, the patches' side; got {side}")
            with torch.device("meta"):
                vision = VisionTransformer.of(
                    replace(config, image_size=side), Sizes.of(config, "vision", eps=config.layer_norm_eps)
                )
                for text in options.reduce or ():
                    self._check_reducer(text, vision)

    def _check_reducer(self, text: str, vision: VisionTransformer) -> None:
        try:
            tokens = PatchReducer(text, vision).tokens
        except (ValueError, TypeError) as error:
            raise BadInput(f"--reduce {text}: {error}") from None
        if tokens > MOST_TOKENS:
            raise BadInput(f"--reduce must leave at most {MOST_TOKENS} tokens per image, got {text}")

    def check_photo(self, options: Options, photo: Image.Image) -> None:
        """Every photograph suits: its crops are squares."""

    def build(self, options: Options, row: Row) -> nn.Module:
        assert isinstance(row, Choice)
        return self._build(options, row)

    def _build(self, options: Options, choice: Choice) -> Flamingo:
        return Flamingo.from_size(
            options.size or "", reduce=choice.reducer, image_size=choice.resolution, seed=options.seed
        )

    def exchange(self, options: Options, model: Flamingo, choice: Choice) -> nn.Module:
        other = self._build(options, choice)
        weights = model.state_dict()
        weights["vision.positions"] = _positions(model.vision, other.vision)
        other.load_state_dict(weights, strict=False, assign=True)  # which lacks the reducer's own
        return other.to(model.embed.weight)

    def reduction(self, model: Flamingo, inputs: Inputs) -> Reduction:
        reducer = model.reducer
        assert reducer is not None
        features, heads = model.encode_with_heads(inputs.pixel_values[:, :1])
        _, rows, columns = reducer.grid
        token_of = reducer.token_of(reducer(features[0], heads))
        learned = next(reducer.parameters(), None) is not None
        return Reduction(reducer.tokens, rows, columns, None if token_of is None else token_of[0].tolist(), learned)


def _positions(have: VisionTransformer, want: VisionTransformer) -> nn.Parameter:
    """Returns the positions for images of another size: those of the patches are interpolated, bicubic.

    Source: Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021, section 3.2.
    """
    (_, *old), (_, *new) = have.grid, want.grid
    positions = have.positions
    if old == new:
        return positions
    patches = old[0] * old[1]
    front, body = positions.detach().split([positions.shape[0] - patches, patches])
    body = body.T.unflatten(1, old)[None].float()  # [1, C, rows, columns]
    body = F.interpolate(body, new, mode="bicubic", align_corners=False, antialias=True)[0].flatten(1).T
    return nn.Parameter(torch.cat([front, body.to(front.dtype)]))
