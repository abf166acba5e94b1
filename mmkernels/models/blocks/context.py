"""`ContextCache`: a text in which images stand, over several turns, and what is forgotten of it under a budget."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmkernels.masks import SpanMask
from mmkernels.models.blocks.kv_cache import KVCache
from mmkernels.nn import TokenBuffer
from mmkernels.nn.checks import check_positive
from mmkernels.ops.tokens.select_diverse import select_diverse


@dataclass(frozen=True)
class ContextPolicy:
    """How many visual tokens a conversation may hold, and what becomes of old images when new ones need room.

    Args:
        max_visual_tokens: the most visual tokens that each row of a cache may hold.
        shrink: None: the oldest images are dropped until the new ones fit. A share between 0 and 1: first each old
            image keeps only this share of its tokens, those whose values in the last layer differ most from each other
            (DivPrune), the oldest image first; images are dropped only where that is not enough.

    What an image left in the text behind it stays: only its own keys and values are removed. Positions do not change.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> ContextPolicy(max_visual_tokens=2048, shrink=0.25)
        ContextPolicy(max_visual_tokens=2048, shrink=0.25)
    """

    max_visual_tokens: int
    shrink: float | None = None

    def __post_init__(self) -> None:
        check_positive("max_visual_tokens", self.max_visual_tokens)
        share = self.shrink
        if share is not None and not (isinstance(share, (int, float)) and 0 < share < 1):
            raise ValueError(f"shrink must be None or between 0 and 1, got {self.shrink!r}")

    def check(self, new: Tensor) -> None:
        """Raises a ValueError if new images alone have more tokens than allowed. Waits for the device.

        Args:
            new: how many visual tokens each row gets, int64 ``[B]``.
        """
        if int(new.amax()) > self.max_visual_tokens:
            must = f"max_visual_tokens must hold the new images, of {int(new.amax())} tokens"
            raise ValueError(f"{must}, got {self.max_visual_tokens}")


class ContextCache(KVCache):
    """A `KVCache` that knows which of its tokens belong to which image, and at which position the text goes on.

    Images are numbered 0, 1, ... as they came, over all rows and turns; within one call images come before videos. An
    image that was dropped keeps its number.

    Args:
        num_layers: the number of self-attention layers.
        reserve: how many tokens to allocate at once.

    Attributes:
        next_position: of the next token of each row, int64 ``[B]``; None: there is no text yet.
        num_images: how many images came, those that were dropped included.

    Example:
        >>> import torch
        >>> from mmkernels.models import QwenVL
        >>> model, marker = QwenVL.from_size("tiny").eval(), 127
        >>> pixels, grid = torch.rand(48, 3 * 2 * 4 * 4), [(1, 4, 4), (1, 4, 8)]  # images of 4 and 8 tokens
        >>> prompt = torch.tensor([[5, *[marker] * 4, 6, *[marker] * 8, 7]])
        >>> with torch.no_grad():
        ...     cache = model(prompt, pixels, image_grid_thw=grid).kv_cache
        >>> cache.drop([0])
        >>> cache.shrink(1, 0.5)
        >>> cache.image_ids, cache.visual_tokens(), cache.num_tokens
        ([1], tensor([4]), 7)
    """

    def __init__(self, num_layers: int, *, reserve: int = 0) -> None:
        super().__init__(num_layers, reserve=reserve)
        self.next_position: Tensor | None = None  # int64 [B]
        self.num_images = 0
        self._image_of: Tensor | None = None  # int64 [B, L]: -1: text
        self._shrunk: set[int] = set()

    @property
    def image_ids(self) -> list[int]:
        """The images of which tokens are held, the oldest first. Waits for the device."""
        if self._image_of is None:
            return []
        return [number for number in self._image_of.unique().tolist() if number >= 0]

    def visual_tokens(self) -> Tensor:
        """Returns how many visual tokens each row holds, int64 ``[B]``."""
        if self._image_of is None:
            return torch.zeros(self.batch_size or 0, dtype=torch.long)
        return (self._image_of >= 0).sum(1)

    def extend_with(self, valid: Tensor, padded: bool, image_of: Tensor, images: int) -> SpanMask:
        """Adds new tokens; returns the mask of the L queries over all keys.

        Args:
            valid, padded: as of `extend`.
            image_of: which of the new images each token belongs to, int64 ``[B, L]``, from 0 on; -1: text.
            images: how many new images there are.
        """
        _, mask = self.extend(valid, padded)
        image_of = torch.where(image_of >= 0, image_of + self.num_images, -1)
        self._image_of = image_of if self._image_of is None else torch.cat([self._image_of, image_of], dim=1)
        self.num_images += images
        return mask

    def fork(self) -> ContextCache:
        """Returns a cache of the same text, from which another continuation can start: nothing is encoded again.

        The keys and values so far are shared, not copied, until the copy grows.
        """
        copy = ContextCache(self.num_layers)
        copy.next_position, copy.num_images, copy.pending = self.next_position, self.num_images, self.pending
        copy._image_of, copy._shrunk = self._image_of, set(self._shrunk)
        copy._valid, copy._padded = self._valid, self._padded
        if self._valid is not None:
            copy._layers = [tuple(map(_shared, buffers)) for buffers in self._layers]
            copy._value_dim = self._value_dim
        return copy

    def drop(self, image_ids: list[int] | tuple[int, ...]) -> None:
        """Removes the keys and values of images. Waits for the device.

        Raises:
            ValueError: an image is not held.
        """
        held = self.image_ids
        unknown = sorted(set(image_ids) - set(held))
        if unknown:
            raise ValueError(f"image_ids must be among those held, {held}, got {unknown}")
        if image_ids:
            assert self._image_of is not None
            self._keep(~torch.isin(self._image_of, self._image_of.new_tensor(sorted(set(image_ids)))))

    def shrink(self, image_id: int, keep: float) -> None:
        """Leaves a share of an image's tokens, rounded up: those whose values in the last layer differ most.

        Waits for the device.

        Raises:
            ValueError: the image is not held, or `keep` is not between 0 and 1.

        Source: Alvar et al., "DivPrune", 2025.
        """
        if not 0 < keep < 1:
            raise ValueError(f"keep must be between 0 and 1, got {keep!r}")
        if self._image_of is None or image_id not in self.image_ids:
            raise ValueError(f"image_id must be among those held, {self.image_ids}, got {image_id}")
        rows, columns = (self._image_of == image_id).nonzero().unbind(1)  # of one row
        values = self._layers[-1][-1].view()[rows, :, columns]  # [n, Hkv, D]; keys are rotated
        values = values[..., : self._value_dim].flatten(1)
        chosen = select_diverse(values, [values.shape[0]], keep, method="distance")
        stays = torch.ones_like(self._image_of, dtype=torch.bool)
        stays[rows, columns] = False
        stays[rows[chosen], columns[chosen]] = True
        self._keep(stays)
        self._shrunk.add(image_id)

    def make_room(self, policy: ContextPolicy, new: Tensor) -> None:
        """Shrinks and drops old images until the new ones fit. Waits for the device.

        Args:
            new: how many visual tokens each row gets, int64 ``[B]``.

        Raises:
            ValueError: the new images alone have more tokens than `policy` allows.
        """
        policy.check(new)
        most = policy.max_visual_tokens
        if self._image_of is None:
            return
        if policy.shrink is not None:
            for image in self.image_ids:
                if image not in self._shrunk and self._crowded(image, new, most):
                    self.shrink(image, policy.shrink)
        for image in self.image_ids:
            if self._crowded(image, new, most):
                self.drop([image])

    def _crowded(self, image: int, new: Tensor, most: int) -> bool:
        """Whether the row that holds an image has too many visual tokens."""
        assert self._image_of is not None
        rows = (self._image_of == image).any(1)
        return bool((rows & (self.visual_tokens() + new > most)).any())

    def _keep(self, stays: Tensor) -> None:
        """Removes the tokens that do not stay, bool ``[B, L]``; rows that lose more are padded on the left."""
        assert self._image_of is not None and self._valid is not None
        stays = stays & self._valid
        left = int(stays.sum(1).amax())
        columns = stays.long().argsort(dim=1, stable=True)[:, stays.shape[1] - left :]  # [B, left]
        valid = stays.gather(1, columns)
        self._image_of = torch.where(valid, self._image_of.gather(1, columns), -1)
        self._valid, self._padded = valid, not bool(valid.all())
        for buffers in self._layers:
            for buffer in buffers:
                buffer.select(columns)


def _shared(buffer: TokenBuffer) -> TokenBuffer:
    """Returns a buffer of the same tokens, which are copied before it is written."""
    copy = TokenBuffer()
    copy.append(buffer.view())
    return copy
