"""Small Whisper models of transformers with random weights, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from mmkernels.testing.models import build as build_model
from mmkernels.testing.models import randomise

# The vocabulary: words from 0, the end of the text, special tokens, then times from 0.00 to 1.00.
EOS, START, ENGLISH, GERMAN, TRANSLATE, TRANSCRIBE, PREVIOUS, NO_TIMES = range(60, 68)
FIRST_TIME = NO_TIMES + 1
POSITIONS, LENGTH, VOCAB = 50, 24, FIRST_TIME + 51
FRAMES = 2 * POSITIONS
HEADS = [[0, 1], [1, 0], [1, 2]]

# Changes to the configuration below.
VARIANTS: dict[str, dict[str, Any]] = {
    "whisper": {},
    "whisper_shards": {
        "shard": True,
        "tie_word_embeddings": False,
        "num_mel_bins": 128,
        "encoder_layers": 1,
        "decoder_layers": 3,
        "encoder_attention_heads": 2,
        "decoder_ffn_dim": 48,
        "activation_function": "gelu_pytorch_tanh",
        "median_filter_width": 5,
    },
}


def config(variant: str) -> dict[str, Any]:
    """Returns the arguments of transformers' configuration. No two sizes of its parts are equal by chance."""
    whole = {
        "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 72, "decoder_ffn_dim": 56, "num_mel_bins": 80,
        "max_source_positions": POSITIONS, "max_target_positions": LENGTH, "vocab_size": VOCAB,
        "decoder_start_token_id": START, "eos_token_id": EOS, "bos_token_id": EOS, "pad_token_id": EOS,
    }  # fmt: skip
    return whole | {key: value for key, value in VARIANTS[variant].items() if key != "shard"}


def build(variant: str) -> Any:
    """Returns transformers' model of a variant, with every parameter redrawn and the rules of published models."""
    theirs = randomise(build_model("WhisperForConditionalGeneration", config(variant)).eval(), std=0.25)
    theirs.generation_config = transformers.GenerationConfig(
        lang_to_id={"<|en|>": ENGLISH, "<|de|>": GERMAN},
        task_to_id={"translate": TRANSLATE, "transcribe": TRANSCRIBE},
        no_timestamps_token_id=NO_TIMES,
        prev_sot_token_id=PREVIOUS,
        is_multilingual=True,
        suppress_tokens=[3, 7, *range(START, NO_TIMES)],
        begin_suppress_tokens=[11, EOS],
        max_initial_timestamp_index=20,
        alignment_heads=HEADS,
        max_length=LENGTH,
        return_timestamps=False,
        decoder_start_token_id=START,
        eos_token_id=EOS,
        pad_token_id=EOS,
        bos_token_id=EOS,
    )
    return theirs


def sounds(theirs: Any, count: int = 2, frames: int = FRAMES, seed: int = 1) -> Tensor:
    """Returns spectrograms, floating ``[count, mel_bins, frames]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, theirs.config.num_mel_bins, frames, generator=generator)


def texts(count: int = 2) -> tuple[Tensor, Tensor]:
    """Returns prompts with words, ``[count, 9]``, and which are no padding: each row is shorter than the last one."""
    generator = torch.Generator().manual_seed(count)
    ids = torch.randint(0, EOS, (count, 9), generator=generator)
    ids[:, :4] = torch.tensor([START, ENGLISH, TRANSCRIBE, NO_TIMES])
    valid = torch.arange(9) < 9 - 2 * torch.arange(count)[:, None]
    return ids.masked_fill(~valid, EOS), valid
