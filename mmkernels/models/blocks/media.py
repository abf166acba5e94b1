"""Which images each text token sees: derived from markers in the text, or from a mask over images."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.masks import SpanMask
from mmkernels.nn import VisualCache
from mmkernels.runtime.checks import can_look, check_range


def images_seen(
    input_ids: Tensor,
    valid: Tensor,
    *,
    image_token_id: int | None,
    media_index: Tensor | None,
    image_attention_mask: Tensor | None,
    images: int,
    first_id: int,
    before: Tensor | None,
) -> Tensor:
    """Returns which images each new token sees.

    Args:
        input_ids, valid: the tokens ``[B, L]``, and bool ``[B, L]``, False: padding.
        image_token_id: the token that marks an image in the text, or None.
        media_index: the image that each token sees, integers ``[B, L]``; or
        image_attention_mask: ``[B, L, images]``. If both are None, the markers decide: each row must have a marker for
            every image from `first_id` on.
        images: the number of image ids, including the new images.
        first_id: the id of the first image that has no marker in the text before these tokens.
        before: what the token before these sees, `last_of` of an earlier result of this function; None: nothing.

    Returns:
        Image ids, int64 ``[B, L]``, -1: none; or bool ``[B, L, images]`` if a token sees several images.
    """
    shape = tuple(input_ids.shape)
    if media_index is not None and image_attention_mask is not None:
        raise ValueError("give media_index or image_attention_mask, not both")
    if media_index is not None:
        return _checked(media_index, shape, images)
    if image_attention_mask is not None:
        if image_attention_mask.shape != (*shape, images):
            got = tuple(image_attention_mask.shape)
            raise ValueError(f"image_attention_mask must be {[*shape, images]}, got shape {got}")
        return media_from_image_mask(image_attention_mask)
    if image_token_id is None and images > first_id:
        raise ValueError("media_index must be given for a model whose config has no image_token_id")
    markers = valid & (input_ids == (-1 if image_token_id is None else image_token_id))
    check_markers(markers, images - first_id)
    return media_from_markers(markers, first_id, images, before)


def _checked(media_index: Tensor, shape: tuple[int, ...], images: int) -> Tensor:
    if media_index.shape != shape or media_index.is_floating_point() or media_index.dtype == torch.bool:
        got = f"{media_index.dtype} {tuple(media_index.shape)}"
        raise ValueError(f"media_index must be integers {list(shape)} as input_ids, got {got}")
    check_range("media_index", media_index, -1, images - 1, note=" (none)")
    return media_index.long()


def media_from_markers(markers: Tensor, first_id: int, images: int, before: Tensor | None = None) -> Tensor:
    """Returns what each token sees if it sees the last image at or before it.

    Args:
        markers: bool ``[B, L]``: which tokens mark an image.
        first_id: the id of the image that the first marker of each row marks.
        images: the number of image ids.
        before: what the token before the first sees, int64 ``[B]`` or bool ``[B, fewer images]``; None: nothing.

    Returns:
        Image ids, int64 ``[B, L]``, -1: none; or bool ``[B, L, images]`` if `before` is bool.
    """
    count = markers.long().cumsum(1)
    sees = torch.where(count > 0, count + (first_id - 1), -1)
    if before is None:
        return sees
    earlier = carry_on(before, count.shape[1], images)
    if earlier.dtype == torch.bool:
        return torch.where((count > 0)[..., None], _one_hot(sees, images), earlier)
    return torch.where(count > 0, sees, earlier)


def check_markers(markers: Tensor, images: int) -> None:
    """Raises unless every row has one marker per image. Syncs if there are tokens; a traced call is not checked."""
    counts = markers.sum(1).tolist() if markers.shape[1] and can_look(markers) else []
    for row, count in enumerate(counts):
        if count != images:
            hint = "; give media_index or image_attention_mask if a text does not use each image"
            must = f"input_ids row {row} must have as many image markers as images, {images}, got {count}"
            raise ValueError(must + (hint if count < images else ""))


def media_from_image_mask(image_mask: Tensor) -> Tensor:
    """Returns image ids ``[B, L]`` if each token sees at most one image, else bool ``[B, L, images]``.

    Syncs. Where a graph is traced, which must serve other masks too, the result is bool.
    """
    sees = image_mask.bool()
    count = sees.sum(-1)
    if sees.shape[-1] == 0 or not can_look(sees) or int(count.max()) > 1:
        return sees
    return torch.where(count > 0, sees.to(torch.uint8).argmax(-1), -1)


def carry_on(sees: Tensor, length: int, images: int) -> Tensor:
    """Repeats what one token sees, int64 ``[B]`` or bool ``[B, fewer images]``, for `length` tokens."""
    if sees.dtype != torch.bool:
        return sees[:, None].expand(-1, length)
    new = sees.new_zeros(sees.shape[0], images - sees.shape[1])
    return torch.cat([sees, new], dim=1)[:, None].expand(-1, length, -1)


def join(first: Tensor, second: Tensor, images: int) -> Tensor:
    """Concatenates what two runs of tokens see: image ids ``[B, L]``, or bool ``[B, L, images]`` if either is bool."""
    if first.dtype != second.dtype:
        first, second = (x if x.dtype == torch.bool else _one_hot(x, images) for x in (first, second))
    return torch.cat([first, second], dim=1)


def last_of(x: Tensor, valid: Tensor) -> Tensor:
    """Returns the last valid token of each row of ``x [B, L, ...]``, ``[B, ...]``; the first token if none is valid."""
    position = torch.arange(valid.shape[1], device=valid.device)
    last = torch.where(valid, position, 0).amax(1)
    return x[torch.arange(x.shape[0], device=x.device), last]


def _one_hot(ids: Tensor, images: int) -> Tensor:
    return ids[..., None] == torch.arange(images, device=ids.device)


def visual_mask(sees: Tensor, cache: VisualCache) -> SpanMask | Tensor:
    """Returns the mask over the visual tokens of a cache: a SpanMask if one equals it, else a dense mask.

    Args:
        sees: image ids ``[B, L]``, or bool ``[B, L, images]``, which syncs if L is not 1 and no graph is traced.
    """
    if sees.dtype != torch.bool:
        return cache.mask(sees)
    dense = cache.token_mask(sees)  # [B, L, tokens]
    if dense.shape[1] == 1:
        return SpanMask.from_key_mask(dense[:, 0])
    spans = SpanMask.try_from_dense(dense) if can_look(dense) else None
    return dense[:, None] if spans is None else spans
