"""The C++ kernels of `grouped_linear` beyond its spec: few and many rows, every cut, shares, non-finite rows."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from harness import SPECS, generator, peak_of, poison
from ops.cpu_tools import ISAS, each_isa, needs_kernels
from torch import Tensor

from mmkernels import grouped_linear
from mmkernels.runtime import cpu

pytestmark = needs_kernels

# Each instruction set; of the widest two also the formats that they multiply or convert in another way.
WAYS = [(isa, torch.float32) for isa in ISAS]
WAYS += [(isa, torch.bfloat16) for isa in ISAS[:2]] + [(isa, torch.float16) for isa in ISAS[:1]]
each_way = pytest.mark.parametrize(("isa", "dtype"), WAYS, ids=str)

Problem = tuple[tuple[int, ...], int, int]  # rows of each group, channels, outputs


def _tensors(problem: Problem, dtype: torch.dtype, behind: int = 0) -> dict[str, Tensor]:
    lengths, channels, outputs = problem
    g = generator(sum(lengths) * 7 + channels * 3 + outputs)
    normal = lambda *shape: torch.randn(shape, generator=g).to(dtype)
    rows = sum(lengths) + behind
    return {
        "x": normal(rows, channels),
        "weight": (normal(len(lengths), outputs, channels) * channels**-0.5).to(dtype),
        "bias": normal(len(lengths), outputs),
        "lengths": torch.tensor(lengths),
        "flow": normal(rows, outputs),
    }


def _ours(tensors: dict[str, Tensor], wanted: Sequence[str] = ("x", "weight", "bias")) -> dict[str, Tensor]:
    """The output and the wanted gradients."""
    leaves = {name: tensors[name].detach().requires_grad_(name in wanted) for name in ("x", "weight", "bias")}
    y = grouped_linear(leaves["x"], leaves["weight"], tensors["lengths"], bias=leaves["bias"], backend="cpu")
    grads = torch.autograd.grad(y, [leaves[name] for name in wanted], tensors["flow"]) if wanted else ()
    return {"y": y.detach(), **dict(zip(wanted, grads, strict=True))}


def _formula(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The same group by group, in another dtype."""
    x, weight, bias, flow = (tensors[name].to(dtype) for name in ("x", "weight", "bias", "flow"))
    found = {"y": flow * 0, "x": x * 0, "weight": weight * 0, "bias": bias * 0}
    first = 0
    for group, count in enumerate(tensors["lengths"].tolist()):
        rows = slice(first, first + count)
        first += count
        found["y"][rows] = x[rows] @ weight[group].T + bias[group]
        found["x"][rows] = flow[rows] @ weight[group]
        found["weight"][group] = flow[rows].T @ x[rows]
        found["bias"][group] = flow[rows].sum(0)
    return found


def _check(problem: Problem, dtype: torch.dtype, threads: int = 1) -> None:
    """Assert the error budget: twice what PyTorch's products have in the same dtype."""
    tensors = _tensors(problem, dtype)
    torch.set_num_threads(threads)
    poison()
    ours = _ours(tensors)
    torch.set_num_threads(1)
    naive, true = _formula(tensors, dtype), _formula(tensors, torch.float64)
    for name, x in ours.items():
        wrong = SPECS["grouped_linear"].over_budget(x, naive[name], true[name])
        assert wrong is None, f"{name} of {problem}: {wrong}"


# Around the places where another kernel is taken, and around whole vectors, panels, blocks and strips.
_ROWS = ((1, 0, 2), (7, 8), (15, 17, 16), (44, 45), (64, 65), (31, 96, 33), (256, 257), (600,), (1030,))
_OUTPUTS = (1, 3, 15, 17, 33, 63, 65, 97, 130, 515)
_CHANNELS = (1, 2, 3, 7, 17, 31, 33, 63, 65, 127, 129, 257, 515, 1030)
CUTS: list[Problem] = [
    *((lengths, 20 + n, 41 + n) for n, lengths in enumerate(_ROWS)),
    *(((3, 30, 66), 19, n) for n in _OUTPUTS),
    *(((2, 32, 70), n, 21) for n in _CHANNELS),
    ((5, 40, 0, 130), 200, 300),
]


@each_way
@pytest.mark.parametrize(
    "rest", [pytest.param(False, id="some"), pytest.param(True, id="rest", marks=pytest.mark.slow)]
)
def test_every_cut(isa: str, dtype: torch.dtype, rest: bool) -> None:
    with cpu.use_isa(isa):
        for at, problem in enumerate(CUTS):
            if (at % len(WAYS) == WAYS.index((isa, dtype))) != rest:
                _check(problem, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shares_change_no_bit(dtype: torch.dtype) -> None:
    """Also where one group has all rows: its columns are shared out."""
    for problem in (((0, 90, 0), 130, 2100), ((3, 1, 300, 2), 200, 1100), ((1,) * 6, 64, 640)):
        tensors = _tensors(problem, dtype, behind=3)
        want = _ours(tensors)
        for threads in (2, 5):
            torch.set_num_threads(threads)
            poison()
            found = _ours(tensors)
            torch.set_num_threads(1)
            for name, x in want.items():
                assert torch.equal(found[name], x), f"{name} of {problem} with {threads} threads"


@each_way
def test_only_the_groups_with_rows_are_read(isa: str, dtype: torch.dtype) -> None:
    """NaN in the weight of a group without rows, in a row or in a row's flow reaches nothing else."""
    for problem in (((4, 0, 3), 65, 35), ((70, 0, 40), 33, 67)):
        tensors = _tensors(problem, dtype, behind=2)
        with cpu.use_isa(isa):
            clean = _ours(tensors)
            tensors["weight"][1], tensors["bias"][1] = torch.nan, torch.nan
            tensors["x"][-2:], tensors["flow"][-2:] = torch.nan, torch.inf
            for name, x in _ours(tensors).items():
                assert torch.equal(x, clean[name]), name
            tensors["x"][1, 5], tensors["flow"][2, 7] = torch.nan, torch.nan
            found = _ours(tensors)
        others = torch.ones(len(tensors["x"]), dtype=torch.bool)
        others[1] = False
        assert bool(found["y"][1].isnan().all()) and torch.equal(found["y"][others], clean["y"][others])
        others[1], others[2] = True, False
        assert bool(found["x"][2].isnan().all()) and torch.equal(found["x"][others], clean["x"][others])
        assert torch.equal(found["weight"][1:], clean["weight"][1:]) and bool((found["weight"][1] == 0).all())
        channels = torch.arange(tensors["x"].shape[1]) != 5
        outputs = torch.arange(tensors["flow"].shape[1]) != 7
        assert torch.equal(found["weight"][0][outputs][:, channels], clean["weight"][0][outputs][:, channels])
        assert torch.equal(found["bias"][:, outputs], clean["bias"][:, outputs])


@each_isa
def test_few_and_many_rows_are_added_alike(isa: str) -> None:
    """The last rows of a long group within rounding of the same rows alone, of every length up to a panel."""
    tensors = _tensors(((80,), 70, 50), torch.float32)
    with cpu.use_isa(isa):
        want = _ours(tensors)
        for rows in (1, 2, 5, 12, 32, 44, 45, 65):
            some = tensors | {"x": tensors["x"][-rows:], "flow": tensors["flow"][-rows:]}
            found = _ours(some | {"lengths": torch.tensor([rows])}, ("x",))
            torch.testing.assert_close(found["y"], want["y"][-rows:], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(found["x"], want["x"][-rows:], rtol=1e-5, atol=1e-5)


def test_a_direct_call_reads_no_memory_past_an_end() -> None:
    tensors = _tensors(((3, 4), 8, 5), torch.float32)
    call = torch.ops.mmkernels.grouped_linear_cpu
    for lengths, message in (([-1, 4], "0 or more, got -1"), ([4, 4], "at most 7, the rows of x, got 8")):
        with pytest.raises(ValueError, match=message):
            call(tensors["x"], tensors["weight"], torch.tensor(lengths), None)
    with pytest.raises(ValueError, match="lengths must sum"):
        call(tensors["x"], tensors["weight"], torch.tensor([2**63 - 1, 2**63 - 1]), None)
    with pytest.raises(ValueError, match="weight must be"):
        call(tensors["x"], tensors["weight"][..., :-1], tensors["lengths"], None)


@pytest.mark.alone
def test_memory() -> None:
    """Scratch does not grow with the rows, nor with the weight."""
    tensors = _tensors(((2000, 0, 1000), 256, 512), torch.bfloat16)
    few = tensors | {name: tensors[name][:8] for name in ("x", "flow")} | {"lengths": torch.tensor([4, 0, 4])}
    results = sum(tensors[name].numel() * 2 for name in ("x", "flow", "weight", "bias"))
    assert peak_of(lambda: _ours(tensors), lambda: _ours(few)) < results + 4e6


@each_isa
def test_a_bias_of_many_rows_keeps_its_digits(isa: str) -> None:
    """Rows of one sign, of which one chain of float32 sums would lose three digits."""
    rows = 65_536
    x, bias, flow = torch.zeros(rows, 1), torch.zeros(1, 8, requires_grad=True), torch.rand(rows, 8)
    with cpu.use_isa(isa):
        grouped_linear(x, torch.zeros(1, 8, 1), torch.tensor([rows]), bias=bias, backend="cpu").backward(flow)
    assert bias.grad is not None
    torch.testing.assert_close(bias.grad[0].double(), flow.double().sum(0), rtol=2e-7, atol=0.0)
