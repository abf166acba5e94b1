"""`Visual`: encoded images as tokens of a text, and where in the text they stand."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from mmkernels.ops.tokens.ranking import on_device
from mmkernels.runtime.checks import can_look


class Visual(NamedTuple):
    """Images, videos or sounds as the tokens that the language model reads: encoded once, for any number of prompts.

    Attributes:
        tokens: ``[V, C]``, image after image.
        lengths: how many tokens each image has.
        marked: for how many tokens of the prompt each image stands: `lengths`, unless a reducer left fewer.
        places: (t, h, w) of each token from the first position of its image on, int64 ``[V, 3]``; None: positions have
            one axis, on which each token takes one place.
        advances: by how many positions the text goes on behind each image.
        deep: further features ``[V, C]``, one tensor for each of the first layers (DeepStack).

    Example:
        >>> import torch
        >>> from mmkernels.models import QwenVL
        >>> model = QwenVL.from_size("tiny")
        >>> images = model.encode(torch.rand(24 + 8, 3 * 2 * 4 * 4), [(1, 4, 6), (1, 2, 4)])
        >>> images.lengths, images.tokens.shape
        ((6, 2), torch.Size([8, 64]))
    """

    tokens: Tensor
    lengths: tuple[int, ...]
    marked: tuple[int, ...]
    places: Tensor | None = None
    advances: tuple[int, ...] = ()
    deep: tuple[Tensor, ...] = ()


def grid_places(sizes: Sequence[tuple[int, int, int]], intervals: Sequence[float]) -> Tensor:
    """Returns (t, h, w) of the tokens of images, int64 ``[V, 3]``, computed on the host.

    Args:
        sizes: (t, h, w) of each image, in tokens.
        intervals: by how many positions two steps of each image's t are apart.
    """
    places = []
    for (t, h, w), interval in zip(sizes, intervals, strict=True):
        t_axis, h_axis, w_axis = (torch.arange(size, device="cpu") for size in (t, h, w))
        axes = torch.meshgrid((t_axis * interval).long(), h_axis, w_axis, indexing="ij")
        places.append(torch.stack(axes, dim=-1).flatten(0, 2))
    return torch.cat(places) if places else torch.zeros(0, 3, dtype=torch.long)


def split(visual: Visual, first: int) -> list[Visual]:
    """Returns the first images, and the others."""
    at = sum(visual.lengths[:first])
    tensors = [visual.tokens.tensor_split([at]), *(x.tensor_split([at]) for x in visual.deep)]
    places = (None, None) if visual.places is None else visual.places.tensor_split([at])
    return [
        Visual(
            tensors[0][half],
            visual.lengths[which],
            visual.marked[which],
            places[half],
            visual.advances[which],
            tuple(pair[half] for pair in tensors[1:]),
        )
        for half, which in enumerate((slice(None, first), slice(first, None)))
    ]


class Media(NamedTuple):
    """What a prompt must mark.

    Attributes:
        name: for errors: "image", "video" or "sound".
        marker: the token that stands for it in a prompt.
        marked: how many markers each one has.
    """

    name: str
    marker: int
    marked: tuple[int, ...]


def check_markers(input_ids: Tensor, valid: Tensor, media: Sequence[Media]) -> None:
    """Raises unless the prompts have as many markers as there are tokens for, each image's in one row.

    Values are looked at on a CPU only.
    """
    if not can_look(input_ids) or not input_ids.is_cpu:
        return
    for kind in media:
        rows = ((input_ids == kind.marker) & valid).nonzero()[:, 0]  # of each marker
        if rows.numel() != sum(kind.marked):
            each = ", ".join(map(str, kind.marked[:8])) + (", ..." if len(kind.marked) > 8 else "")
            must = f"{sum(kind.marked)} tokens {kind.marker} ({kind.name}) for {len(kind.marked)} {kind.name}s"
            of_each = f" of {each} tokens" if kind.marked else ""
            raise ValueError(f"input_ids must have {must}{of_each}, got {rows.numel()}")
        ends = list(accumulate(kind.marked))
        for number, (end, count) in enumerate(zip(ends, kind.marked, strict=True)):
            if count and rows[end - 1] != rows[end - count]:
                raise ValueError(
                    f"input_ids must have the {count} tokens of {kind.name} {number} in one row, got them in rows "
                    f"{int(rows[end - count])} to {int(rows[end - 1])}"
                )


def token_numbers(markers: Tensor) -> Tensor:
    """Returns the number of the visual token at each place of ``markers [B, L]`` (bool), int64; -1: none."""
    numbers = markers.flatten().long().cumsum(0).view_as(markers) - 1
    return torch.where(markers, numbers, -1)


def positions_of(valid: Tensor, markers: Sequence[Tensor], visuals: Sequence[Visual], first: Tensor) -> Tensor:
    """Returns the M-RoPE positions (t, h, w) of new tokens, int64 ``[3, B, L]``; 0 of padding.

    A text token takes the next position, the same on the three axes. The tokens of an image lie on a grid that begins
    there, and the text goes on behind its longer side. Nothing waits for the device.

    Args:
        valid: bool ``[B, L]``, False: padding.
        markers: for each of `visuals` where its tokens stand, bool ``[B, L]``.
        visuals: images, videos.
        first: the position of the first token, int64 ``[B]``.

    Source: Wang et al., "Qwen2-VL", 2024, section 2.1, figure 3.
    """
    step = valid.long()
    offsets = torch.zeros(3, *valid.shape, dtype=torch.long, device=valid.device)
    for mask, visual in zip(markers, visuals, strict=True):
        if not visual.tokens.shape[0]:
            continue
        assert visual.places is not None
        numbers = token_numbers(mask).clamp(min=0, max=visual.tokens.shape[0] - 1)
        step = torch.where(mask, _steps(visual, valid.device)[numbers], step)
        offsets = torch.where(mask, visual.places[numbers].movedim(-1, 0), offsets)
    before = step.cumsum(1) - step + first[:, None]  # [B, L]
    return (before + offsets) * valid


def _steps(visual: Visual, device: torch.device) -> Tensor:
    """Returns by how much the text's position grows at each token: at the last one of each image, int64 ``[V]``."""
    steps = [0] * visual.tokens.shape[0]
    for end, length, advance in zip(accumulate(visual.lengths), visual.lengths, visual.advances, strict=True):
        if length:
            steps[end - 1] = advance
    return on_device(steps, device)


class Shortened(NamedTuple):
    """What `shorten` returns: the columns that stay, for each row, and which of them are tokens."""

    columns: Tensor  # int64 [B, L']
    valid: Tensor  # bool [B, L']


def shorten(valid: Tensor, markers: Sequence[Tensor], visuals: Sequence[Visual]) -> Shortened | None:
    """Returns which tokens of a prompt are left where reducers leave images fewer tokens; None: all.

    An image keeps its first markers. Rows that lose more are padded on the left. With several rows this waits for the
    device.

    Args:
        valid, markers, visuals: as of `positions_of`.
    """
    if all(visual.lengths == visual.marked for visual in visuals):
        return None
    keep = valid
    for mask, visual in zip(markers, visuals, strict=True):
        table = [at < length for length, count in zip(visual.lengths, visual.marked) for at in range(count)]
        if table:
            of_marker = on_device([int(stays) for stays in table], valid.device).bool()
            keep = keep & (~mask | of_marker[token_numbers(mask).clamp(min=0, max=len(table) - 1)])
    batch, length = valid.shape
    if batch == 1:
        left = length - sum(sum(visual.marked) - sum(visual.lengths) for visual in visuals)
    else:
        left = int(keep.sum(1).amax())
    columns = keep.long().argsort(dim=1, stable=True)[:, length - left :]
    return Shortened(columns, keep.gather(1, columns))
