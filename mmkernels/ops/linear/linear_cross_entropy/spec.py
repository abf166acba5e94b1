"""The definition of the cross-entropy of a linear head: the naive formula, its cases, its benchmark configurations."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from mmkernels.ops.common.dtypes import wide_dtype
from mmkernels.ops.common.kept import fake_kept
from mmkernels.ops.common.kept import kept as kept_gradients
from mmkernels.ops.linear.cases import inputs_of, large, linear_cost
from mmkernels.ops.linear.formula import (
    IGNORED,
    best_index,
    capped_logits_of,
    formula_of_logits,
    head_gradients,
    logits_of,
)
from mmkernels.ops.linear.parts import CROSS_ENTROPY
from mmkernels.runtime.arguments import Differentiable
from mmkernels.spec import Benchmark, Case, Inputs, OpSpec
from mmkernels.targets import MemoryRatio, Milliseconds, PeakOrPeerShare, PeakShare, Speedup, Target

PICK, SPREAD, SQUARE = range(3)
"""The rows of `Arguments.rows`, by which the loss is

sum_i -PICK_i logp_i[target_i] - SPREAD_i sum_c token_weight_c logp_ic + SQUARE_i lse_i^2

with ``sum_c probabilities_ic token_weight_c logp_ic`` in place of ``logp_i[target_i]`` where there are probabilities.
All are 0 in ignored rows."""


class Arguments(NamedTuple):
    """The record of `linear_cross_entropy`, whose forward pass also computes the gradients that will be wanted."""

    input: Differentiable  # [T, d]
    linear_weight: Differentiable  # [V, d]
    linear_bias: Differentiable | None  # [V]
    target: Tensor  # int64 [T], `formula.IGNORED` in ignored rows; V or more: no token
    token_weight: Tensor | None  # wide [V]
    probabilities: Tensor | None  # [T, V]
    rows: Tensor  # wide [3, T], see `PICK`
    softcap: float  # 0: none
    best: bool
    keep_input: bool  # whether to compute and keep input's gradient
    keep_linear_weight: bool
    keep_linear_bias: bool

    # The names that the family's functions know.

    @property
    def hidden(self) -> Tensor:
        return self.input

    @property
    def weight(self) -> Tensor:
        return self.linear_weight

    @property
    def bias(self) -> Tensor | None:
        return self.linear_bias

    @property
    def temperature(self) -> float:
        return 1.0

    @property
    def entropy(self) -> bool:
        return False

    @property
    def average(self) -> bool:
        return self.token_weight is not None

    @property
    def keep(self) -> tuple[bool, bool, bool]:
        """Whether to compute and keep each gradient."""
        return self.keep_input, self.keep_linear_weight, self.keep_linear_bias

    def without_gradients(self) -> Arguments:
        """Returns the record of a call that keeps none."""
        return self._replace(keep_input=False, keep_linear_weight=False, keep_linear_bias=False)


class Results(NamedTuple):
    """What a backend returns: the loss, its gradients in `kept_dtype`, empty where none is kept, and rows, [T] each."""

    loss: Differentiable
    of_input: Tensor
    of_linear_weight: Tensor
    of_linear_bias: Tensor
    logprobs: Tensor  # wide, of the target; 0 where ignored, NaN where it is no token; of no use with probabilities
    lse: Tensor  # wide, 0 where ignored
    best_index: Tensor  # int64, the token with the largest logit, -1 where ignored; [0] unless `best`


KEPT = ("of_input", "of_linear_weight", "of_linear_bias")
KEEP = ("keep_input", "keep_linear_weight", "keep_linear_bias")
"""The fields of `Results` and of `Arguments` that belong to the differentiable inputs, in their order."""


def row_losses(args: Any, y: Tensor) -> tuple[Tensor, Tensor]:
    """Returns each row's part of the loss, and its log-sum-exp, [T] each, which PyTorch can differentiate.

    Args:
        y: logits, wide [T, V].
    """
    found = formula_of_logits(args, y)
    picked, spread = found.logprobs, found.average * y.shape[1]
    if args.probabilities is not None:
        weighted = y.log_softmax(1) if args.token_weight is None else y.log_softmax(1) * args.token_weight.to(y.dtype)
        picked = (args.probabilities.to(y.dtype) * weighted).sum(1)
    loss = args.rows[SQUARE] * found.lse**2 - args.rows[PICK] * picked
    return (loss if args.token_weight is None else loss - args.rows[SPREAD] * spread), found.lse


def formula(args: Any) -> Tensor:
    """Returns the loss by the naive formula, which PyTorch can differentiate; see `linear_cross_entropy`."""
    return row_losses(args, logits_of(args))[0].sum()


def reference(args: Arguments) -> tuple[Tensor, ...]:
    """Returns the op's results, the gradients written out."""
    y, tanh = capped_logits_of(args)
    of_rows, lse = row_losses(args, y)
    logprobs = formula_of_logits(args, y).logprobs
    index = args.target.new_empty(0)
    if args.best:
        index = best_index(y).masked_fill(args.target == IGNORED, IGNORED)
    grads: tuple[Tensor | None, ...] = (None, None, None)
    if any(args.keep):
        reference = y.amax(1)
        log_sum = (y - reference[:, None]).exp().sum(1).log()
        grads = head_gradients(args, y_gradient(args, y, reference, log_sum), tanh)
    return (of_rows.sum(), *kept(grads, args), logprobs, lse, index)


def y_gradient(args: Any, y: Tensor, reference: Tensor, log_sum: Tensor) -> Tensor:
    """Returns the gradient of logits y, wide [T, V]; the same of some rows, if the record has those.

    Args:
        reference, log_sum: [T], see `formula.LOG_SUM`.
    """
    pick, spread, square = args.rows[:, :, None]
    p = ((y - reference[:, None]) - log_sum[:, None]).exp()
    lse = reference + log_sum
    weights = None if args.token_weight is None else args.token_weight.to(y.dtype)
    mass = pick + 2 * square * lse[:, None]
    chosen = None
    if args.probabilities is not None:
        chosen = args.probabilities.to(y.dtype)
        chosen = chosen if weights is None else chosen * weights
        mass = pick * chosen.sum(1, keepdim=True) + 2 * square * lse[:, None]
    if weights is not None:
        mass = mass + spread * weights.sum()
    flow = p * mass
    if weights is not None:
        flow -= spread * weights
    if chosen is not None:
        flow -= pick * chosen
    else:
        here = (args.target >= 0) & (args.target < y.shape[1])
        token = args.target.clamp(0, y.shape[1] - 1)[:, None]
        flow.scatter_add_(1, token, -pick.where(here[:, None], 0.0))
    return flow.masked_fill_((args.target == IGNORED)[:, None], 0.0)


def kept(grads: Any, args: Arguments) -> list[Tensor]:
    """Returns the gradients of input, linear_weight and linear_bias as they are kept; empty where none is."""
    return kept_gradients(grads, args[:3], args.keep, args.input)


def fake(args: Arguments) -> tuple[Tensor, ...]:
    """Returns outputs of the right shapes and dtypes, and nothing in them."""
    rows, wide = args.input.shape[0], wide_dtype(args.input)
    return (
        args.input.new_empty((), dtype=wide),
        *fake_kept(args[:3], args.keep, args.input),
        *(args.input.new_empty(rows, dtype=wide) for _ in range(2)),
        args.target.new_empty(rows if args.best else 0),
    )


_GRADS = ("input", "linear_weight", "linear_bias")


def _renamed(inputs: Inputs) -> Inputs:
    names = {"hidden": "input", "weight": "linear_weight", "bias": "linear_bias"}
    return {names.get(name, name): x for name, x in inputs.items()}


def _case(
    id: str, rows: int, tokens: int, dim: int, classes: bool = False, probabilities: bool = False, **more: Any
) -> Case:
    def make(g: Generator) -> Inputs:
        inputs = _renamed(inputs_of(g, rows, tokens, dim, **more))
        if classes:
            inputs["weight"] = torch.rand(tokens, generator=g, dtype=torch.float64) + 0.25
        if probabilities:
            inputs["target"] = torch.rand(rows, tokens, generator=g, dtype=torch.float64).softmax(1)
        return inputs

    return Case(id, make, _GRADS if more.get("bias") else _GRADS[:2])


def _config(
    id: str, rows: int, tokens: int, dim: int, *targets: Target, ignored: float = 0.0, **more: Any
) -> Benchmark:
    def make(g: Generator) -> Inputs:
        hidden, weight, target = large(g, rows, tokens, dim, ignored)
        return {"input": hidden, "linear_weight": weight, "target": target}

    params = {"T": rows, "V": tokens, "d": dim} | ({"supervised": round(1 - ignored, 2)} if ignored else {})
    return Benchmark(id, make, params, _GRADS[:2], targets=targets, **more)


_TOKENS = 151_936


def _on_gpu(best: float | None = None) -> list[Target]:
    """Returns what a training step in bfloat16 must reach on a GPU.

    Args:
        best: the fewest milliseconds that others have published of an H200.
    """
    near = [Speedup("bf16", True, 1 / 1.3, peer, device="gpu") for peer in ("QuACK", "Liger CuTe")]
    ahead = [Speedup("bf16", True, 1.0, peer, device="gpu") for peer in ("Liger", "CCE", "compiled")]
    published = [] if best is None else [Milliseconds("bf16", True, 1.3 * best, "H200", device="gpu")]
    return [PeakShare("bf16", True, 0.7, device="gpu"), *near, *ahead, *published]


SPEC = OpSpec(
    name="linear_cross_entropy",
    cases=(
        _case("few rows", 5, 37, 16),
        _case("one row, one token", 1, 1, 8),
        _case("odd sizes, some ignored", 21, 135, 13, ignored=0.4),
        _case("bias", 18, 75, 24, bias=True, ignored=0.2),
        _case("sum", 18, 75, 24, reduction="sum", ignored=0.2),
        _case("no reduction", 18, 75, 24, reduction="none", ignored=0.2, bias=True),
        _case("label smoothing", 20, 90, 16, label_smoothing=0.1, ignored=0.2),
        _case("class weights", 20, 90, 16, classes=True, ignored=0.2),
        _case("weights, smoothing, z-loss", 20, 90, 16, classes=True, label_smoothing=0.2, z_loss=1e-2, bias=True),
        _case("smoothing, no reduction", 20, 90, 16, classes=True, label_smoothing=0.2, z_loss=1e-2, reduction="none"),
        _case("z-loss", 20, 90, 16, z_loss=1e-2),
        _case("softcap", 20, 90, 16, scale=30.0, softcap=15.0, ignored=0.2),
        _case("probabilities", 20, 90, 16, probabilities=True, classes=True, label_smoothing=0.1),
        _case("large logits", 20, 90, 16, scale=1000.0),
        _case("a transposed weight", 20, 90, 16, transposed=True, ignored=0.4),
        _case("strided rows", 20, 90, 16, strided=True),
        _case("more than a tile", 150, 300, 72, ignored=0.5),
    ),
    cost=linear_cost(products=3, names=("input", "linear_weight")),
    benchmarks=(
        _config(
            "152k tokens",
            1024,
            _TOKENS,
            1024,
            PeakOrPeerShare("fp32", True, 0.75, "mm alone", of_peer=0.85),
            PeakShare("bf16", True, 0.7),
            *(Speedup("fp32", True, 1.0, peer) for peer in ("eager", "torch chunked", "compiled")),
            Speedup("bf16", True, 1.0, "torch chunked"),
            MemoryRatio("fp32", True, 20.0, "eager"),
            MemoryRatio("bf16", True, 20.0, "eager", allowed=4.0 * _TOKENS * 1024),
            MemoryRatio("fp32", True, 1.0, "compiled"),
        ),
        _config(
            "a tenth of rows",
            1024,
            _TOKENS,
            1024,
            Speedup("fp32", True, 8.0, "HF loss"),
            MemoryRatio("fp32", True, 20.0, "HF loss"),
            ignored=0.9,
        ),
        _config("a decoder's head", 1024, 32_000, 1024, headline=True),
        _config(
            "few rows",
            16,
            32_000,
            1024,
            *(Speedup(dtype, backward, 1.0, "eager") for dtype in ("fp32", "bf16") for backward in (False, True)),
        ),
        _config("H 4096, 4k", 4096, 128_256, 4096, *_on_gpu(best=16.7), devices=("gpu",)),
        _config("H 4096, 8k", 8192, 128_256, 4096, *_on_gpu(best=34.4), devices=("gpu",)),
        _config("Gemma 2 2B", 8192, 256_000, 2304, *_on_gpu(), devices=("gpu",)),
    ),
    always_wide=frozenset({"linear_bias", "weight"}),
    parts=CROSS_ENTROPY,
)
