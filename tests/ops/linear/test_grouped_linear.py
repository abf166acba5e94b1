"""`grouped_linear` beyond its spec's cases: bad input, NaN, any division into groups, lengths that nothing looks at."""

from __future__ import annotations

from typing import Any

import grouped_peers
import pytest
import torch
from harness import SPECS, each_backend, examples, generator
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mmkernels import grouped_linear
from mmkernels.bench.gate import Gate, draw_cotangents, flat, with_gradients
from mmkernels.ops.linear.grouped_linear.groups import groups_of_rows
from mmkernels.ops.linear.grouped_linear.spec import Arguments, reference, reference_backward
from mmkernels.runtime import triton as gpu
from mmkernels.spec import Inputs

SPEC = SPECS["grouped_linear"]
NAN = float("nan")
GOOD: dict[str, Any] = {
    "x": torch.zeros(6, 8),
    "weight": torch.zeros(3, 4, 8),
    "lengths": torch.tensor([2, 0, 3]),
    "bias": torch.zeros(3, 4),
}
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    ({"x": torch.zeros(6, 8, dtype=torch.int32)}, TypeError, "x must be float16, bfloat16, float32 or float64"),
    ({"x": torch.zeros(2, 3, 8)}, ValueError, r"x must be \[R, C\] with at least one channel, got shape \(2, 3, 8\)"),
    ({"x": torch.zeros(6, 0)}, ValueError, r"x must be \[R, C\] with at least one channel, got shape \(6, 0\)"),
    ({"weight": torch.zeros(3, 8, 4)}, ValueError, r"weight must be \[G, O, 8\].*got shape \(3, 8, 4\)"),
    ({"weight": torch.zeros(4, 8)}, ValueError, r"weight must be \[G, O, 8\].*got shape \(4, 8\)"),
    ({"weight": torch.zeros(0, 4, 8)}, ValueError, r"weight must be .*one group and output, got shape \(0, 4, 8\)"),
    ({"weight": torch.zeros(3, 0, 8)}, ValueError, r"weight must be .*one group and output, got shape \(3, 0, 8\)"),
    ({"weight": torch.zeros(3, 4, 8).half()}, TypeError, "weight must have x's dtype torch.float32, got torch.float16"),
    ({"weight": torch.zeros(3, 4, 8, device="meta")}, ValueError, "weight must be on x's device cpu, got meta"),
    ({"lengths": [2, 0, 3]}, TypeError, "lengths must be a tensor, got list"),
    ({"lengths": torch.tensor([2.0, 0, 3])}, TypeError, "lengths must be int32 or int64, got torch.float32"),
    ({"lengths": torch.tensor([2, 3])}, ValueError, r"lengths must be \[G\] = \[3\], one for each .*shape \(2,\)"),
    ({"lengths": torch.tensor([[2, 0, 3]])}, ValueError, r"lengths must be \[G\] = \[3\].*got shape \(1, 3\)"),
    ({"lengths": torch.zeros(3, device="meta").long()}, ValueError, "lengths must be on x's device cpu, got meta"),
    ({"bias": torch.zeros(4)}, ValueError, r"bias must be \[3, 4\] as weight is, got shape \(4,\)"),
    ({"bias": torch.zeros(3, 4).double()}, TypeError, "bias must have x's dtype torch.float32, got torch.float64"),
    ({"backend": "fast"}, ValueError, "backend must be one of"),
]
BAD_VALUES: list[tuple[list[int], str]] = [
    ([2, -1, 3], "lengths must be 0 or more, got -1"),
    ([2, 0, 5], "lengths must sum to at most 6, the rows of x, got 7"),
    ([2**62, 2**62, 2**62], "lengths must sum to at most 6, the rows of x, got"),
]


@pytest.mark.parametrize(("bad", "error", "match"), BAD)
def test_bad_input_is_refused_by_name(bad: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=f"^{match}"):
        grouped_linear(**GOOD | bad)


@each_backend("grouped_linear", interpreted=False)
@pytest.mark.parametrize(("lengths", "match"), BAD_VALUES)
def test_wrong_lengths_are_refused_on_a_cpu(lengths: list[int], match: str, backend: str) -> None:
    with pytest.raises(ValueError, match=f"^{match}"):
        grouped_linear(**GOOD | {"lengths": torch.tensor(lengths)}, backend=backend)


def _inputs(lengths: list[int], behind: int = 0, channels: int = 20, outputs: int = 36) -> Inputs:
    g = generator(sum(lengths) + len(lengths))
    return {
        "x": torch.randn(sum(lengths) + behind, channels, generator=g),
        "weight": torch.randn(len(lengths), outputs, channels, generator=g),
        "lengths": torch.tensor(lengths),
        "bias": torch.randn(len(lengths), outputs, generator=g),
    }


def _results(inputs: Inputs, backend: str) -> list[Tensor]:
    """Returns the output, and the gradients of x, weight and bias."""
    leaves = {name: x.detach().requires_grad_(name != "lengths") for name, x in inputs.items()}
    y = grouped_linear(**leaves, backend=backend)
    flow = torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape)
    return [y.detach(), *torch.autograd.grad(y, [leaves[name] for name in ("x", "weight", "bias")], flow)]


@each_backend("grouped_linear")
@given(st.lists(st.one_of(st.just(0), st.integers(1, 40)), min_size=1, max_size=9), st.integers(0, 5))
@examples(12, interpreted=4)
def test_any_division_into_groups(backend: str, lengths: list[int], behind: int) -> None:
    inputs = _inputs(lengths, behind, channels=9, outputs=11)
    wide = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    want = _results(wide, "reference")
    for found, true in zip(_results(inputs, backend), want, strict=True):
        torch.testing.assert_close(found.double(), true, rtol=1e-5, atol=1e-4)


@each_backend("grouped_linear")
def test_nan_stays_in_its_row_and_its_group(backend: str) -> None:
    """Rows 2 and 5 are of one tile; the weight with NaN is read by a group that has rows, and by one that has none."""
    inputs = _inputs([3, 0, 4, 2], behind=2)
    want = _results(inputs, backend)
    bad = {name: x.clone() for name, x in inputs.items()}
    bad["x"][5], bad["x"][-1] = NAN, NAN  # a row of group 2, and one that belongs to no group
    bad["weight"][1], bad["weight"][3] = NAN, torch.inf
    bad["bias"][1] = NAN
    y, of_x, of_weight, of_bias = _results(bad, backend)
    assert bool(y[5].isnan().all()) and bool(of_weight[2].isnan().all())
    assert not bool(y[7:9].isfinite().any()) and not bool(of_x[7:9].isfinite().any())
    rows, groups = [0, 1, 2, 3, 4, 6, 9, 10], [0, 1, 3]
    found, whole = (y[rows], of_x[[*rows, 5]], of_weight[groups], of_bias), (want[0][rows], want[1][[*rows, 5]])
    for x, right in zip(found, (*whole, want[2][groups], want[3]), strict=True):
        torch.testing.assert_close(x, right, rtol=0, atol=0)
    assert not bool(y[9:].any()) and not bool(of_x[9:].any()) and not bool(of_weight[1].any())


@each_backend("grouped_linear")
def test_nan_that_flows_back_stays_in_its_row_and_its_group(backend: str) -> None:
    inputs = _inputs([3, 0, 4, 2], behind=2)
    leaves = {name: x.requires_grad_(name != "lengths") for name, x in inputs.items()}
    names = ("x", "weight", "bias")
    flow = torch.cos(torch.arange(11.0 * 36)).view(11, 36)
    grads = lambda flow: torch.autograd.grad(
        grouped_linear(**leaves, backend=backend), [leaves[n] for n in names], flow
    )
    want = grads(flow)
    flow[5], flow[9] = NAN, NAN  # row 5 is of group 2, row 9 of none
    of_x, of_weight, of_bias = grads(flow)
    assert all(bool(x.isnan().all()) for x in (of_x[5], of_weight[2], of_bias[2]))
    rows, groups = [n for n in range(11) if n != 5], [0, 1, 3]
    right = (want[0][rows], want[1][groups], want[2][groups])
    torch.testing.assert_close((of_x[rows], of_weight[groups], of_bias[groups]), right, rtol=0, atol=0)


@each_backend("grouped_linear")
def test_a_group_does_not_depend_on_the_others(backend: str) -> None:
    """To the last bit: its rows may lie in the memory of a longer x, and other groups may have rows or none."""
    inputs = _inputs([5, 7, 30])
    y = grouped_linear(**inputs, backend=backend)
    alone = inputs | {"lengths": torch.tensor([0, 7, 0]), "x": inputs["x"][5:12]}
    torch.testing.assert_close(grouped_linear(**alone, backend=backend), y[5:12], rtol=1e-6, atol=1e-6)


# Where nothing may look at the lengths: in compiled code, and on a device.


def _unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmkernels.ops.linear.grouped_linear.groups.can_look", lambda x: False)


@pytest.mark.parametrize("case", SPEC.cases, ids=lambda case: case.id.replace(" ", "_"))
def test_the_formula_without_a_look_at_the_lengths(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = {"bias": None} | case.make(generator())
    args = Arguments(**inputs)
    want = _of_formula(args)
    _unseen(monkeypatch)
    for found, true in zip(_of_formula(args), want, strict=True):
        torch.testing.assert_close(found, true)


def _of_formula(args: Arguments) -> list[Tensor]:
    """Returns the output and the gradients, by autograd and by the formula for them."""
    names = ["x", "weight"] + (["bias"] if args.bias is not None else [])
    args = args._replace(**{name: getattr(args, name).detach().requires_grad_() for name in names})
    y = reference(args)
    flow = torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape)
    grads = torch.autograd.grad(y, [getattr(args, name) for name in names], flow)
    needs = {f"need_{name}": name in names for name in ("x", "weight", "bias")}
    record: Any = _Record(**args._asdict(), grad_y=flow, **needs)
    with torch.no_grad():
        given = reference_backward(record)
    for grad, same in zip(grads, given, strict=False):
        torch.testing.assert_close(grad, same, equal_nan=True)
    return [y.detach(), *grads]


class _Record:
    """The record of the backward pass."""

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)

    def _replace(self, **fields: Any) -> _Record:
        return _Record(**self.__dict__ | fields)


def test_nan_without_a_look_at_the_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    _unseen(monkeypatch)
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in _inputs([3, 0, 4], behind=1).items()}
    want = _of_formula(Arguments(**inputs))
    inputs["x"][4], inputs["weight"][1] = NAN, NAN
    y, of_x, of_weight, of_bias = _of_formula(Arguments(**inputs))
    rows = [0, 1, 2, 3, 5, 6, 7]
    assert bool(y[4].isnan().all())
    torch.testing.assert_close((y[rows], of_x, of_weight[:2], of_bias), (want[0][rows], want[1], want[2][:2], want[3]))


@pytest.mark.interpreted
def test_what_is_wrong_in_lengths_is_cut_where_nothing_looks() -> None:
    """By the kernels of a GPU, and by the formula."""
    lengths = torch.tensor([4, -3, 2**62, 2**62, 5])
    if not gpu.INTERPRETED:
        assert groups_of_rows(lengths, 9).tolist() == [0] * 4 + [2] * 5
        return
    right = _inputs([4, 0, 5, 0, 0])
    want, found = _results(right, "triton"), _results(right | {"lengths": lengths}, "triton")
    torch.testing.assert_close(found, want, rtol=0, atol=0)


# Benchmarks.


def _large() -> tuple[Inputs, list[str]]:
    """As a benchmark's, with groups that have no rows."""
    inputs, names = _inputs([3, 0, 1, 5, 4, 0, 2, 2, 0, 3], channels=32, outputs=24), ["x", "weight"]
    del inputs["bias"]
    return inputs | {name: inputs[name].requires_grad_() for name in names}, names


@pytest.mark.parametrize("peer", grouped_peers.PEERS, ids=lambda peer: peer.name.replace(" ", "_"))
def test_peers_compute_the_same(peer: Any) -> None:
    inputs, names = _large()
    leaves = [inputs[name] for name in names]
    flows = draw_cotangents([grouped_linear(**inputs)])
    found = with_gradients(peer.prepare(inputs), leaves, flows)()
    want = with_gradients(lambda: grouped_linear(**inputs, backend="reference"), leaves, flows)()
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


def test_the_check_of_parts_finds_what_is_wrong() -> None:
    inputs, names = _large()
    flows = draw_cotangents(flat(grouped_linear(**inputs)))
    judge = Gate(SPEC, inputs, names, flows, parts_only=True)
    right = with_gradients(lambda: grouped_linear(**inputs), [inputs[name] for name in names], flows)()
    assert judge.partial and judge.problem(flat(right)) is None
    for index, place in ((0, 4), (1, -1), (2, 3)):
        wrong = [x.clone() for x in flat(right)]
        wrong[index][place] += 1.0
        assert judge.problem(wrong) is not None
