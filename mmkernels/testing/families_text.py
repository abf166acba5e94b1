"""Families that read text: decoders, encoders, and one of each."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from mmkernels.testing.families_common import (
    Built,
    Inputs,
    family,
    left_padded,
    opt_config,
    right_padded,
    short_text_config,
    text_config,
    tokens,
)


def _padded_prompt() -> Inputs:
    return left_padded(tokens(2, 13), (13, 9))


@family()
def llama() -> Built:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**text_config())), _padded_prompt()


@family()
def mistral_sliding() -> Built:
    return transformers.MistralForCausalLM(
        transformers.MistralConfig(**text_config(sliding_window=5))
    ), _padded_prompt()


@family()
def qwen3() -> Built:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**text_config(head_dim=16))), _padded_prompt()


@family()
def qwen3_sliding() -> Built:
    sliding = {"use_sliding_window": True, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
    config = transformers.Qwen3Config(**text_config(head_dim=16, **sliding))
    return transformers.Qwen3ForCausalLM(config), _padded_prompt()


@family()
def gemma2() -> Built:
    config = transformers.Gemma2Config(**text_config(head_dim=16, sliding_window=5, query_pre_attn_scalar=16))
    return transformers.Gemma2ForCausalLM(config), _padded_prompt()


@family()
def gemma3_text() -> Built:
    layers = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
    config = transformers.Gemma3TextConfig(**text_config(head_dim=16, query_pre_attn_scalar=16, **layers))
    return transformers.Gemma3ForCausalLM(config), _padded_prompt()


@family()
def gpt_oss() -> Built:
    layers = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 16}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    config = transformers.GptOssConfig(**text_config(**layers, **experts, **rope))
    model = transformers.GptOssForCausalLM(config)
    model.set_experts_implementation("eager")  # the default has no float64
    return model, _padded_prompt()


@family()
def opt() -> Built:
    return transformers.OPTForCausalLM(transformers.OPTConfig(**opt_config())), _padded_prompt()


@family()
def bert() -> Built:
    config = transformers.BertConfig(**short_text_config())
    return transformers.BertModel(config), right_padded(tokens(3, 11), (11, 7, 4))


@family()
def bert_decoder() -> Built:
    config = transformers.BertConfig(**short_text_config(is_decoder=True))
    return transformers.BertLMHeadModel(config), _padded_prompt()


@family(padded=("attention_mask", "decoder_attention_mask"))
def bert_to_bert() -> Built:
    """An encoder and a decoder that attends to it."""
    encoder = transformers.BertConfig(**short_text_config())
    decoder = transformers.BertConfig(**short_text_config(is_decoder=True, add_cross_attention=True))
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    inputs = right_padded(tokens(2, 11), (11, 6))
    decoder_inputs = {f"decoder_{name}": x for name, x in left_padded(tokens(2, 8), (5, 8)).items()}
    return transformers.EncoderDecoderModel(config), inputs | decoder_inputs


@family()
def bart() -> Built:
    config = transformers.BartConfig(
        vocab_size=100,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    )
    decoder = {"decoder_input_ids": torch.cat([torch.full((2, 1), 2), tokens(2, 4)], 1)}
    return transformers.BartForConditionalGeneration(config), right_padded(tokens(2, 11), (11, 6)) | decoder


@family()
def t5() -> Built:
    """Relative positions are added to the scores."""
    sizes = {"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    special: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    config = transformers.T5Config(**(sizes | special))
    decoder = {"decoder_input_ids": torch.cat([torch.zeros(2, 1, dtype=torch.long), tokens(2, 4)], 1)}
    return transformers.T5ForConditionalGeneration(config), right_padded(tokens(2, 11), (11, 6)) | decoder
