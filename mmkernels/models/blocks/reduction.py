"""`PatchReducer`: fewer visual tokens of a `VisionTransformer`'s features, chosen by what its last layer knows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmkernels.models.blocks.encoder import Heads
from mmkernels.models.blocks.vision import VisionTransformer
from mmkernels.nn import TokenReducer
from mmkernels.nn.reducer import Reduced
from mmkernels.ops.attention.attention_received import attention_received
from mmkernels.ops.tokens.inputs import grid_sizes


class PatchReducer(nn.Module):
    """Makes fewer tokens of the features of images, whose class token it keeps as it is.

    "select" ranks the patches by `class_attention`; "tome" compares the last layer's keys, the mean over heads, as its
    authors do (Bolya et al., "Token Merging: Your ViT But Faster", 2023, section 3).

    Args:
        text: the reducer, as `TokenReducer.parse` reads it.
        vision: what makes the features.

    Attributes:
        reducer: the `TokenReducer`.
        grid: the patches of an image as (1, rows, columns).
        protect: 1 with a class token, which comes first and stays; else 0.
        tokens: the tokens that an image has afterwards, the class token included.
        needs_heads: whether `forward` needs the last layer's query and key.

    Raises:
        ValueError: there is no such reducer, or it does not fit the number of patches.

    Example:
        >>> import torch
        >>> from mmkernels.models.blocks.encoder import Sizes
        >>> sizes = Sizes(width=32, layers=2, heads=4, mlp=64)
        >>> vision = VisionTransformer(sizes, image_size=32, patch_size=8)
        >>> features, heads = vision.with_heads(torch.randn(3, 3, 32, 32))
        >>> reducer = PatchReducer("select:0.25", vision)
        >>> features.shape, reducer(features, heads).x.shape  # 16 patches, 4 patches; and the class token
        (torch.Size([3, 17, 32]), torch.Size([3, 5, 32]))
    """

    def __init__(self, text: str, vision: VisionTransformer) -> None:
        super().__init__()
        self.grid, self.protect = vision.grid, int(vision.class_token is not None)
        self.reducer = TokenReducer.parse(text, vision.positions.shape[1], protect=self.protect)
        self.tokens = self.reducer.tokens(self.grid)[0]
        self._by_attention = self.reducer.kind == "select" and self.reducer.scorer == "scores"
        self.needs_heads = self._by_attention or self.reducer.kind == "tome"

    def forward(self, features: Tensor, heads: Heads | None = None) -> Reduced:
        """Returns what is left of features ``[images, tokens, C]``.

        Args:
            features, heads: what `VisionTransformer.with_heads` returned; where it is not `needs_heads`, `heads` is not
                looked at.
        """
        if not self.needs_heads:
            return self.reducer(features, self.grid)
        if heads is None:
            raise ValueError(f"heads must be query and key of the last layer for {self.reducer.kind!r}, got None")
        if self._by_attention:
            return self.reducer(features, self.grid, scores=class_attention(heads, class_token=bool(self.protect)))
        return self.reducer(features, self.grid, metric=heads.key.mean(1))

    def token_of(self, reduced: Reduced) -> Tensor | None:
        """Returns to which token each patch of an image went: `token_of` of what `forward` returned."""
        return token_of(self.reducer, reduced, self.grid)


def token_of(reducer: TokenReducer, reduced: Reduced, grid: tuple[int, int, int]) -> Tensor | None:
    """Returns to which token each patch of an image went, int64 ``[images, patches]``, for pictures.

    Tokens are numbered from 0, protected ones left out; -1: to none. None: "perceiver" has any patch in any token.
    Where a "pool" with a budget has windows that overlap, a patch goes to the first.

    Args:
        reducer: what made fewer tokens.
        reduced: what it returned for images ``[images, tokens, C]``.
        grid: (1, rows, columns) of each.
    """
    images, left = reduced.x.shape[:2]
    _, height, width = grid
    protect = reducer.protect
    first = torch.arange(images, device=reduced.x.device)[:, None]
    if reduced.assignment is not None:
        return reduced.assignment[:, protect:] - first * left - protect
    if reduced.positions is not None:
        patches = reduced.positions[:, protect:] - first * (height * width + protect) - protect
        places = torch.arange(left - protect, device=patches.device).expand_as(patches)
        return places.new_full((images, height * width), -1).scatter(1, patches, places)
    if reduced.grid is None:
        return None
    _, rows, columns = grid_sizes(reduced.grid)[:3]
    row, column = _window_of(reducer, height, rows, 1), _window_of(reducer, width, columns, 2)
    return (row[:, None] * columns + column).flatten().to(first.device).expand(images, -1)


def _window_of(reducer: TokenReducer, size: int, windows: int, axis: int) -> Tensor:
    """Returns the window of each patch along an axis of the grid."""
    patch = torch.arange(size)
    # With a budget the windows are as even as can be, as those of adaptive pooling.
    return patch // reducer.window[axis] if reducer.budget is None else patch * windows // size


def class_attention(heads: Heads, *, class_token: bool = True) -> Tensor:
    """Returns how much each token matters, fp32 ``[B, tokens]``: the attention that it receives from the class token.

    The mean over heads; without a class token, from all tokens, the mean. It has no gradient.

    Source: Zhang et al., "[CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make VLM Inference
    Faster" (FasterVLM), 2024.
    """
    query = heads.query[:, :, :1] if class_token else heads.query
    return attention_received(query, heads.key).mean(1) / query.shape[2]
