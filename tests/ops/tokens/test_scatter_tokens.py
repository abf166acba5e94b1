"""`scatter_tokens`: bad input, what PyTorch's own ways give, what is kept for the backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import each_backend, examples, generator
from hypothesis import given
from hypothesis import strategies as st
from ops.cpu_tools import needs_kernels
from torch import Tensor

from mmkernels import scatter_tokens
from mmkernels.ops.tokens.rows import home_of, source_of_mask, source_of_positions
from mmkernels.runtime import triton as gpu

META = torch.zeros(2, 5, 8, device="meta")
GOOD: dict[str, Any] = {
    "embeddings": torch.zeros(2, 5, 8),
    "visual": torch.ones(3, 8),
    "positions": torch.tensor([4, 0, 7]),
}
MASK = torch.zeros(2, 5, dtype=torch.bool)

Bad = tuple[dict[str, Any], type[Exception], str]

BAD: dict[str, Bad] = {
    "embeddings a list": ({"embeddings": [0.0]}, TypeError, r"embeddings must be a tensor, got list"),
    "embeddings integers": (
        {"embeddings": torch.zeros(2, 5, 8, dtype=torch.int64)},
        TypeError,
        r"embeddings must be float16.*got torch.int64",
    ),
    "embeddings 1-D": (
        {"embeddings": torch.zeros(8)},
        ValueError,
        r"embeddings must be \[B, L, C\] or \[T, C\].*got shape \(8,\)",
    ),
    "embeddings 4-D": ({"embeddings": torch.zeros(1, 2, 5, 8)}, ValueError, r"embeddings must be .*\(1, 2, 5, 8\)"),
    "no channels": ({"embeddings": torch.zeros(2, 5, 0)}, ValueError, r"embeddings must be .*at least one channel"),
    "visual None": ({"visual": None}, TypeError, r"visual must be a tensor, got NoneType"),
    "visual's channels": (
        {"visual": torch.ones(3, 7)},
        ValueError,
        r"visual must be \[V, 8\] as embeddings is, got shape \(3, 7\)$",
    ),
    "visual by image": (
        {"visual": torch.ones(1, 3, 8)},
        ValueError,
        r"visual must be \[V, 8\].*got shape \(1, 3, 8\); flatten its images",
    ),
    "visual's dtype": (
        {"visual": torch.ones(3, 8, dtype=torch.bfloat16)},
        TypeError,
        r"visual must have embeddings' dtype torch.float32, got torch.bfloat16",
    ),
    "visual's device": (
        {"visual": META[0, :3]},
        ValueError,
        r"visual must be on embeddings' device cpu, got meta",
    ),
    "positions a list": ({"positions": [4, 0, 7]}, TypeError, r"positions must be a tensor, got list"),
    "positions int32": (
        {"positions": torch.tensor([4, 0, 7], dtype=torch.int32)},
        TypeError,
        r"positions must be int64 or a bool mask, got torch.int32",
    ),
    "positions' device": (
        {"positions": torch.zeros(3, dtype=torch.int64, device="meta")},
        ValueError,
        r"positions must be on embeddings' device cpu, got meta",
    ),
    "few positions": (
        {"positions": torch.tensor([4, 0])},
        ValueError,
        r"positions must be \[V\] = \[3\], one for each row of visual, got shape \(2,\)",
    ),
    "positions 2-D": ({"positions": torch.zeros(1, 3, dtype=torch.int64)}, ValueError, r"positions must be \[V\]"),
    "negative": ({"positions": torch.tensor([4, -1, 7])}, ValueError, r"positions must be from 0 to 9, got -1"),
    "too large": ({"positions": torch.tensor([4, 10, 7])}, ValueError, r"positions must be from 0 to 9, got .*10"),
    "repeated": (
        {"positions": torch.tensor([4, 7, 4])},
        ValueError,
        r"positions must differ from each other, got 4 twice, at 0 and 2",
    ),
    "mask's shape": (
        {"positions": MASK[0]},
        ValueError,
        r"positions must be a mask \[B, L\] = \[2, 5\], got shape \(5,\)$",
    ),
    "mask of channels": (
        {"positions": torch.zeros(2, 5, 8, dtype=torch.bool)},
        ValueError,
        r"positions must be a mask .*got shape \(2, 5, 8\); pass positions\[..., 0\]",
    ),
    "mask too small": (
        {"positions": MASK},
        ValueError,
        r"positions must be true 3 times, once for each row of visual, got 0",
    ),
    "mask too large": ({"positions": ~MASK}, ValueError, r"positions must be true 3 times, .*, got 10"),
    "mode": ({"mode": "mean"}, ValueError, r"mode must be one of replace, add, got 'mean'"),
    "backend": ({"backend": "gpu"}, ValueError, r"backend must be one of .*, or None; got 'gpu'"),
}
VALUES = ("negative", "too large", "repeated", "mask too small", "mask too large")
"""Faults that only positions' values show."""


@pytest.mark.parametrize(("changes", "error", "message"), BAD.values(), ids=list(BAD))
def test_bad_input_is_refused_by_name(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        scatter_tokens(**GOOD | changes)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_kernels)])
@pytest.mark.parametrize("fault", VALUES)
def test_wrong_positions_in_compiled_code(fault: str, backend: str) -> None:
    changes, error, message = BAD[fault]
    torch._dynamo.reset()
    compiled = torch.compile(scatter_tokens, fullgraph=True, backend="aot_eager")
    with pytest.raises(error, match=message):
        compiled(**GOOD | changes, backend=backend)


def _by_hand(embeddings: Tensor, visual: Tensor, positions: Tensor, mode: str) -> Tensor:
    """One assignment after the other."""
    rows = list(embeddings.flatten(0, -2))
    for x, row in zip(visual, positions.tolist(), strict=True):
        rows[row] = rows[row] + x if mode == "add" else x
    return torch.stack(rows).view(embeddings.shape)


@each_backend("scatter_tokens")
@examples(40, interpreted=4)
@given(
    shape=st.sampled_from([(1, 1), (40,), (2, 7), (5, 3), (3, 20)]),
    share=st.sampled_from([0.0, 0.2, 0.6, 1.0]),
    channels=st.sampled_from([1, 5, 16, 72]),
    mode=st.sampled_from(["replace", "add"]),
    mask=st.booleans(),
    number=st.integers(0, 1000),
)
def test_against_one_assignment_after_the_other(
    backend: str, shape: tuple[int, ...], share: float, channels: int, mode: str, mask: bool, number: int
) -> None:
    random = generator(number)
    tokens = torch.Size(shape).numel()
    positions = torch.randperm(tokens, generator=random)[: int(share * tokens)]
    if mask:
        positions = positions.sort().values
    embeddings = torch.randn(*shape, channels, generator=random)
    visual = torch.randn(len(positions), channels, generator=random)
    given = positions
    if mask:
        given = torch.zeros(tokens, dtype=torch.bool).index_fill(0, positions, True).view(shape)
    leaves = (embeddings.requires_grad_(), visual.requires_grad_())
    found = scatter_tokens(embeddings, visual, given, mode=mode, backend=backend)
    want = _by_hand(embeddings, visual, positions, mode)
    assert torch.equal(found, want)
    flow = torch.randn(want.shape, generator=random)
    grads = [torch.autograd.grad(x, leaves, flow, allow_unused=True, materialize_grads=True) for x in (found, want)]
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_as_transformers_fills_in_image_tokens() -> None:
    """LLaVA's and Qwen-VL's line: ``inputs_embeds.masked_scatter(mask, features)``, and its gradients."""
    ids = torch.tensor([[5, 9, 9, 9, 2, 0], [9, 9, 4, 9, 7, 1]])
    mask = (ids == 9)[..., None].expand(-1, -1, 8)
    leaves = [torch.randn(2, 6, 8, requires_grad=True), torch.randn(2, 3, 8, requires_grad=True)]
    want = leaves[0].masked_scatter(mask, leaves[1])
    found = scatter_tokens(leaves[0], leaves[1].flatten(0, 1), ids == 9)
    flow = torch.randn(2, 6, 8)
    assert torch.equal(found, want)
    for a, b in zip(*(torch.autograd.grad(x, leaves, flow) for x in (found, want)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(not gpu.INTERPRETED, reason="needs Triton's interpreter, which checks no values")
@pytest.mark.interpreted
@pytest.mark.parametrize("mode", ["replace", "add"])
def test_what_a_gpu_does_with_wrong_positions(mode: str) -> None:
    embeddings, visual = torch.randn(2, 5, 8), torch.randn(6, 8)
    positions = torch.tensor([3, -1, 10, 3, 2**40, 6])
    visual.requires_grad_()
    found = scatter_tokens(embeddings, visual, positions, mode=mode, backend="triton")
    assert torch.equal(found, _by_hand(embeddings, visual[[3, 5]], positions[[3, 5]], mode))
    (grad,) = torch.autograd.grad(found.sum(), visual)
    assert torch.equal(grad.sum(1), torch.tensor([0.0, 0, 0, 8, 0, 8]))


def test_maps_of_wrong_positions() -> None:
    source = source_of_positions(torch.tensor([3, -1, 10, 3, 2**40, 6]), 10)
    assert source.tolist() == [-1, -1, -1, 3, -1, -1, 5, -1, -1, -1]
    assert home_of(source, 6).tolist() == [-1, -1, -1, 3, -1, 6]
    mask = torch.tensor([[True, False, True], [True, False, False]])
    assert source_of_mask(mask, 2).tolist() == [0, -1, 1, -1, -1, -1]
    assert source_of_mask(mask, 9).tolist() == [0, -1, 1, 2, -1, -1]


def test_autocast_takes_the_wider_dtype() -> None:
    for wide in ("embeddings", "visual"):
        inputs = {name: x.to(torch.float32 if name == wide else torch.bfloat16) for name, x in GOOD.items()}
        inputs["positions"] = GOOD["positions"]
        with torch.autocast("cpu", torch.bfloat16):
            assert scatter_tokens(**inputs).dtype == torch.float32


@pytest.mark.parametrize("mode", ["replace", "add"])
def test_neither_tensor_is_kept_for_the_backward_pass(mode: str) -> None:
    embeddings, visual = torch.randn(2, 500, 64, requires_grad=True), torch.randn(300, 64, requires_grad=True)
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        scatter_tokens(embeddings, visual, torch.arange(300), mode=mode)
    assert sum(x.untyped_storage().nbytes() for x in kept if x.dtype == torch.float32) < 1000


def test_what_flows_back_is_handed_on_without_a_copy() -> None:
    embeddings, visual = torch.zeros(4, 8, requires_grad=True), torch.zeros(2, 8, requires_grad=True)
    out = scatter_tokens(embeddings, visual, torch.tensor([1, 3]), mode="add")
    flow = torch.randn(4, 8)
    for leaves in ((embeddings,), (embeddings, visual)):
        grads = torch.autograd.grad(out, leaves, flow, retain_graph=True)
        assert grads[0].data_ptr() == flow.data_ptr()


@needs_kernels
@pytest.mark.parametrize("mode", ["replace", "add"])
def test_large_results_past_the_caches(mode: str) -> None:
    """16 MB, which is stored past the caches; one channel fewer, which can't be."""
    for channels in (1024, 1023):
        embeddings, visual = torch.randn(4, 1024, channels), torch.randn(1000, channels)
        positions = torch.randperm(4096)[:1000]
        rows = embeddings.flatten(0, 1)
        want = rows.index_add(0, positions, visual) if mode == "add" else rows.index_copy(0, positions, visual)
        assert torch.equal(scatter_tokens(embeddings, visual, positions, mode=mode, backend="cpu").flatten(0, 1), want)
