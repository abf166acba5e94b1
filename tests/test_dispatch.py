"""How a backend is chosen: order, reasons, fall-back in the backward pass, threads, ops removed."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from mmkernels import BackendError, SpanMask, cross_attention, use_backend
from mmkernels.runtime import dispatch, eager
from mmkernels.runtime.dispatch import TABLES, Backend, choose


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An op "toy" with three backends: one that never runs here, one for short inputs, one for all."""
    ran: list[str] = []

    def short(args: tuple[Tensor] | None = None) -> str | None:
        if args is None:
            return None
        (x,) = args
        return None if len(x) < 3 else f"x must be shorter than 3, got {len(x)}"

    entries = (
        Backend("cuda", ran.append, lambda *args: "no NVIDIA GPU"),
        Backend("cpu", ran.append, short),
        Backend("reference", ran.append),
    )
    monkeypatch.setitem(TABLES, "toy", entries)
    return ran


def test_first_that_can(table: list[str]) -> None:
    assert choose("toy", "", (torch.zeros(2),)).name == "cpu"
    assert choose("toy", "", (torch.zeros(3),)).name == "reference"


def test_forced(table: list[str]) -> None:
    assert choose("toy", "reference", (torch.zeros(2),)).name == "reference"
    with pytest.raises(BackendError, match=r"toy can't run this call\. cpu: x must be shorter than 3, got 5"):
        choose("toy", "cpu", (torch.zeros(5),))
    with pytest.raises(BackendError, match="cuda: no NVIDIA GPU"):
        choose("toy", "cuda", (torch.zeros(2),))
    with pytest.raises(BackendError, match="toy has no backend 'triton'; it has cuda, cpu, reference"):
        choose("toy", "triton", (torch.zeros(2),))


def test_backward_may_fall_back(table: list[str]) -> None:
    assert choose("toy", "cpu", (torch.zeros(5),), forced_may_fall_back=True).name == "reference"
    assert choose("toy", "triton", (torch.zeros(2),), forced_may_fall_back=True).name == "cpu"


def test_the_choice_is_the_threads_own() -> None:
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(dispatch.resolve(None)))
        thread.start()
        thread.join()
        assert dispatch.resolve(None) == "reference"
    assert seen == [""] and dispatch.resolve(None) == ""


def test_an_error_leaves_the_block_in_order() -> None:
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert dispatch.resolve(None) == ""


def test_a_block_may_be_entered_again_inside_itself() -> None:
    block = use_backend("reference")
    with block:
        with block:
            assert dispatch.resolve(None) == "reference"
        assert dispatch.resolve(None) == "reference"
    assert dispatch.resolve(None) == ""


def test_removed_ops_answer_zeros_forward_and_backward() -> None:
    q = torch.randn(1, 2, 3, 4, requires_grad=True)
    with eager.stub_ops():
        out, lse = cross_attention(q, q, q, return_lse=True)
        out.sum().backward()
    assert not bool(out.any()) and not bool(lse.any()) and q.grad is not None and not bool(q.grad.any())
    assert bool(cross_attention(q, q, q).any())
    with pytest.raises(KeyError), eager.stub_ops():
        raise KeyError
    assert bool(cross_attention(q, q, q).any())


@pytest.mark.parametrize("grad", [False, True])
def test_a_trace_holds_the_boundary(grad: bool) -> None:
    """torch.jit.trace must see one operator, not what its kernel did for the traced values."""
    q, k = (torch.randn(1, 2, n, 4, dtype=torch.float64) for n in (3, 9))
    q.requires_grad_(grad)

    def call(q: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        return cross_attention(q, k, k, SpanMask(torch.zeros_like(end), end))

    ends = [torch.tensor([[n]], dtype=torch.int32) for n in (5, 8)]
    traced = torch.jit.trace(call, (q, ends[0]), check_trace=False)
    assert "mmkernels::cross_attention(" in str(traced.graph)
    for end in ends:
        torch.testing.assert_close(traced(q, end), call(q, end))
