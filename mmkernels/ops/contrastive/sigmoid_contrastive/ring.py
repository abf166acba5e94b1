"""`sigmoid_contrastive` over the ranks of a group: texts travel round the ring, and their gradient follows.

No softmax joins the pairs of a row, so one trip computes the loss and its gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.common.dtypes import wide_dtype
from mmkernels.ops.common.kept import kept_dtype
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
from mmkernels.ops.contrastive.sigmoid_contrastive import block, spec
from mmkernels.ops.contrastive.sigmoid_contrastive.spec import (
    KEEP,
    KEPT,
    Results,
    fake,
    kept,
    scaled_gradients,
)
from mmkernels.runtime.dispatch import Backend, define
from mmkernels.runtime.gradient import Gradient
from mmkernels.runtime.group import Group, Piece, circulate

CALL = "sigmoid_contrastive"

Arguments = record_over_ranks(spec.Arguments, local=bool)
"""The op's record, the group's name, and `local`: see `local_share` in the op's folder."""


def forward(args: Any, kernels: str) -> tuple[Tensor, ...]:
    """Returns `Results`: the loss over all ranks, and its gradients in `kept_dtype`."""
    return _Call(args, kernels).run()


class _Call:
    """The loss of one rank's images with all texts, its gradients, and what it adds to those of texts that visit it."""

    def __init__(self, args: Any, kernels: str) -> None:
        self.args, self.kernels, self.wide = args, kernels, wide_dtype(args.image)
        same = {
            "logit_scale": float(args.logit_scale),
            "logit_bias": float(args.logit_bias),
            "whether ids are given": args.image_ids is not None,
            "local": args.local,
        }
        own = {"text": args.keep_text, "scale": args.keep_logit_scale, "bias": args.keep_logit_bias}
        self.ring = Ring(CALL, args.group, args.image, args.text, same, own)
        self.ring.check_rows(CALL)
        self.need_text, self.need_scale, self.need_bias = (self.ring.any(name) for name in own)
        self.image_grad = args.image.new_zeros(args.image.shape, dtype=self.wide) if args.keep_image else None
        self.text_grad = TextGradient(args.text, self.need_text, kept_dtype(args.text) if args.keep_text else None)
        # The loss, and the gradients of the scale and the bias.
        self.sums = torch.zeros(3, dtype=torch.float64, device=args.image.device)

    def run(self) -> tuple[Tensor, ...]:
        """Returns `Results`."""
        args, ring = self.args, self.ring
        tensors = [args.text] if args.text_ids is None else [args.text, args.text_ids]
        of_text = self.text_grad
        circulate(
            ring.group, ring.texts, ring.rows, tensors, self._visit,
            empty=of_text.empty, merge=of_text.merge, home=of_text.home,
        )  # fmt: skip
        sums = self.sums * ring.size if args.local else ring.group.sum(self.sums)
        loss, of_scale, of_bias = (x.clone() for x in sums)  # an op's outputs don't share memory
        return (loss.to(self.wide), *kept((self.image_grad, of_text.kept, of_scale, of_bias), args))

    def _visit(self, piece: Piece, tensors: list[Tensor]) -> list[Tensor] | None:
        args, total = self.args, None
        text, ids = (*tensors, None)[:2]
        assert text is not None
        for at in chunks(args.image):
            arguments = block.BlockArguments(
                **features(args, at, text, ids, self.ring.first_text(piece)),
                logit_bias=args.logit_bias,
                divisor=float(self.ring.all_images),
                keep_image=self.image_grad is not None,
                keep_text=self.need_text,
                keep_logit_scale=self.need_scale,
                keep_logit_bias=self.need_bias,
            )
            loss, of_image, of_text, of_scale, of_bias = block.BLOCK(arguments, self.kernels)
            if self.image_grad is not None:
                self.image_grad[at] += of_image
            for place, (found, needed) in enumerate(
                ((loss, True), (of_scale, self.need_scale), (of_bias, self.need_bias))
            ):
                if needed:
                    self.sums[place] += found
            if self.need_text:
                total = of_text if total is None else total.add_(of_text)
        return None if total is None else [total]


def _scaled(args: Any) -> tuple[Tensor, ...]:
    """The backward pass: features' gradients times what flows back on all ranks, scalars' times its mean."""
    group = Group(args.group, f"{CALL}, backward", args.image.device)
    said = group.agree({}, {"flow": float(args.grad_loss)})
    flow = args.image.new_full((), sum(x["flow"] for x in said), dtype=torch.float64)
    return scaled_gradients(args, flow, args.grad_loss if args.local else flow / group.size)


OP = define(
    "sigmoid_contrastive_ring",
    Arguments,
    Results,
    fake=fake,
    backends=backends_of(block.BLOCK, forward),
    gradient=Gradient(
        saves=KEPT, formula=no_formula, backends=[Backend("reference", _scaled)], contiguous=True, prepared=KEEP
    ),
)


def loss(checked: Callable[[], Any], group: Any, backend: str | None, image: object, local: bool = False) -> Tensor:
    """Returns what `sigmoid_contrastive` returns, over a group, or `local_share`; see `call_over_ranks`."""
    found: Tensor
    _, (found, *_) = call_over_ranks(OP, Arguments, group, backend, CALL, image, checked, local)
    return found
