"""CrossAttention, GatedCrossAttention and PerceiverResampler against formulas written out in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmkernels
from mmkernels import SpanMask
from mmkernels.nn import CrossAttention, GatedCrossAttention, PerceiverResampler

BACKENDS = ("chunked", "reference")
F64 = torch.float64


def attention(module: CrossAttention, x: Tensor, context: Tensor, visible: Tensor | None = None) -> Tensor:
    """Returns ``[B, Lq, dim]`` by the definition; `visible`: bool ``[B or 1, Lq, Lk]``."""
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
    """Returns the module in float64 with every parameter drawn, so that norms and gates do something."""
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


VISIBLE = SpanMask.media(torch.tensor([[-1, 0, 1], [1, 1, 0]]), 2)  # of two images of two tokens


@pytest.mark.parametrize(
    ("make", "shapes", "options"),
    [
        (
            lambda: CrossAttention(4, 3, 2, num_kv_heads=1, qk_norm=nn.LayerNorm),
            [(2, 3, 4), (1, 4, 3)],
            {"mask": VISIBLE},
        ),
        (lambda: GatedCrossAttention(4, 3, 2), [(2, 3, 4), (2, 4, 3)], {"mask": VISIBLE}),
        (lambda: GatedCrossAttention(4, 3, 2, gate="vector"), [(2, 3, 4), (2, 4, 3)], {"mask": VISIBLE}),
        (
            lambda: PerceiverResampler(4, depth=2, num_latents=2, num_heads=2, activation=nn.GELU),
            [(2, 3, 4)],
            {"lengths": torch.tensor([3, 2])},
        ),
    ],
    ids=["CrossAttention", "scalar gate", "vector gate", "PerceiverResampler"],
)
def test_gradients(make: Callable[[], nn.Module], shapes: list[tuple[int, ...]], options: dict[str, Any]) -> None:
    """Also for a gate at 0, its initial value: it must get a gradient."""
    module = randomised(make())
    if isinstance(module, GatedCrossAttention):
        module.attention_gate.data.zero_()
    inputs = [torch.randn(shape, dtype=F64, requires_grad=True) for shape in shapes]
    names = [name for name, _ in module.named_parameters()]

    def call(*tensors: Tensor) -> Tensor:
        given, parameters = tensors[: len(inputs)], tensors[len(inputs) :]
        return torch.func.functional_call(module, dict(zip(names, parameters)), given, options)

    assert torch.autograd.gradcheck(call, (*inputs, *module.parameters()), fast_mode=True)
    call(*inputs, *module.parameters()).sum().backward()
    if isinstance(module, GatedCrossAttention):
        assert float(module.attention_gate.grad.abs().sum()) > 0


def test_dropout_acts_in_training_alone() -> None:
    module = CrossAttention(12, 10, 4, dropout=0.5)
    x, context = torch.randn(2, 5, 12), torch.randn(2, 8, 10)
    assert not torch.equal(module(x, context), module(x, context))
    module.eval()
    torch.testing.assert_close(module(x, context), attention(module, x, context))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gate", ["scalar", "vector"])
def test_gated_cross_attention(gate: str, backend: str) -> None:
    block = randomised(GatedCrossAttention(12, 10, 4, gate=gate, norm=nn.RMSNorm))
    x, context = torch.randn(2, 4, 12, dtype=F64), torch.randn(2, 6, 10, dtype=F64)
    sees = torch.tensor([[-1, 0, 0, 1], [0, 1, -1, -1]])
    visible = sees[..., None] == torch.arange(6) // 3
    attended = attention(block.attention, block.attention_norm(x), context, visible)
    expected = x + torch.tanh(block.attention_gate) * attended
    fed = block.feed_forward(block.feed_forward_norm(expected))
    expected = expected + torch.tanh(block.feed_forward_gate) * fed
    with mmkernels.use_backend(backend):
        mask = SpanMask.media(sees, 3)
        torch.testing.assert_close(block(x, context, mask=mask), expected)
        torch.testing.assert_close(block(x, key_value=block.project(context), mask=mask), expected)
        blind = block(x, context, mask=SpanMask.media(torch.full((2, 4), -1), 3))
        torch.testing.assert_close(block(x), blind)


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


def resampled(module: PerceiverResampler, media: Tensor, count: int) -> Tensor:
    """Returns one image's visual tokens by Flamingo's figure 5, of its first `count` features."""
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


CROSS = {"dim": 12, "context_dim": 10, "num_heads": 4}
RESAMPLER = {"dim": 8, "num_heads": 2}


@pytest.mark.parametrize(
    ("make", "sizes", "match"),
    [
        (CrossAttention, CROSS | {"dim": 10}, "dim must be a multiple of num_heads = 4 where head_dim is None, got 10"),
        (CrossAttention, CROSS | {"dim": 0}, "dim must be a positive integer, got 0"),
        (CrossAttention, CROSS | {"num_heads": -4}, "num_heads must be a positive integer, got -4"),
        (CrossAttention, CROSS | {"num_kv_heads": 3}, "num_kv_heads must divide num_heads = 4, got 3"),
        (CrossAttention, CROSS | {"head_dim": 0}, "head_dim must be a positive integer, got 0"),
        (CrossAttention, CROSS | {"context_dim": 1.5}, "context_dim must be a positive integer, got 1.5"),
        (CrossAttention, CROSS | {"dropout": 1.5}, "dropout must be between 0 and 1, got 1.5"),
        (GatedCrossAttention, CROSS | {"gate": "matrix"}, 'gate must be "scalar" or "vector", got \'matrix\''),
        (GatedCrossAttention, CROSS | {"dim": 0}, "dim must be a positive integer, got 0"),
        (PerceiverResampler, RESAMPLER | {"num_latents": 0}, "num_latents must be a positive integer, got 0"),
        (PerceiverResampler, RESAMPLER | {"num_heads": 3}, "dim must be a multiple of num_heads = 3"),
    ],
)
def test_bad_sizes(make: Callable[..., nn.Module], sizes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make(**sizes)


def test_bad_inputs() -> None:
    module, x, context = CrossAttention(**CROSS), torch.randn(2, 5, 12), torch.randn(2, 8, 10)
    resampler, media = PerceiverResampler(**RESAMPLER), torch.randn(2, 5, 8)
    for call, match in (
        (lambda: module(x[..., :10], context), r"x must be \[B, L, 12\], got shape \(2, 5, 10\)"),
        (lambda: module(x, x), r"context must be \[B, L, 10\], got shape \(2, 5, 12\)"),
        (lambda: module(x, context[0]), r"context must be \[B, L, 10\], got shape \(8, 10\)"),
        (lambda: module(x, context, key_value=module.project(context)), "give context or key_value, not both"),
        (lambda: module(x, torch.randn(3, 8, 10)), "key must have batch 1 or query's 2, got shape"),
        (lambda: resampler(media[..., :6]), r"media must be \[..., P, 8\], got shape \(2, 5, 6\)"),
        (lambda: resampler(media[0, 0]), r"media must be \[..., P, 8\], got shape \(8,\)"),
        (lambda: resampler(media, torch.ones(3).int()), r"lengths must be \[2\] as media's .* got \(3,\)"),
        (lambda: resampler(media, torch.tensor([-2, 5])), "lengths must be from 0 to 5"),
        (lambda: resampler(media, torch.tensor([50, 5])), "lengths must be from 0 to 5"),
    ):
        with pytest.raises(ValueError, match=match):
            call()


def test_an_image_without_features() -> None:
    assert PerceiverResampler(**RESAMPLER, num_latents=4)(torch.randn(2, 0, 8)).shape == (2, 4, 8)
