"""`WhisperConfig`: the sizes of a Whisper, with their checks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mmkernels.models import whisper_weights as weights
from mmkernels.models.blocks.checkpoint import CheckpointError, read_json
from mmkernels.models.blocks.config import check_config, read_config, read_fields, token_ids, with_generation
from mmkernels.models.blocks.encoder import Sizes
from mmkernels.models.whisper_tokens import WhisperTokens


@dataclass(frozen=True)
class WhisperConfig:
    """The sizes of a Whisper, and its special tokens.

    Args:
        audio_*: of the encoder; `audio_positions`: the most features of a sound, 1,500 in 30 seconds; `audio_mlp`: the
            width of the feed-forward; the dropouts are those of `AudioEncoder`.
        mel_bins: the frequencies of a spectrogram: 80, or 128 since large-v3.
        text_*: of the decoder; `text_length`: the most tokens of a text, with its prompt.
        start_token_id: the first token of a prompt (<|startoftranscript|>).
        pad_token_id: follows the end of a text.
        eos_token_ids: the tokens that end a text.
        tie_embeddings: whether the last layer has the weight of the embeddings.
        median_filter: how many frames the filter of word timestamps spans, an odd number.
        spec_augment: whether the checkpoint asks for SpecAugment in training: such a model refuses labels in training
            mode, because spectrograms are not masked here.
        tokens: what the special tokens mean, and which ones are never written.

    Raises:
        ValueError: a size is not positive, too large, or does not divide; an option is unknown.
    """

    audio_width: int
    audio_layers: int
    audio_heads: int
    audio_mlp: int
    text_width: int
    text_layers: int
    text_heads: int
    text_mlp: int
    vocab_size: int
    start_token_id: int
    pad_token_id: int
    eos_token_ids: tuple[int, ...]
    mel_bins: int = 80
    audio_positions: int = 1500
    text_length: int = 448
    audio_activation: str = "gelu"
    text_activation: str = "gelu"
    audio_dropout: float = 0.0
    audio_residual_dropout: float = 0.0
    audio_activation_dropout: float = 0.0
    audio_layer_dropout: float = 0.0
    text_dropout: float = 0.0
    text_residual_dropout: float = 0.0
    text_activation_dropout: float = 0.0
    text_layer_dropout: float = 0.0
    tie_embeddings: bool = True
    median_filter: int = 7
    spec_augment: bool = False
    tokens: WhisperTokens = field(default_factory=WhisperTokens)

    def __post_init__(self) -> None:
        check_config(self)
        if self.audio_width != self.text_width:
            raise ValueError(f"audio_width must be text_width = {self.text_width}, got {self.audio_width}")
        for name in ("start_token_id", "pad_token_id"):
            if getattr(self, name) is None:
                raise ValueError(f"{name} must be an integer below vocab_size = {self.vocab_size}, got None")
        if not self.eos_token_ids:
            raise ValueError(f"eos_token_ids must name a token, got {self.eos_token_ids!r}")
        if not all(token < self.vocab_size for token in self.eos_token_ids):
            must = f"eos_token_ids must be integers below vocab_size = {self.vocab_size}"
            raise ValueError(f"{must}, got {self.eos_token_ids!r}")
        if type(self.median_filter) is not int or not (0 < self.median_filter < 2**10 and self.median_filter % 2):
            raise ValueError(f"median_filter must be an odd integer from 1 to 1023, got {self.median_filter!r}")
        for name in ("tie_embeddings", "spec_augment"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be a bool, got {getattr(self, name)!r}")
        self.tokens.check(self.vocab_size, self.text_layers, self.text_heads)

    @property
    def audio(self) -> Sizes:
        """The sizes of the encoder."""
        return Sizes.of(self, "audio", eps=1e-5)

    @property
    def text(self) -> Sizes:
        """The sizes of the decoder."""
        return Sizes.of(self, "text", eps=1e-5)

    @classmethod
    def from_hf(cls, config: dict[str, Any], where: str = "config") -> WhisperConfig:
        """Returns the configuration that a Hugging Face ``config.json`` of a Whisper, as a dict, describes.

        Args:
            config: the dict.
            where: how errors name it. A ``generation_config.json`` beside this file says what the special tokens mean.
        """
        theirs = read_config(config, weights.ARCHITECTURES, where)
        beside = Path(where).with_name("generation_config.json")
        tokens = WhisperTokens.read(config, beside)
        if theirs.eos_token_id is None:
            raise CheckpointError(f"{where}: eos_token_id must be a token or a list of tokens, got null")
        ours = read_fields(
            cls, theirs, weights.FIELDS, where, eos_token_ids=token_ids(theirs.eos_token_id), tokens=tokens
        )
        return _with_start(with_generation(ours, beside), beside)


def _with_start(config: WhisperConfig, path: Path) -> WhisperConfig:
    """Returns a configuration with the first token that a ``generation_config.json`` names, if it does."""
    start = read_json(path).get("decoder_start_token_id") if path.is_file() else None
    try:
        return config if start is None else replace(config, start_token_id=start)
    except ValueError as error:
        raise CheckpointError(f"{path}, decoder_start_token_id: {error}") from error


def _published(width: int, layers: int, heads: int, **changes: Any) -> WhisperConfig:
    """Returns the sizes of a published model, in which both sides have equal sizes.

    Source: Radford et al., "Robust Speech Recognition via Large-Scale Weak Supervision", 2022, table 1; the tokens are
    those of the multilingual vocabulary.
    """
    sizes = {"width": width, "layers": layers, "heads": heads, "mlp": 4 * width}
    both: dict[str, Any] = {f"{side}_{name}": size for side in ("audio", "text") for name, size in sizes.items()}
    special = {"vocab_size": 51865, "start_token_id": 50258, "pad_token_id": 50257, "eos_token_ids": (50257,)}
    no_timestamps = 50364 if changes.get("vocab_size") == 51866 else 50363  # large-v3 has one language more
    tokens = WhisperTokens(no_timestamps_token_id=no_timestamps)
    return WhisperConfig(**(both | special | {"tokens": tokens} | changes))


_V3: dict[str, Any] = {"vocab_size": 51866, "mel_bins": 128}
SIZES = {
    # For tests. Sounds have up to 100 frames, a second; the last 51 tokens are times.
    "tiny": WhisperConfig(
        audio_width=32, audio_layers=2, audio_heads=4, audio_mlp=64, audio_positions=50,
        text_width=32, text_layers=2, text_heads=4, text_mlp=64, text_length=32, vocab_size=128,
        start_token_id=70, pad_token_id=69, eos_token_ids=(69,),
        tokens=WhisperTokens(no_timestamps_token_id=76, alignment_heads=((0, 1), (1, 0), (1, 3))),
    ),
    "whisper_tiny": _published(384, 4, 6),
    "base": _published(512, 6, 8),
    "small": _published(768, 12, 12),
    "medium": _published(1024, 24, 16),
    "large_v3": _published(1280, 32, 20, **_V3),
    # large-v3-turbo: the decoder has four layers.
    "turbo": _published(1280, 32, 20, text_layers=4, **_V3),
}  # fmt: skip
"""The sizes that `Whisper.from_size` accepts."""
