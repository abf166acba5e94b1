"""The pairwise sigmoid loss of images and texts (SigLIP), without the logits' matrix."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmkernels.ops.contrastive.inputs import check_features, check_ids, check_scalar
from mmkernels.ops.contrastive.sigmoid_contrastive import chunked, ring
from mmkernels.ops.contrastive.sigmoid_contrastive.spec import (
    KEEP,
    KEPT,
    Arguments,
    Results,
    fake,
    formula,
    reference,
    scaled_gradients,
)
from mmkernels.runtime.backends import cpu_kernel, triton_kernel
from mmkernels.runtime.checks import autocast, in_graph, requires_grad
from mmkernels.runtime.dispatch import Backend, define, resolve
from mmkernels.runtime.gradient import Gradient

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["sigmoid_contrastive"]


def sigmoid_contrastive(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    group: ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    """SigLIP's loss: ``-sum_ij log sigmoid(z_ij (logit_scale * image_i text_j' + logit_bias)) / N``.

    z is 1 for positive pairs and -1 for all others. The logits are never stored: memory is linear in the features. The
    gradients are computed with the loss, from the same logits: three matrix products a training step.

    Args:
        image: features ``[N, d]``, float16, bfloat16, float32 or float64, normalised or not; or ``[N, Q, d]``: the
            score of a pair is the largest of its image's Q queries.
        text: ``[M, d]``, image's dtype and device.
        logit_scale: the multiplier itself (already exponentiated): a number, or a tensor of one element in any real
            dtype. It is used in image's dtype or float32 if it has one of these, else in float32 (float64 beside
            float64 features), and never widens the features.
        logit_bias: added to the scaled scores; as logit_scale. The paper begins at -10, with a scale of 10.
        image_ids, text_ids: integers ``[N]`` and ``[M]``: a pair of one id is positive. One alone serves for both
            sides. Without ids N = M, and text i is image i's only positive.
        group: ranks that compute the loss together, as in `info_nce`, or None: this process alone.
        backend: None (``use_backend``'s choice, else the first that can), "triton" (GPUs), "cpu" (float32, bfloat16 and
            float16), "chunked" (any device, float64 too) or "reference", the naive formula, differentiated by PyTorch's
            own autograd outside ``torch.compile``.

    Returns:
        a float32 tensor without a dim (float64 for float64 features): the sum over all pairs divided by N, the number
        of images, as in the paper. Differentiable by image, text, logit_scale and logit_bias; second derivatives, and
        those in forward mode, are computed by the reference formula, at its memory cost. NaN among the features makes
        the loss NaN, inf makes it NaN or inf, as the logits' signs have it.

    Under autocast image and text are cast to the autocast dtype.

    **Over a group** all of `info_nce`'s section on groups holds: each rank passes its own rows, as many as it has, the
    loss is that of all ranks' pairs, N the number of all ranks' images, and the gradients are exact after the mean over
    ranks, as under DDP and FSDP2. Texts travel once, and their gradient with them, so that a rank sends about
    ``N W d`` numbers of the features' dtype and ``N W d`` of float32 a step.

    Raises:
        TypeError: a wrong dtype or type. ValueError: a wrong shape or device. Each names the argument, what it must be
            and what it got. Over a group every rank raises ValueError where one rank's arguments are bad, or ranks
            differ in what must be the same.
        BackendError: a forced backend can't run this call.
        GroupError: (a RuntimeError) a rank has died, is late, or called something else.

    Source: Zhai et al., "Sigmoid Loss for Language Image Pre-Training" (SigLIP), 2023, section 3.2.

    Example:
        >>> import torch, mmkernels
        >>> image, text = (torch.nn.functional.normalize(torch.randn(8, 64), dim=1) for _ in range(2))
        >>> mmkernels.sigmoid_contrastive(image, text, 10.0, -10.0).shape
        torch.Size([])
    """
    if group is not None:
        checked = partial(_checked, image, text, logit_scale, logit_bias, image_ids, text_ids, least=0)
        return ring.loss(checked, group, backend, image)
    args = _checked(image, text, logit_scale, logit_bias, image_ids, text_ids, least=1)
    backend = resolve(backend)
    if backend == "reference" and not in_graph():
        with torch._C._DisableAutocast():  # the features have been cast
            return formula(args)
    loss: Tensor
    loss, *_ = OP(args, backend)
    return loss


def _checked(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    least: int,
) -> Arguments:
    """Returns the record of a call; `least`: the images and texts that there must be."""
    image, text = autocast(image, text)
    check_features(image, text, least=least)
    image_ids, text_ids = check_ids(image_ids, text_ids, image, text, paired=False)
    logit_scale = check_scalar("logit_scale", logit_scale, image)
    logit_bias = check_scalar("logit_bias", logit_bias, image)
    # `torch.jit.trace` traces once more without gradients, and demands the same graph.
    recording = torch.is_grad_enabled() or torch._C._get_tracing_state() is not None
    return Arguments(
        image=image,
        text=text,
        logit_scale=logit_scale,
        logit_bias=logit_bias,
        image_ids=image_ids,
        text_ids=text_ids,
        keep_image=recording and requires_grad(image),
        keep_text=recording and requires_grad(text),
        keep_logit_scale=recording and requires_grad(logit_scale),
        keep_logit_bias=recording and requires_grad(logit_bias),
    )


def local_share(
    image: Tensor, text: Tensor, logit_scale: Tensor | float, logit_bias: Tensor | float, *, group: ProcessGroup
) -> Tensor:
    """Returns W times what this rank's images add to the loss over a group of W ranks: the mean over ranks is the loss.

    The features' gradients are those of `sigmoid_contrastive`; logit_scale and logit_bias get the gradient of this
    rank's share alone, times what flows back on this rank. So do open_clip's ranks, which have equally many images.
    """
    checked = partial(_checked, image, text, logit_scale, logit_bias, None, None, least=0)
    return ring.loss(checked, group, None, image, local=True)


def _scaled(args: Any) -> tuple[Tensor, ...]:
    """The backward pass: the loss's gradients times what flows back to it."""
    return scaled_gradients(args, args.grad_loss, args.grad_loss)


OP = define(
    "sigmoid_contrastive",
    Arguments,
    Results,
    fake=fake,
    backends=[
        triton_kernel(f"{__name__}.triton", "forward"),
        cpu_kernel("sigmoid_contrastive_cpu"),
        Backend("chunked", chunked.forward),
        Backend("reference", reference),
    ],
    gradient=Gradient(
        saves=KEPT,
        formula=lambda args: (formula(args),),
        backends=[Backend("chunked", _scaled), Backend("reference", _scaled)],
        contiguous=True,
        prepared=KEEP,
    ),
)
