"""Which image each text token sees: from markers in the text, or from a mask over images."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.masks import SpanMask
from mmkernels.nn import VisualCache
from mmkernels.runtime.checks import check_range


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
    """Which images each new token sees.

    Args:
        input_ids, valid: tokens ``[B, L]``, and which are no padding.
        image_token_id: the marker of an image in the text, or None.
        media_index: integers ``[B, L]``, the answer itself; or
        image_attention_mask: ``[B, L, images]``; or neither: by the markers, of which each row must have one for every
            image from `first_id` on.
        images: number of image ids, the new images' too.
        first_id: id of the first image that the text before these tokens doesn't account for.
        before: what the token before these sees, as `last_of` this function's result.

    Returns:
        Image ids, int64 ``[B, L]``, -1: none; or, where a token sees several, bool ``[B, L, images]``.
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
    """Each token sees the last image at or before it.

    Args:
        markers: bool ``[B, L]``: where an image stands in the text.
        first_id: id of the image that each row's first marker stands for.
        images: number of image ids.
        before: what the token before the first sees, int64 ``[B]`` or bool ``[B, fewer images]``; None: nothing.

    Returns:
        int64 ``[B, L]``: image ids, -1: none; or, where `before` is bool, bool ``[B, L, images]``.
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
    """Raise unless every row has a marker for each image. Syncs, unless there is no token."""
    counts = markers.sum(1).tolist() if markers.shape[1] else []
    for row, count in enumerate(counts):
        if count != images:
            few = (
                "; give media_index or image_attention_mask where a text doesn't use each image"
                if count < images
                else ""
            )
            raise ValueError(
                f"input_ids row {row} must have as many image markers as images, {images}, got {count}{few}"
            )


def media_from_image_mask(image_mask: Tensor) -> Tensor:
    """Image ids ``[B, L]`` where each token sees at most one image, else the mask as bool ``[B, L, images]``. Syncs."""
    sees = image_mask.bool()
    count = sees.sum(-1)
    if sees.shape[-1] == 0 or int(count.max()) > 1:
        return sees
    return torch.where(count > 0, sees.to(torch.uint8).argmax(-1), -1)


def carry_on(sees: Tensor, length: int, images: int) -> Tensor:
    """What `length` tokens see that see what one did: int64 ``[B]`` or bool ``[B, fewer images]``."""
    if sees.dtype != torch.bool:
        return sees[:, None].expand(-1, length)
    new = sees.new_zeros(sees.shape[0], images - sees.shape[1])
    return torch.cat([sees, new], dim=1)[:, None].expand(-1, length, -1)


def join(first: Tensor, second: Tensor, images: int) -> Tensor:
    """What two runs of tokens see, one after the other: ids ``[B, L]``, or bool ``[B, L, images]`` if either is."""
    if first.dtype != second.dtype:
        first, second = (x if x.dtype == torch.bool else _one_hot(x, images) for x in (first, second))
    return torch.cat([first, second], dim=1)


def last_of(x: Tensor, valid: Tensor) -> Tensor:
    """Of ``x [B, L, ...]`` each row's last valid token, ``[B, ...]``; the first one's of a row with none."""
    place = torch.arange(valid.shape[1], device=valid.device)
    last = torch.where(valid, place, 0).amax(1)
    return x[torch.arange(x.shape[0], device=x.device), last]


def _one_hot(ids: Tensor, images: int) -> Tensor:
    return ids[..., None] == torch.arange(images, device=ids.device)


def visual_mask(sees: Tensor, cache: VisualCache) -> SpanMask | Tensor:
    """The mask over a cache's visual tokens, spans where that is possible.

    Args:
        sees: image ids ``[B, L]``, or bool ``[B, L, images]`` (which syncs, but for one query).
    """
    if sees.dtype != torch.bool:
        return cache.mask(sees)
    dense = cache.token_mask(sees)  # [B, L, tokens]
    if dense.shape[1] == 1:
        return SpanMask.from_key_mask(dense[:, 0])
    spans = SpanMask.try_from_dense(dense)
    return dense[:, None] if spans is None else spans
