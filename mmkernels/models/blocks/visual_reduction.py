"""`VisualReducer`: fewer visual tokens of images of any size, behind the encoder of a `VisionLanguageModel`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from mmkernels.masks import SpanMask
from mmkernels.models.blocks.encoder import Heads
from mmkernels.models.blocks.visual import Visual
from mmkernels.nn import TokenReducer
from mmkernels.nn.reducer import Reduced
from mmkernels.ops.attention.attention_received import attention_received
from mmkernels.ops.tokens.groups import group_means

KINDS = ("none", "pool", "tome", "select", "diverse")
"""Kinds of `TokenReducer` without weights: a checkpoint has none for the others."""


class VisualReducer:
    """Leaves fewer tokens of each image of a `Visual`, and moves their positions and deep features with them.

    "select" ranks the tokens by the attention that their patches receive in the encoder's last layer; "tome" and
    "diverse" compare the tokens themselves, as DivPrune does. (With the last layer's keys, which Qwen-VL rotates, the
    model of examples/tradeoff_digits.py answers 45 % of the questions instead of 79 % from a third of the tokens.) A
    pooled or merged token stands at the mean of its tokens' positions, rounded down.

    Args:
        text: the reducer, as `TokenReducer.parse` reads it; one without weights.
        width: of the tokens.

    Attributes:
        reducer: the `TokenReducer`.
        needs_scores: whether `reduce` needs scores.

    Raises:
        ValueError: there is no such reducer, or it has weights.

    Example:
        >>> import torch
        >>> visual = Visual(torch.randn(24, 8), (24,), (24,))
        >>> VisualReducer("pool:2", 8).reduce(visual, [(1, 4, 6)]).lengths
        (6,)
    """

    def __init__(self, text: str, width: int) -> None:
        if not isinstance(text, str) or text.partition(":")[0] not in KINDS:
            must = (
                "a reducer without weights: none, pool:2, tome:0.5, select:0.25, diverse:64, or a budget (pool:<=256)"
            )
            raise ValueError(f"reduce must be {must}; got {text!r}")
        self.text = text
        self.reducer = TokenReducer.parse(text, width)
        self.reducer.dim = None  # positions are reduced too, which are not as wide
        self.needs_scores = self.reducer.kind == "select" and self.reducer.scorer == "scores"

    def reduce(self, visual: Visual, sizes: Sequence[tuple[int, int, int]], scores: Tensor | None = None) -> Visual:
        """Returns the tokens that are left.

        Args:
            visual: images.
            sizes: (t, h, w) of each image, in tokens.
            scores: ``[V]``, such as `head_scores` returns, where they are needed.
        """
        if not visual.lengths:
            return visual
        reduced = self.reducer(visual.tokens, list(sizes), scores=scores if self.needs_scores else None)
        moved = self._mover(reduced, list(sizes))
        places = None if visual.places is None else moved(visual.places.float()).floor().long()
        lengths = tuple(int(length) for length in reduced.lengths)
        deep = tuple(moved(x) for x in visual.deep)
        return visual._replace(tokens=reduced.x, lengths=lengths, places=places, deep=deep)

    def _mover(self, reduced: Reduced, sizes: list[tuple[int, int, int]]) -> Callable[[Tensor], Tensor]:
        """Returns what does to further values of the tokens, ``[V, D]``, what was done to the tokens."""
        if reduced.positions is not None:
            return lambda x: x[reduced.positions]
        if reduced.assignment is not None:
            assignment, count = reduced.assignment, reduced.x.shape[0]
            return lambda x: group_means(x, None, assignment, count)[0].to(x.dtype)
        return lambda x: self.reducer(x, sizes).x


def head_scores(heads: Heads, mask: SpanMask | None, unit: int) -> Tensor:
    """Returns how much attention each token's patches receive in a layer, fp32 ``[V]``: the mean over them and heads.

    Args:
        heads: query and key ``[1, H, N, D]`` of packed patches, `unit` of them for each token.
        mask: of the layer.
    """
    received = attention_received(heads.query, heads.key, mask)  # [1, H, N]
    return received[0].mean(0).view(-1, unit).mean(1)
