"""Qwen2-Audio: sounds become tokens of the text that a language model continues.

Source: Chu et al., "Qwen2-Audio Technical Report", 2024, figure 2 and section 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.models.blocks.audio_encoder import AudioEncoder
from mmkernels.models.blocks.checkpoint import Names
from mmkernels.models.blocks.config import with_generation
from mmkernels.models.blocks.decoder import Decoder, decoder_sizes
from mmkernels.models.blocks.encoder import Sizes
from mmkernels.models.blocks.vision_language import Encode, VisionLanguageModel
from mmkernels.models.blocks.visual import Media, Visual
from mmkernels.models.blocks.visual_reduction import VisualReducer
from mmkernels.models.qwen_audio_config import SIZES, QwenAudioConfig
from mmkernels.models.qwen_audio_weights import NAMES
from mmkernels.nn.checks import described
from mmkernels.ops.tokens.inputs import check_integers
from mmkernels.ops.tokens.ranking import on_device
from mmkernels.runtime.checks import can_look

POOL = 2
"""Features of the encoder that become one token: a token is 40 ms of sound (Chu et al., 2024, section 2)."""
MOST_FRAMES = 2**24
"""Of one call: more are refused before memory is taken."""

FrameLengths = Sequence[int] | Tensor
"""How many frames of features each sound has, behind which there is silence."""


class QwenAudio(VisionLanguageModel):
    """Predicts the next token from sounds and text.

    Inputs are those of transformers' processor: ``model(**processor(text=..., audio=..., return_tensors="pt"))``, or of
    `log_mel`, whose `LogMel.lengths` are the `frame_lengths`. A sound has a token for 40 ms; one of less than 3 frames
    (30 ms) has none. It is encoded only as far as it goes, not with the silence behind it, at the same result. A sound
    of more than 30 seconds must be cut into several (`cut_sound`): transformers' processor drops what is behind them.

    The stages can be called one by one: `encode`, then `forward` with ``sounds=``, any number of times.

    The lengths are needed on the host. A mask on a GPU is read once a call, before anything is encoded, which waits for
    the GPU; no layer waits. Code that `torch.compile` or `torch.export` reads needs `frame_lengths` as a list.

    `from_pretrained` reads the folder of a Hugging Face ``Qwen2AudioForConditionalGeneration``.

    Args:
        config: the sizes. Models are usually made by `from_size` or `from_pretrained`.

    Example:
        >>> import torch
        >>> from mmkernels.models import QwenAudio, log_mel
        >>> model = QwenAudio.from_size("tiny").eval()
        >>> mel = log_mel(torch.rand(8_000), 16_000, bands=16, seconds=1)  # half a second, and silence
        >>> marker = model.config.audio_token_id
        >>> prompt = torch.tensor([[5, *[marker] * 12, 7]])  # 50 frames: 25 features, 12 tokens
        >>> given = {"input_features": mel.features, "frame_lengths": mel.lengths}
        >>> first = model.generate(prompt, **given, max_new_tokens=3)
        >>> more = torch.tensor([[8, 9]])  # a second question: nothing is encoded again
        >>> model.generate(more, kv_cache=first.kv_cache, max_new_tokens=2).tokens.shape
        torch.Size([1, 2])
    """

    sizes = SIZES
    config: QwenAudioConfig

    def __init__(self, config: QwenAudioConfig) -> None:
        super().__init__(config)
        c = config
        self.audio = AudioEncoder(
            Sizes.of(c, "audio", eps=1e-5),
            mel_bins=c.mel_bins,
            positions=c.audio_positions,
            pool=POOL,
            residual_dropout=c.audio_residual_dropout,
            activation_dropout=c.audio_activation_dropout,
            layer_dropout=c.audio_layer_dropout,
        )
        self.projector = nn.Linear(c.audio_width, c.text_width)
        sizes = decoder_sizes(
            c, vocab=c.vocab_size, eps=c.rms_norm_eps, rope_theta=c.rope_theta, bias=True, dropout=c.dropout
        )
        self._make_decoder(Decoder(sizes), tied=False)
        self.set_reducer(c.reduce)

    def _set_constants(self) -> None:
        """Sets the encoder's positions, which are not trained."""
        self.audio.set_positions()

    @classmethod
    def _read_config(cls, values: dict[str, Any], path: Path) -> QwenAudioConfig:
        return with_generation(QwenAudioConfig.from_hf(values, str(path)), path.with_name("generation_config.json"))

    @classmethod
    def _names(cls, config: QwenAudioConfig) -> Names:
        return NAMES

    def set_reducer(self, text: str | None) -> None:
        """Leaves fewer tokens of each sound from now on: the prompts stay, and the markers without a token go.

        Args:
            text: "pool:2" (means of 2 neighbours, 80 ms), "tome:0.5", "diverse:0.25" or "none", as
                `TokenReducer.parse` reads it; None: all tokens stay.

        Raises:
            ValueError: there is no such reducer, it has weights, or it needs scores ("select"), which the encoder's
                attention without a class token does not give.
        """
        before = getattr(self, "reducer", None)
        super().set_reducer(text)
        if self.reducer is not None and self.reducer.needs_scores:
            self.reducer = before
            raise ValueError(f"reduce must be none, pool, tome or diverse for sounds, got {text!r}")

    # The stages.

    def encode(self, input_features: Tensor, frame_lengths: FrameLengths | None = None) -> Visual:
        """Returns sounds as tokens: what `forward` takes as `sounds`.

        Args:
            input_features: log-mel features ``[N, mel_bins, T]``, floating, T from 3 to ``2 * audio_positions``. The
                model was trained with T = 3,000, where silence fills up what a sound leaves of 30 seconds.
            frame_lengths: how many frames each sound has, from 1 to T: integers ``[N]``; None: all T.
        """
        return self._encode(input_features, self._checked_frames("frame_lengths", input_features, frame_lengths))

    def _encode(self, input_features: Tensor, frames: tuple[int, ...]) -> Visual:
        """Returns sounds of so many frames as tokens."""
        features = [(count + 1) // 2 for count in frames]  # of each sound, behind the strided convolution
        counts = tuple(count // POOL for count in features)
        if not sum(counts):
            return self._nothing()._replace(lengths=counts, marked=counts)
        # The last feature's convolutions see one frame behind its own two: what lies behind it changes no token.
        read = min(int(input_features.shape[2]), 2 * max(features) + 1)
        lengths = on_device(frames, input_features.device)
        x = self.audio(input_features[..., :read], lengths, mask_convolutions=False)  # [N, tokens, audio_width]
        packed = torch.cat([sound[:count] for sound, count in zip(x.unbind(), counts, strict=True)])
        visual = Visual(self.projector(packed), counts, counts)
        return visual if self.reducer is None else _reduced(self.reducer, visual)

    # Inputs of `forward`.

    def _media(  # type: ignore[override]
        self,
        input_ids: Tensor,
        *,
        input_features: Tensor | None = None,
        feature_attention_mask: Tensor | None = None,
        frame_lengths: FrameLengths | None = None,
        sounds: Visual | None = None,
    ) -> tuple[list[Media], Encode]:
        """Checks the sounds of `forward`.

        Args:
            input_features: new sounds, as in `encode`, in the order of their markers, row after row; with
            feature_attention_mask: ``[N, T]``, 1 for the frames of a sound, as transformers' processor returns it; or
            frame_lengths: as in `encode`; or instead of all
            sounds: what `encode` returned for them.
        """
        if input_features is None:
            for name, value in (("feature_attention_mask", feature_attention_mask), ("frame_lengths", frame_lengths)):
                if value is not None:
                    raise ValueError(f"{name} must be None without input_features, got {type(value).__name__}")
            visual = self._nothing() if sounds is None else sounds
            self._check_encoded("sounds", visual)
            return [self._marked(visual.marked)], lambda: [visual]
        if sounds is not None:
            raise ValueError("input_features must be None with sounds, got both")
        if feature_attention_mask is None:
            frames = self._checked_frames("frame_lengths", input_features, frame_lengths)
        elif frame_lengths is not None:
            raise ValueError("frame_lengths must be None with feature_attention_mask, got both")
        else:
            lengths = _lengths_of(feature_attention_mask, input_features)
            frames = self._checked_frames("lengths in feature_attention_mask", input_features, lengths)
        marked = tuple((count + 1) // 2 // POOL for count in frames)
        return [self._marked(marked)], lambda: [self._encode(input_features, frames)]

    def _marked(self, marked: tuple[int, ...]) -> Media:
        return Media("sound", self.config.audio_token_id, marked)

    def _checked_frames(self, name: str, input_features: Tensor, frame_lengths: FrameLengths | None) -> tuple[int, ...]:
        """Returns how many frames each sound has.

        Args:
            name: of the argument that says so, for errors.
        """
        c = self.config
        if not isinstance(input_features, Tensor) or not input_features.is_floating_point():
            raise TypeError(f"input_features must be a floating tensor, got {described(input_features)}")
        shape, least, most = tuple(map(int, input_features.shape)), 2 * POOL - 1, self.audio.most_frames
        if len(shape) != 3 or shape[1] != c.mel_bins or not least <= shape[2] <= most:
            must = f"[N, {c.mel_bins}, T], T from {least} to {most} frames"
            hint = "; cut a longer sound in several" if len(shape) == 3 and shape[2] > most else ""
            raise ValueError(f"input_features must be {must}, got shape {shape}{hint}")
        if shape[0] * shape[2] > MOST_FRAMES:
            got = shape[0] * shape[2]
            raise ValueError(f"input_features must have at most {MOST_FRAMES} frames in all, got {got}")
        if frame_lengths is None:
            return (shape[2],) * shape[0]
        frames = check_integers(name, frame_lengths, "the frames of each sound")
        if len(frames) != shape[0]:
            raise ValueError(f"{name} must be of {shape[0]} sounds as input_features, got {len(frames)}")
        for number, count in enumerate(frames):
            if count > shape[2]:
                raise ValueError(f"{name} must be at most {shape[2]} frames, got {count} of sound {number}")
        return frames


def _lengths_of(mask: Tensor, input_features: Tensor) -> Tensor:
    """Returns how many frames a mask of features ``[N, T]`` has in each row."""
    shape = (int(input_features.shape[0]), int(input_features.shape[-1])) if isinstance(input_features, Tensor) else ()
    if not isinstance(mask, Tensor) or mask.is_floating_point() or tuple(mask.shape) != shape:
        got = f"{described(mask)} {list(getattr(mask, 'shape', ()))}"
        raise ValueError(f"feature_attention_mask must be integers {list(shape)} as input_features, got {got}")
    there = mask != 0
    if mask.is_cpu and can_look(mask) and bool((there[:, 1:] & ~there[:, :-1]).any()):
        raise ValueError("feature_attention_mask must have ones, then zeros, in each row; got a one behind a zero")
    return there.sum(1)


def _reduced(reducer: VisualReducer, sounds: Visual) -> Visual:
    """Returns what a reducer leaves of sounds. One without tokens, which is no grid, stays as it is."""
    some = tuple(count for count in sounds.lengths if count)
    reduced = reducer.reduce(sounds._replace(lengths=some, marked=some), [(1, 1, count) for count in some])
    left = iter(reduced.lengths)
    return reduced._replace(lengths=tuple(next(left) if n else 0 for n in sounds.lengths), marked=sounds.marked)
