"""AttentionPool beside SigLIP's head and PyTorch's attention, on padded and packed images, and on bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from module_checks import equal_to, refused
from torch import Tensor, nn

import mmkernels
from mmkernels.nn import AttentionPool
from mmkernels.testing.models import randomise

F64 = torch.float64
PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class _Split(nn.Module):
    """A module with PyTorch's attention in it, whose three projections are parameters apart.

    Args:
        attention: the name of the attention in `module`.
    """

    def __init__(self, module: nn.Module, attention: str) -> None:
        super().__init__()
        self.held = [module]  # not a part of this module
        self.attention = attention + "."
        held = dict(module.named_parameters())
        together = [self.attention + name for name in ("in_proj_weight", "in_proj_bias")]
        self.rest = nn.ParameterDict({name.replace(".", "/"): x for name, x in held.items() if name not in together})
        weights, biases = (held[name].tensor_split(3) for name in together)
        self.weights = nn.ParameterDict(dict(zip(PROJECTIONS, weights)))
        self.biases = nn.ParameterDict(dict(zip(PROJECTIONS, biases)))

    def forward(self, *inputs: Tensor) -> Tensor:
        parameters = {name.replace("/", "."): x for name, x in self.rest.items()}
        parameters[self.attention + "in_proj_weight"] = torch.cat([self.weights[name] for name in PROJECTIONS])
        parameters[self.attention + "in_proj_bias"] = torch.cat([self.biases[name] for name in PROJECTIONS])
        return torch.func.functional_call(self.held[0], parameters, inputs)


SPLIT = {
    f"attention.{name}.{kind}": f"{kinds}.{name}"
    for name in PROJECTIONS
    for kind, kinds in (("weight", "weights"), ("bias", "biases"))
}


def test_equals_the_head_of_siglip() -> None:
    from transformers import SiglipVisionConfig
    from transformers.models.siglip.modeling_siglip import SiglipMultiheadAttentionPoolingHead

    config = SiglipVisionConfig(hidden_size=12, intermediate_size=20, num_attention_heads=3)
    names = {"queries": "rest.probe", **SPLIT, "attention.out_proj.": "rest.attention/out_proj/"}
    names |= {"norm.": "rest.layernorm/", "mlp.0.": "rest.mlp/fc1/", "mlp.2.": "rest.mlp/fc2/"}
    equal_to(
        AttentionPool(12, num_heads=3, mlp=20, activation=lambda: nn.GELU(approximate="tanh")),
        _Split(randomise(SiglipMultiheadAttentionPoolingHead(config), std=0.5), "attention"),
        names,
        lambda m, x: m(x)[:, 0],
        lambda m, x: m(x),
        torch.randn(4, 9, 12, dtype=F64),
    )


class _Pooler(nn.Module):
    """Norms and PyTorch's attention."""

    def __init__(self, dim: int, queries: int, heads: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(queries, dim))
        self.query_norm, self.context_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        query = self.query_norm(self.queries).expand(len(x), -1, -1)
        x = self.context_norm(x)
        return self.attention(query, x, x)[0]


def test_equals_coca_s_pooler_by_pytorch_s_attention() -> None:
    names = {"queries": "rest.queries", **SPLIT, "attention.out_proj.": "rest.attention/out_proj/"}
    names |= {name + ".": f"rest.{name}/" for name in ("query_norm", "context_norm")}
    equal_to(
        AttentionPool(12, 5, num_heads=3, pre_norm=True, eps=1e-5),
        _Split(randomise(_Pooler(12, 5, 3), std=0.25), "attention"),
        names,
        lambda m, x: m(x),
        lambda m, x: m(x),
        torch.randn(4, 9, 12, dtype=F64),
    )


POOLS: dict[str, dict[str, Any]] = {
    "one": {"mlp": 20},
    "many": {"num_queries": 5, "context_dim": 10, "pre_norm": True, "bias": False},
}


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("name", POOLS)
def test_padded_and_packed_images_are_pooled_one_by_one(name: str, dtype: torch.dtype) -> None:
    """With all gradients; padding reaches nothing."""
    pool = AttentionPool(12, num_heads=3, **POOLS[name]).to(dtype)
    lengths, width = (7, 1, 4), pool.attention.context_dim
    images = [torch.randn(n, width, dtype=dtype, requires_grad=True) for n in lengths]
    leaves = [*images, *pool.parameters()]
    padded = nn.utils.rnn.pad_sequence(images, batch_first=True, padding_value=3.0)
    calls = {
        "one by one": torch.cat([pool(image[None]) for image in images]),
        "padded": pool(padded, torch.tensor(lengths)),
        "packed": pool(torch.cat(images), lengths),
        "packed, lengths in a tensor": pool(torch.cat(images), torch.tensor(lengths, dtype=torch.int32)),
    }
    want = calls["one by one"]
    gradients = torch.autograd.grad(want.square().sum(), leaves, retain_graph=True)
    for call, y in calls.items():
        torch.testing.assert_close(y, want, msg=lambda text, call=call: f"{call}: {text}")
        found = torch.autograd.grad(y.square().sum(), leaves, retain_graph=True)
        torch.testing.assert_close(found, gradients, rtol=1e-4, atol=2e-5)


def test_an_image_without_tokens_gets_the_bias() -> None:
    pool = AttentionPool(12, 2, num_heads=3)
    nn.init.normal_(pool.attention.out_proj.bias)
    x = torch.randn(5, 12)
    for y in (pool(x, (0, 5)), pool(torch.stack([x, x]), (0, 5))):
        torch.testing.assert_close(y[0], pool.attention.out_proj.bias.expand(2, -1))
        torch.testing.assert_close(y[1], pool(x[None])[0])
    assert pool(x[:0], ()).shape == (0, 2, 12)


def test_compiles_whole_and_equals_the_naive_formula() -> None:
    pool = AttentionPool(12, 2, num_heads=3, mlp=20)
    compiled = torch.compile(pool, backend="eager", fullgraph=True)
    for x, lengths in (
        (torch.randn(3, 7, 12), None),
        (torch.randn(3, 7, 12), torch.tensor([7, 2, 4])),
        (torch.randn(9, 12), (4, 5)),
        (torch.randn(11, 12), (2, 3, 6)),
    ):
        want = pool(x, lengths)
        torch.testing.assert_close(compiled(x, lengths), want)
        with mmkernels.use_backend("reference"):
            torch.testing.assert_close(pool(x, lengths), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_and_autocast(dtype: torch.dtype) -> None:
    pool, x = AttentionPool(12, 2, num_heads=3, mlp=20, pre_norm=True), torch.randn(9, 12)
    want = pool(x, (4, 5))
    with torch.autocast("cpu", dtype):
        mixed = pool(x, (4, 5))
    y = pool.to(dtype)(x.to(dtype), (4, 5))
    assert y.dtype == dtype
    for found in (mixed, y):
        torch.testing.assert_close(found.float(), want, rtol=0.05, atol=0.05)


def test_bad_input() -> None:
    pool, x = AttentionPool(12, num_heads=3), torch.randn(2, 5, 12)
    packed = x.flatten(0, 1)
    refused(
        [
            (lambda: AttentionPool(0), ValueError, "dim must be a positive integer, got 0"),
            (lambda: AttentionPool(12, 0, num_heads=3), ValueError, "num_queries must be a positive integer, got 0"),
            (lambda: AttentionPool(12, num_heads=5), ValueError, "dim must be a multiple of num_heads = 5"),
            (lambda: AttentionPool(12, num_heads=3, mlp=0), ValueError, "mlp must be a positive integer, got 0"),
            (lambda: AttentionPool(12, num_heads=3, context_dim=0), ValueError, "context_dim must be a positive"),
            (lambda: pool(x[..., :9]), ValueError, r"x must be \[tokens, 12\] or .*, got shape \(2, 5, 9\)"),
            (lambda: pool(x[None]), ValueError, r"x must be \[tokens, 12\] or .*, got shape \(1, 2, 5, 12\)"),
            (lambda: pool(packed), ValueError, r"lengths must be given for packed x, got x of shape \(10, 12\)"),
            (lambda: pool(packed, (4, 5)), ValueError, "lengths must match x's 10 tokens, got 9 in 2 images"),
            (lambda: pool(packed, torch.tensor([12, -2])), ValueError, "lengths must be >= 0, got -2"),
            (lambda: pool(packed, torch.tensor(10)), ValueError, r"lengths must be \[images\], got shape \(\)"),
            (lambda: pool(packed, (4, -6)), ValueError, "lengths must be 0 or more, got -6"),
            (lambda: pool(packed, (4.0, 6.0)), TypeError, "lengths must be integers, .*, got float"),
            (lambda: pool(packed, torch.tensor([4.0])), TypeError, "lengths must be integers, .*, got torch.float32"),
            (lambda: pool(x, (5, 5, 5)), ValueError, r"lengths must be \[2\] beside x, got shape \(3,\)"),
            (lambda: pool(x, (5, 6)), ValueError, "lengths must be from 0 to 5, got 5 to 6"),
        ]
    )
