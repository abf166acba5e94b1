"""What the contrastive ops over a group of ranks share: which pieces of texts pass, and where they stand.

Texts, or a gallery's items, travel round the ring of ranks in pieces; images, or queries, stay. A block is this rank's
images with one piece. Nothing that grows with the square of the batch is stored, and no rank holds another's features
but the pieces that are under way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from mmkernels.ops.common.dtypes import wide_dtype
from mmkernels.ops.contrastive.formula import NO_PARTNERS
from mmkernels.runtime.checks import in_graph
from mmkernels.runtime.dispatch import TABLES, Backend, Op, resolve
from mmkernels.runtime.eager import in_forward_mode
from mmkernels.runtime.group import Group, Piece, check_group, told_to_group

PIECE_BYTES = 2**21  # of features on a CPU: two or three pieces and their float32 gradients fit into the caches
CHUNK_BYTES = 2**23  # of the float32 gradients of the images that one block takes on a CPU
_ACCELERATOR = 16  # times as much there: a kernel of milliseconds, beside which its launch is nothing


def piece_rows(text: Tensor) -> int:
    """Returns the rows of a piece, which are the same on every rank; text: [M, d]."""
    return rows_within(PIECE_BYTES, text, text.shape[1] * text.element_size())


def chunks(image: Tensor) -> Iterator[slice]:
    """Yields images whose float32 gradients fit into the budget; image: [N, d] or [N, Q, d]."""
    step = rows_within(CHUNK_BYTES, image, image.shape[1:].numel() * 4)
    return (slice(first, min(first + step, len(image))) for first in range(0, len(image), step))


def rows_within(budget: int, x: Tensor, row_bytes: int) -> int:
    """Returns how many rows a budget holds on x's device: whole tiles of 64, and one tile at least."""
    return max(64, budget * (1 if x.is_cpu else _ACCELERATOR) // row_bytes // 64 * 64)


class Ring:
    """One call over a group: what the ranks have agreed on, and where rows stand among those of all ranks.

    Args:
        call: what is computed, for errors.
        name: of the group.
        image, text: this rank's features, [n, d] or [n, Q, d], and [m, d]; or queries and gallery.
        same: what must be the same on every rank besides the features' kind; see `Group.agree`.
        own: what a rank says of itself besides its sizes.
    """

    def __init__(
        self, call: str, name: str, image: Tensor, text: Tensor, same: Mapping[str, Any], own: Mapping[str, Any]
    ) -> None:
        self.group = Group(name, call, image.device)
        kind = {
            "the number of channels": text.shape[1],
            "the number of dims": image.dim(),
            "the number of queries": image.shape[1] if image.dim() == 3 else 1,
            "the dtype": str(image.dtype),
            "the type of device": image.device.type,
        }
        self.said = self.group.agree({**kind, **same}, {"images": len(image), "texts": len(text), **own})
        self.images, self.texts = ([x[name] for x in self.said] for name in ("images", "texts"))
        self.all_images, self.all_texts = sum(self.images), sum(self.texts)
        self.first_image = sum(self.images[: self.group.rank])
        self._first_texts = [0, *accumulate(self.texts)]
        self.rows = piece_rows(text)

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self.group.size

    def any(self, name: str) -> bool:
        """Returns whether a rank said so in `own`."""
        return any(x[name] for x in self.said)

    def first_text(self, piece: Piece) -> int:
        """Returns which of this rank's images the piece's first text belongs to by its index."""
        return piece.start if piece.owner == self.group.rank else NO_PARTNERS

    def number(self, piece: Piece) -> int:
        """Returns the number of the piece's first text among all ranks' texts."""
        return self._first_texts[piece.owner] + piece.start

    def check_rows(self, call: str) -> None:
        """Raise ValueError unless the ranks together have an image and a text."""
        if not self.all_images or not self.all_texts:
            raise ValueError(
                f"{call}: the ranks of the group together must have an image and a text at least, got "
                f"{self.all_images} images and {self.all_texts} texts"
            )


def features(args: Any, at: slice, text: Tensor, ids: Tensor | None, first_text: int) -> dict[str, Any]:
    """Returns the arguments that every block takes: some of this rank's images, and texts from anywhere.

    Args:
        args: a record with image, logit_scale and image_ids.
        ids: of the texts; None: pairs are not compared by ids.
        first_text: which of this rank's images the first text belongs to by its index, see `Ring.first_text`.
    """
    return {
        "image": args.image[at],
        "text": text,
        "logit_scale": args.logit_scale,
        "image_ids": None if ids is None else args.image_ids[at],
        "text_ids": ids,
        "first_text": first_text if first_text == NO_PARTNERS else first_text - at.start,
    }


class TextGradient:
    """The gradient of texts: wide with the pieces that travel, of which each rank keeps its own texts' rows.

    Its methods are `circulate`'s `empty`, `merge` and `home`.

    Args:
        text: this rank's texts.
        travels: whether a rank needs it.
        kept: the dtype in which this rank keeps it, zeros before it comes home; None: it needs none.
    """

    def __init__(self, text: Tensor, travels: bool, kept: torch.dtype | None) -> None:
        self.text, self.travels = text, travels
        self.kept = None if kept is None else text.new_zeros(text.shape, dtype=kept)

    def empty(self, rows: int) -> list[Tensor]:
        text = self.text
        return [text.new_zeros(rows, text.shape[1], dtype=wide_dtype(text))] if self.travels else []

    @staticmethod
    def merge(some: list[Tensor], more: list[Tensor]) -> list[Tensor]:
        return [x.add_(y) for x, y in zip(more, some, strict=True)]

    def home(self, at: slice, found: list[Tensor]) -> None:
        if self.kept is not None:
            self.kept[at] = found[0]


def record_over_ranks(arguments: type[Any], **more: type[Any]) -> Any:
    """Returns the record of an op over a group: that of the op, the group's name, and `more` fields of these types."""
    fields = [*get_type_hints(arguments, include_extras=True).items(), ("group", str), *more.items()]
    return NamedTuple(f"{arguments.__name__}OverRanks", fields)


def backends_of(block: Op, run: Callable[..., Any]) -> list[Backend]:
    """Returns the backends of a block, round which the ring is the same.

    Args:
        run: (record, name of the block's backend) -> outputs.
    """
    return [Backend(entry.name, partial(run, kernels=entry.name), entry.why_not) for entry in TABLES[block.name]]


def call_over_ranks(
    op: Op,
    record: Any,
    group: Any,
    backend: str | None,
    call: str,
    like: object,
    checked: Callable[[], Any],
    *more: Any,
) -> tuple[Any, Any]:
    """Returns the record of a call over a group, and the op's outputs.

    Args:
        op, record: over a group, see `record_over_ranks`.
        call: what is computed, for errors.
        like: features, whose device is that of the call, if they are a tensor.
        checked: returns the record without the group, or raises an error, of which the other ranks then hear.
        more: the values of the record's further fields.
    """
    name = check_group(group)
    try:
        args = checked()
        check_group(group, args[0].device)
        inputs, backend = record(*args, name, *more), resolve(backend)
        if not in_graph():
            op.choose(backend, inputs)
            if in_forward_mode(op.layout.take_tensors(inputs)):
                no_formula(inputs)
    except Exception as error:  # of any kind: the other ranks wait
        told_to_group(error, name, call, like)
        raise
    return inputs, op(inputs, backend)


def no_formula(args: Any) -> Any:
    """Takes the place of a formula for derivatives of other kinds."""
    raise NotImplementedError("a loss over a group has no second derivatives, and none in forward mode")
