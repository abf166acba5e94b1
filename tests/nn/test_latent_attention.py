"""LatentAttention against transformers' DeepseekV2Attention, and with its keys and values never expanded."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from mmkernels import SpanMask
from mmkernels.models.blocks.kv_cache import KVCache
from mmkernels.nn import LatentAttention, LatentSizes
from mmkernels.nn.latent_attention import Angles, rotate_pairs

transformers = pytest.importorskip("transformers")

DIM, LENGTH = 48, 9
F64 = torch.float64
SIZES = LatentSizes(heads=4, kv_rank=32, nope_dim=16, rope_dim=8, value_dim=12)
YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "mscale": 0.5, "mscale_all_dim": 0.7, "beta_fast": 32,
    "beta_slow": 1, "original_max_position_embeddings": 64,
}  # fmt: skip
NAMES = {
    "kv_proj": "kv_a_proj_with_mqa", "kv_norm": "kv_a_layernorm", "expand_proj": "kv_b_proj", "out_proj": "o_proj",
    "q_proj": "q_proj", "q_proj.0": "q_a_proj", "q_proj.1": "q_a_layernorm", "q_proj.2": "q_b_proj",
}  # fmt: skip


def pair(query_rank: int | None = None, rope: dict[str, Any] | None = None) -> tuple[Any, LatentAttention, Angles]:
    """Returns transformers' layer, ours with the same random weights, both in float64, and angles of positions."""
    from transformers.models.deepseek_v2 import modeling_deepseek_v2 as theirs

    config = transformers.DeepseekV2Config(
        hidden_size=DIM, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=query_rank, kv_lora_rank=32,
        qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12, attention_bias=True, max_position_embeddings=256,
        rope_parameters=rope or {"rope_type": "default", "rope_theta": 1e4}, attn_implementation="eager",
    )  # fmt: skip
    layer = theirs.DeepseekV2Attention(config, 0).to(F64).eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours = LatentAttention(DIM, SIZES._replace(query_rank=query_rank), bias=True, scale=layer.scaling).to(F64).eval()
    parts = {name for name, _ in ours.named_modules()} & set(NAMES)
    for name in parts - ({"q_proj"} if query_rank else set()):
        ours.get_submodule(name).load_state_dict(getattr(layer, NAMES[name]).state_dict())
    turns = theirs.DeepseekV2RotaryEmbedding(config)(torch.zeros(1), torch.arange(LENGTH)[None])
    return layer, ours, (turns.real[:, None].to(F64), turns.imag[:, None].to(F64))


def theirs(layer: Any, x: Tensor, angles: Angles) -> Tensor:
    """Returns what transformers' layer makes of a causal text."""
    hidden = torch.full((LENGTH, LENGTH), -torch.inf, dtype=F64).triu(1)[None, None]
    turns = torch.complex(angles[0][:, 0].float(), angles[1][:, 0].float())
    return layer(x, hidden, position_embeddings=turns)[0]  # type: ignore[no-any-return]


def forced(module: LatentAttention, absorbs: bool, monkeypatch: pytest.MonkeyPatch) -> LatentAttention:
    monkeypatch.setattr(module, "_absorbs", lambda queries, keys: absorbs)
    return module


@pytest.mark.parametrize("absorbs", [False, True], ids=["expanded", "absorbed"])
@pytest.mark.parametrize("rope", [None, YARN], ids=["plain", "YaRN"])
@pytest.mark.parametrize("query_rank", [None, 24])
def test_of_transformers(
    query_rank: int | None, rope: dict[str, Any] | None, absorbs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its angles are float32, whatever its weights are: 1e-6. Gradients too, of every parameter."""
    layer, ours, angles = pair(query_rank, rope)
    x = torch.randn(2, LENGTH, DIM, dtype=F64)
    want, found = (
        theirs(layer, x, angles),
        forced(ours, absorbs, monkeypatch)(x, angles, SpanMask.causal(LENGTH, LENGTH)),
    )
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6)
    cotangent = torch.randn_like(want)
    (want * cotangent).sum().backward()
    (found * cotangent).sum().backward()
    for name, parameter in ours.named_parameters():
        part, _, last = name.rpartition(".")
        true = getattr(layer.get_submodule(NAMES[part]), last).grad
        assert bool(true.any())
        torch.testing.assert_close(parameter.grad, true, rtol=1e-5, atol=1e-5)


def test_token_by_token_over_a_cache() -> None:
    """The same as at once; the cache holds kv_rank + rope_dim numbers a token and nothing else."""
    _, ours, (cos, sin) = pair()
    x = torch.randn(2, LENGTH, DIM, dtype=F64)
    whole = ours(x, (cos, sin), SpanMask.causal(LENGTH, LENGTH))
    cache = KVCache(1)
    found = []
    with torch.no_grad():
        for first, last in ((0, 5), (5, 6), (6, LENGTH)):  # a prompt, a token, a few tokens
            _, mask = cache.extend(torch.ones(2, last - first, dtype=torch.bool), padded=False)
            angles = cos[:, :, first:last], sin[:, :, first:last]
            keep = lambda tokens: cache.append_compressed(0, tokens, SIZES.kv_rank)
            found.append(ours(x[:, first:last], angles, mask, keep))
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="kv_cache must be of a model that caches keys and values, got one of compr"):
        cache.append(0, x[:, None], x[:, None])
    usual = KVCache(1)
    usual.append(0, x[:, None], x[:, None])
    with pytest.raises(ValueError, match="kv_cache must be of a model that caches compressed tokens, got one of keys"):
        usual.append_compressed(0, x[:, None], SIZES.kv_rank)
    (buffer,) = cache._layers[0]
    assert buffer.view().shape == (2, 1, LENGTH, SIZES.cached)
    assert SIZES.cached == 32 + 8


def test_what_is_expanded() -> None:
    """A new token never expands the cache; a prompt does, once that takes fewer products."""
    lite = LatentSizes(heads=16, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128)
    with torch.device("meta"):
        module = LatentAttention(2048, lite)
    assert module._absorbs(1, 2)
    assert module._absorbs(100, 10_000)
    assert not module._absorbs(200, 10_000)
    assert not module._absorbs(576, 576)


@pytest.mark.parametrize("way", ["hook", "another layer"])
def test_what_changes_the_expansion_is_called(way: str) -> None:
    """For one new token as for a prompt: LoRA puts a layer of its own there."""
    _, ours, (cos, sin) = pair()
    if way == "hook":
        ours.expand_proj.register_forward_hook(lambda layer, args, out: 2 * out)
    else:
        ours.expand_proj = torch.nn.Sequential(ours.expand_proj, torch.nn.Tanh())  # type: ignore[assignment]
    x = torch.randn(2, LENGTH, DIM, dtype=F64)
    whole = ours(x, (cos, sin), SpanMask.causal(LENGTH, LENGTH))
    before = ours.compress(x[:, :-1], (cos[:, :, :-1], sin[:, :, :-1]))
    last = ours(x[:, -1:], (cos[:, :, -1:], sin[:, :, -1:]), keep=lambda new: torch.cat([before, new], 2))
    torch.testing.assert_close(last[:, 0], whole[:, -1], rtol=1e-12, atol=1e-12)


def test_rotation_of_pairs() -> None:
    """A complex number times exp(i angle), as the paper writes it."""
    x, angles = torch.randn(2, 3, 5, 8, dtype=F64), torch.randn(2, 1, 5, 4, dtype=F64)
    turned = torch.view_as_complex(x.unflatten(-1, (4, 2))) * torch.polar(torch.ones_like(angles), angles)
    found = rotate_pairs(x, (angles.cos(), angles.sin()))
    torch.testing.assert_close(found, torch.view_as_real(turned).flatten(-2), rtol=1e-12, atol=1e-12)


def test_wide_angles_of_16_bit_tokens() -> None:
    module = LatentAttention(DIM, SIZES).bfloat16()
    angles = torch.rand(1, 1, LENGTH, 4)
    x = torch.randn(2, LENGTH, DIM).bfloat16()
    found = module(x, (angles.cos(), angles.sin()))
    wide = module.double()(x.double(), (angles.cos().double(), angles.sin().double()))
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found.double(), wide, rtol=0.05, atol=0.02)


def test_dropout_in_training_only() -> None:
    module = LatentAttention(DIM, SIZES, dropout=0.5)
    angles = torch.ones(1, 1, LENGTH, 4), torch.zeros(1, 1, LENGTH, 4)
    x = torch.randn(1, LENGTH, DIM)
    assert not torch.equal(module(x, angles), module(x, angles))
    module.eval()
    assert torch.equal(module(x, angles), module(x, angles))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_dim": 7}, "rope_dim must be even, got 7"),
        ({"kv_rank": 0}, "kv_rank must be a positive integer, got 0"),
        ({"query_rank": -1}, "query_rank must be a positive integer, got -1"),
        ({"heads": 2.0}, "heads must be a positive integer, got 2.0"),
    ],
)
def test_bad_sizes(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        LatentAttention(DIM, SIZES._replace(**change))


def test_bad_input() -> None:
    angles = torch.ones(1, 1, 3, 4), torch.zeros(1, 1, 3, 4)
    with pytest.raises(ValueError, match=r"x must be \[B, L, 48\], got shape \(1, 3, 47\)"):
        LatentAttention(DIM, SIZES)(torch.randn(1, 3, 47), angles)
    for wrong in (angles[0][:, :, :1], angles[0][..., :2], angles[0][0]):
        with pytest.raises(ValueError, match=r"angles must be two tensors \[B or 1, 1, 3, 4\], got shape"):
            LatentAttention(DIM, SIZES)(torch.randn(1, 3, DIM), (angles[0], wrong))
    with pytest.raises(TypeError, match="sizes must be LatentSizes, got tuple"):
        LatentAttention(DIM, tuple(SIZES))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scale must be a finite number, got nan"):
        LatentAttention(DIM, SIZES, scale=float("nan"))
    with pytest.raises(ValueError, match="dropout must be between 0 and 1, got 2"):
        LatentAttention(DIM, SIZES, dropout=2)
