"""Linear layers of groups of rows in one call, as the experts of a mixture need them."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops.linear.grouped_linear import chunked
from mmkernels.ops.linear.grouped_linear.spec import Arguments, Results, formula, reference, reference_backward
from mmkernels.runtime.backends import cpu_kernel, triton_kernel
from mmkernels.runtime.checks import autocast, check_floating, check_tensor
from mmkernels.runtime.dispatch import Backend, define, resolve
from mmkernels.runtime.gradient import Gradient

__all__ = ["grouped_linear"]


def grouped_linear(
    x: Tensor, weight: Tensor, lengths: Tensor, *, bias: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """Multiply each group of rows by a weight of its own: ``y_r = weight[g] x_r + bias[g]`` for the rows r of group g.

    It is the product of a mixture of experts, whose tokens are sorted by expert. Only weights of groups that have rows
    are read: with few rows a group the call takes the time to read those once.

    Args:
        x: ``[R, C]``, the rows of the first group, then those of the second, and so on; float16, bfloat16, float32 or
            float64; strided as it likes.
        weight: ``[G, O, C]``, x's dtype and device; strided as it likes: a transposed view is not copied.
        lengths: int32 or int64 ``[G]`` on x's device, how many rows each group has; 0 is allowed. Rows behind the last
            group's belong to none. Values are checked on a CPU, by the backends; on a GPU, where that would wait for
            the device, a negative number counts as 0, and what exceeds R is cut.
        bias: ``[G, O]``, x's dtype and device, or None.
        backend: None (``use_backend``'s choice, else the first that can), "triton" (GPUs, untested on one), "cpu"
            (float32, bfloat16 and float16), "chunked" or "reference" (any device, float64 too; on a GPU each weight
            multiplies all rows there, as the groups' sizes are known to the device alone).

    Returns:
        ``[R, O]`` in x's dtype, 0 in rows that belong to no group. Differentiable with respect to x, weight and bias:
        the gradient of a weight or bias whose group has no rows is 0, as is that of a row without a group. Second
        derivatives are those of the reference formula.

    Sums are made in float32 (float64), in an order that no other group changes; results are the same each time. NaN in
    a row, or in the weight of a group, reaches no other row or group. Under autocast x, weight and bias are cast to the
    autocast dtype.

    Raises:
        TypeError: a wrong dtype or type. ValueError: a wrong shape or device, on a CPU also lengths that are negative
            or more than x has rows. Each names the argument, what it must be and what it got.
        BackendError: a forced backend can't run this call.

    Source: Gale et al., "MegaBlocks: Efficient Sparse Training with Mixture-of-Experts", 2023, section 4: products of
    as many rows as each expert has, none dropped, none padded.

    Example:
        >>> import torch, mmkernels
        >>> x, weight = torch.randn(7, 16), torch.randn(3, 8, 16)
        >>> y = mmkernels.grouped_linear(x, weight, torch.tensor([4, 0, 3]))
        >>> torch.allclose(y[4:], x[4:] @ weight[2].T, atol=1e-5)
        True
    """
    x, weight = autocast(x, weight)
    if bias is not None:
        (bias,) = autocast(bias)
    _check(x, weight, lengths, bias)
    y: Tensor = OP(Arguments(x=x, weight=weight, lengths=lengths, bias=bias), resolve(backend))
    return y


def _check(x: Tensor, weight: Tensor, lengths: Tensor, bias: Tensor | None) -> None:
    check_floating("x", x)
    check_floating("weight", weight)
    check_tensor("lengths", lengths)
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(f"x must be [R, C] with at least one channel, got shape {tuple(x.shape)}")
    channels = x.shape[1]
    if weight.dim() != 3 or weight.shape[2] != channels or weight.shape[0] == 0 or weight.shape[1] == 0:
        must = f"[G, O, {channels}], x's channels last, with at least one group and output"
        raise ValueError(f"weight must be {must}, got shape {tuple(weight.shape)}")
    groups, outputs, _ = weight.shape
    if lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"lengths must be int32 or int64, got {lengths.dtype}")
    if lengths.dim() != 1 or lengths.shape[0] != groups:
        raise ValueError(f"lengths must be [G] = [{groups}], one for each weight, got shape {tuple(lengths.shape)}")
    others = [("weight", weight)]
    if bias is not None:
        check_floating("bias", bias)
        if bias.dim() != 2 or bias.shape[0] != groups or bias.shape[1] != outputs:
            raise ValueError(f"bias must be [{groups}, {outputs}] as weight is, got shape {tuple(bias.shape)}")
        others.append(("bias", bias))
    for name, tensor in others:
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name} must have x's dtype {x.dtype}, got {tensor.dtype}")
    for name, tensor in (*others, ("lengths", lengths)):
        if not (tensor.is_cpu and x.is_cpu) and tensor.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")


def _fake(args: Arguments) -> Tensor:
    return args.x.new_empty(args.x.shape[0], args.weight.shape[1])


OP = define(
    "grouped_linear",
    Arguments,
    Results,
    fake=_fake,
    backends=[
        triton_kernel(f"{__name__}.triton.forward", "forward"),
        cpu_kernel("grouped_linear_cpu"),
        Backend("chunked", chunked.forward),
        Backend("reference", reference),
    ],
    gradient=Gradient(
        saves=(),
        formula=formula,
        backends=[
            triton_kernel(f"{__name__}.triton.backward", "backward"),
            cpu_kernel("grouped_linear_backward_cpu"),
            Backend("chunked", chunked.backward),
            Backend("reference", reference_backward),
        ],
        contiguous=True,
    ),
)
