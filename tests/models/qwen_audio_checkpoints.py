"""Small Qwen2-Audio models of transformers with random weights, and prompts with sounds for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmkernels.testing.models import build as build_model
from mmkernels.testing.models import randomise
from mmkernels.testing.parts import decoder, rope

MARKER, VOCAB, BANDS, FRAMES = 99, 128, 12, 80

# Changes to the configuration below: `text__x` sets x of the language model, `audio__x` of the encoder.
VARIANTS: dict[str, dict[str, Any]] = {
    "qwen2_audio": {},
    "qwen2_audio_other": {  # as many key heads as query heads, as Qwen2-Audio-7B; an odd number of bands
        "shard": True,
        "text__num_key_value_heads": 4,
        "text__rms_norm_eps": 1e-3,
        "text__rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "audio__num_mel_bins": 7,
        "audio__encoder_layers": 3,
        "audio__activation_function": "gelu_pytorch_tanh",
    },
}


def config(variant: str) -> dict[str, Any]:
    """Returns the arguments of transformers' configuration."""
    audio: dict[str, Any] = {
        "model_type": "qwen2_audio_encoder", "num_mel_bins": BANDS, "d_model": 32, "encoder_layers": 2,
        "encoder_attention_heads": 2, "encoder_ffn_dim": 64, "max_source_positions": FRAMES // 2,
    }  # fmt: skip
    text = decoder(width=48, mlp=80, vocabulary=VOCAB, model_type="qwen2") | rope(5000.0)
    parts = {"audio": audio, "text": text | {"max_position_embeddings": 512}}
    for key, value in VARIANTS[variant].items():
        part, _, name = key.partition("__")
        if name:
            parts[part][name] = value
    return {"audio_token_index": MARKER} | {f"{part}_config": sizes for part, sizes in parts.items()}


def build(variant: str) -> Any:
    """Returns transformers' model of a variant, with every parameter redrawn."""
    theirs = randomise(build_model("Qwen2AudioForConditionalGeneration", config(variant)).eval(), std=0.2)
    positions = next(p for name, p in theirs.named_parameters() if name.endswith("embed_positions.weight"))
    positions.requires_grad_(False)
    return theirs


def tokens(frames: int) -> int:
    """Returns how many tokens a sound has."""
    return ((frames - 1) // 2 + 1 - 2) // 2 + 1


def sounds(theirs: Any, lengths: Sequence[int], seed: int = 0) -> dict[str, Tensor]:
    """Returns random features, with other numbers in the padding behind each sound, as transformers' processor."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(len(lengths), theirs.config.audio_config.num_mel_bins, FRAMES, generator=generator)
    mask = torch.arange(FRAMES) < torch.tensor(lengths)[:, None]
    return {"input_features": features, "feature_attention_mask": mask.long()}


def prompt(rows: Sequence[Sequence[int]], padding: str = "left", seed: int = 0) -> dict[str, Tensor]:
    """Returns prompts and their attention mask ``[B, L]``.

    Args:
        rows: for each row the frames of its sounds, which stand between random text.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for lengths in rows:
        row = torch.randint(3, MARKER, (4,), generator=generator).tolist()
        for frames in lengths:
            row += [MARKER] * tokens(frames) + torch.randint(3, MARKER, (3,), generator=generator).tolist()
        found.append(torch.tensor(row))
    ids, mask = (
        pad_sequence(part, batch_first=True, padding_side=padding)
        for part in (found, [torch.ones_like(row) for row in found])
    )
    return {"input_ids": ids, "attention_mask": mask}


def inputs(theirs: Any, padding: str = "left") -> dict[str, Tensor]:
    """Returns two prompts: one with two sounds, of which one fills the spectrogram, and one with a short sound."""
    return prompt([[FRAMES, 33], [26]], padding) | sounds(theirs, [FRAMES, 33, 26])


def labels_of(given: dict[str, Tensor]) -> Tensor:
    """Returns labels of the text, but for the first token, which padding would predict."""
    ids, mask = given["input_ids"], given["attention_mask"]
    return ids.masked_fill((mask.cumsum(1) * mask < 2) | (ids == MARKER), -100)
