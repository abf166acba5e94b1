"""Rows of bench_models.py about sound: Qwen2.5-Omni's audio tower, Whisper's decoder and its word times.

Widths are published ones, layers are fewer.
"""

from __future__ import annotations

import copy
import tempfile
from functools import partial
from typing import Any, NamedTuple

import torch
import transformers
from models_cases import Case
from models_pairs import Pair, redraw_zeros
from models_targets import BANDWIDTH, CAP, NEVER_SLOWER, NO_SLOWER, ONE_CALL, WITH_TIMES, WITHOUT_TIMES
from models_work import MAIN, Results, Work
from torch import Tensor, nn

from mmkernels.integrations.transformers import NAME
from mmkernels.models import Whisper
from mmkernels.models.whisper_decoder import WhisperCache
from mmkernels.testing.models import Inputs, build, seeded

FRAMES_PER_SECOND = 100
"""Mel frames of one second: a hop of 10 ms."""

_OMNI = {
    "num_mel_bins": 128,
    "d_model": 1280,
    "encoder_layers": 32,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "output_dim": 3584,
    "n_window": 100,
}
"""Qwen2.5-Omni-7B's audio tower: each layer attends within chunks of 200 mel frames, two seconds."""

_OMNI_TOWER = "models.qwen2_5_omni.modeling_qwen2_5_omni:Qwen2_5OmniAudioEncoder"


def omni_tower(**changes: int) -> Pair:
    """Returns transformers' tower of Qwen2.5-Omni twice, as it runs on its own attention and on mmkernels'.

    Args:
        changes: arguments of the configuration that differ from the published ones.
    """
    with seeded(0):
        tower = build(_OMNI_TOWER, _OMNI | changes).eval()
    return Pair(tower, tower)


class EncodeSound(Work):
    """Mel frames become what the language model reads. For transformers' audio tower of Qwen2.5-Omni."""

    passes = "encode"

    def layers(self, config: Any) -> int:
        return int(config.encoder_layers)

    def ours(self, model: Any, inputs: Inputs) -> Results:
        return self.theirs(model, inputs)

    def theirs(self, model: Any, inputs: Inputs) -> Results:
        return (model(**inputs).last_hidden_state,)


def _recording(config: Any, *, seconds: int) -> dict[str, Inputs]:
    frames = seconds * FRAMES_PER_SECOND
    return {MAIN: {"input_features": torch.randn(config.num_mel_bins, frames), "feature_lens": torch.tensor([frames])}}


# Whisper.

BEAMS, MEL_FRAMES, WRITTEN = 5, 3000, 32
"""Of the decode step: rows of text for a sound, frames of half a minute, and tokens before the step."""

_LARGE_V3 = {"d_model": 1280, "heads": 20, "num_mel_bins": 128}
_SMALL = {"d_model": 768, "heads": 12, "num_mel_bins": 80}
_ALIGNMENT = [[5, 3], [5, 9], [8, 0], [8, 4], [8, 7], [8, 8], [9, 0], [9, 7], [9, 9], [10, 5]]
"""The heads of whisper-small that follow the sound: its generation_config.json."""
_END, _START, _NO_TIMES = 900, 901, 902  # of a vocabulary of 1,000


def whisper(sizes: dict[str, int], *, layers: int, alignment: list[list[int]] | None = None, **changes: int) -> Pair:
    """Returns a Whisper with one layer of its encoder. Its texts have no end.

    Args:
        sizes: of both sides.
        layers: of the decoder.
        alignment: the heads from which word times are; None: there are none.
        changes: arguments of transformers' configuration that differ.
    """
    rest, heads = dict(sizes), sizes["heads"]
    del rest["heads"]
    mlp = {f"{side}_ffn_dim": 4 * rest["d_model"] for side in ("encoder", "decoder")}
    special = {"decoder_start_token_id": _START, "eos_token_id": _END, "bos_token_id": _END, "pad_token_id": _END}
    config = {
        "encoder_layers": 1,
        "decoder_layers": layers,
        "vocab_size": 1000,
        "max_source_positions": MEL_FRAMES // 2,
    }
    config |= {"encoder_attention_heads": heads, "decoder_attention_heads": heads}
    with seeded(0):
        theirs = build("WhisperForConditionalGeneration", config | mlp | special | rest | changes).eval()
        redraw_zeros(theirs)
    theirs.generation_config = transformers.GenerationConfig(
        **special,
        no_timestamps_token_id=_NO_TIMES,
        is_multilingual=False,
        return_timestamps=False,
        suppress_tokens=[_END],
        begin_suppress_tokens=[_END],
        alignment_heads=alignment,
        max_length=448,
    )
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = Whisper.from_pretrained(folder)
        for x in ours.parameters():
            x.data = x.data.clone()
    return Pair(ours, theirs)


class _Read(NamedTuple):
    """What transformers' model has read: its cache, the name of that argument, and the sound's features."""

    name: str
    cache: Any
    heard: tuple[Tensor]


class DecodeStep(Work):
    """One more token of each beam: their texts attend to themselves and to one sound. For a Whisper.

    Reordering the beams is not in it: transformers would also reorder its copies of the sound's keys and values.
    """

    passes = "decode step"

    def layers(self, config: Any) -> int:
        return 2 * int(config.text_layers)

    def encoder(self, model: Any) -> nn.Module:
        return model.encoder

    def begin(self, model: Any, inputs: Inputs) -> Any:
        """Encodes the sound and reads the texts so far; returns the cache."""
        written = inputs["written"]
        if isinstance(model, Whisper):
            cache = WhisperCache(model.config.text_layers, reserve=written.shape[1] + 1)
            return model(written, inputs["input_features"], cache=cache, last_logits_only=True).cache
        (features,) = model.get_encoder()(inputs["input_features"], return_dict=False)
        heard = (features.expand(written.shape[0], -1, -1),)
        out = model(decoder_input_ids=written, encoder_outputs=heard, use_cache=True)
        name = next(name for name in ("cache", "past_key_values") if out.get(name) is not None)  # the newer one first
        return _Read(name, out[name], heard)

    def resume(self, state: Any, inputs: Inputs) -> Inputs:
        """Copies what a run changes, the keys and values of the texts."""
        if isinstance(state, WhisperCache):
            return {"token": inputs["token"], "cache": copy.deepcopy(state, {id(state.sound): state.sound})}
        cache = copy.copy(state.cache)
        cache.self_attention_cache = copy.deepcopy(state.cache.self_attention_cache)
        return {"decoder_input_ids": inputs["token"], state.name: cache, "encoder_outputs": state.heard}

    def ours(self, model: Any, inputs: Inputs) -> Results:
        return (model(inputs["token"], cache=inputs["cache"], last_logits_only=True).logits,)

    def theirs(self, model: Any, inputs: Inputs) -> Results:
        return (model(**inputs, use_cache=True).logits,)


class WriteWithTimes(Work):
    """A text is written from a sound, with the time of each token. For a Whisper. Only the tokens are compared."""

    passes = "write"

    def layers(self, config: Any) -> int:
        return int(config.audio_layers + 2 * config.text_layers)

    def encoder(self, model: Any) -> nn.Module:
        return model.encoder

    def ours(self, model: Any, inputs: Inputs) -> Results:
        times = {"frame_lengths": inputs["frame_lengths"], "token_times": True} if inputs["times"] else {}
        return (model.generate(inputs["input_features"], max_new_tokens=inputs["length"], **times).tokens.float(),)

    def theirs(self, model: Any, inputs: Inputs) -> Results:
        features, length = inputs["input_features"], inputs["length"]
        mask = torch.ones(features.shape[0], features.shape[2], dtype=torch.long)
        options = {"attention_mask": mask, "return_token_timestamps": True, "max_new_tokens": length}
        return (model.generate(features, **options)["sequences"][:, -length:].float(),)


def _beams(config: Any, *, frames: int = MEL_FRAMES, beams: int = BEAMS, written: int = WRITTEN) -> dict[str, Inputs]:
    ids = torch.randint(_END, (beams, written + 1))
    ids[:, 0] = config.start_token_id
    features = torch.randn(1, config.mel_bins, frames)
    return {MAIN: {"input_features": features, "written": ids[:, :-1], "token": ids[:, -1:]}}


def _to_write(config: Any, *, length: int, frames: int = MEL_FRAMES) -> dict[str, Inputs]:
    """Returns a sound to write down with times, and without."""
    inputs = {"input_features": torch.randn(1, config.mel_bins, frames), "length": length, "times": True}
    inputs["frame_lengths"] = torch.tensor([frames])
    return {MAIN: inputs, WITHOUT_TIMES: inputs | {"times": False}}


SOUND_CASES = (
    Case(
        "transformers' Qwen2.5-Omni audio tower, 5 min",
        partial(omni_tower, encoder_layers=2),
        partial(_recording, seconds=300),
        EncodeSound(),
        (CAP, ONE_CALL, NO_SLOWER, NEVER_SLOWER),
        subject=NAME,
    ),
    Case(
        "Whisper large-v3, 5 beams, 1,500 features",
        partial(whisper, _LARGE_V3, layers=4),
        _beams,
        DecodeStep(),
        (BANDWIDTH, NO_SLOWER, NEVER_SLOWER),
    ),
    Case(
        "Whisper small, 64 tokens with their times",
        partial(whisper, _SMALL, layers=12, alignment=_ALIGNMENT),
        partial(_to_write, length=64),
        WriteWithTimes(),
        (WITH_TIMES, NEVER_SLOWER),
    ),
)
