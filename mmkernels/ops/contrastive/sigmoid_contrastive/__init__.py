"""The pairwise sigmoid loss of images and texts (SigLIP), without the logits' matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.common.dtypes import wide_dtype
from mmkernels.ops.common.second import second_derivatives
from mmkernels.ops.contrastive.formula import scaled
from mmkernels.ops.contrastive.inputs import check_features, check_ids, check_scalar
from mmkernels.ops.contrastive.sigmoid_contrastive import chunked
from mmkernels.ops.contrastive.sigmoid_contrastive.spec import formula, kept_dtype, reference
from mmkernels.runtime import cpu
from mmkernels.runtime import triton as gpu
from mmkernels.runtime.checks import autocast, requires_grad
from mmkernels.runtime.dispatch import Backend, register, resolve

__all__ = ["sigmoid_contrastive"]


def sigmoid_contrastive(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """SigLIP's loss: ``-sum_ij log sigmoid(z_ij (logit_scale * image_i text_j' + logit_bias)) / N``.

    z is 1 for positive pairs and -1 for all others. The logits are never stored: memory is linear in the features. The
    gradients are computed with the loss, from the same logits: three matrix products a training step.

    Args:
        image: features ``[N, d]``, float16, bfloat16, float32 or float64, normalised or not; or ``[N, Q, d]``: the
            score of a pair is the largest of its image's Q queries.
        text: ``[M, d]``, image's dtype and device.
        logit_scale: the multiplier itself (already exponentiated): a number, or a tensor of one element in image's
            dtype or float32.
        logit_bias: added to the scaled scores; as logit_scale. The paper begins at -10, with a scale of 10.
        image_ids, text_ids: integers ``[N]`` and ``[M]``: a pair of one id is positive. One alone serves for both
            sides. Without ids N = M, and text i is image i's only positive.
        backend: None (``use_backend``'s choice, else the first that can), "triton" (GPUs), "cpu" (float32, bfloat16 and
            float16), "chunked" (any device, float64 too) or "reference", the naive formula, differentiated by PyTorch's
            own autograd outside ``torch.compile``.

    Returns:
        a float32 tensor without a dim (float64 for float64 features): the sum over all pairs divided by N, the number
        of images, as in the paper. Differentiable by image, text, logit_scale and logit_bias; second derivatives are
        computed by the reference formula, at its memory cost. NaN among the features makes the loss NaN, inf makes it
        NaN or inf, as the logits' signs have it.

    Under autocast image and text are cast to the autocast dtype.

    Raises:
        TypeError: a wrong dtype or type. ValueError: a wrong shape or device. Each names the argument, what it must be
            and what it got.
        BackendError: a forced backend can't run this call.

    Source: Zhai et al., "Sigmoid Loss for Language Image Pre-Training" (SigLIP), 2023, section 3.2.

    Example:
        >>> import torch, mmkernels
        >>> image, text = (torch.nn.functional.normalize(torch.randn(8, 64), dim=1) for _ in range(2))
        >>> mmkernels.sigmoid_contrastive(image, text, 10.0, -10.0).shape
        torch.Size([])
    """
    image, text = autocast(image, text)
    check_features(image, text)
    image_ids, text_ids = check_ids(image_ids, text_ids, image, text, paired=False)
    logit_scale = check_scalar("logit_scale", logit_scale, image)
    logit_bias = check_scalar("logit_bias", logit_bias, image)
    tensors = (image, text, logit_scale, logit_bias, image_ids, text_ids)
    backend = resolve(backend)
    if backend == "reference" and not torch.compiler.is_compiling():
        with torch._C._DisableAutocast():  # the features have been cast
            return formula(*tensors)
    recording = torch.is_grad_enabled()
    needs = [recording and requires_grad(x) for x in tensors[:4] if x is not None]
    loss: Tensor = _op(*tensors, needs, backend)[0]
    return loss


# The op boundary, forward: it gives the gradients too, of those inputs that need one.

_INPUTS = "Tensor image, Tensor text, Tensor logit_scale, Tensor logit_bias, Tensor? image_ids, Tensor? text_ids"
_DIFFERENTIABLE = (0, 1, 2, 3)  # image, text, logit_scale, logit_bias among the inputs


def _fake(*inputs: Any) -> tuple[Tensor, ...]:
    *tensors, needs, _backend = inputs
    image = tensors[0]
    return (image.new_empty((), dtype=wide_dtype(image)), *_fake_grads(tensors, needs, kept_dtype))


def _fake_grads(tensors: list[Tensor], needs: list[bool], dtype_of: Callable[[Tensor], torch.dtype]) -> list[Tensor]:
    wanted = [tensors[n] if need else None for n, need in zip(_DIFFERENTIABLE, needs, strict=True)]
    return [tensors[0].new_empty(0) if x is None else x.new_empty(x.shape, dtype=dtype_of(x)) for x in wanted]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.needs, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad_loss is None:
        return (None,) * 8
    grads = _op_backward(*ctx.saved_tensors, grad_loss, ctx.needs, ctx.backend)
    image, text, scale, bias = (grad if need else None for grad, need in zip(grads, ctx.needs, strict=True))
    return image, text, scale, bias, None, None, None, None


# The op boundary, backward: the loss's gradients times what flows back to it.


def _scaled(*inputs: Any) -> tuple[Tensor, ...]:
    *tensors, of_image, of_text, of_scale, of_bias, grad_loss, needs = inputs
    kept = (of_image, of_text, of_scale, of_bias)
    return tuple(
        scaled(g, grad_loss, tensors[n].dtype) if need else tensors[0].new_empty(0)
        for g, n, need in zip(kept, _DIFFERENTIABLE, needs, strict=True)
    )


def _fake_backward(*inputs: Any) -> tuple[Tensor, ...]:
    *tensors, needs, _backend = inputs
    return tuple(_fake_grads(tensors, needs, lambda x: x.dtype))


def _setup_context_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _needs, _backend = inputs
    ctx.save_for_backward(*tensors[:6], tensors[-1])
    ctx.set_materialize_grads(False)


def _backward_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    """Second derivatives. The saved gradients are functions of the inputs."""
    *tensors, grad_loss = ctx.saved_tensors

    def naive(given: list[Any]) -> tuple[Tensor, ...]:
        return (formula(*given),)

    (of_grad_loss,), found = second_derivatives(naive, tensors, _DIFFERENTIABLE, [grad_loss], grads)
    return (*found, None, None, None, None, None, None, of_grad_loss, None, None)


_op_backward = register(
    f"sigmoid_contrastive_backward({_INPUTS}, Tensor of_image, Tensor of_text, Tensor of_scale, Tensor of_bias, "
    "Tensor grad_loss, bool[] needs, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    [Backend("chunked", _scaled), Backend("reference", _scaled)],
    _fake_backward,
    setup_context=_setup_context_backward,
    backward=_backward_backward,
    is_backward=True,
)
_op = register(
    f"sigmoid_contrastive({_INPUTS}, bool[] needs, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    [
        Backend("triton", gpu.op("mmkernels.ops.contrastive.sigmoid_contrastive.triton", "forward"), gpu.why_not),
        Backend("cpu", cpu.op("sigmoid_contrastive_cpu"), cpu.why_not),
        Backend("chunked", chunked.forward),
        Backend("reference", reference),
    ],
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)
