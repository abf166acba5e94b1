"""The C++ kernels of the linear ops beyond the specs' cases: shares of the work, threads, layouts, corners, memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import SPECS, generator, peak_of, poison
from ops.cpu_tools import ISAS, each_isa, needs_kernels
from torch import Tensor

from mmkernels import linear_cross_entropy, linear_logprobs
from mmkernels.ops.linear.linear_cross_entropy import OP
from mmkernels.ops.linear.linear_cross_entropy.spec import Arguments
from mmkernels.ops.linear.rows import GRADIENTS, STATES, GradientArguments, StateArguments
from mmkernels.runtime import cpu

pytestmark = needs_kernels

# Each instruction set; of the widest also the formats that it multiplies in another way.
WAYS = [(isa, torch.float32) for isa in ISAS]
WAYS += [(isa, torch.bfloat16) for isa in ISAS[:2]] + [(isa, torch.float16) for isa in ISAS[:1]]
each_way = pytest.mark.parametrize(("isa", "dtype"), WAYS, ids=str)


# The formula, written anew in float64.


def _problem(rows: int, words: int, dim: int, **options: Any) -> dict[str, Any]:
    """The fields of a record, float64; `options`: some of them."""
    g = generator(rows * 7 + words * 3 + dim)
    normal = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)
    target = torch.randint(words + 1, (rows,), generator=g)  # some are elsewhere
    target[torch.rand(rows, generator=g) < options.pop("ignored", 0.2)] = -1
    args = {
        "hidden": normal(rows, dim),
        "weight": normal(words, dim) * (options.pop("scale", 3.0) * dim**-0.5),
        "bias": normal(words) if options.pop("bias", False) else None,
        "target": target,
        "token_weight": torch.rand(words, generator=g, dtype=torch.float64) if options.pop("weighted", False) else None,
        "softcap": 0.0,
        "temperature": 1.0,
        "entropy": False,
        "rows": normal(4, rows),
    }
    return args | options


def _in(args: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    narrow = ("hidden", "weight", "bias")
    move = lambda name, x: x.to(dtype if name in narrow else wide)
    return {n: move(n, x) if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in args.items()}


def _truth(args: dict[str, Any]) -> dict[str, Tensor]:
    """States that do not depend on the reference, and gradients; in the arguments' dtype what a product gives."""
    hidden, weight, live = args["hidden"], args["weight"], args["target"] >= 0
    rows, words = len(hidden), len(weight)
    z = (hidden @ weight.mT + (0.0 if args["bias"] is None else args["bias"])).to(args["rows"].dtype)
    slope = torch.ones_like(z)
    if args["softcap"]:
        z = (z / args["softcap"]).tanh()
        z, slope = z * args["softcap"], 1 - z * z
    y = z / args["temperature"]
    logp = y.log_softmax(1)
    p = logp.exp()
    of_p, of_entropy, of_target, of_words = args["rows"][:, :, None]
    flow = p * (of_p + of_entropy * logp if args["entropy"] else of_p)
    here = torch.zeros(rows, words + 1, dtype=torch.bool).scatter_(1, args["target"].clamp(0)[:, None], True)
    here = here[:, :words] & live[:, None]
    flow = flow + torch.where(here, of_target, 0.0)
    total = torch.zeros_like(y[:, 0])
    if args["token_weight"] is not None:
        flow = flow + of_words * args["token_weight"]
        total = y @ args["token_weight"]
    flow = (flow * slope / args["temperature"]).masked_fill(~live[:, None], 0.0)
    narrow = flow.to(hidden.dtype)
    found = {
        "lse": y.logsumexp(1),
        "picked": torch.where(here, y, 0.0).sum(1),
        "total": total,
        "best": y.amax(1),
        "mean": (p * y).sum(1) if args["entropy"] else torch.zeros_like(total),
    }
    found = {name: x.masked_fill(~live, 0.0) for name, x in found.items()}
    found |= {"of_hidden": narrow @ weight, "of_weight": narrow.mT @ hidden}
    return found if args["bias"] is None else found | {"of_bias": flow.sum(0).to(hidden.dtype)}


def _states(args: dict[str, Any]) -> tuple[Tensor, Tensor]:
    fields = [*StateArguments._fields[:-1]]
    return STATES(StateArguments(*(args[name] for name in fields), best=True), "cpu")


def _gradients(args: dict[str, Any], softmax: Tensor, needs: tuple[bool, bool, bool] = (True,) * 3) -> Any:
    given = args | {"softmax": softmax, "wide": False}
    given |= dict(zip(("need_hidden", "need_weight", "need_bias"), needs, strict=True))
    return GRADIENTS(GradientArguments(*(given[name] for name in GradientArguments._fields)), "cpu")


def _ours(args: dict[str, Any]) -> dict[str, Tensor]:
    states, best_index = _states(args)
    reference, total, picked, moment, weighted, best = states
    live = args["target"] >= 0
    assert bool((best_index[~live] == -1).all()) and bool((states[:, ~live] == torch.eye(6)[1][:, None]).all())
    elsewhere = args["target"] == len(args["weight"])
    assert bool((picked[elsewhere] == -torch.inf).all())
    found = {
        "lse": reference + total.log(),
        "picked": picked.masked_fill(elsewhere, 0.0),
        "total": weighted,
        "best": best,
        "mean": (reference + moment / total).masked_fill(~live, 0.0) if args["entropy"] else torch.zeros_like(best),
    }
    gradients = _gradients(args, torch.stack([reference, total.log()]))
    found |= dict(zip(("of_hidden", "of_weight"), gradients[:2], strict=True))
    return found if args["bias"] is None else found | {"of_bias": gradients[2]}


def _check(args: dict[str, Any], dtype: torch.dtype, threads: int = 1) -> None:
    """Assert the error budget: twice what the formula has in the same dtype."""
    mine = _in(args, dtype)
    torch.set_num_threads(threads)
    poison()
    ours = _ours(mine)
    torch.set_num_threads(1)
    naive, true = _truth(mine), _truth(_in(mine, torch.float64))
    for name, x in ours.items():
        problem = SPECS["linear_logprobs"].over_budget(x, naive[name], true[name])
        assert problem is None, f"{name} of {tuple(args['weight'].shape)}, {len(args['hidden'])} rows: {problem}"


# Every cut: vectors and panels of tokens, blocks of words, groups of columns, chains.

_ROWS = (1, 2, 7, 15, 16, 17, 33, 63, 64, 65, 127, 129, 200)
_WORDS = (1, 2, 3, 5, 8, 47, 48, 49, 95, 96, 97, 191, 193, 385)
_CHANNELS = (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 257, 513, 1030)
CUTS = [
    *(_problem(n, 50, 9, bias=n % 2 == 1) for n in _ROWS),
    *(_problem(20, n, 10, bias=n % 2 == 0, weighted=n % 3 == 0, softcap=5.0 * (n % 5 == 0)) for n in _WORDS),
    *(_problem(70, 40, n, entropy=n % 3 == 1, temperature=1.0 + n % 2) for n in _CHANNELS),
    _problem(150, 300, 70, bias=True, weighted=True, entropy=True, softcap=4.0, temperature=0.7),
    _problem(90, 260, 31, ignored=0.9, weighted=True, entropy=True, bias=True),
    _problem(9, 100, 2500, entropy=True),
]


@each_way
@pytest.mark.parametrize(
    "rest", [pytest.param(False, id="some"), pytest.param(True, id="rest", marks=pytest.mark.slow)]
)
def test_every_cut(isa: str, dtype: torch.dtype, rest: bool) -> None:
    with cpu.use_isa(isa):
        for at, args in enumerate(CUTS):
            if (at % len(WAYS) == WAYS.index((isa, dtype))) != rest:
                _check(args, dtype)


@pytest.mark.parametrize("threads", [2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shares(threads: int, dtype: torch.dtype) -> None:
    """Words shared out to the threads; of long rows columns, as sums for each thread would take much memory."""
    _check(_problem(100, 2000, 40, bias=True, entropy=True), dtype, threads)
    _check(_problem(130, 210, 16_500, bias=True), dtype, threads)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strips(dtype: torch.dtype) -> None:
    """Where columns are shared out, the logits' gradient of some words at a time."""
    _check(_problem(3000, 6000, 1500, bias=True), dtype, 2)


# The loss with its gradients.


@cache
def _losses() -> list[tuple[dict[str, Tensor], dict[str, Any]]]:
    """Tensors in float64, and options: several chunks, one, columns shared out; logits in the gradient's memory."""
    g = generator(5)
    found = []
    for rows, words, dim, options in (
        (300, 120, 33, {}),
        (300, 210, 20, {"label_smoothing": 0.1, "z_loss": 1e-2}),
        (150, 97, 66, {"softcap": 3.0, "label_smoothing": 0.2}),
        (60, 100, 64, {"softcap": 3.0}),
        (140, 100, 17_000, {}),
        (400, 61, 161, {}),
        (400, 61, 161, {"softcap": 3.0, "z_loss": 1e-2}),
        (150, 61, 161, {"label_smoothing": 0.1}),
    ):
        normal = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)
        target = torch.randint(words, (rows,), generator=g).masked_fill(torch.rand(rows, generator=g) < 0.1, -100)
        weight = normal(words, dim) * 4 * dim**-0.5
        tensors = {"input": normal(rows, dim), "linear_weight": weight, "linear_bias": normal(words)}
        found.append((tensors | {"target": target}, options))
    return found


def _loss_and_gradients(tensors: dict[str, Tensor], options: dict[str, Any], dtype: torch.dtype, backend: str) -> Any:
    leaves = [tensors[name].to(dtype).requires_grad_() for name in ("input", "linear_weight", "linear_bias")]
    loss = linear_cross_entropy(
        leaves[0], leaves[1], tensors["target"], linear_bias=leaves[2], backend=backend, **options
    )
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@each_way
def test_loss_in_chunks(isa: str, dtype: torch.dtype) -> None:
    for at, (tensors, options) in enumerate(_losses()):
        if isa != ISAS[0] and at % 2 and at < 5:
            continue
        rounded = {name: x if name == "target" else x.to(dtype).double() for name, x in tensors.items()}
        naive, true = (_loss_and_gradients(rounded, options, kind, "reference") for kind in (dtype, torch.float64))
        torch.set_num_threads(1 + at % 5)
        with cpu.use_isa(isa):
            ours = _loss_and_gradients(rounded, options, dtype, "cpu")
        torch.set_num_threads(1)
        for one, triple in enumerate(zip(ours, naive, true, strict=True)):
            problem = SPECS["linear_cross_entropy"].over_budget(*triple)
            assert problem is None, f"{options}, result {one}: {problem}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_again_the_same_bits_and_only_what_is_wanted(dtype: torch.dtype) -> None:
    torch.set_num_threads(3)
    args = _in(_problem(150, 900, 70, bias=True, weighted=True, entropy=True), dtype)
    states, index = _states(args)
    softmax = torch.stack([states[0], states[1].log()])
    every = _gradients(args, softmax)
    rows = torch.rand(3, 150)
    some = (args["hidden"], args["weight"], args["bias"], args["target"], args["token_weight"], None, rows, 0.0, True)
    whole = OP(Arguments(*some, True, True, True), "cpu")
    for needs in itertools.product((True, False), repeat=3):
        poison()
        again = _states(args)
        assert torch.equal(again[0], states) and torch.equal(again[1], index)
        for wanted, found, true in zip(needs, _gradients(args, softmax, needs), every, strict=True):
            assert torch.equal(found, true if wanted else true.new_empty(0))
        results = OP(Arguments(*some, *needs), "cpu")
        for wanted, found, true in zip((True, *needs, True, True, True), results, whole, strict=True):
            torch.testing.assert_close(found, true if wanted else true.new_empty(0), rtol=0, atol=0, equal_nan=True)


# Layouts.

_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "every second": lambda x: x.repeat_interleave(2, 1)[:, 1::2],
    "within wider rows": lambda x: F.pad(x, (3, 5))[:, 3:-5],
    "every third row": lambda x: x.repeat_interleave(3, 0)[::3],
}


@each_way
@pytest.mark.parametrize("layout", _LAYOUTS)
def test_layouts(layout: str, isa: str, dtype: torch.dtype) -> None:
    """The same bits as of what is contiguous."""
    args = _in(_problem(70, 130, 67, bias=True), dtype)
    views = {name: _LAYOUTS[layout](args[name]) for name in ("hidden", "weight")}
    assert not views["weight"].is_contiguous()
    with cpu.use_isa(isa):
        for name, want in _ours(args).items():
            assert torch.equal(_ours(args | views)[name], want), name


def test_expanded() -> None:
    args = _in(_problem(20, 50, 8), torch.float32)
    args |= {"hidden": args["hidden"][:1].expand(20, 8), "weight": args["weight"][:, :1].expand(50, 8)}
    dense = args | {name: args[name].contiguous() for name in ("hidden", "weight")}
    for name, want in _ours(dense).items():
        assert torch.equal(_ours(args)[name], want), name


# Corners.


@each_way
def test_rows_that_are_not_finite_keep_to_themselves(isa: str, dtype: torch.dtype) -> None:
    args = _in(_problem(40, 120, 33, ignored=0.0, entropy=True), dtype)
    args["target"][5] = -1
    clean = args | {"hidden": args["hidden"].clone(), "target": args["target"].clone()}
    args["hidden"][5] = torch.nan  # ignored
    with cpu.use_isa(isa):
        for name, want in _ours(clean).items():
            assert torch.equal(_ours(args)[name], want), name
        args["hidden"][7, 2], args["hidden"][20, 3] = torch.nan, torch.inf
        found, want = _ours(args), _ours(clean)
    bad = torch.zeros(40, dtype=torch.bool).index_fill(0, torch.tensor([7, 20]), True)
    for name in ("lse", "of_hidden"):
        assert bool(found[name][bad].isnan().any(-1).all()), name
        assert torch.equal(found[name][~bad], want[name][~bad]), name


@each_isa
def test_hidden_words(isa: str) -> None:
    """-inf in the bias: no probability, and no NaN; of all words: NaN, as the formula has it."""
    args = _in(_problem(20, 150, 12, bias=True, entropy=True), torch.float32)
    args["bias"][::2] = -torch.inf
    args["bias"][0:96] = -torch.inf  # a whole block
    args["target"][:] = 149
    seen = args["bias"] > -torch.inf
    few = args | {"weight": args["weight"][seen], "bias": args["bias"][seen]}
    few["target"] = torch.full_like(args["target"], int(seen.sum()) - 1)
    with cpu.use_isa(isa):
        found, want = _ours(args), _ours(few)
        for name in ("lse", "mean", "picked", "best", "of_hidden"):
            torch.testing.assert_close(found[name], want[name], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found["of_weight"][seen], want["of_weight"], rtol=1e-5, atol=1e-5)
        assert bool((found["of_weight"][~seen] == 0).all()) and bool((found["of_bias"][~seen] == 0).all())
        states, _ = _states(args | {"bias": torch.full_like(args["bias"], -torch.inf)})
    assert (
        bool((states[0] == -torch.inf).all()) and bool((states[1] == 0).all()) and bool((states[2] == -torch.inf).all())
    )


@each_way
def test_large_logits_and_caps(isa: str, dtype: torch.dtype) -> None:
    with cpu.use_isa(isa):
        _check(_problem(30, 120, 20, scale=3000.0, entropy=True, ignored=0.0), dtype)
        _check(_problem(30, 120, 20, scale=100.0, softcap=30.0, entropy=True, ignored=0.0), dtype)
        _check(_problem(30, 120, 20, scale=0.01, softcap=0.5, ignored=0.0), dtype)


def test_the_first_of_equal_words_is_the_best() -> None:
    args = _in(_problem(20, 700, 4), torch.float32)
    args["weight"][:] = args["weight"][300]
    torch.set_num_threads(3)
    live = args["target"] >= 0
    assert bool((_states(args)[1][live] == 0).all())


# How much is multiplied, and what it takes of memory.


def _multiplied(run: Callable[[], Any]) -> int:
    before = cpu.multiplied()
    run()
    return cpu.multiplied() - before


def test_ignored_rows_are_not_multiplied() -> None:
    hidden, weight, target = torch.randn(640, 64), torch.randn(500, 64), torch.randint(500, (640,))
    target[torch.randperm(640)[:576]] = -100
    live, bias = 64, torch.randn(500)
    product = 2 * live * 500 * 64
    for wanted, count in (((), 1), ((hidden,), 2), ((weight,), 2), ((hidden, weight), 3), ((bias,), 1)):
        leaves = [x.detach().requires_grad_(any(x is y for y in wanted)) for x in (hidden, weight, bias)]

        def step(function: Any, bias: str, leaves: list[Tensor] = leaves) -> None:
            loss = function(leaves[0], leaves[1], target, backend="cpu", **{bias: leaves[2]}).sum()
            if loss.requires_grad:
                loss.backward()

        assert _multiplied(lambda: step(linear_cross_entropy, "linear_bias")) == product * count
        again = 1 if wanted else 0  # the logits are computed again
        assert _multiplied(lambda: step(linear_logprobs, "bias")) == product * (count + again)


def test_memory() -> None:
    """Beside the gradients a chunk's logits, and no matrix of the weight's size in float32."""
    hidden, weight, target = torch.randn(1024, 32), torch.randn(16_000, 32), torch.randint(16_000, (1024,))
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    loss = lambda n: torch.autograd.grad(linear_cross_entropy(hidden[:n], weight, target[:n], backend="cpu"), leaves)
    logits = 1024 * 16_000 * 4
    kept = (hidden.numel() + weight.numel()) * 4
    assert peak_of(lambda: loss(1024), lambda: loss(64)) < 2 * kept + logits / 8 + 3e6
    wide = torch.randn(16_000, 256, requires_grad=True)  # as many rows as channels: logits in the gradient's memory
    rows = torch.randn(256, 256)
    few = lambda n: torch.autograd.grad(linear_cross_entropy(rows[:n], wide, target[:n], backend="cpu"), wide)
    assert peak_of(lambda: few(256), lambda: few(16)) < wide.numel() * 4 + 3e6
    logp = lambda n: linear_logprobs(hidden[:n], weight, target[:n], backend="cpu", return_entropy=True)[0].sum()
    assert peak_of(lambda: logp(1024), lambda: logp(64)) < logits / 50 + 2e6
    step = lambda n: torch.autograd.grad(logp(n), leaves)
    assert peak_of(lambda: step(1024), lambda: step(64)) < kept + 6e6
