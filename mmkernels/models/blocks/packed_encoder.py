"""The image encoder of the Qwen-VL family: images of any size, packed, in one attention call a layer.

Patches lie in the order of Qwen's processors: window by window of ``merge x merge``, which later become one token.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmkernels.masks import SpanMask
from mmkernels.models.blocks.activations import ACTIVATIONS
from mmkernels.models.blocks.encoder import Heads
from mmkernels.models.blocks.gated import gated_down
from mmkernels.models.blocks.text import rotate
from mmkernels.ops.attention.cross_attention import cross_attention
from mmkernels.ops.tokens.ranking import on_device, to_device
from mmkernels.runtime.checks import can_look

GridSizes = tuple[tuple[int, int, int], ...]
"""(t, h, w) of each image or video, in patches."""


class PackedSizes(NamedTuple):
    """The sizes of a `PackedEncoder`.

    Attributes:
        width, layers, heads, mlp: the width, the number of layers and of heads, the width of the feed-forward.
        inputs: numbers of a patch: channels * frames * side * side.
        merge: the side of the windows that later become one token, in patches.
        activation: of the feed-forward, a name in `ACTIVATIONS`.
        norm: "layer" or "rms".
        gated: whether the feed-forward is a SwiGLU (Qwen2.5-VL).
        patch_bias: whether the projection of the patches adds a bias (Qwen3-VL).
        eps: of the norms.
        window: the side of the windows of attention, in merged tokens; 0: each frame is attended as a whole.
        full_layers: the layers that attend to the whole frame where there are windows.
        positions: the side of the learned grid of position embeddings; 0: there are none.
    """

    width: int
    layers: int
    heads: int
    mlp: int
    inputs: int
    merge: int = 2
    activation: str = "quick_gelu"
    norm: str = "layer"
    gated: bool = False
    patch_bias: bool = False
    eps: float = 1e-6
    window: int = 0
    full_layers: tuple[int, ...] = ()
    positions: int = 0


class PackedLayout(NamedTuple):
    """Where the patches of packed images lie. It is computed on the host, from the grid alone.

    Attributes:
        places: row and column of each patch in its frame, int64 ``[2, N]``, in the order of the processors.
        frames: patches of each frame.
        order: of the merged tokens, window of attention by window, int64 ``[N / merge^2]``; None: as they are.
        windows: patches of each window of attention.
    """

    places: Tensor
    frames: tuple[int, ...]
    order: Tensor | None
    windows: tuple[int, ...]


def packed_layout(grid: GridSizes, merge: int, window: int) -> PackedLayout:
    """Returns the layout of packed images. Those of the last calls are kept.

    Args:
        grid: (t, h, w) of each image; h and w are multiples of `merge`.
        merge, window: as of `PackedSizes`.
    """
    # A graph's tensors, and those of fake modes, must not be kept, nor meet tensors that were kept.
    compute = _kept_layout if can_look(torch.empty(0, device="cpu")) else _layout
    return compute(grid, merge, window)


def _layout(grid: GridSizes, merge: int, window: int) -> PackedLayout:
    with torch.inference_mode(False):
        places, orders, windows, first = [], [], [], 0
        for t, h, w in grid:
            row = torch.arange(h, device="cpu")[:, None].expand(h, w)
            column = torch.arange(w, device="cpu").expand(h, w)
            grouped = [_grouped(x, merge) for x in (row, column)]
            places.append(torch.stack(grouped).repeat(1, t))
            if window:
                order, counts = _window_order(h // merge, w // merge, window)
                tokens = len(order)
                orders += [order + first + frame * tokens for frame in range(t)]
                windows += [count * merge * merge for count in counts] * t
                first += t * tokens
        frames = tuple(h * w for t, h, w in grid for _ in range(t))
        return PackedLayout(torch.cat(places, 1), frames, torch.cat(orders) if orders else None, tuple(windows))


_kept_layout = lru_cache(maxsize=4)(_layout)


def _grouped(x: Tensor, merge: int) -> Tensor:
    """Returns the values of a frame ``[h, w]``, window by window of ``merge x merge``."""
    return x.reshape(x.shape[0] // merge, merge, x.shape[1] // merge, merge).transpose(1, 2).flatten()


def _window_order(rows: int, columns: int, window: int) -> tuple[Tensor, list[int]]:
    """Returns the merged tokens of a frame in the order of its windows of attention, and how many each window has."""
    index = torch.arange(rows * columns, device="cpu").view(rows, columns)
    parts = [part.flatten() for row in index.split(window, 0) for part in row.split(window, 1)]
    return torch.cat(parts), [len(part) for part in parts]


def packed_mask(lengths: tuple[int, ...], device: torch.device) -> SpanMask | None:
    """Returns the mask by which each token sees the tokens of its own segment; None: there is one segment."""
    if len(lengths) <= 1:
        return None
    ends = on_device(list(accumulate(lengths)), device)
    counts, total = on_device(list(lengths), device), sum(lengths)
    end = torch.repeat_interleave(ends, counts, output_size=total)
    start = torch.repeat_interleave(ends - counts, counts, output_size=total)
    return SpanMask(start.int()[None], end.int()[None])


class PackedBlock(nn.Module):
    """Self-attention with one projection for query, key and value, then a feed-forward, each after a norm."""

    def __init__(self, sizes: PackedSizes) -> None:
        super().__init__()
        s = sizes
        norm = nn.LayerNorm if s.norm == "layer" else nn.RMSNorm
        self.heads = s.heads
        self.attention_norm = norm(s.width, eps=s.eps)
        self.qkv = nn.Linear(s.width, 3 * s.width)
        self.out_proj = nn.Linear(s.width, s.width)
        self.mlp_norm = norm(s.width, eps=s.eps)
        self.gate_proj = nn.Linear(s.width, s.mlp) if s.gated else None
        self.up_proj = nn.Linear(s.width, s.mlp)
        self.activation = ACTIVATIONS[s.activation]()
        self.down_proj = nn.Linear(s.mlp, s.width)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], mask: SpanMask | None) -> tuple[Tensor, Heads]:
        """Returns ``[N, width]`` after the block, and query and key ``[1, H, N, D]`` of its attention.

        Args:
            x: ``[N, width]``.
            angles: cosine and sine ``[1, 1, N, D / 2]``, fp32.
            mask: which tokens each token sees; None: all.
        """
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))  # [N, 3, H, D]
        both, value = qkv[:, :2].permute(1, 2, 0, 3), qkv[:, 2].transpose(0, 1)  # [2, H, N, D], [H, N, D]
        both = both if qkv.dtype == torch.float64 else both.float()
        query, key = rotate(both, angles).to(qkv.dtype)[:, None].unbind()  # [1, H, N, D] each
        out = cross_attention(query, key, value[None], mask)  # [1, H, N, D]
        x = x + self.out_proj(out[0].transpose(0, 1).flatten(1))
        return x + self._feed_forward(self.mlp_norm(x)), Heads(query, key)

    def _feed_forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x)
        if self.gate_proj is None:
            return self.down_proj(self.activation(up))
        return gated_down(self.gate_proj(x), up, self.activation, self.down_proj)


class Encoded(NamedTuple):
    """What a `PackedEncoder` returns.

    Attributes:
        x: ``[N, width]``, in the order of the windows of attention.
        order: of the merged tokens, as in `PackedLayout`, on the device.
        kept: the features ``[N, width]`` behind each of the layers that were asked for.
        heads: query and key of the last layer, ``[1, H, N, D]``.
        mask: of the last layer.
    """

    x: Tensor
    order: Tensor | None
    kept: tuple[Tensor, ...]
    heads: Heads
    mask: SpanMask | None


class PackedEncoder(nn.Module):
    """Maps the patches of packed images to features.

    Args:
        sizes: of the transformer.

    Source: Wang et al., "Qwen2-VL", 2024, section 2.1; windows of attention by Bai et al., "Qwen2.5-VL Technical
    Report", 2025, section 2.1.

    Example:
        >>> import torch
        >>> sizes = PackedSizes(width=32, layers=2, heads=4, mlp=64, inputs=3 * 2 * 8 * 8)
        >>> encoder = PackedEncoder(sizes)
        >>> encoder(torch.randn(4 * 6 + 2 * 2, 384), ((1, 4, 6), (1, 2, 2))).x.shape
        torch.Size([28, 32])
    """

    def __init__(self, sizes: PackedSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.patch = nn.Linear(sizes.inputs, sizes.width, bias=sizes.patch_bias)
        self.positions = nn.Embedding(sizes.positions**2, sizes.width) if sizes.positions else None
        self.blocks = nn.ModuleList(PackedBlock(sizes) for _ in range(sizes.layers))

    def forward(self, pixel_values: Tensor, grid: GridSizes, keep: tuple[int, ...] = ()) -> Encoded:
        """Returns the features.

        Args:
            pixel_values: patches ``[N, inputs]``, image after image.
            grid: (t, h, w) of each image, which add up to N patches.
            keep: the layers behind which features are wanted too.
        """
        s = self.sizes
        layout, device = packed_layout(grid, s.merge, s.window), pixel_values.device
        places = to_device(layout.places, device)
        x = self.patch(pixel_values.to(self.patch.weight.dtype))
        if self.positions is not None:
            x = x + self._interpolated(places, grid).to(x.dtype)
        order = None if layout.order is None else to_device(layout.order, device)
        unit = s.merge * s.merge
        if order is not None:
            x = x.unflatten(0, (-1, unit))[order].flatten(0, 1)
            places = places.unflatten(1, (-1, unit))[:, order].flatten(1)
        angles = self._angles(places)
        whole = packed_mask(layout.frames, device)
        parts = packed_mask(layout.windows, device) if s.window else whole
        kept: dict[int, Tensor] = {}
        for layer, block in enumerate(self.blocks):
            mask = whole if layer in s.full_layers else parts
            x, heads = block(x, angles, mask)
            if layer in keep:
                kept[layer] = x
        return Encoded(x, order, tuple(kept[layer] for layer in keep), heads, mask)

    def _angles(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Returns cosine and sine ``[1, 1, N, D / 2]``: half of the frequencies follow the row, half the column."""
        half = self.sizes.width // self.sizes.heads // 2
        power = torch.arange(0, half, 2, dtype=torch.float32, device=places.device) / half
        angles = places.float()[:, :, None] * (1.0 / 10000.0**power)  # [2, N, D / 4]
        angles = torch.cat([angles[0], angles[1]], dim=-1)[None, None]
        return angles.cos(), angles.sin()

    def _interpolated(self, places: Tensor, grid: GridSizes) -> Tensor:
        """Returns the position embedding of each patch ``[N, width]``: bilinear, the grid's corners on the corners."""
        assert self.positions is not None
        side, device = self.sizes.positions, places.device
        counts = on_device([t * h * w for t, h, w in grid], device)
        corners, weights = [], []
        for axis in range(2):
            sizes = on_device([image[1 + axis] for image in grid], device)
            size = torch.repeat_interleave(sizes, counts, output_size=places.shape[1])
            at = places[axis].float() * (side - 1) / (size - 1).clamp(min=1)
            low = at.floor()
            part = at - low
            low = low.long()
            corners.append((low, (low + 1).clamp(max=side - 1)))
            weights.append((1 - part, part))
        index = torch.stack([row * side + column for row in corners[0] for column in corners[1]], dim=1)  # [N, 4]
        weight = torch.stack([row * column for row in weights[0] for column in weights[1]], dim=1)
        return (self.positions(index) * weight[:, :, None]).sum(1)
