"""`VisualCache`: keys and values of images, which are computed once, and to which every later token attends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from mmkernels.masks import SpanMask
from mmkernels.nn.checks import check_positive
from mmkernels.nn.cross_attention import KeyValue
from mmkernels.nn.token_buffer import TokenBuffer
from mmkernels.runtime.checks import check_range, check_tensor, is_known, is_traced

_Sizes = tuple[int, int, int, torch.dtype, torch.device]
"""Batch, heads, head width, dtype and device."""


class VisualCache:
    """Visual keys and values of every cross-attention layer, image after image.

    The cache is filled once per image. It is read at each decode step, in each later turn, and by many questions on one
    image: a cache of batch 1 is shared, without a copy, by a query batch of any size. Images may have different numbers
    of tokens. Each image has an id that never changes: the first image has id 0, the next 1, and so on, also after
    images were dropped.

    With a token budget, the oldest images are evicted to make room for new ones. (Not the least recently used: the
    image that a token sees is known on the device only, and reading it would synchronise a GPU at every step. In
    Flamingo a token sees the last image before it, so the oldest image is the least likely to be needed.)

    In a program of `torch.export` or `torch.jit.trace`, the images that are appended inside of it are the example's in
    number and in numbers of tokens, or the program raises; the batch and the text may have any size.

    Args:
        num_layers: cross-attention layers.
        max_tokens: the largest number of visual tokens; None: no limit.
        reserve: how many tokens to allocate with the first append, so that later ones need no allocation. 0: the first
            append keeps the given tensors without a copy (and with their gradient).

    Raises:
        ValueError: a wrong shape, an image larger than the budget, or an unknown id.

    Source: the key/value cache of Alayrac et al., "Flamingo", 2022, section 2.2: visual keys and values do not depend
    on the text.

    Example:
        >>> import torch, mmkernels
        >>> from mmkernels.nn import CrossAttention, VisualCache
        >>> layers = [CrossAttention(64, context_dim=32, num_heads=4) for _ in range(2)]
        >>> cache = VisualCache(num_layers=2, max_tokens=100)
        >>> images = torch.randn(1, 24, 32)  # one image of 8 tokens, one of 16
        >>> cache.append([layer.project(images) for layer in layers], lengths=[8, 16])
        [0, 1]
        >>> sees = torch.tensor([[-1, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]])  # 3 questions, ids per token
        >>> text = torch.randn(3, 4, 64)
        >>> layers[0](text, key_value=cache[0], mask=cache.mask(sees)).shape
        torch.Size([3, 4, 64])
    """

    def __init__(self, num_layers: int, *, max_tokens: int | None = None, reserve: int = 0) -> None:
        check_positive("num_layers", num_layers)
        if max_tokens is not None:
            check_positive("max_tokens", max_tokens)
        self.max_tokens = max_tokens
        self._layers = [(TokenBuffer(reserve), TokenBuffer(reserve)) for _ in range(num_layers)]
        self._lengths: dict[int, int] = {}  # id -> tokens of the images held, oldest first
        self._next_id = 0
        self._sizes: list[tuple[_Sizes, _Sizes]] | None = None  # of each layer's key and value; set by the first append
        self._table: tuple[Tensor, Tensor] | None = None  # id -> place, and offsets; None after a change of images

    # Content.

    def __len__(self) -> int:
        """The number of layers."""
        return len(self._layers)

    def __getitem__(self, layer: int) -> KeyValue:
        """Returns key and value ``[B, Hkv, tokens, D]`` of a layer: views that are valid until the next change."""
        key, value = self._layers[layer]
        return key.view(), value.view()

    def __iter__(self) -> Iterator[KeyValue]:
        return (self[layer] for layer in range(len(self)))

    @property
    def image_ids(self) -> list[int]:
        """The ids of the images in the cache, oldest first."""
        return list(self._lengths)

    @property
    def next_id(self) -> int:
        """The id of the next image: the number of images that were appended so far."""
        return self._next_id

    @property
    def num_tokens(self) -> int:
        return sum(self._lengths.values())

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each image in the cache, oldest first."""
        return list(self._lengths.values())

    @property
    def batch_size(self) -> int:
        """The batch of keys and values; 1: all queries share the images; 0: nothing was appended yet."""
        return 0 if self._sizes is None else self._sizes[0][0][0]

    # Changes.

    def append(self, key_values: Sequence[KeyValue], lengths: Iterable[int]) -> list[int]:
        """Appends images.

        Args:
            key_values: for each layer key ``[B, Hkv, n, D]`` and value ``[B, Hkv, n, Dv]``, the same B in every append.
            lengths: the number of tokens of each image; they add up to n.

        Returns:
            The ids of the new images. If the budget is too small for all images, the oldest are evicted; these may
            include the first of the new ones.
        """
        lengths = [int(length) for length in lengths]
        self._check(key_values, lengths)
        ids = list(range(self._next_id, self._next_id + len(lengths)))
        skip = self._make_room(lengths)  # how many of the new images do not fit
        skipped_tokens, count = sum(lengths[:skip]), sum(lengths)
        for buffers, tensors in zip(self._layers, key_values):
            for buffer, tokens in zip(buffers, tensors):
                if is_traced():  # the program raises where it is given other images
                    tokens = tokens.reshape(*tokens.shape[:2], count, tokens.shape[3])
                buffer.append(tokens[:, :, skipped_tokens:])
        self._sizes = [(_sizes(key), _sizes(value)) for key, value in key_values]
        self._lengths.update(list(zip(ids, lengths))[skip:])
        self._next_id += len(lengths)
        self._table = None
        return ids

    def drop(self, image_ids: Iterable[int]) -> None:
        """Removes images by id. A token that sees only a removed image sees nothing."""
        image_ids = set(image_ids)
        unknown = sorted(image_ids - self._lengths.keys())
        if unknown:
            raise ValueError(f"image_ids must be among those held, {self.image_ids}, got {unknown}")
        for image_id in sorted(image_ids, reverse=True):  # the last first, so that fewer tokens are moved
            start = sum(length for earlier, length in self._lengths.items() if earlier < image_id)
            for buffers in self._layers:
                for buffer in buffers:
                    buffer.remove(start, start + self._lengths[image_id])
            del self._lengths[image_id]
        self._table = None

    def clear(self) -> None:
        """Removes all images. Ids are not used again."""
        self.drop(self.image_ids)

    def _make_room(self, lengths: list[int]) -> int:
        """Evicts the oldest images until the new ones fit, and returns how many of the new ones do not."""
        if self.max_tokens is None:
            return 0
        excess = self.num_tokens + sum(lengths) - self.max_tokens
        oldest = []
        for image_id, length in self._lengths.items():
            if excess <= 0:
                break
            oldest.append(image_id)
            excess -= length
        self.drop(oldest)
        skip = 0
        while excess > 0:
            excess -= lengths[skip]
            skip += 1
        return skip

    # Masks.

    def mask(self, image_ids: Tensor) -> SpanMask:
        """Returns the mask in which each text token sees one image. It sees nothing if the image was removed.

        Args:
            image_ids: the id of the image of each token, integers ``[B, Lq]``; -1: none.
        """
        check_tensor("image_ids", image_ids)
        if image_ids.is_floating_point() or image_ids.dtype == torch.bool:
            raise TypeError(f"image_ids must be integers, got {image_ids.dtype}")
        check_range("image_ids", image_ids, -1, self._next_id - 1, note=" (none)")
        place_of, offsets = self._tables(image_ids.device)
        return SpanMask.media(place_of[image_ids.long()], media_offsets=offsets)

    def token_mask(self, images: Tensor) -> Tensor:
        """Returns which visual tokens each text token sees, bool ``[B, Lq, tokens]``.

        Args:
            images: which images it sees, bool ``[B, Lq, next_id]``.
        """
        check_tensor("images", images)
        if images.dtype != torch.bool:
            raise TypeError(f"images must be bool, got {images.dtype}")
        if images.shape[-1] != self._next_id:
            raise ValueError(f"images must be [B, Lq, {self._next_id}], got shape {tuple(images.shape)}")
        image_of = [image_id for image_id, length in self._lengths.items() for _ in range(length)]  # of each token
        return images[..., torch.tensor(image_of, dtype=torch.long, device=images.device)]

    def _tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._table is None or self._table[0].device != device:
            place_of = torch.full((self._next_id + 1,), -1)  # the last entry belongs to id -1
            place_of[self.image_ids] = torch.arange(len(self._lengths))
            offsets = torch.tensor([0, *self._lengths.values()]).cumsum(0)
            self._table = place_of.to(device), offsets.to(device)
        return self._table

    def _check(self, key_values: Sequence[KeyValue], lengths: list[int]) -> None:
        if len(key_values) != len(self):
            raise ValueError(f"key_values must be for {len(self)} layers, got {len(key_values)}")
        if any(length < 1 for length in lengths):
            raise ValueError(f"lengths must be positive, got {lengths}")
        if self.max_tokens is not None and max(lengths, default=0) > self.max_tokens:
            raise ValueError(f"max_tokens must hold the largest image, of {max(lengths)} tokens, got {self.max_tokens}")
        batch = self.batch_size
        for layer, (key, value) in enumerate(key_values):
            for name, x in (("key", key), ("value", value)):
                check_tensor(f"{name} of layer {layer}", x)
                batch = x.shape[0] if x.dim() and is_known(batch == 0) else batch
                if x.dim() != 4 or x.shape[0] != batch or x.shape[2] != sum(lengths):
                    raise ValueError(
                        f"{name} of layer {layer} must be [{batch}, H, {sum(lengths)}, D], got shape {tuple(x.shape)}"
                    )
                if self._sizes is not None and _sizes(x) != self._sizes[layer][name == "value"]:
                    raise ValueError(
                        f"{name} of layer {layer} must have the earlier images' batch, heads, width, dtype and device, "
                        f"{self._sizes[layer][name == 'value']}, got {_sizes(x)}"
                    )


def _sizes(x: Tensor) -> _Sizes:
    return x.shape[0], x.shape[1], x.shape[3], x.dtype, x.device
