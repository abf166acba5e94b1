"""Models of a named size, with random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmkernels.models import (
    BLIP,
    BLIP2,
    CLIP,
    LXMERT,
    BLIP2Retrieval,
    DeepSeekVL,
    DeepSeekVL2,
    Flamingo,
    InternVL,
    Janus,
    QwenAudio,
    QwenVL,
    ViLBERT,
    Whisper,
)

SIZES: list[tuple[Any, str]] = [(CLIP, "tiny"), (CLIP, "siglip_tiny"), (Flamingo, "tiny"), (InternVL, "tiny")]
SIZES += [(BLIP, "tiny"), (BLIP2, "tiny"), (BLIP2, "tiny_instruct"), (BLIP2Retrieval, "tiny")]
SIZES += [(LXMERT, "tiny"), (ViLBERT, "tiny"), (QwenAudio, "tiny"), (Whisper, "tiny")]
SIZES += [(DeepSeekVL, "tiny"), (DeepSeekVL, "tiny_hybrid")]
SIZES += [(DeepSeekVL2, size) for size in ("tiny", "tiny_plain", "tiny_sigmoid")]
SIZES += [(Janus, "tiny")]
SIZES += [(QwenVL, size) for size in ("tiny_qwen2", "tiny", "tiny_qwen3")]


@pytest.mark.parametrize(("model", "size"), SIZES)
def test_a_seed_fixes_the_weights(model: Any, size: str) -> None:
    first, again, other = (model.from_size(size, seed=seed) for seed in (0, 0, 1))
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))
        assert torch.isfinite(parameter).all()
        if parameter.dim() > 1 and parameter.requires_grad:
            assert not torch.equal(parameter, other.get_parameter(name))
    for name, parameter in model.from_size(size, dtype=torch.bfloat16).named_parameters():
        assert parameter.dtype is (torch.float32 if ".router." in name else torch.bfloat16), name


def test_where_the_logits_start() -> None:
    """In CLIP's paper, section 2.5, and in SigLIP's, section 3.2."""
    clip, siglip = (CLIP.from_size(size).requires_grad_(False) for size in ("tiny", "siglip_tiny"))
    assert float(clip.logit_scale.exp()) == pytest.approx(1 / 0.07) and clip.logit_bias is None
    assert float(siglip.logit_scale.exp()) == pytest.approx(10.0) and float(siglip.logit_bias) == -10.0


@pytest.mark.parametrize(
    ("model", "size", "millions", "within"),
    [
        (CLIP, "base", 149.6, 0.05),  # open_clip's table, ViT-B/16
        (CLIP, "siglip_base", 203.2, 0.05),  # its model card, B/16
        # ViT-B/16 (86 M) and BERT base of 30,524 tokens (109 M); in each of its layers two more attentions with norms.
        (BLIP, "base", 86 + 109 + 12 * 2 * 2.364, 1),
        (Flamingo, "small", 85, 5),
        (Flamingo, "base", 295, 35),
        (QwenAudio, "qwen2_audio_7b", 8397.094, 0.001),  # transformers' class of this size
        (Janus, "janus_pro_1b", 2076.637, 0.001),  # transformers' class of these sizes, the head apart
        (Janus, "janus_pro_7b", 7407.773, 0.001),
        (QwenVL, "qwen2_2b", 2209.0, 0.05),  # their checkpoints on the hub
        (QwenVL, "qwen2_5_3b", 3754.6, 0.05),
        (QwenVL, "qwen3_2b", 2127.5, 0.05),
        (BLIP2, "opt_2.7b", 3744.762, 0.001),  # transformers' classes of these sizes
        (BLIP2, "vicuna_7b", 7913.211, 0.001),
        (DeepSeekVL, "deepseek_vl_1.3b", 1962.641, 0.001),
        (DeepSeekVL, "deepseek_vl_7b", 7331.391, 0.001),
        # Of the released folders, where SigLIP's pooling head of 15.2 M counts too.
        (DeepSeekVL2, "deepseek_vl2_tiny", 3370 - 15.2, 5),
        (DeepSeekVL2, "deepseek_vl2_small", 16100 - 15.2, 50),
        (DeepSeekVL2, "deepseek_vl2", 27500 - 15.2, 50),
        (Whisper, "whisper_tiny", 37.761, 0.001),
        (Whisper, "base", 72.594, 0.001),
        (Whisper, "small", 241.735, 0.001),
        (Whisper, "medium", 763.858, 0.001),
        (Whisper, "large_v3", 1543.491, 0.001),
        (Whisper, "turbo", 808.878, 0.001),
        (BLIP2Retrieval, "vit_g", 1172.032 + 0.623, 0.001),  # its class has no head for generation
        # 270 M by its paper, of which 6 x 1.837 M are projections that nothing uses.
        (ViLBERT, "base_12_in_1", 270 - 6 * 1.837, 2.5),
        (LXMERT, "base", 228.052, 0.001),  # transformers' class of this size
    ],
)
def test_numbers_of_parameters(model: Any, size: str, millions: float, within: float) -> None:
    with torch.device("meta"):
        parameters = model(model.sizes[size]).parameters()
    assert sum(p.numel() for p in parameters) / 1e6 == pytest.approx(millions, abs=within)


def test_fields_that_differ_from_the_size() -> None:
    visual = Flamingo.from_size("tiny", num_latents=5).resample(torch.randn(1, 2, 17, 32))
    assert visual.shape == (1, 2, 5, 32)
    assert CLIP.from_size("tiny", text_length=None).config == CLIP.sizes["tiny"]
    with pytest.raises(ValueError, match="num_latents must be an integer from 1 to 262144, got 0"):
        Flamingo.from_size("tiny", num_latents=0)


@pytest.mark.parametrize("model", [CLIP, Flamingo])
def test_bad_arguments(model: Any) -> None:
    for size in ("huge", ["tiny"]):
        with pytest.raises(ValueError, match=r"size must be one of tiny, small, base.*, got ") as error:
            model.from_size(size)
        assert str(error.value).endswith(f"got {size!r}")
    with pytest.raises(TypeError, match=r"dtype must be a floating dtype, got torch.int32"):
        model.from_size("tiny", dtype=torch.int32)


@pytest.mark.parametrize("model", [DeepSeekVL, DeepSeekVL2, Flamingo, InternVL, Janus, QwenVL])
def test_shared_parameters_stay_shared(model: Any) -> None:
    tied, apart = (model.from_size("tiny", tie_embeddings=tie) for tie in (True, False))
    embed = lambda net: net.get_parameter("embed.weight" if model is Flamingo else "decoder.embed.weight")
    assert tied.head.weight is embed(tied)
    assert apart.head.weight is not embed(apart)
    assert not torch.equal(apart.head.weight, embed(apart))
