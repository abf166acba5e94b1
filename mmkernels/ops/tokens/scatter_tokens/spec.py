"""What scattering is: rows of embeddings replaced by visual tokens, or added to; its cases and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from mmkernels.ops.tokens.rows import compose, home_of, source_of_mask, source_of_positions
from mmkernels.runtime.arguments import Differentiable
from mmkernels.runtime.checks import can_look, check_range
from mmkernels.spec import Benchmark, Case, Cost, Inputs, OpSpec
from mmkernels.targets import BandwidthShare, MemoryRatio, Speedup


class Arguments(NamedTuple):
    """The record of `scatter_tokens`."""

    embeddings: Differentiable  # [T, C] or [B, L, C]
    visual: Differentiable  # [V, C]
    positions: Tensor  # int64 [V], or bool [T] or [B, L]
    mode: str


class Results(NamedTuple):
    """What `scatter_tokens` returns."""

    out: Differentiable  # as embeddings


def reference(args: Arguments) -> Tensor:
    """The naive formula."""
    check_positions(args)
    embeddings, visual = args.embeddings, args.visual
    base = embeddings.flatten(0, -2)
    out = compose(base, visual, source_of(args), add=args.mode == "add")
    return out.view(embeddings.shape)


def reference_backward(args: Any) -> tuple[Tensor, Tensor]:
    """Returns the gradients, in mode "add" only that of visual: the other one is what flows back."""
    grad, source = args.grad_out.flatten(0, -2), source_of(args)
    none = grad.new_empty(0)
    of_embeddings = compose(grad, None, source).view(args.embeddings.shape) if args.need_embeddings else none
    home = home_of(source, len(args.visual))
    return of_embeddings, compose(None, grad, home) if args.need_visual and len(grad) else _nothing(args)


def _nothing(args: Any) -> Tensor:
    """Returns the gradient of visual tokens that went nowhere."""
    visual: Tensor = args.visual
    return visual.new_zeros(visual.shape if args.need_visual else 0)


def source_of(args: Any) -> Tensor:
    """Returns int64 [tokens]: which visual token a row gets, or -1."""
    if args.positions.dtype == torch.bool:
        return source_of_mask(args.positions, args.visual.shape[0])
    return source_of_positions(args.positions, args.embeddings.shape[:-1].numel())


def check_positions(args: Arguments) -> None:
    """Raise ValueError where positions are wrong, if that can be seen without waiting for a device."""
    positions, count = args.positions, args.visual.shape[0]
    if positions.device.type != "cpu" or not can_look(positions):
        return
    if positions.dtype == torch.bool:
        if (found := int(positions.sum())) != count:
            raise ValueError(f"positions must be true {count} times, once for each row of visual, got {found}")
        return
    check_range("positions", positions, 0, args.embeddings.shape[:-1].numel() - 1)
    values, counts = positions.unique(return_counts=True)
    if len(values) < count:
        twice = int(values[counts > 1][0])
        first, second, *_ = (positions == twice).nonzero().flatten().tolist()
        raise ValueError(f"positions must differ from each other, got {twice} twice, at {first} and {second}")


def _make(shape: tuple[int, ...], count: int, mode: str, *, mask: bool = False) -> Callable[[Generator], Inputs]:
    def make(generator: Generator) -> Inputs:
        random = lambda *size: torch.randn(size, generator=generator, dtype=torch.float64)
        tokens = shape[:-1]
        positions = torch.randperm(torch.Size(tokens).numel(), generator=generator)[:count]
        if mask:
            positions = torch.zeros(tokens, dtype=torch.bool).view(-1).index_fill(0, positions, True).view(tokens)
        return {
            "embeddings": random(*shape),
            "visual": random(count, shape[-1]),
            "positions": positions,
            "mode": mode,
        }

    return make


def _prompt(batch: int, length: int, images: int, tokens: int, dim: int, mode: str) -> Callable[[Generator], Inputs]:
    """Each prompt has so many images, each a run of so many tokens, as far apart from each other as they can be."""

    def make(generator: Generator) -> Inputs:
        random = lambda *size: torch.randn(size, generator=generator, dtype=torch.float64)
        text = (length - images * tokens) // (images + 1)
        first = text + torch.arange(images) * (tokens + text) + length * torch.arange(batch)[:, None]  # [batch, images]
        positions = (first[..., None] + torch.arange(tokens)).flatten()
        return {
            "embeddings": random(batch, length, dim),
            "visual": random(len(positions), dim),
            "positions": positions,
            "mode": mode,
        }

    return make


def _benchmark(
    id: str, batch: int, length: int, images: int, tokens: int, dim: int, mode: str = "replace", **more: Any
) -> Benchmark:
    params = {"B": batch, "L": length, "images": images, "tokens": tokens, "C": dim, "mode": mode}
    return Benchmark(id, _prompt(batch, length, images, tokens, dim, mode), params, _BOTH, **more)


def _cost(inputs: Inputs, backward: bool) -> Cost:
    embeddings, visual, added = inputs["embeddings"], inputs["visual"], inputs["mode"] == "add"
    of_all, of_visual = (x.numel() * x.element_size() for x in (embeddings, visual))
    forward = 2 * of_all + (of_visual if added else 0)
    back = 2 * of_visual if added else 2 * of_all + of_visual  # what flows back is read once in both
    return Cost(float(visual.numel() if added else 0), float(forward + (back if backward else 0)))


_BOTH = ("embeddings", "visual")
_PEER, _SHARE = 2.0, 0.8
"""Targets: the ratio to `masked_scatter` on a clone, and the share of the bandwidth."""

SPEC = OpSpec(
    name="scatter_tokens",
    cases=(
        Case("batch, added", _make((2, 9, 16), 7, "add"), _BOTH),
        Case("batch, added, mask", _make((2, 12, 16), 7, "add", mask=True), _BOTH),
        Case("batch, mask", _make((3, 4, 8), 5, "replace", mask=True), _BOTH),
        Case("one visual token", _make((1, 6, 24), 1, "replace"), _BOTH),
        Case("nothing visual", _make((2, 5, 8), 0, "replace"), _BOTH),
        Case("no text", _make((40, 12), 40, "replace"), _BOTH),
        Case("no rows", _make((0, 12), 0, "add"), _BOTH),
        Case("batch", _make((3, 17, 71), 20, "replace"), _BOTH),
        Case("packed, added", _make((37, 130), 21, "add"), _BOTH),
        Case("packed", _make((50, 65), 31, "replace"), _BOTH),
    ),
    benchmarks=(
        _benchmark(
            "one small image", 1, 320, 1, 256, 1024,
            targets=(Speedup("fp32", False, 1.0, "naive"),),
        ),
        _benchmark(
            "LLaVA", 4, 1024, 1, 576, 4096, headline=True,
            targets=(
                Speedup("fp32", False, _PEER, "masked_scatter"),
                Speedup("bf16", False, _PEER, "masked_scatter"),
                Speedup("fp32", True, _PEER, "masked_scatter"),
                MemoryRatio("fp32", True, 1.0, "masked_scatter"),
                BandwidthShare("bf16", False, _SHARE, device="gpu"),
            ),
        ),
        _benchmark("Qwen2.5-VL", 1, 8192, 4, 1536, 2048),
        _benchmark("DeepStack", 1, 4096, 1, 2048, 2048, "add", targets=(Speedup("bf16", False, 1.0, "index_add"),)),
    ),
    cost=_cost,
)  # fmt: skip
