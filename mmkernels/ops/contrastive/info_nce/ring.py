"""`info_nce` over the ranks of a group: each rank holds its own images and texts, and texts travel round the ring.

Forward, a piece of texts takes the running sums of its columns along, and each rank adds its images' to them; the sums
of rows stay at home. Backward, the texts travel once more with the states of their columns, and their gradient follows
in float32. Of n rows with d channels a rank sends about ``2 n W d`` elements and ``n W d`` wide ones in a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmkernels.ops.common.dtypes import wide_dtype
from mmkernels.ops.common.results import or_empty
from mmkernels.ops.contrastive.formula import LOG2E, NO_PARTNERS, ranks
from mmkernels.ops.contrastive.info_nce import block
from mmkernels.ops.contrastive.info_nce.merging import ALL_DOTS, losses, merge
from mmkernels.ops.contrastive.info_nce.reduction import CLASSES, POSITIVES, REFERENCE, SUM, Arguments
from mmkernels.ops.contrastive.ring import (
    Ring,
    TextGradient,
    backends_of,
    call_over_ranks,
    chunks,
    features,
    no_formula,
    record_over_ranks,
)
from mmkernels.runtime.arguments import Differentiable
from mmkernels.runtime.dispatch import define
from mmkernels.runtime.gradient import Gradient
from mmkernels.runtime.group import Piece, circulate

CALL = "info_nce"


class Direction(NamedTuple):
    """Counts over the rows of one direction, of one rank or of all.

    Args:
        rows: how many there are.
        with_positive: how many of them have a positive.
        accurate: how many of these have their best positive before all negatives.
        ranks: the sum of their ranks.
        loss: the sum of their losses.
    """

    rows: Any
    with_positive: Any
    accurate: Any
    ranks: Any
    loss: Any


class RingResults(NamedTuple):
    """What the op returns: the loss over all ranks, and this rank's rows."""

    loss: Differentiable  # []
    image_loss: Differentiable  # [n]
    text_loss: Differentiable  # [m]
    image_state: Tensor  # [4, n], over all ranks' columns
    text_state: Tensor  # [4, m]
    totals: Tensor  # float64 [2 * 5 + 1], over all ranks: `Direction` of images, of texts; the middle of the logits


def totals_of(totals: Tensor) -> tuple[Direction, Direction]:
    """Returns the counts of images and of texts over all ranks, as tensors without a dim."""
    return Direction(*totals[:5].unbind()), Direction(*totals[5:10].unbind())


def _ring(args: Any, kernels: str, pass_name: str, own: dict[str, Any]) -> Ring:
    """Returns the ring of a call, after the handshake.

    Args:
        kernels: the backend of the blocks.
        pass_name: "forward" or "backward": what ranks must do at once.
        own: what this rank says of itself besides its sizes.
    """
    same = {
        "logit_scale": float(args.logit_scale),
        "same_id": "ignore" if args.ignore else "positive",
        "whether ids are given": args.image_ids is not None,
        "label_smoothing": args.label_smoothing,
        "image_weight": args.image_weight,
        "reduction": args.reduction,
        "return_stats": args.stats,
        # Ranks compare their best scores, whose unit is the backend's own.
        "the backend": kernels if args.stats and pass_name == "forward" else None,
    }
    return Ring(f"{CALL}, {pass_name}", args.group, args.image, args.text, same, own)


class _Texts(NamedTuple):
    """Texts from anywhere that meet this rank's images.

    Args:
        features: [m, d].
        ids: int64 [m]; None: none belongs to an image by its id.
        first: which of this rank's images the first one belongs to by its index, see `Ring.first_text`.
        number: of the first one among all texts that this rank's images are compared to.
        own: further tensors, [m, ...].
    """

    features: Tensor
    ids: Tensor | None
    first: int
    number: int
    own: list[Tensor]


class _Call:
    """One pass: its arguments, the ring, and the backend of the blocks."""

    def __init__(self, args: Any, kernels: str, pass_name: str, own: dict[str, Any]) -> None:
        self.args, self.kernels, self.wide = args, kernels, wide_dtype(args.image)
        self.ring = _ring(args, kernels, pass_name, own)
        self.images = slice(0, len(args.image))

    def circulate(self, own: list[Tensor], meet: Callable[[_Texts], list[Tensor] | None], **results: Any) -> None:
        """Let the texts of all ranks meet this rank's images; see `group.circulate`.

        Args:
            own: tensors [m, ...] of this rank's texts that travel with them.
        """
        args, ring = self.args, self.ring

        def visit(piece: Piece, tensors: list[Tensor]) -> list[Tensor] | None:
            if not len(args.image):
                return None
            text, *rest = tensors
            ids = rest.pop() if args.text_ids is not None else None
            return meet(_Texts(text, ids, ring.first_text(piece), ring.number(piece), rest))

        ids = [] if args.text_ids is None else [args.text_ids]
        circulate(ring.group, ring.texts, ring.rows, [args.text, *own, *ids], visit, **results)

    def hard_texts(self) -> Iterator[tuple[slice, _Texts]]:
        """Yields this rank's hard texts in pieces, and where they stand among them. No other rank sees them."""
        hard, ids = self.args.hard_texts, self.args.hard_text_ids
        if hard is not None and len(self.args.image):
            for first in range(0, len(hard), self.ring.rows):
                at = slice(first, first + self.ring.rows)
                number = self.ring.all_texts + first
                yield at, _Texts(hard[at], None if ids is None else ids[at], NO_PARTNERS, number, [])

    def block(self, texts: _Texts, at: slice) -> dict[str, Any]:
        """Returns the arguments that every block takes."""
        ignore = self.args.ignore and texts.ids is not None
        return {**features(self.args, at, texts.features, texts.ids, texts.first), "ignore": ignore}


# Forward.


def forward(args: Any, kernels: str) -> tuple[Tensor, ...]:
    """Returns `RingResults`."""
    call = _Call(args, kernels, "forward", {})
    call.ring.check_rows(CALL)
    best = _find_best(call) if args.stats else None
    sums, before = _add_up(call, best)
    row_losses = [losses(x, args.logit_scale, args.label_smoothing) for x in sums]
    row_ranks: list[Tensor | None] = [None, None]
    if best is not None:
        row_ranks = [
            ranks(n, found[0], _negatives(x), x[POSITIVES] > 0) for x, n, found in zip(sums, before, best, strict=True)
        ]
    counted = [_count(*x) for x in zip(sums, row_losses, row_ranks, strict=True)]
    total = call.ring.group.sum(torch.cat([*counted, _logits_summed(sums[0])]))
    middle = total[10:11] / total[11:12].clamp(min=1) / (float(args.logit_scale) * LOG2E)
    totals = torch.cat([total[:10], torch.where(middle.isfinite(), middle, 0.0)])
    loss = _reduced(args, *totals_of(totals)).to(call.wide)
    states = [x[: CLASSES + 1].contiguous() for x in sums]
    return loss, *(x.to(call.wide) for x in row_losses), *states, totals


_Best = list[Tensor]
"""Of some rows the best positive: its score and its number among all ranks' texts, or images."""


def _find_best(call: _Call) -> tuple[_Best, _Best]:
    """Returns the best positives of this rank's images and of its texts."""
    args, ring = call.args, call.ring

    def none(rows: int) -> _Best:
        score = args.image.new_full((rows,), -torch.inf, dtype=call.wide)
        return [score, torch.zeros(rows, dtype=torch.int64, device=score.device)]

    of_images, of_texts = none(len(args.image)), none(len(args.text))

    def meet(texts: _Texts) -> _Best:
        found = block.BEST(block.BestArguments(**call.block(texts, call.images)), call.kernels)
        score, index, text_score, text_index = found
        of_images[:] = _better(of_images, [score, index + texts.number])
        return [text_score, text_index + ring.first_image]

    def home(at: slice, found: _Best) -> None:
        for x, y in zip(of_texts, found, strict=True):
            x[at] = y

    call.circulate([], meet, empty=none, merge=_better, home=home)
    for _, texts in call.hard_texts():
        meet(texts)
    return of_images, of_texts


def _better(some: _Best, more: _Best) -> _Best:
    """Returns the better of two positives of each row. NaN is the best; of equals the one with the lower number."""
    (score, index), (other, other_index) = some, more
    better = (other > score) | (other.isnan() & ~score.isnan()) | ((other == score) & (other_index < index))
    return [torch.where(better, other, score), torch.where(better, other_index, index)]


def _add_up(call: _Call, best: tuple[_Best, _Best] | None) -> tuple[list[Tensor], list[Tensor]]:
    """Returns of images and of texts the sums over all columns, wide [6, rows], and the negatives before the best."""
    args, ring = call.args, call.ring

    def none(rows: int) -> list[Tensor]:
        sums = args.image.new_zeros(ALL_DOTS + 1, rows, dtype=call.wide)
        sums[REFERENCE] = -torch.inf
        return [sums, torch.zeros(rows if args.stats else 0, dtype=torch.int64, device=sums.device)]

    def add(some: list[Tensor], more: list[Tensor]) -> list[Tensor]:
        return [merge(some[0], more[0]), some[1] + more[1]]

    of_images, of_texts = none(len(args.image)), none(len(args.text))

    def meet(texts: _Texts) -> list[Tensor]:
        found: dict[str, Tensor | None] = dict.fromkeys(("image_best", "image_index", "text_best", "text_index"))
        if best is not None:
            (image_score, image_number), (text_score, text_number) = best[0], texts.own
            found = {
                "image_best": image_score,
                "image_index": image_number - texts.number,
                "text_best": text_score,
                "text_index": text_number - ring.first_image,
            }
        features: dict[str, Any] = {**call.block(texts, call.images), **found}
        given = block.BLOCK(block.BlockArguments(**features, smooth=args.label_smoothing > 0), call.kernels)
        image_sums, text_sums, image_before, text_before = given
        of_images[:] = add(of_images, [image_sums, image_before])
        return [text_sums, text_before]

    def home(at: slice, found: list[Tensor]) -> None:
        of_texts[0][:, at] = found[0]
        if args.stats:
            of_texts[1][at] = found[1]

    call.circulate([] if best is None else best[1], meet, empty=none, merge=add, home=home)
    for _, texts in call.hard_texts():
        no_best = [] if best is None else [x.new_zeros(len(texts.features)) for x in best[1]]
        meet(texts._replace(own=no_best))
    sums, before = zip(of_images, of_texts, strict=True)
    return list(sums), list(before)


def _negatives(sums: Tensor) -> Tensor:
    return (sums[CLASSES] - sums[POSITIVES]).to(torch.int64)


def _count(sums: Tensor, loss: Tensor, rank: Tensor | None) -> Tensor:
    """Returns `Direction` of this rank's rows as float64 [5]."""
    positive = sums[POSITIVES] > 0
    none = torch.zeros((), device=sums.device)
    of_ranks = (none, none) if rank is None else (((rank == 0) & positive).sum(), torch.where(positive, rank, 0).sum())
    counts = Direction(torch.full_like(none, sums.shape[1]), positive.sum(), *of_ranks, loss.sum())
    return torch.stack([x.to(torch.float64) for x in counts])


def _logits_summed(sums: Tensor) -> Tensor:
    """Returns float64 [2]: the sum of a typical logit of each image, in base 2, and how many images have one."""
    sums = sums.to(torch.float64)
    typical = sums[REFERENCE] + (sums[SUM] / sums[CLASSES]).log2()
    finite = typical.isfinite()
    return torch.stack([torch.where(finite, typical, 0.0).sum(), finite.sum().to(torch.float64)])


def _reduced(args: Any, images: Direction, texts: Direction) -> Tensor:
    """Returns the loss over all ranks, float64 without a dim; 0 for reduction "none"."""
    if args.reduction == "none":
        return torch.zeros_like(images.loss)
    of_images, of_texts = (x.loss * _weight(args, weight, x) for x, weight in _weighted(args, images, texts))
    return of_images + of_texts


def _weighted(args: Any, images: Direction, texts: Direction) -> tuple[tuple[Direction, float], ...]:
    return (images, args.image_weight), (texts, 1.0 - args.image_weight)


def _weight(args: Any, weight: float, rows: Direction) -> Any:
    """Returns what each row's loss is multiplied by in the reduced loss."""
    return weight / rows.with_positive.clamp(min=1) if args.reduction == "mean" else weight


# Backward.


def backward(args: Any, kernels: str) -> tuple[Tensor, ...]:
    """Returns the gradients of image, text, logit_scale and hard_texts, empty where none is needed."""
    flow = 0.0 if args.grad_loss is None else float(args.grad_loss)
    own = {"flow": flow, "text": args.need_text, "scale": args.need_logit_scale}
    return _Backward(_Call(args, kernels, "backward", own)).run()


class _Backward:
    """The gradients of one rank, and what it adds to those of texts that visit it."""

    def __init__(self, call: _Call) -> None:
        self.call, self.args = call, call.args
        args, wide = call.args, call.wide
        self.need_texts, self.need_scale = call.ring.any("text"), call.ring.any("scale")
        flow = sum(x["flow"] for x in call.ring.said)
        rows = (args.grad_image_loss, len(args.image)), (args.grad_text_loss, len(args.text))
        self.image_flow, self.text_flow = (
            self._flow(flow, direction, weight, *of_rows)
            for (direction, weight), of_rows in zip(_weighted(args, *totals_of(args.totals)), rows, strict=True)
        )
        self.middle = float(args.totals[10])
        self.image_grad = args.image.new_zeros(args.image.shape, dtype=wide) if args.need_image else None
        self.text_grad = TextGradient(args.text, self.need_texts, args.text.dtype if args.need_text else None)
        self.hard_grad = args.hard_texts.new_zeros(args.hard_texts.shape) if args.need_hard_texts else None
        self.scale_grad = torch.zeros((), dtype=torch.float64, device=args.image.device)

    def _flow(self, flow: float, direction: Direction, weight: float, of_rows: Tensor | None, rows: int) -> Tensor:
        """Returns what flows back to the loss of each of this rank's rows, wide [rows]."""
        each = torch.zeros_like(direction.loss)
        if self.args.reduction != "none" and flow != 0.0:
            each = each + flow * _weight(self.args, weight, direction)
        each = each.to(self.call.wide).expand(rows)
        return each if of_rows is None else each + of_rows

    def run(self) -> tuple[Tensor, ...]:
        """Returns the gradients."""
        args, ring = self.args, self.call.ring
        lines = torch.cat([args.text_state, self.text_flow[None]]).mT  # [m, 5]
        of_text = self.text_grad
        self.call.circulate([lines], self._meet, empty=of_text.empty, merge=of_text.merge, home=of_text.home)
        for at, texts in self.call.hard_texts():
            state = args.image_state.new_zeros(CLASSES + 1, len(texts.features))
            found = self._block(texts, state, None, need_text=args.need_hard_texts)
            if self.hard_grad is not None:
                self.hard_grad[at] = found
        scale = ring.group.sum(self.scale_grad) / ring.size if self.need_scale else self.scale_grad
        like = args.logit_scale
        grads = (
            None if self.image_grad is None else self.image_grad.to(args.image.dtype),
            of_text.kept,
            scale.to(like.dtype).reshape(like.shape) if args.need_logit_scale else None,
            self.hard_grad,
        )
        return tuple(or_empty(x, args.image) for x in grads)

    def _meet(self, texts: _Texts) -> list[Tensor] | None:
        (lines,) = texts.own
        found = self._block(texts, lines[:, :-1].mT, lines[:, -1], need_text=self.need_texts)
        return None if found is None else [found]

    def _block(self, texts: _Texts, state: Tensor, flow: Tensor | None, need_text: bool) -> Tensor | None:
        """Add to the gradients of all images and of the scale; returns the wide gradient of the texts.

        Args:
            state, flow: of the texts, [4, m] and [m]; a flow of None: they have no direction.
        """
        args, total = self.args, None
        for at in chunks(args.image):
            arguments = block.BackwardArguments(
                **self.call.block(texts, at),
                ranked=args.stats,
                label_smoothing=args.label_smoothing,
                middle=self.middle,
                image_state=args.image_state[:, at],
                text_state=state,
                grad_image_loss=self.image_flow[at],
                grad_text_loss=flow,
                need_image=self.image_grad is not None,
                need_text=need_text,
                need_logit_scale=self.need_scale,
            )
            of_image, of_text, of_scale = block.BACKWARD(arguments, self.call.kernels)
            if self.image_grad is not None:
                self.image_grad[at] += of_image
            if self.need_scale:
                self.scale_grad += of_scale
            if need_text:
                total = of_text if total is None else total.add_(of_text)
        return total


# The op.


def _fake(args: Any) -> tuple[Tensor, ...]:
    image, wide = args.image, wide_dtype(args.image)
    sizes = (image.shape[0], args.text.shape[0])
    losses = [image.new_empty(n, dtype=wide) for n in sizes]
    states = [image.new_empty(CLASSES + 1, n, dtype=wide) for n in sizes]
    return (image.new_empty((), dtype=wide), *losses, *states, image.new_empty(11, dtype=torch.float64))


_Arguments = record_over_ranks(Arguments)
OP = define(
    "info_nce_ring",
    _Arguments,
    RingResults,
    fake=_fake,
    backends=backends_of(block.BLOCK, forward),
    gradient=Gradient(
        saves=("image_state", "text_state", "totals"),
        formula=no_formula,
        backends=backends_of(block.BACKWARD, backward),
        contiguous=True,
    ),
)


def results(checked: Callable[[], Any], group: Any, backend: str | None, image: object) -> tuple[Any, RingResults]:
    """Returns the record of a call over a group and its results; see `call_over_ranks`."""
    args, found = call_over_ranks(OP, _Arguments, group, backend, f"{CALL}, forward", image, checked)
    return args, RingResults._make(found)
