"""`QwenAudioConfig`: the sizes of a Qwen2-Audio, with their checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mmkernels.models import qwen_audio_weights as weights
from mmkernels.models.blocks.checkpoint import CheckpointError
from mmkernels.models.blocks.config import check_config, read_config, read_fields, text_values


@dataclass(frozen=True)
class QwenAudioConfig:
    """The sizes of a Qwen2-Audio.

    Args:
        audio_*: of the encoder of sounds; `audio_mlp` is the width of its feed-forward, `audio_positions` the most
            features of a sound before two become a token: 1,500 are 30 seconds. `audio_dropout` drops attention
            probabilities, `audio_residual_dropout` elements of a branch's result, `audio_activation_dropout` elements
            inside the feed-forward, and `audio_layer_dropout` whole layers, in training mode.
        mel_bins: the frequencies of a spectrogram.
        text_*: of the language model; `text_length`: the most tokens of a text.
        audio_token_id: the token that marks a token of sound in a prompt.
        eos_token_ids: the tokens that end a generated text.
        reduce: what leaves fewer tokens of a sound behind the projector, as `QwenAudio.set_reducer` reads it, such as
            "pool:2"; None: all stay.

    Raises:
        ValueError: a size is not positive, too large, or does not divide; an option is unknown.

    Example:
        >>> from mmkernels.models import QwenAudio
        >>> QwenAudio.sizes["qwen2_audio_7b"].mel_bins
        128
    """

    audio_width: int
    audio_layers: int
    audio_heads: int
    audio_mlp: int
    text_width: int
    text_layers: int
    text_heads: int
    text_kv_heads: int
    text_head_dim: int
    text_mlp: int
    vocab_size: int
    audio_token_id: int
    mel_bins: int = 128
    audio_positions: int = 1500
    audio_activation: str = "gelu"
    audio_dropout: float = 0.0
    audio_residual_dropout: float = 0.0
    audio_activation_dropout: float = 0.0
    audio_layer_dropout: float = 0.0
    text_length: int = 32768
    text_activation: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e4
    dropout: float = 0.0
    pad_token_id: int = 0
    eos_token_ids: tuple[int, ...] = ()
    reduce: str | None = None

    def __post_init__(self) -> None:
        check_config(self)
        if self.audio_token_id is None:
            raise ValueError(f"audio_token_id must be an integer below vocab_size = {self.vocab_size}, got None")
        if self.text_head_dim % 2:
            raise ValueError(f"text_head_dim must be even, got {self.text_head_dim}")

    @classmethod
    def from_hf(cls, config: dict[str, Any], where: str = "config") -> QwenAudioConfig:
        """Returns the configuration that a Hugging Face ``config.json`` of a Qwen2-Audio, as a dict, describes.

        Args:
            config: the dict.
            where: how errors name it.
        """
        theirs = read_config(config, weights.ARCHITECTURES, where)
        text, audio = theirs.text_config, theirs.audio_config
        _check_fixed(text, f"{where}, text_config", model_type="qwen2", use_sliding_window=False)
        _check_fixed(audio, f"{where}, audio_config", model_type="qwen2_audio_encoder", scale_embedding=False)
        rope = text.rope_parameters.get("rope_type", "default")
        if rope != "default":
            raise CheckpointError(f"{where}, text_config: rope_type must be default, got {rope!r}")
        return read_fields(
            cls,
            theirs,
            weights.FIELDS,
            where,
            text_head_dim=text.hidden_size // max(1, text.num_attention_heads),
            **text_values(text),
        )


def _check_fixed(part: Any, where: str, **values: Any) -> None:
    """Raises where a part of transformers' configuration has another value than the models here."""
    for name, must in values.items():
        got = getattr(part, name, must)
        if got != must:
            raise CheckpointError(f"{where}: {name} must be {must!r}, got {repr(got)[:200]}")


SIZES = {
    # For tests.
    "tiny": QwenAudioConfig(
        audio_width=32, audio_layers=2, audio_heads=2, audio_mlp=64, mel_bins=16, audio_positions=50,
        text_width=64, text_layers=2, text_heads=4, text_kv_heads=2, text_head_dim=16, text_mlp=128,
        vocab_size=128, audio_token_id=127, text_length=16384,
    ),
    # Qwen2-Audio-7B's published widths (its config.json); its encoder is Whisper large-v3's.
    "qwen2_audio_7b": QwenAudioConfig(
        audio_width=1280, audio_layers=32, audio_heads=20, audio_mlp=5120,
        text_width=4096, text_layers=32, text_heads=32, text_kv_heads=32, text_head_dim=128, text_mlp=11008,
        vocab_size=156032, audio_token_id=151646, text_length=8192, rms_norm_eps=1e-5, eos_token_ids=(151645,),
        pad_token_id=151643,
    ),
}  # fmt: skip
"""The sizes that `QwenAudio.from_size` accepts. Layers may differ: ``from_size("qwen2_audio_7b", text_layers=2)``."""
