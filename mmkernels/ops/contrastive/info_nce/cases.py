"""Correctness cases and benchmark configurations of the contrastive loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator

from mmkernels.ops.contrastive.cases import features, two_towers
from mmkernels.spec import Benchmark, Case, Inputs
from mmkernels.targets import ExtraMemory, MemoryRatio, PeakShare, Speedup, Target

_GRADS = ("image", "text", "logit_scale")


def _case(id: str, n: int, m: int, dim: int, queries: int = 0, scale: float = 20.0, **more: Any) -> Case:
    def make(g: Generator) -> Inputs:
        inputs = two_towers(g, n, m, dim, queries, scale)
        return inputs | {name: x(g) if callable(x) else x for name, x in more.items()}

    grads = (*_GRADS, *(["hard_texts"] if more.get("hard_texts") else []))
    return Case(id, make, grads)


def _ids(*numbers: int) -> Callable[[Generator], torch.Tensor]:
    return lambda g: torch.tensor(numbers)


def _hard(k: int, dim: int) -> Callable[[Generator], torch.Tensor]:
    return lambda g: features(g, k, dim)


def _queue(dim: int, *ids: int) -> dict[str, Any]:
    """Hard texts with these ids."""
    return {"hard_texts": _hard(len(ids), dim), "hard_text_ids": _ids(*ids)}


def _aligned(g: Generator) -> Inputs:
    image = features(g, 21, 12)
    return {"image": image, "text": image.clone(), "logit_scale": torch.tensor(100.0, dtype=torch.float64)}


_BOTH: dict[str, Any] = {"return_stats": True}
_CAPTIONS: dict[str, Any] = {
    "image_ids": _ids(*range(9), 50),
    "text_ids": _ids(*(j // 2 for j in range(18)), 99, 98, 97),
}
_CLASSES: dict[str, Any] = {
    "image_ids": _ids(*(i % 3 for i in range(17))),
    "text_ids": _ids(*(i % 3 for i in range(17))),
}
_PLACES: dict[str, Any] = {"image_ids": _ids(*range(8))}
_APART: dict[str, Any] = {"image_ids": _ids(*range(9)), "text_ids": _ids(*range(8, 17)), "reduction": "none"}
_LEFT_OUT: dict[str, Any] = {"same_id": "ignore", **_queue(16, *(k % 5 for k in range(70)))}

CASES = (
    _case("a square batch", 33, 33, 16),
    _case("rows of both directions", 19, 19, 40, reduction="none", **_BOTH),
    _case("one pair", 1, 1, 8, **_BOTH),
    _case("odd sizes", 70, 70, 13, label_smoothing=0.1, image_weight=0.3, reduction="sum"),
    _case("several captions an image, some without", 10, 21, 24, **_CAPTIONS, **_BOTH),
    _case("several captions, smoothed", 10, 21, 24, label_smoothing=0.2, reduction="none", **_CAPTIONS),
    _case("few classes", 17, 17, 16, **_CLASSES, **_BOTH),
    _case("no row has a positive", 5, 7, 8, image_ids=_ids(*range(5)), text_ids=_ids(*range(10, 17)), reduction="sum"),
    _case("false negatives left out", 17, 17, 16, same_id="ignore", **_CLASSES, **_BOTH),
    _case("false negatives left out, smoothed", 17, 17, 16, same_id="ignore", label_smoothing=0.1, **_CLASSES),
    _case("hard texts", 18, 18, 16, hard_texts=_hard(37, 16), **_BOTH),
    _case("hard texts, captions, smoothed", 10, 21, 24, hard_texts=_hard(5, 24), label_smoothing=0.1, **_CAPTIONS),
    _case("hard texts with ids", 10, 21, 24, **_queue(24, *(k % 13 for k in range(37))), **_CAPTIONS, **_BOTH),
    _case("few positives but hard texts", 9, 9, 16, label_smoothing=0.1, **_queue(16, *range(-6, 14)), **_APART),
    _case("false negatives of a queue left out", 17, 17, 16, label_smoothing=0.1, **_LEFT_OUT, **_CLASSES),
    _case("queries, hard texts with ids", 8, 8, 16, queries=3, **_queue(16, 0, 1, 2, 9, 9, 1), **_PLACES, **_BOTH),
    _case("queries of an image", 20, 20, 16, queries=5, **_BOTH),
    _case("queries, captions, hard texts", 10, 21, 24, queries=3, hard_texts=_hard(4, 24), **_CAPTIONS),
    _case("negative scale", 25, 25, 16, scale=-7.0, **_BOTH),
    _case("no scale", 25, 25, 16, scale=0.0),
    _case("only images to texts", 25, 25, 16, image_weight=1.0),
    Case("aligned at scale 100", _aligned, _GRADS),
    _case("more than a tile", 150, 150, 72, scale=100.0),
    _case(
        "more texts than a tile", 70, 300, 96, image_ids=_ids(*range(70)), text_ids=_ids(*(j % 90 for j in range(300)))
    ),
)


def _benchmark(n: int, dim: int, queries: int) -> Callable[[Generator], Inputs]:
    def make(g: Generator) -> Inputs:
        inputs = two_towers(g, n, n, dim, queries, scale=100.0)
        return inputs | {"logit_scale": inputs["logit_scale"].to(g.device)}

    return make


def _config(id: str, n: int, dim: int, *targets: Target, queries: int = 0, **more: Any) -> Benchmark:
    sizes = {"N": n, "d": dim} | ({"Q": queries} if queries else {})
    return Benchmark(id, _benchmark(n, dim, queries), sizes, _GRADS, targets=targets, **more)


# A GPU's targets are an H200's milliseconds as shares of the rate at which it was measured to multiply, 800 TFLOP/s.
BENCHMARKS = (
    _config("small batch", 64, 512, *(Speedup(dtype, True, 1.0, "naive") for dtype in ("fp32", "bf16"))),
    _config(
        "batch of 8,192",
        8192,
        512,
        PeakShare("fp32", True, 0.7),
        PeakShare("bf16", True, 0.65),
        *(MemoryRatio(dtype, True, 30.0, "naive") for dtype in ("fp32", "bf16")),
        *(
            Speedup(dtype, True, 1.0, peer)
            for dtype in ("fp32", "bf16")
            for peer in ("compiled", "cached", "cached 512")
        ),
        headline=True,
    ),
    # BLIP-2's first stage. The formula's largest tensor, a score of every query with every text, is 537 MB in float32.
    _config(
        "batch of 2,048, 32 queries each",
        2048,
        256,
        PeakShare("fp32", True, 0.7),
        ExtraMemory("fp32", True, 50.0),
        Speedup("fp32", True, 1.0, "naive"),
        Speedup("fp32", True, 1.0, "compiled"),
        queries=32,
    ),
    _config(
        "batch of 65,536",
        65_536,
        512,
        PeakShare("fp32", True, 0.7),
        ExtraMemory("fp32", True, 100.0),
        devices=("cpu",),
    ),
    _config(
        "batch of 65,536, wide",
        65_536,
        768,
        PeakShare("bf16", True, 0.73, device="gpu"),  # 45 ms
        ExtraMemory("bf16", True, 500.0, device="gpu"),
        devices=("gpu",),
    ),
)
