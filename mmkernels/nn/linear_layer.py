"""`linear`: a linear layer, computed by the faster of two libraries where no gradient is recorded."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules import module

from mmkernels.runtime.checks import PLAIN
from mmkernels.runtime.eager import transform_active

LEAST_WEIGHTS = 2**18
"""Below, the cost of a call counts more than the weights."""

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """Returns ``layer(x)``, ``[..., out]`` of ``x [..., in]``; faster in float32 on a CPU, without gradients.

    PyTorch computes a linear layer by MKL, which reads the weights of 2 to 16 rows at 10 GB/s, those of one row with
    one core, and which takes no AVX-512 on AMD. oneDNN, which PyTorch has too, reads them at 30 to 45 GB/s, and is
    twice as fast for many rows (2 cores of a Zen 5, layers of 1,024 x 1,024 to 16,384 x 2,048). ADR 19 has the figures.

    Args:
        layer: an ``nn.Linear``. One of another class, such as LoRA's, or with hooks is called as it is.
        x: ``[..., in]``.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(512, 600)
        >>> with torch.no_grad():
        ...     linear(layer, torch.randn(2, 1, 512)).shape
        torch.Size([2, 1, 600])
    """
    y: Tensor
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not _is_served(layer, x) or transform_active():
        y = layer(x)
    else:
        y = torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, "none", [], "")
    return y


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer computes ``F.linear`` and nothing else."""
    hooks = layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks
    return type(layer) is nn.Linear and "forward" not in layer.__dict__ and not any(hooks)


def _is_packed(parameter: Tensor) -> bool:
    """Whether oneDNN, which reads no strides of weights, may read it."""
    return (
        parameter.dtype is torch.float32 and parameter.is_cpu and type(parameter) in PLAIN and parameter.is_contiguous()
    )


def _is_served(layer: nn.Module, x: Tensor) -> bool:
    """Whether oneDNN computes a layer, and faster."""
    if not _HAS_ONEDNN or not is_plain(layer):
        return False
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    return (
        weight.numel() >= LEAST_WEIGHTS
        and all(_is_packed(part) for part in (weight, bias) if isinstance(part, Tensor))
        and (bias is None or bias.shape == weight.shape[:1])
        and x.dtype is torch.float32
        and x.is_cpu
        and type(x) in PLAIN
        and x.dim() > 0
        and x.shape[-1] == weight.shape[1]
        and x.numel() > 0
        and bool(torch.backends.mkldnn.enabled)
        and not module._has_any_global_hook()
    )
