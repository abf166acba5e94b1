"""`linear`: a linear layer of few rows, whose time is that of reading its weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules import module

from mmkernels.runtime.checks import PLAIN
from mmkernels.runtime.eager import transform_active

MOST_ROWS = 64
"""Above, the time is that of the products, and other ways to compute them have other costs, such as a copy of the
weights."""
LEAST_WEIGHTS = 2**18
"""Below, the cost of a call counts more than the weights."""

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """Returns ``layer(x)``, ``[..., out]`` of ``x [..., in]``; where no gradient is recorded, faster for few rows.

    In float32 on a CPU, PyTorch computes a linear layer by MKL, which reads the weights of 2 to 16 rows at 10 GB/s, and
    of one row with one core. oneDNN, which PyTorch has too, reads them at 30 to 45 GB/s (2 cores of a Zen 5, layers of
    2,048 x 2,048 to 16,384 x 2,048). A text that is generated token by token spends its time there.

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


def _is_served(layer: nn.Module, x: Tensor) -> bool:
    """Whether oneDNN computes a product, and faster."""
    if not _HAS_ONEDNN or not is_plain(layer):
        return False
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return (
        weight.numel() >= LEAST_WEIGHTS
        and x.dtype is weight.dtype is torch.float32
        and x.is_cpu
        and weight.is_cpu
        and type(x) in PLAIN
        and type(weight) in PLAIN
        and weight.is_contiguous()
        and x.shape[-1] == weight.shape[1]
        and 0 < x.numel() <= MOST_ROWS * weight.shape[1]
        and bool(torch.backends.mkldnn.enabled)
        and not module._has_any_global_hook()
    )
