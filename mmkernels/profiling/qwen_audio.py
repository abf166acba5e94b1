"""Qwen2-Audio for the profiler: a sound's tokens stand in the text."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.models.blocks.visual import Visual
from mmkernels.models.qwen_audio import POOL, QwenAudio
from mmkernels.profiling.adapter import Reduction, Stage
from mmkernels.profiling.encoder import output_of, returning
from mmkernels.profiling.options import Excerpt, Row
from mmkernels.profiling.reading import DECODE, DECODE_TOKENS, PREFILL, Prompt, random_text, with_markers
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
)
from mmkernels.profiling.sound_options import SoundOptions
from mmkernels.profiling.vision_language import Size

_VOCABULARY = 32000
_FEW = {"audio_layers": 2, "text_layers": 2, "vocab_size": _VOCABULARY, "audio_token_id": _VOCABULARY - 1} | {
    "eos_token_ids": (),
    "pad_token_id": 0,
}
"""Layers and tokens of "small", at published widths: what a CPU profiles in minutes."""
_NAMED = {
    "tiny": Size("tiny", {"audio_positions": 1500}),  # its own hear one second
    "small": Size("qwen2_audio_7b", _FEW, f"published widths, 2 layers each, a vocabulary of {_VOCABULARY:,}"),
    "base": Size("qwen2_audio_7b"),
}


@dataclass(frozen=True, kw_only=True)
class Inputs(Prompt):
    """A prompt, and its sound."""

    heard: Heard


def _encode(model: QwenAudio, inputs: Inputs, state: Tensor) -> Any:
    return state, output_of(model.audio, lambda: model.encode(state))


def _pool(model: QwenAudio, inputs: Inputs, state: tuple[Tensor, Tensor]) -> Visual:
    features, encoded = state
    with returning(model.audio, encoded):
        return model.encode(features)


class QwenAudioAdapter(HearingAdapter):
    model_class = QwenAudio
    named = _NAMED
    about_tokens = f"of the sound, in the prompt; before pooling one is {1000 * 2 * POOL // FRAMES_PER_SECOND} ms"
    stages: tuple[Stage, ...] = (
        MEL,
        Stage("encode", "the encoder of sound, which averages two features", _encode, shared=True),
        Stage("pool", "the projection to the language model, and the mean of neighbours", _pool),
        PREFILL,
        DECODE,
    )

    def check(self, options: SoundOptions) -> None:
        assert options.text_length is not None and options.seconds
        config = self.config(options)
        check_seconds(options, config.audio_positions)
        check_room(options.text_length, _tokens(options.seconds[-1]), DECODE_TOKENS, config.text_length)

    def build(self, options: SoundOptions, row: Row) -> nn.Module:
        assert isinstance(row, Excerpt)
        model: QwenAudio = self.make(options)
        model.set_reducer(_reducer(row))
        return model.eval()

    def exchange(self, options: SoundOptions, model: QwenAudio, choice: Excerpt) -> nn.Module:
        other = copy.copy(model)  # its modules are the same ones
        other.set_reducer(_reducer(choice))
        return other

    def reduction(self, model: QwenAudio, inputs: Inputs) -> Reduction:
        whole = _tokens(inputs.heard.seconds)
        visual = model.encode(inputs.heard.features)
        return Reduction(sum(visual.lengths), 1, whole, None, learned=False)

    def inputs(self, options: SoundOptions, model: QwenAudio, sources: list[Sound], row: Row) -> Inputs:
        assert isinstance(row, Excerpt) and options.text_length is not None
        (sound,), config, weight = sources, model.config, model.head.weight
        heard = hear(sound, row.seconds, feature_extractor(options.folder, config.mel_bins), weight)
        marker = config.audio_token_id
        text_ids = min(marker, *config.eos_token_ids, config.vocab_size)
        text = random_text(text_ids, marker, length=options.text_length, images=1, seed=options.seed)
        ids = with_markers(text, marker, _tokens(row.seconds))
        return Inputs(input_ids=ids.to(weight.device), text_ids=text_ids, medium="sounds", heard=heard)

    def logits(self, model: QwenAudio, inputs: Inputs) -> Tensor:
        """Returns the scores after each text token: there are as many of them whatever became of the sound."""
        sounds = model.encode(inputs.heard.features)
        out = model(inputs.input_ids, sounds=sounds).logits
        assert out is not None
        return out[:, sum(sounds.lengths) :]  # the sound stands in front

    def loss(self, model: QwenAudio, inputs: Inputs) -> Tensor:
        labels = inputs.input_ids.masked_fill(inputs.input_ids == model.config.audio_token_id, -100)
        loss = model(inputs.input_ids, sounds=model.encode(inputs.heard.features), labels=labels).loss
        assert loss is not None
        return loss

    def naive_loss(self, model: QwenAudio, inputs: Inputs) -> Tensor:
        sounds = model.encode(inputs.heard.features)
        logits = model(inputs.input_ids, sounds=sounds).logits
        assert logits is not None
        first = sum(sounds.lengths)  # of the text, which the last token of the sound predicts
        text = inputs.input_ids[0, sum(sounds.marked) :]
        return F.cross_entropy(logits[0, first - 1 : -1].float(), text)


def _tokens(seconds: float) -> int:
    """Returns how many tokens the model has for so much sound."""
    frames = round(seconds * FRAMES_PER_SECOND)
    return (frames + 1) // 2 // POOL


def _reducer(row: Excerpt) -> str | None:
    return None if row.pool == 1 else f"pool:{row.pool}"
