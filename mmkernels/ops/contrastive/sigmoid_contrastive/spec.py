"""What the sigmoid loss is: the naive formula, its cases, the shapes that it is measured at."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from mmkernels.ops.contrastive import parts
from mmkernels.ops.contrastive.cases import contrastive_cost, features, two_towers
from mmkernels.ops.contrastive.formula import best_scores, pairs, queries_of, wide_dtype
from mmkernels.spec import Benchmark, Case, Inputs, OpSpec
from mmkernels.targets import MemoryRatio, PeakShare, Target


def formula(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
) -> Tensor:
    """The naive formula, differentiable by PyTorch; what its arguments mean stands at `sigmoid_contrastive`."""
    logits = logit_scale.reshape(()).to(image.dtype) * best_scores(image, text) + logit_bias.reshape(()).to(image.dtype)
    loss = -F.logsigmoid(_signs(logits, image_ids, text_ids) * logits).sum() / image.shape[0]
    return loss.to(wide_dtype(image))


def _signs(logits: Tensor, image_ids: Tensor | None, text_ids: Tensor | None) -> Tensor:
    """[N, M]: 1 for positives, -1 for all other pairs."""
    (rows, columns), device = logits.shape, logits.device
    positive = pairs(image_ids, text_ids, False, (0, rows), (0, columns), device).positive
    return 2 * positive.to(logits.dtype) - 1


def reference(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """Loss, and the gradients of image, text, logit_scale and logit_bias, written out, in `kept_dtype`."""
    loss = formula(image, text, logit_scale, logit_bias, image_ids, text_ids)
    inputs = (image, text, logit_scale, logit_bias)
    if not any(needs):
        return (loss, *(image.new_empty(0) for _ in inputs))
    dots = queries_of(image) @ text.mT  # [N, Q, M]
    best, query = dots.max(1)
    scale = logit_scale.reshape(()).to(image.dtype)
    logits = scale * best + logit_bias.reshape(()).to(image.dtype)
    signs = _signs(logits, image_ids, text_ids)
    of_logits = -signs * torch.sigmoid(-signs * logits) / image.shape[0]
    of_dots = torch.zeros_like(dots).scatter_(1, query[:, None], (scale * of_logits)[:, None])
    wide = wide_dtype(image)
    grads = (
        (of_dots @ text).reshape(image.shape),
        torch.einsum("nqm,nqd->md", of_dots, queries_of(image)),
        (of_logits * best).sum(dtype=wide).reshape(logit_scale.shape),
        of_logits.sum(dtype=wide).reshape(logit_bias.shape),
    )
    return (loss, *kept(grads, inputs, needs))


def kept_dtype(image: Tensor) -> torch.dtype:
    """What gradients are kept in from the forward pass to the backward one.

    float16 has no room for a loss scale above what is yet to be divided by it, nor below for what is yet to be
    multiplied.
    """
    return torch.float32 if image.dtype == torch.float16 else image.dtype


def kept(grads: tuple[Tensor, ...], inputs: tuple[Tensor, ...], needs: list[bool]) -> list[Tensor]:
    """The gradients that are wanted, as they are kept; nothing in place of the others."""
    return [
        x.new_empty(x.shape, dtype=kept_dtype(x)).copy_(g) if need else x.new_empty(0)
        for x, g, need in zip(inputs, grads, needs, strict=True)
    ]


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
