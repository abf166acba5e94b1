"""The Triton linear kernels' memory: nothing read or written outside, far offsets, no wait; and what a GPU alone shows.

As test_linear_triton.py, under Triton's interpreter or on a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import check
from layouts import embedded, far_apart, guarded
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mmkernels.ops.common.cases import normal
from mmkernels.ops.linear.linear_cross_entropy.spec import SPEC as CROSS_ENTROPY
from mmkernels.ops.linear.linear_logprobs.spec import SPEC as LOGPROBS
from mmkernels.runtime import triton as gpu
from mmkernels.runtime import tuning
from mmkernels.spec import Case, Inputs, OpSpec

pytest.importorskip("triton")

from ops.linear.triton_tools import (
    check_gradients,
    check_states,
    gradients_record,
    loss_record,
    states_record,
)
from triton_tiling import tiled

from mmkernels.ops.linear.linear_cross_entropy import triton as cross_entropy
from mmkernels.ops.linear.linear_logprobs import triton as logprobs
from mmkernels.ops.linear.triton import gradients, stored

interpreted = pytest.mark.interpreted  # and else on a GPU, or not at all
if not gpu.INTERPRETED:
    pytestmark = pytest.mark.gpu

EVERYTHING = {"softcap": 5.0, "temperature": 0.7, "entropy": True, "best": True, "bias": True, "weighted": True}


@interpreted
@pytest.mark.parametrize("dim", [13, 36])
def test_nothing_outside_is_read_or_written(dim: int) -> None:
    """Between NaN, with strides of its own; what launchers make is full of NaN, and lies between guards."""
    record = states_record(21, 45, dim, **EVERYTHING)

    def all_results(wrap: Any) -> list[Tensor]:
        given = record._make(wrap(x) if isinstance(x, Tensor) else x for x in record)
        backward = gradients_record(record)
        backward = backward._make(wrap(x) if isinstance(x, Tensor) else x for x in backward)
        plain = loss_record(given._replace(softcap=0.0))
        losses = [cross_entropy.forward(x) for x in (plain, loss_record(given), plain.without_gradients())]
        return [*logprobs.states(given), *logprobs.gradients(backward), *(x for loss in losses for x in loss)]

    with tiled(16, 32):
        want = all_results(lambda x: x)
        with guarded() as made:
            got = all_results(embedded)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, equal_nan=False)
    assert len(made) > 20 and all(x.intact() for x in made)


@interpreted
@pytest.mark.parametrize("dim", [0, 1])
def test_rows_and_channels_far_apart(dim: int) -> None:
    """Offsets beyond 2^31 elements, in the weight and in hidden."""
    record = states_record(5, 20, 16)
    far = record._replace(weight=far_apart(record.weight, dim), hidden=far_apart(record.hidden, dim))
    with tiled(16, 32):
        check_states(far)
        check_gradients(gradients_record(record)._replace(weight=far.weight, hidden=far.hidden))


@interpreted
def test_expanded_operands() -> None:
    """All rows or all channels in one place."""
    record = states_record(21, 40, 16, bias=True)
    with tiled(16, 32):
        for weight in (record.weight[:1].expand(40, 16), record.weight[:, :1].expand(40, 16)):
            check_states(record._replace(weight=weight))
            check_gradients(gradients_record(record._replace(weight=weight)))
            check_gradients(gradients_record(record._replace(weight=weight, hidden=record.hidden[:1].expand(21, 16))))


@interpreted
def test_no_value_is_looked_at_on_the_host() -> None:
    """Fake tensors have none; launches are only recorded."""
    given = states_record(40, 90, 24, dtype=torch.float16, **EVERYTHING)
    records = [given, gradients_record(given), loss_record(given), loss_record(given._replace(softcap=0.0))]
    launchers = [logprobs.states, logprobs.gradients, cross_entropy.forward, cross_entropy.forward]
    with FakeTensorMode() as mode, tuning.pretend("sm_80"), gpu.recorded() as launches:
        for record, launcher in zip(records, launchers, strict=True):
            launcher(record._make(mode.from_tensor(x) if isinstance(x, Tensor) else x for x in record))
    assert len(launches) > 15


# What only a GPU can show.


def _large(spec: OpSpec, tokens: int, **more: Any) -> Case:
    names = ("hidden", "weight") if spec is LOGPROBS else ("input", "linear_weight")

    def make(g: torch.Generator) -> Inputs:
        hidden, weight = normal(g, 700, 320), normal(g, tokens, 320) * 0.2
        target = torch.randint(tokens, (700,), generator=g)
        target = target.masked_fill(torch.rand(700, generator=g) < 0.4, -100)
        return dict(zip(names, (hidden, weight), strict=True)) | {"target": target} | more

    return Case("here", make, names)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", [30_000, 30_011])
def test_tens_of_thousands_of_tokens(tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """More tiles than a GPU works on at once, last tiles that hang over, several strips and chunks."""
    for module, name in ((gradients, "STRIP_BYTES"), (stored, "CHUNK_BYTES")):
        monkeypatch.setattr(module, name, 2**23)
    for spec, more in (
        (LOGPROBS, {"return_entropy": True, "temperature": 0.7}),
        (LOGPROBS, {"softcap": 20.0, "return_correct": dtype == torch.float32}),
        (CROSS_ENTROPY, {"label_smoothing": 0.1, "z_loss": 1e-3}),
        (CROSS_ENTROPY, {"softcap": 20.0}),
    ):
        check(spec, _large(spec, tokens, **more), dtype, "triton", "cuda")


def _step(rows: int, tokens: int, dim: int, live: float = 1.0) -> Any:
    hidden = torch.randn(rows, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(tokens, dim, device="cuda", dtype=torch.bfloat16) * dim**-0.5).requires_grad_()
    target = torch.randint(tokens, (rows,), device="cuda")
    target = target.masked_fill(torch.rand(rows, device="cuda") >= live, -100)

    def step(spec: OpSpec) -> list[Tensor]:
        loss = spec.function(hidden, weight, target, backend="triton")
        loss = loss if spec is CROSS_ENTROPY else loss.mean()
        return [loss.detach(), *torch.autograd.grad(loss, [hidden, weight])]

    return step


@pytest.mark.gpu
@pytest.mark.parametrize("spec", [LOGPROBS, CROSS_ENTROPY], ids=lambda spec: spec.name)
def test_a_cuda_graph_captures_a_step(spec: OpSpec) -> None:
    step = _step(2000, 20_000, 512, live=0.5)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        want = step(spec)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(spec)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step(spec)
    for x in got:
        x.fill_(torch.nan)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("spec", [LOGPROBS, CROSS_ENTROPY], ids=lambda spec: spec.name)
def test_memory_of_a_step(spec: OpSpec) -> None:
    """Above the gradients: a strip or a chunk, hidden's packed copy and sums; of the loss the weight's sums."""
    rows, tokens, dim = 8192, 128_256, 2048
    step = _step(rows, tokens, dim)
    step(spec)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grads = step(spec)
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in grads)
    most = gradients.STRIP_BYTES if spec is LOGPROBS else stored.CHUNK_BYTES + 4 * tokens * dim
    assert extra <= most + 8 * rows * dim + 100 * 2**20


@pytest.mark.gpu
def test_time_follows_the_rows_that_take_part() -> None:
    """A tenth of the rows takes less than a third of the time."""

    def seconds(live: float) -> float:
        step, events = _step(8192, 64_000, 2048, live), [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        step(CROSS_ENTROPY)
        events[0].record()
        step(CROSS_ENTROPY)
        events[1].record()
        torch.cuda.synchronize()
        return float(events[0].elapsed_time(events[1]))

    assert seconds(0.1) < seconds(1.0) / 3
