"""The definition of the sigmoid loss: the naive formula, its cases, its benchmark configurations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from mmkernels.ops.common.dtypes import wide_dtype
from mmkernels.ops.common.kept import fake_kept, scaled
from mmkernels.ops.common.kept import kept as kept_gradients
from mmkernels.ops.common.results import or_empty
from mmkernels.ops.contrastive import parts
from mmkernels.ops.contrastive.cases import contrastive_cost, features, two_towers
from mmkernels.ops.contrastive.formula import best_scores, pairs, queries_of, score_gradients
from mmkernels.runtime.arguments import Differentiable
from mmkernels.spec import Benchmark, Case, Inputs, OpSpec
from mmkernels.targets import MemoryRatio, PeakShare, Target


class Arguments(NamedTuple):
    """The record of `sigmoid_contrastive`, whose forward pass also computes the gradients that will be wanted."""

    image: Differentiable  # [N, d] or [N, Q, d]
    text: Differentiable  # [M, d]
    logit_scale: Differentiable  # one element
    logit_bias: Differentiable  # one element
    image_ids: Tensor | None  # int64 [N]
    text_ids: Tensor | None  # int64 [M]
    keep_image: bool  # whether to compute and keep image's gradient
    keep_text: bool
    keep_logit_scale: bool
    keep_logit_bias: bool

    @property
    def keep_any(self) -> bool:
        """Whether any gradient is computed."""
        return self.keep_image or self.keep_text or self.keep_logit_scale or self.keep_logit_bias


class Results(NamedTuple):
    """What a backend returns: the loss, and its gradients in `kept_dtype`, empty where none is kept."""

    loss: Differentiable
    of_image: Tensor
    of_text: Tensor
    of_logit_scale: Tensor
    of_logit_bias: Tensor


KEPT = ("of_image", "of_text", "of_logit_scale", "of_logit_bias")
KEEP = ("keep_image", "keep_text", "keep_logit_scale", "keep_logit_bias")
"""The fields of `Results` and of `Arguments` that belong to the differentiable inputs, in their order."""


def formula(args: Arguments) -> Tensor:
    """Returns the loss by the naive formula, which PyTorch can differentiate; see `sigmoid_contrastive`."""
    image = args.image
    scale, bias = (x.reshape(()).to(image.dtype) for x in (args.logit_scale, args.logit_bias))
    logits = scale * best_scores(image, args.text) + bias
    loss = -F.logsigmoid(_signs(logits, args.image_ids, args.text_ids) * logits).sum() / image.shape[0]
    return loss.to(wide_dtype(image))


def _signs(logits: Tensor, image_ids: Tensor | None, text_ids: Tensor | None) -> Tensor:
    """Returns [N, M]: 1 for positives, -1 for all other pairs."""
    images, texts = (slice(0, n) for n in logits.shape)
    found = pairs(image_ids, text_ids, ignore=False, images=images, texts=texts, device=logits.device)
    return 2 * found.positive.to(logits.dtype) - 1


def reference(args: Arguments) -> tuple[Tensor, ...]:
    """Returns the loss, and its gradients written out, in `kept_dtype`."""
    image, text, logit_scale, logit_bias = args.image, args.text, args.logit_scale, args.logit_bias
    loss = formula(args)
    if not args.keep_any:
        return (loss, *kept((loss,) * 4, args))
    best, winner = (queries_of(image) @ text.mT).max(1)  # [N, M]
    scale = logit_scale.reshape(()).to(image.dtype)
    logits = scale * best + logit_bias.reshape(()).to(image.dtype)
    signs = _signs(logits, args.image_ids, args.text_ids)
    logits_grad = -signs * torch.sigmoid(-signs * logits) / image.shape[0]
    image_grad, text_grad = score_gradients(scale * logits_grad, winner, image, text)
    wide = wide_dtype(image)
    scale_grad = (logits_grad * best).sum(dtype=wide).reshape(logit_scale.shape)
    bias_grad = logits_grad.sum(dtype=wide).reshape(logit_bias.shape)
    return (loss, *kept((image_grad, text_grad, scale_grad, bias_grad), args))


def kept(grads: Sequence[Tensor | None], args: Arguments) -> list[Tensor]:
    """Returns the gradients of image, text, logit_scale, logit_bias as they are kept; empty where none is."""
    return kept_gradients(grads, _inputs(args), [getattr(args, name) for name in KEEP], args.image)


def _inputs(args: Arguments) -> tuple[Tensor, ...]:
    return args.image, args.text, args.logit_scale, args.logit_bias


def scaled_gradients(args: Any, of_features: Tensor, of_scalars: Tensor) -> tuple[Tensor, ...]:
    """Returns the kept gradients that are needed, in their inputs' dtypes, times what flows back.

    Args:
        args: the record of a backward pass.
        of_features, of_scalars: what flows back to features, and to the scale and the bias: without a dim.
    """
    inputs, flows = _inputs(args), (of_features, of_features, of_scalars, of_scalars)
    found = (
        scaled(getattr(args, kept), flow, x.dtype) if getattr(args, f"need_{name}") else None
        for name, kept, x, flow in zip(_GRADS, KEPT, inputs, flows, strict=True)
    )
    return tuple(or_empty(x, args.image) for x in found)


def fake(args: Arguments) -> tuple[Tensor, ...]:
    """Returns outputs of the right shapes and dtypes, and nothing in them."""
    grads = fake_kept(_inputs(args), [getattr(args, name) for name in KEEP], args.image)
    return (args.image.new_empty((), dtype=wide_dtype(args.image)), *grads)


_GRADS = ("image", "text", "logit_scale", "logit_bias")


def _case(
    id: str, n: int, m: int, dim: int, queries: int = 0, scale: float = 10.0, bias: float = -5.0, **more: Any
) -> Case:
    def make(g: Generator) -> Inputs:
        inputs = two_towers(g, n, m, dim, queries, scale) | {"logit_bias": torch.tensor(bias, dtype=torch.float64)}
        return inputs | {name: torch.tensor(x) for name, x in more.items()}

    return Case(id, make, _GRADS)


def _aligned(g: Generator) -> Inputs:
    image = features(g, 21, 12)
    scale, bias = (torch.tensor(x, dtype=torch.float64) for x in (100.0, -10.0))
    return {"image": image, "text": image.clone(), "logit_scale": scale, "logit_bias": bias}


def _config(id: str, n: int, dim: int, *targets: Target, **more: Any) -> Benchmark:
    def make(g: Generator) -> Inputs:
        inputs = two_towers(g, n, n, dim) | {"logit_bias": torch.tensor(-10.0, dtype=torch.float64)}
        return {name: x.to(g.device) for name, x in inputs.items()}

    return Benchmark(id, make, {"N": n, "d": dim}, _GRADS, targets=targets, **more)


_CAPTIONS: dict[str, Any] = {"image_ids": [*range(9), 50], "text_ids": [*(j // 2 for j in range(18)), 99, 98, 97]}

SPEC = OpSpec(
    name="sigmoid_contrastive",
    cases=(
        _case("a square batch", 33, 33, 16),
        _case("one pair", 1, 1, 8),
        _case("as training begins", 40, 40, 24, bias=-10.0),
        _case("odd sizes", 70, 70, 13, scale=30.0, bias=3.0),
        _case("several captions an image", 10, 21, 24, **_CAPTIONS),
        _case("few classes", 17, 17, 16, image_ids=[i % 3 for i in range(17)], text_ids=[i % 3 for i in range(17)]),
        _case("queries of an image", 20, 20, 16, queries=5),
        _case("queries, captions", 10, 21, 24, queries=3, **_CAPTIONS),
        _case("negative scale", 25, 25, 16, scale=-7.0),
        _case("no scale", 25, 25, 16, scale=0.0),
        Case("aligned at scale 100", _aligned, _GRADS),
        _case("more than a tile", 150, 150, 72, scale=100.0, bias=-20.0),
    ),
    cost=contrastive_cost(products_backward=2),
    benchmarks=(
        _config("small batch", 64, 512),
        _config(
            "batch of 8,192",
            8192,
            512,
            PeakShare("fp32", True, 0.7),
            MemoryRatio("fp32", True, 30.0, "open_clip"),
            headline=True,
        ),
        # 40 ms on an H200, as a share of the rate at which it was measured to multiply, 800 TFLOP/s.
        _config("batch of 65,536, wide", 65_536, 768, PeakShare("bf16", True, 0.62, device="gpu"), devices=("gpu",)),
    ),
    always_wide=frozenset({"logit_scale", "logit_bias"}),
    parts=parts.SIGMOID,
)
