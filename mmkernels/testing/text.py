"""Families that read text: decoders, encoders, and one of each."""

from __future__ import annotations

import torch

from mmkernels.testing.models import Config, Family, Inputs
from mmkernels.testing.parts import (
    SPECIAL,
    decoder,
    encoder,
    left_padded,
    opt,
    right_padded,
    rope,
    sequence_to_sequence,
    sliding_and_full,
    tokens,
)


def _prompts() -> Inputs:
    return left_padded(tokens(2, 13), (13, 9))


def _texts() -> Inputs:
    return right_padded(tokens(2, 11), (11, 6))


def _texts_and_outputs(start: int) -> Inputs:
    """Inputs of an encoder, and the first tokens of its decoder's output."""
    return _texts() | {"decoder_input_ids": torch.cat([torch.full((2, 1), start), tokens(2, 4)], 1)}


def _texts_and_padded_outputs() -> Inputs:
    return _texts() | {f"decoder_{name}": x for name, x in left_padded(tokens(2, 8), (5, 8)).items()}


_T5: Config = {"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
_T5 |= {"feed_forward_proj": "gated-gelu"}  # as in T5 1.1; rounding may flip the gradient of T5 1.0's ReLU
_EXPERTS: Config = {"num_local_experts": 4, "num_experts_per_tok": 2}
_EXPERTS |= {"experts_implementation": "eager"}  # the other implementations lack float64
_BERT_TO_BERT = {
    "encoder": encoder(model_type="bert"),
    "decoder": encoder(model_type="bert", is_decoder=True, add_cross_attention=True),
    "decoder_start_token_id": 1,
    "pad_token_id": 0,
}

FAMILIES = (
    Family("llama", "LlamaForCausalLM", decoder(), _prompts),
    Family("mistral_sliding", "MistralForCausalLM", decoder(sliding_window=5), _prompts),
    Family("qwen3", "Qwen3ForCausalLM", decoder(head_dim=16), _prompts),
    Family(
        "qwen3_sliding",
        "Qwen3ForCausalLM",
        decoder(head_dim=16, use_sliding_window=True, **sliding_and_full(5)),
        _prompts,
    ),
    Family("gemma2", "Gemma2ForCausalLM", decoder(head_dim=16, sliding_window=5, query_pre_attn_scalar=16), _prompts),
    Family(
        "gemma3_text",
        "Gemma3ForCausalLM",
        decoder(head_dim=16, query_pre_attn_scalar=16, **sliding_and_full(5)),
        _prompts,
    ),
    Family("gpt_oss", "GptOssForCausalLM", decoder(head_dim=16, **sliding_and_full(5), **_EXPERTS, **rope()), _prompts),
    Family("opt", "OPTForCausalLM", opt(), _prompts),
    Family("bert", "BertModel", encoder(), lambda: right_padded(tokens(3, 11), (11, 7, 4))),
    Family("bert_decoder", "BertLMHeadModel", encoder(is_decoder=True), _prompts),
    Family(
        "bert_to_bert",
        "EncoderDecoderModel",
        _BERT_TO_BERT,
        _texts_and_padded_outputs,
        padded=("attention_mask", "decoder_attention_mask"),
    ),
    Family(
        "bart",
        "BartForConditionalGeneration",
        sequence_to_sequence(max_position_embeddings=64, decoder_start_token_id=2, forced_eos_token_id=None),
        lambda: _texts_and_outputs(start=2),
    ),
    Family(  # adds relative positions to the scores
        "t5",
        "T5ForConditionalGeneration",
        _T5 | SPECIAL | {"decoder_start_token_id": 0},
        lambda: _texts_and_outputs(start=0),
    ),
)
