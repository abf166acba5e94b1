"""The definition of the sigmoid loss: the naive formula, its cases, its benchmark configurations."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from mmkernels.ops.common.dtypes import wide_dtype
from mmkernels.ops.contrastive.cases import contrastive_cost, features, two_towers
from mmkernels.ops.contrastive.formula import best_scores, pairs, queries_of, score_gradients
from mmkernels.spec import Benchmark, Case, Inputs, OpSpec, Target


def formula(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
) -> Tensor:
    """Returns the loss by the naive formula, which PyTorch can differentiate; see `sigmoid_contrastive`."""
    logits = logit_scale.reshape(()).to(image.dtype) * best_scores(image, text) + logit_bias.reshape(()).to(image.dtype)
    loss = -F.logsigmoid(_signs(logits, image_ids, text_ids) * logits).sum() / image.shape[0]
    return loss.to(wide_dtype(image))


def _signs(logits: Tensor, image_ids: Tensor | None, text_ids: Tensor | None) -> Tensor:
    """Returns [N, M]: 1 for positives, -1 for all other pairs."""
    images, texts = (slice(0, n) for n in logits.shape)
    found = pairs(image_ids, text_ids, ignore=False, images=images, texts=texts, device=logits.device)
    return 2 * found.positive.to(logits.dtype) - 1


def reference(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """Returns the loss, and the gradients of image, text, logit_scale and logit_bias, written out, in `kept_dtype`."""
    loss = formula(image, text, logit_scale, logit_bias, image_ids, text_ids)
    inputs = (image, text, logit_scale, logit_bias)
    if not any(needs):
        return (loss, *(image.new_empty(0) for _ in inputs))
    best, winner = (queries_of(image) @ text.mT).max(1)  # [N, M]
    scale = logit_scale.reshape(()).to(image.dtype)
    logits = scale * best + logit_bias.reshape(()).to(image.dtype)
    signs = _signs(logits, image_ids, text_ids)
    logits_grad = -signs * torch.sigmoid(-signs * logits) / image.shape[0]
    image_grad, text_grad = score_gradients(scale * logits_grad, winner, image, text)
    wide = wide_dtype(image)
    scale_grad = (logits_grad * best).sum(dtype=wide).reshape(logit_scale.shape)
    bias_grad = logits_grad.sum(dtype=wide).reshape(logit_bias.shape)
    return (loss, *kept((image_grad, text_grad, scale_grad, bias_grad), inputs, needs))


def kept_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype in which the gradient of x is kept between the forward and the backward pass.

    float16 has too little range: a loss scale in the upstream gradient multiplies the kept values only later.
    """
    return torch.float32 if x.dtype == torch.float16 else x.dtype


def kept(grads: tuple[Tensor, ...], inputs: tuple[Tensor, ...], needs: list[bool]) -> list[Tensor]:
    """Returns the needed gradients in `kept_dtype`, and empty tensors in place of the others."""
    return [
        x.new_empty(x.shape, dtype=kept_dtype(x)).copy_(grad) if need else x.new_empty(0)
        for x, grad, need in zip(inputs, grads, needs, strict=True)
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


def _config(id: str, n: int, dim: int, *targets: Target, devices: tuple[str, ...] = ("cpu", "gpu")) -> Benchmark:
    def make(g: Generator) -> Inputs:
        inputs = two_towers(g, n, n, dim) | {"logit_bias": torch.tensor(-10.0, dtype=torch.float64)}
        return {name: x.to(g.device) for name, x in inputs.items()}

    return Benchmark(id, make, {"N": n, "d": dim}, _GRADS, targets=targets, devices=devices)


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
            Target("fp32", True, "open_clip", 4.0),
            Target("fp32", True, "memory of open_clip", 30.0),
        ),
        # 40 ms on an H200, as a share of the rate at which it was measured to multiply, 800 TFLOP/s.
        _config("batch of 65,536, wide", 65_536, 768, Target("bf16", True, "peak", 0.62, "gpu"), devices=("gpu",)),
    ),
    always_wide=frozenset({"logit_scale", "logit_bias"}),
)
