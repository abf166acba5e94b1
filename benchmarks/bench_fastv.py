"""FastV in a language model: the prefill of a prompt of which most visual tokens are dropped after the second layer.

Beside it: the same layers without pruning; with the tokens that are kept known beforehand, which is all that fewer
tokens can gain ("tokens known"); and FastV as its authors' code does it, which stores a layer's attention weights.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmkernels import SpanMask, pruning
from mmkernels.bench.rounds import Peaks, alternate
from mmkernels.meters import memory_why_not, peak_memory
from mmkernels.models.blocks.text import TextBlock, rotary_angles, rotate
from mmkernels.ops.attention.cross_attention.spec import SPEC
from mmkernels.options import DTYPES
from mmkernels.targets import OURS, Measured, MemoryRatio, Speedup, Target

WIDTH, HEADS, KV_HEADS, MLP = 896, 14, 2, 4864  # Qwen2-0.5B, the language model of LLaVA-OneVision-0.5B
LAYERS, SYSTEM, VISUAL, QUESTION = 8, 35, 2048, 61
AFTER, KEEP = 2, 0.25  # the layers before the pruning, and the share of visual tokens that it keeps
LENGTH, KEPT = SYSTEM + VISUAL + QUESTION, SYSTEM + math.ceil(KEEP * VISUAL) + QUESTION
IMAGE = slice(SYSTEM, SYSTEM + VISUAL)
UNPRUNED, KNOWN, STORED = "no pruning", "tokens known", "weights stored"
LOST = {"fp32": 1e-4, "bf16": 1e-2, "fp16": 1e-2}  # of the attention that the best tokens receive, by rounding


@dataclass(frozen=True, repr=False)
class Row:
    """A row of the benchmark: the layers in one dtype."""

    dtype: str
    device: str
    compile_only: bool

    def __str__(self) -> str:
        return f"{LAYERS} layers, {VISUAL:,} visual tokens, {self.dtype}, forward"

    __repr__ = __str__


@dataclass
class Layer:
    """What a model has of a layer when the next one begins."""

    block: Any
    below: Tensor  # [1, L, C], what went into the layer
    hidden: Tensor  # [1, L, C]
    key: Tensor = field(default_factory=lambda: torch.empty(0))  # [1, Hkv, L, D], in the key-value cache

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Takes the place of a key-value cache."""
        self.key = key
        return key, value

    def query(self, first: int) -> Tensor:
        """Returns the queries from the `first` token on: [1, H, L - first, D]."""
        query = self.block.attention.query(self.block.attention_norm(self.below[:, first:]))
        return rotate(query, _angles(torch.arange(first, LENGTH)[None], query))


class Layers(nn.Module):
    """The layers of a language model over a prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TextBlock(WIDTH, heads=HEADS, kv_heads=KV_HEADS, mlp=MLP) for _ in range(LAYERS))

    def forward(self, x: Tensor, prune: Callable[[Layer], tuple[Tensor, Tensor]] | None = None) -> Tensor:
        places = torch.arange(LENGTH)[None]
        angles, mask = _angles(places, x), SpanMask.causal(LENGTH, LENGTH, x.device)
        for number, block in enumerate(self.blocks, 1):
            layer = Layer(block, x, x)
            x = layer.hidden = block(x, angles, mask, layer)
            if number == AFTER and prune is not None:
                x, places = prune(layer)
                angles, mask = _angles(places, x), SpanMask.causal(x.shape[1], x.shape[1], x.device)
        return x


def _angles(places: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    return rotary_angles(places.to(like.device), WIDTH // HEADS, 1e6, like.dtype)


# Ways to prune.


def fastv(layer: Layer) -> tuple[Tensor, Tensor]:
    kept = pruning.fastv(layer.hidden, layer.query(LENGTH - 1), layer.key, IMAGE, KEEP)
    return kept.x, kept.positions


def take(places: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
    return layer.hidden[:, places[0]], places


def with_stored_weights(layer: Layer) -> tuple[Tensor, Tensor]:
    best = received(layer).topk(KEPT - SYSTEM - QUESTION).indices + SYSTEM
    text = torch.cat([torch.arange(SYSTEM), torch.arange(SYSTEM + VISUAL, LENGTH)]).to(best.device)
    return take(torch.cat([text, best]).sort().values[None], layer)


def received(layer: Layer) -> Tensor:
    """Returns the last token's attention to the visual tokens, the mean over heads, from the weights of all tokens."""
    query, key = layer.query(0), layer.key.repeat_interleave(HEADS // KV_HEADS, 1)
    later = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=key.device).triu(1)
    scores = (query @ key.mT / math.sqrt(key.shape[-1])).masked_fill(later, -torch.inf)
    return scores.softmax(-1).mean(1)[0, -1, IMAGE]


# Measuring.


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    rows = [Row(dtype, option("device"), option("compile_only")) for dtype in option("dtypes").split(",")]
    metafunc.parametrize("row", rows, ids=str)


@torch.inference_mode()
def test_fastv(benchmark: Any, row: Row) -> None:
    """Checks which tokens are kept and what the layers make of them, then times."""
    torch.manual_seed(0)
    dtype, device = DTYPES[row.dtype], torch.device(row.device)
    net, x = Layers().to(device, dtype), torch.randn(1, LENGTH, WIDTH).to(device, dtype)
    if row.compile_only:
        net(x, fastv)
        return
    places = _check(net, x, row)
    candidates: dict[str, Callable[[], Tensor]] = {
        OURS: partial(net, x, fastv),
        UNPRUNED: partial(net, x),
        KNOWN: partial(net, x, partial(take, places)),
        STORED: partial(net, x, with_stored_weights),
    }
    memory: dict[str, float | None] = {name: peak_memory(call, device) for name, call in candidates.items()}
    peaks = Peaks(dtype, row.device)
    samples = alternate(benchmark, candidates, peaks, device)
    seconds = {name: statistics.median(times) for name, times in samples.items()}
    flops = _flops(LENGTH) * AFTER + _flops(KEPT) * (LAYERS - AFTER)
    weights = sum(parameter.nbytes for parameter in net.parameters())
    measured = Measured(flops, weights, seconds, memory, peaks.flops, peaks.bytes)
    benchmark.group = f"fastv, {row.dtype}, forward"
    benchmark.extra_info |= _description(row, measured)


def _check(net: Layers, x: Tensor, row: Row) -> Tensor:
    """Returns the places of the tokens that are kept.

    Raises:
        AssertionError: they are not those that receive the most attention, or what the layers make of them is wrong.
    """
    wide = torch.float64 if x.dtype == torch.float32 else torch.float32
    found: list[Tensor] = []

    def noting(layer: Layer) -> tuple[Tensor, Tensor]:
        kept = fastv(layer)
        found.append(kept[1])
        return kept

    def ranking(layer: Layer) -> tuple[Tensor, Tensor]:
        found.append(received(layer))
        return take(found[0], layer)

    ours = net(x, noting)
    naive = net(x, partial(take, found[0]))
    net.to(wide)
    truth = net(x.to(wide), ranking)
    net.to(x.dtype)
    places, scores = found[0], found[1]
    kept = places[(places >= SYSTEM) & (places < SYSTEM + VISUAL)] - SYSTEM
    share = float(scores[kept].sum() / scores.topk(len(kept)).values.sum())
    assert len(kept) == KEPT - SYSTEM - QUESTION and share > 1 - LOST[row.dtype], f"{row}: {share:.2%} of the attention"
    problem = SPEC.over_budget(ours, naive, truth)
    assert problem is None, f"FastV is wrong at {row}: {problem}"
    return places


def _flops(length: int) -> float:
    """Returns the FLOP of one layer over so many tokens; of causal attention half of the scores."""
    linear = 2 * length * WIDTH * (2 * WIDTH + 2 * KV_HEADS * (WIDTH // HEADS) + 3 * MLP)
    return float(linear + 2 * length * length * WIDTH)


def _targets(row: Row) -> list[Target]:
    if torch.device(row.device).type != "cpu":
        return []
    return [
        Speedup(row.dtype, False, 0.85, KNOWN),
        Speedup(row.dtype, False, 1.0, STORED),
        MemoryRatio(row.dtype, False, 1.0, STORED),
    ]


def _description(row: Row, measured: Measured) -> dict[str, Any]:
    """Returns the JSON of a row; the names contain the units."""
    seconds = measured.seconds[OURS]
    return {
        "op": "fastv",
        "configuration": f"{LAYERS} layers, {VISUAL:,} visual tokens",
        "dtype": row.dtype,
        "pass": "forward",
        "device": row.device,
        "seconds": seconds,
        "peers": {
            name: {
                "seconds": measured.seconds[name],
                "ratio": measured.ratio(name),
                "ratio_at_peak": measured.ratio_at_peak(name),
                "peak_memory_bytes": measured.memory[name],
            }
            for name in (UNPRUNED, KNOWN, STORED)
        },
        "peak_memory_bytes": measured.memory[OURS],
        "memory_why_not": memory_why_not(row.device),
        "flops": measured.flops,
        "flops_per_second": measured.rate,
        "share_of_compute_peak": measured.share_of_peak,
        "share_of_bandwidth_peak": measured.share_of_bandwidth,
        "targets": [target.judge(measured) for target in _targets(row)],
    }
