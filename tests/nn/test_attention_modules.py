"""CrossAttention, GatedCrossAttention and PerceiverResampler against formulas written out in plain PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import mmkernels
from mmkernels import SpanMask
from mmkernels.nn import CrossAttention, GatedCrossAttention, PerceiverResampler

BACKENDS = ("chunked", "reference")
F64 = torch.float64


def attention(module: CrossAttention, x: Tensor, context: Tensor, visible: Tensor | None = None) -> Tensor:
    """``[B, Lq, dim]`` by the textbook; `visible`: bool ``[B or 1, Lq, Lk]``."""
    groups = module.num_heads // module.num_kv_heads
    q = module.q_norm(module.q_proj(x).unflatten(-1, (module.num_heads, -1)))
    k = module.k_norm(module.k_proj(context).unflatten(-1, (module.num_kv_heads, -1))).repeat_interleave(groups, 2)
    v = module.v_proj(context).unflatten(-1, (module.num_kv_heads, -1)).repeat_interleave(groups, 2)
    k, v = (t.expand(x.shape[0], -1, -1, -1) for t in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / module.head_dim**0.5
    if visible is not None:
        scores = scores.masked_fill(~visible[:, None], -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)
    return module.out_proj(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2))


MODULES: dict[str, Callable[[], CrossAttention]] = {
    "plain": lambda: CrossAttention(12, 10, 4),
    "grouped": lambda: CrossAttention(12, 10, 4, num_kv_heads=2, head_dim=5, bias=True),
    "norms": lambda: CrossAttention(12, 10, 2, qk_norm=nn.RMSNorm),
}


def randomised(module: nn.Module) -> nn.Module:
    """In float64, every parameter drawn: norms and gates that do something."""
    module = module.to(F64)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=F64) * 0.5 + 0.1)
    return module


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", [3, 1])
@pytest.mark.parametrize("name", MODULES)
def test_cross_attention(name: str, batch: int, backend: str) -> None:
    module = randomised(MODULES[name]())
    x, context = torch.randn(3, 5, 12, dtype=F64), torch.randn(batch, 8, 10, dtype=F64)
    sees = torch.tensor([[-1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [1, -1, -1, 1, 0]])
    visible = sees[..., None] == torch.arange(8) // 4
    with mmkernels.use_backend(backend):
        torch.testing.assert_close(module(x, context), attention(module, x, context))
        spans = module(x, context, mask=SpanMask.media(sees, 4))
        dense = module(x, key_value=module.project(context), mask=visible[:, None])
    torch.testing.assert_close(spans, attention(module, x, context, visible))
    torch.testing.assert_close(dense, spans)


def test_self_attention_is_the_default_context() -> None:
    module = randomised(CrossAttention(12, num_heads=3, bias=True))
    x = torch.randn(2, 5, 12, dtype=F64)
    torch.testing.assert_close(module(x), attention(module, x, x))


def test_cross_attention_gradients() -> None:
    module = randomised(CrossAttention(4, 3, 2, num_kv_heads=1, qk_norm=nn.LayerNorm))
    x = torch.randn(2, 3, 4, dtype=F64, requires_grad=True)
    context = torch.randn(1, 4, 3, dtype=F64, requires_grad=True)
    mask = SpanMask.media(torch.tensor([[-1, 0, 1], [1, 1, 0]]), 2)
    names = [name for name, _ in module.named_parameters()]

    def call(x: Tensor, context: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, parameters)), (x, context), {"mask": mask})

    assert torch.autograd.gradcheck(call, (x, context, *module.parameters()), fast_mode=True)


def test_dropout_acts_in_training_alone() -> None:
    module = CrossAttention(12, 10, 4, dropout=0.5)
    x, context = torch.randn(2, 5, 12), torch.randn(2, 8, 10)
    assert not torch.equal(module(x, context), module(x, context))
    module.eval()
    torch.testing.assert_close(module(x, context), attention(module, x, context))


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"dim": 10}, "dim must be a multiple of num_heads = 4 where head_dim is None, got 10"),
        ({"dim": 0}, "dim must be a positive integer, got 0"),
        ({"num_heads": -4}, "num_heads must be a positive integer, got -4"),
        ({"num_kv_heads": 3}, "num_kv_heads must divide num_heads = 4, got 3"),
        ({"head_dim": 0}, "head_dim must be a positive integer, got 0"),
        ({"context_dim": 1.5}, "context_dim must be a positive integer, got 1.5"),
        ({"dropout": 1.5}, "dropout must be between 0 and 1, got 1.5"),
    ],
)
def test_cross_attention_refuses_sizes(values: dict[str, float], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        CrossAttention(**({"dim": 12, "context_dim": 10, "num_heads": 4} | values))


def test_cross_attention_refuses_inputs() -> None:
    module, x, context = CrossAttention(12, 10, 4), torch.randn(2, 5, 12), torch.randn(2, 8, 10)
    with pytest.raises(ValueError, match=r"x must be \[B, L, 12\], got shape \(2, 5, 10\)"):
        module(x[..., :10], context)
    with pytest.raises(ValueError, match=r"context must be \[B, L, 10\], got shape \(2, 8, 12\)"):
        module(x, torch.randn(2, 8, 12))
    with pytest.raises(ValueError, match=r"context must be \[B, L, 10\], got shape \(8, 10\)"):
        module(x, context[0])
    with pytest.raises(ValueError, match="give context or key_value, not both"):
        module(x, context, key_value=module.project(context))
    with pytest.raises(ValueError, match="key must have batch 1 or query's 2, got shape"):
        module(x, torch.randn(3, 8, 10))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gate", ["scalar", "vector"])
def test_gated_cross_attention(gate: str, backend: str) -> None:
    block = randomised(GatedCrossAttention(12, 10, 4, gate=gate, norm=nn.RMSNorm))
    x, context = torch.randn(2, 4, 12, dtype=F64), torch.randn(2, 6, 10, dtype=F64)
    sees = torch.tensor([[-1, 0, 0, 1], [0, 1, -1, -1]])
    visible = sees[..., None] == torch.arange(6) // 3
    seen = attention(block.attention, block.attention_norm(x), context, visible)
    expected = x + torch.tanh(block.attention_gate) * seen
    fed = block.feed_forward(block.feed_forward_norm(expected))
    expected = expected + torch.tanh(block.feed_forward_gate) * fed
    with mmkernels.use_backend(backend):
        mask = SpanMask.media(sees, 3)
        torch.testing.assert_close(block(x, context, mask=mask), expected)
        torch.testing.assert_close(block(x, key_value=block.project(context), mask=mask), expected)
        blind = block(x, context, mask=SpanMask.media(torch.full((2, 4), -1), 3))
        torch.testing.assert_close(block(x), blind)


@pytest.mark.parametrize("gate", ["scalar", "vector"])
def test_gated_cross_attention_gradients(gate: str) -> None:
    """Also with gates at 0, where they start: a gate must still learn."""
    block = randomised(GatedCrossAttention(4, 3, 2, gate=gate))
    with torch.no_grad():
        block.attention_gate.zero_()
    x = torch.randn(2, 3, 4, dtype=F64, requires_grad=True)
    context = torch.randn(2, 4, 3, dtype=F64, requires_grad=True)
    mask = SpanMask.media(torch.tensor([[-1, 0, 1], [1, 1, 0]]), 2)
    names = [name for name, _ in block.named_parameters()]

    def call(x: Tensor, context: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(block, dict(zip(names, parameters)), (x, context), {"mask": mask})

    assert torch.autograd.gradcheck(call, (x, context, *block.parameters()), fast_mode=True)
    call(x, context, *block.parameters()).sum().backward()
    assert float(block.attention_gate.grad.abs().sum()) > 0


def test_gated_cross_attention_changes_nothing_at_first() -> None:
    x = torch.randn(2, 4, 12)
    assert torch.equal(GatedCrossAttention(12, 10, 4)(x, torch.randn(2, 6, 10)), x)


def test_gated_cross_attention_compiles_whole() -> None:
    block = GatedCrossAttention(12, 10, 4, gate_init=0.5)
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    for length in (4, 7):
        x, context = torch.randn(2, length, 12, requires_grad=True), torch.randn(2, 6, 10)
        mask = SpanMask.media(torch.randint(-1, 2, (2, length)), 3)
        expected, out = block(x, context, mask=mask), compiled(x, context, mask=mask)
        torch.testing.assert_close(out, expected)
        gradients = [torch.autograd.grad(y.square().sum(), [x, *block.parameters()]) for y in (expected, out)]
        torch.testing.assert_close(*gradients)


def test_gated_cross_attention_refuses() -> None:
    with pytest.raises(ValueError, match='gate must be "scalar" or "vector", got \'matrix\''):
        GatedCrossAttention(12, gate="matrix")
    with pytest.raises(ValueError, match="dim must be a positive integer, got 0"):
        GatedCrossAttention(0)


def resampled(module: PerceiverResampler, media: Tensor, count: int) -> Tensor:
    """One image's visual tokens by Flamingo's figure 5, of its first `count` features."""
    latents, media = module.latents[None], media[None, :count]
    for block in module.blocks:
        normed = block.latent_norm(latents)
        both = torch.cat([block.media_norm(media), normed], dim=1)
        latents = latents + attention(block.attention, normed, both)
        latents = latents + block.feed_forward(latents)
    return module.norm(latents)[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("qk_norm", [None, nn.LayerNorm])
def test_resampler(qk_norm: type[nn.Module] | None, backend: str) -> None:
    module = randomised(PerceiverResampler(8, depth=2, num_latents=3, num_heads=2, head_dim=5, qk_norm=qk_norm))
    media = torch.randn(2, 3, 7, 8, dtype=F64)
    lengths = torch.tensor([[7, 1, 4], [0, 7, 6]])
    with mmkernels.use_backend(backend):
        out, ragged = module(media), module(media, lengths)
    assert out.shape == ragged.shape == (2, 3, 3, 8)
    for b in range(2):
        for n in range(3):
            torch.testing.assert_close(out[b, n], resampled(module, media[b, n], 7))
            torch.testing.assert_close(ragged[b, n], resampled(module, media[b, n], int(lengths[b, n])))
    torch.testing.assert_close(module(media[0, 0]), out[0, 0])


def test_resampler_gradients() -> None:
    module = randomised(PerceiverResampler(4, depth=2, num_latents=2, num_heads=2, activation=nn.GELU))
    media = torch.randn(2, 3, 4, dtype=F64, requires_grad=True)
    names = [name for name, _ in module.named_parameters()]

    def call(media: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, parameters)), (media, torch.tensor([3, 2])))

    assert torch.autograd.gradcheck(call, (media, *module.parameters()), fast_mode=True)


def test_resampler_refuses() -> None:
    module = PerceiverResampler(8, num_heads=2)
    with pytest.raises(ValueError, match=r"media must be \[..., P, 8\], got shape \(2, 5, 6\)"):
        module(torch.randn(2, 5, 6))
    with pytest.raises(ValueError, match=r"media must be \[..., P, 8\], got shape \(8,\)"):
        module(torch.randn(8))
    with pytest.raises(ValueError, match=r"lengths must be \[2\] as media's leading dimensions, got \(3,\)"):
        module(torch.randn(2, 5, 8), torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="num_latents must be a positive integer, got 0"):
        PerceiverResampler(8, num_latents=0)
    with pytest.raises(ValueError, match="dim must be a multiple of num_heads = 3"):
        PerceiverResampler(8, num_heads=3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: CrossAttention(12, 10, 4, num_kv_heads=2, bias=True, qk_norm=nn.RMSNorm),
        lambda: GatedCrossAttention(12, 10, 4, gate="vector"),
        lambda: PerceiverResampler(12, depth=2, num_latents=3, num_heads=4),
    ],
    ids=["CrossAttention", "GatedCrossAttention", "PerceiverResampler"],
)
def test_state_dict_round_trip(make: Callable[[], nn.Module]) -> None:
    first, second = randomised(make()), randomised(make())
    x, context = torch.randn(2, 5, 12, dtype=F64), torch.randn(2, 6, 10, dtype=F64)
    args = (x,) if isinstance(first, PerceiverResampler) else (x, context)
    assert not torch.allclose(first(*args), second(*args))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert torch.equal(first(*args), second(*args))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_and_autocast(dtype: torch.dtype) -> None:
    block = GatedCrossAttention(12, 10, 4, gate_init=0.5)
    x, context = torch.randn(2, 4, 12), torch.randn(2, 6, 10)
    expected = block(x, context)
    with torch.autocast("cpu", dtype):
        mixed = block(x, context)
    torch.testing.assert_close(mixed.float(), expected, rtol=0.05, atol=0.05)
    out = block.to(dtype)(x.to(dtype), context.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)


def test_resampler_checks_lengths() -> None:
    resampler = PerceiverResampler(8, depth=1, num_latents=4, num_heads=2)
    media = torch.randn(2, 5, 8)
    for lengths in ([-2, 5], [50, 5]):
        with pytest.raises(ValueError, match="lengths must be from 0 to 5"):
            resampler(media, torch.tensor(lengths))
    assert resampler(media[:, :0]).shape == (2, 4, 8)
