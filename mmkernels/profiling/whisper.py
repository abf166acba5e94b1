"""Whisper for the profiler: the decoder attends to the features of a sound."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.models.whisper import Whisper
from mmkernels.models.whisper_decoder import Sound as Features
from mmkernels.models.whisper_decoder import SoundKeys, WhisperCache
from mmkernels.nn import TokenReducer
from mmkernels.profiling.adapter import Reduction, Stage
from mmkernels.profiling.options import Excerpt, Row
from mmkernels.profiling.reading import DECODE_TOKENS
from mmkernels.profiling.sound import Sound
from mmkernels.profiling.sound_adapter import (
    FRAMES_PER_SECOND,
    MEL,
    Heard,
    HearingAdapter,
    check_room,
    check_seconds,
    feature_extractor,
    hear,
    random_ids,
)
from mmkernels.profiling.sound_options import SoundOptions
from mmkernels.profiling.vision_language import Size

_SAID = 28  # tokens behind the prompt of which drift and the training loss are
_NAMED = {
    "tiny": Size("tiny", {"audio_positions": 1500, "text_length": 64}),  # its own hears one second
    "small": Size("base", {}, "whisper-base's sizes"),
    "base": Size("large_v3", {}, "whisper-large-v3's sizes"),
}


class Pooling(nn.Module):
    """A `Whisper` whose decoder attends to the means of neighbouring features.

    Args:
        whisper: the model.
        pool: of so many features.
    """

    def __init__(self, whisper: Whisper, pool: int) -> None:
        super().__init__()
        self.whisper = whisper
        self.reducer = TokenReducer.parse("none" if pool == 1 else f"pool:{pool}", whisper.config.audio_width)

    def pool(self, sound: Features) -> Features:
        """Returns the features of one sound that are left; the last one may be of fewer."""
        reduced = self.reducer(sound.features[0], [(1, 1, sound.features.shape[1])])
        return Features(reduced.x[None], None)

    def hear(self, features: Tensor) -> Features:
        """Returns what a text sees of a spectrogram."""
        return self.pool(self.whisper.encode(features))


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What the stages take.

    Args:
        prompt: int64 ``[1, L]``.
        text: the prompt, and what is said behind it.
        heard: the sound.
    """

    prompt: Tensor
    text: Tensor
    heard: Heard


class Read(NamedTuple):
    """The state after the prompt, ready for the next token ``[1, 1]``."""

    cache: WhisperCache
    token: Tensor


def _encode(model: Pooling, inputs: Inputs, state: Tensor) -> Features:
    return model.whisper.encode(state)


def _pool(model: Pooling, inputs: Inputs, state: Features) -> Features:
    return model.pool(state)


def _project(model: Pooling, inputs: Inputs, state: Features) -> SoundKeys:
    return model.whisper.project(state)


def _prefill(model: Pooling, inputs: Inputs, state: SoundKeys) -> Read:
    cache = WhisperCache(len(model.whisper.decoder.blocks), reserve=inputs.prompt.shape[1] + DECODE_TOKENS)
    cache.sound = state
    return Read(cache, _next_token(model, inputs.prompt, cache))


def _decode(model: Pooling, inputs: Inputs, state: Read) -> Read:
    token = state.token
    for _ in range(DECODE_TOKENS):
        token = _next_token(model, token, state.cache)
    return Read(state.cache, token)


def _next_token(model: Pooling, ids: Tensor, cache: WhisperCache) -> Tensor:
    logits = model.whisper(ids, cache=cache, last_logits_only=True).logits
    assert logits is not None
    return logits[:, -1:].argmax(-1)


def _fork(state: Read) -> Read:
    """Copies what the decoder changes: the keys and values of the text, not those of the sound."""
    sound = state.cache.sound
    return Read(copy.deepcopy(state.cache, {id(sound): sound}), state.token)


class WhisperAdapter(HearingAdapter):
    model_class = Whisper
    named = _NAMED
    about_tokens = (
        f"features of the sound that the decoder attends to; before pooling one is {2000 // FRAMES_PER_SECOND} ms"
    )
    stages: tuple[Stage, ...] = (
        MEL,
        Stage("encode", "the encoder of sound", _encode, shared=True),
        Stage("pool", "the mean of neighbouring features", _pool),
        Stage("keys", "the keys and values of the features in every layer of the decoder", _project),
        Stage("prompt", "the prompt through the decoder, up to the next token's scores", _prefill),
        Stage("decode", f"one more token, the mean of {DECODE_TOKENS}", _decode, DECODE_TOKENS, _fork),
    )

    def check(self, options: SoundOptions) -> None:
        assert options.text_length is not None
        config = self.config(options)
        check_seconds(options, config.audio_positions)
        check_room(options.text_length, 0, max(_SAID, DECODE_TOKENS), config.text_length)

    def build(self, options: SoundOptions, row: Row) -> nn.Module:
        assert isinstance(row, Excerpt)
        return Pooling(self.make(options), row.pool).eval()

    def exchange(self, options: SoundOptions, model: Pooling, choice: Excerpt) -> nn.Module:
        return Pooling(model.whisper, choice.pool).eval()

    def reduction(self, model: Pooling, inputs: Inputs) -> Reduction:
        sound = model.whisper.encode(inputs.heard.features)
        return Reduction(model.pool(sound).features.shape[1], 1, sound.features.shape[1], None, learned=False)

    def inputs(self, options: SoundOptions, model: Pooling, sources: list[Sound], row: Row) -> Inputs:
        assert isinstance(row, Excerpt) and options.text_length is not None
        (sound,), config, weight = sources, model.whisper.config, model.whisper.head.weight
        heard = hear(sound, row.seconds, feature_extractor(options.folder, config.mel_bins), weight)
        special = min(config.start_token_id, config.pad_token_id, *config.eos_token_ids)
        text = random_ids(special, options.text_length + _SAID, options.seed)
        text[:, 0] = config.start_token_id
        text = text.to(weight.device)
        return Inputs(prompt=text[:, : options.text_length], text=text, heard=heard)

    def logits(self, model: Pooling, inputs: Inputs) -> Tensor:
        logits = model.whisper(inputs.text, sound=model.hear(inputs.heard.features)).logits
        assert isinstance(logits, torch.Tensor)
        return logits

    def loss(self, model: Pooling, inputs: Inputs) -> Tensor:
        sound = model.hear(inputs.heard.features)
        loss = model.whisper(inputs.text, sound=sound, labels=inputs.text).loss
        assert isinstance(loss, torch.Tensor)
        return loss

    def naive_loss(self, model: Pooling, inputs: Inputs) -> Tensor:
        return F.cross_entropy(self.logits(model, inputs)[0, :-1].float(), inputs.text[0, 1:])
