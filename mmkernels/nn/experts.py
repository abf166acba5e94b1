"""`Experts` and `TopKRouter`: a mixture of experts, in which each token goes through a few of many small MLPs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmkernels.nn.checks import check_choice, check_positive
from mmkernels.ops.linear.grouped_linear import grouped_linear
from mmkernels.ops.tokens.unmerge_tokens import unmerge_tokens
from mmkernels.runtime.checks import (
    autocast_dtype,
    check_bool,
    check_floating,
    check_number,
    check_range,
    check_tensor,
)

__all__ = ["Experts", "TopKRouter"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}
SCORING = ("softmax", "sigmoid")
METHODS = ("greedy", "group_limited_greedy", "noaux_tc")
_LEAST_SUM = 1e-20  # added to the sum of a token's weights before they are divided by it
_BEST_OF_GROUP = 2  # a group counts by the sum of so many of its scores, with "noaux_tc"


class Experts(nn.Module):
    """Gated MLPs, each for the tokens that a router sends to it: ``down (activation(gate x) * up x)``.

    The pairs of a token and an expert are sorted by expert, so that each expert's rows are multiplied together by
    `mmkernels.grouped_linear`; there is no loop over experts, no wait for the device, and no token is dropped. Of an
    expert that no token goes to nothing is read, and its gradient is 0.

    Args:
        width: of the tokens.
        mlp: the width between an expert's linear layers.
        num_experts: how many experts there are.
        activation: "silu", "gelu" or "relu".

    Parameters are ``gate_up [num_experts, 2 mlp, width]``, the rows of `gate` before those of `up`, and ``down
    [num_experts, width, mlp]``, which transformers' modules call ``gate_up_proj`` and ``down_proj``.

    Raises:
        TypeError, ValueError: a wrong size or option; in `forward`, a wrong dtype, shape or device, on a CPU also an
            index that is no expert's.

    Source: Shazeer et al., "Outrageously Large Neural Networks", 2017, section 2; Dai et al., "DeepSeekMoE", 2024,
    section 3.1, for many small experts.

    Example:
        >>> import torch
        >>> from mmkernels.nn import Experts, TopKRouter
        >>> router, experts = TopKRouter(32, num_experts=8, k=2), Experts(32, 16, num_experts=8)
        >>> x = torch.randn(5, 32)
        >>> weight, index, logits = router(x)
        >>> experts(x, index, weight).shape
        torch.Size([5, 32])
    """

    def __init__(self, width: int, mlp: int, num_experts: int, activation: str = "silu") -> None:
        super().__init__()
        for name, size in (("width", width), ("mlp", mlp), ("num_experts", num_experts)):
            check_positive(name, size)
        check_choice("activation", activation, tuple(ACTIVATIONS))
        self.width, self.mlp, self.num_experts, self.activation = width, mlp, num_experts, activation
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * mlp, width))
        self.down = nn.Parameter(torch.empty(num_experts, width, mlp))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw each expert's weights as `torch.nn.Linear` draws its own."""
        for weight in (self.gate_up, self.down):
            nn.init.uniform_(weight, -(weight.shape[-1] ** -0.5), weight.shape[-1] ** -0.5)

    def forward(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """Returns ``[T, width]`` in x's dtype: of each token the sum over its experts of weight times output.

        Args:
            x: ``[T, width]``.
            index: int64 ``[T, k]``, the experts of each token. Values are checked on a CPU; on a GPU, where that would
                wait for the device, an index that is no expert's adds nothing.
            weight: floating ``[T, k]``, what each of their outputs is multiplied by; float32 beside 16-bit x, too.

        The sum is made in float32 (float64 for float64 x), in the order of index; it and the gradients are the same
        each time.
        """
        self._check(x, index, weight)
        tokens, k = index.shape
        pairs = index.flatten()  # [T * k]
        pairs = torch.where(pairs < 0, self.num_experts, pairs)  # behind all experts, as what is too large
        by_expert, order = pairs.sort(stable=True)
        experts = torch.arange(self.num_experts, device=index.device)
        ends = torch.searchsorted(by_expert, experts, right=True)
        lengths = ends.diff(prepend=ends.new_zeros(1))  # [num_experts]
        place = torch.empty_like(order).scatter_(0, order, torch.arange(tokens * k, device=index.device))
        rows = unmerge_tokens(x, order.div(k, rounding_mode="floor"))  # [T * k, width]
        gate, up = grouped_linear(rows, self.gate_up, lengths).chunk(2, dim=-1)
        rows = grouped_linear(ACTIVATIONS[self.activation](gate) * up, self.down, lengths)
        outputs = unmerge_tokens(rows, place).view(tokens, k, self.width)
        wide = torch.promote_types(outputs.dtype, torch.float32)
        return (outputs * weight[..., None].to(wide)).sum(1).to(x.dtype)

    def _check(self, x: Tensor, index: Tensor, weight: Tensor) -> None:
        check_floating("x", x)
        check_tensor("index", index)
        check_floating("weight", weight)
        if x.dim() != 2 or x.shape[1] != self.width:
            raise ValueError(f"x must be [T, {self.width}], got shape {tuple(x.shape)}")
        if x.dtype != self.down.dtype and autocast_dtype(x) is None:
            raise TypeError(f"x must have the experts' dtype {self.down.dtype}, got {x.dtype}")
        if index.dtype != torch.int64:
            raise TypeError(f"index must be int64, got {index.dtype}")
        if index.dim() != 2 or index.shape[0] != x.shape[0] or index.shape[1] == 0:
            raise ValueError(f"index must be [{x.shape[0]}, k], k experts a token, got shape {tuple(index.shape)}")
        if weight.shape != index.shape:
            raise ValueError(f"weight must be {list(index.shape)} as index is, got shape {tuple(weight.shape)}")
        for name, tensor in (("index", index), ("weight", weight)):
            if tensor.device != x.device:
                raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")
        check_range("index", index, 0, self.num_experts - 1)

    def extra_repr(self) -> str:
        return f"{self.width}, {self.mlp}, num_experts={self.num_experts}, activation={self.activation!r}"


class TopKRouter(nn.Module):
    """Chooses each token's experts, and what their outputs are multiplied by, as DeepSeek-V2 and V3 do.

    Scores are the softmax or the sigmoid of a linear layer in float32, whose weights stay float32 where those of the
    model around it become 16-bit. Of equal scores the lowest index is chosen, on every device; experts are returned in
    the order of their scores, the largest first.

    Args:
        width: of the tokens.
        num_experts: how many experts there are.
        k: how many each token goes to.
        scoring: "softmax" (V2) or "sigmoid" (V3).
        groups: into how many groups of equal size the experts are divided; 1: they are not.
        top_groups: how many groups a token may use.
        method: "greedy", the k largest scores; "group_limited_greedy", those in the `top_groups` groups with the
            largest score; "noaux_tc", those in the groups with the largest sum of two scores, where the buffer
            ``correction_bias [num_experts]`` is added to the scores for the choice alone.
        scale: the weights are multiplied by it.
        normalise: a token's weights are divided by their sum, before they are multiplied by `scale`.

    Raises:
        TypeError, ValueError: a wrong size or option; in `forward`, a wrong dtype or shape.

    Source: DeepSeek-AI, "DeepSeek-V2", 2024, section 2.2.2, for groups; DeepSeek-AI, "DeepSeek-V3", 2024, section
    2.1.2, for the correction bias.

    Example:
        >>> import torch
        >>> from mmkernels.nn import TopKRouter
        >>> router = TopKRouter(32, num_experts=8, k=2, groups=4, top_groups=2, method="group_limited_greedy")
        >>> weight, index, logits = router(torch.randn(5, 32))
        >>> weight.shape, index.shape, logits.shape
        (torch.Size([5, 2]), torch.Size([5, 2]), torch.Size([5, 8]))
    """

    correction_bias: Tensor | None

    def __init__(
        self,
        width: int,
        num_experts: int,
        k: int,
        scoring: str = "softmax",
        *,
        groups: int = 1,
        top_groups: int = 1,
        method: str = "greedy",
        scale: float = 1.0,
        normalise: bool = False,
    ) -> None:
        super().__init__()
        sizes = {"width": width, "num_experts": num_experts, "k": k, "groups": groups, "top_groups": top_groups}
        for name, size in sizes.items():
            check_positive(name, size)
        check_choice("scoring", scoring, SCORING)
        check_choice("method", method, METHODS)
        check_bool("normalise", normalise)
        self.width, self.num_experts, self.k, self.scoring = width, num_experts, k, scoring
        self.groups, self.top_groups, self.method, self.normalise = groups, top_groups, method, normalise
        self.scale = check_number("scale", scale, "a finite number")
        self._check_groups()
        self.weight = nn.Parameter(torch.empty(num_experts, width, dtype=torch.float32))
        bias = torch.zeros(num_experts, dtype=torch.float32) if method == "noaux_tc" else None
        self.register_buffer("correction_bias", bias)
        nn.init.uniform_(self.weight, -(width**-0.5), width**-0.5)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TopKRouter:
        """Moves what the router has; ``.to(torch.bfloat16)`` leaves it in float32, as other experts would be chosen."""
        return super()._apply(lambda x: _not_narrower(x, fn(x)), recurse)

    def _check_groups(self) -> None:
        if self.num_experts % self.groups:
            raise ValueError(f"groups must divide num_experts = {self.num_experts}, got {self.groups}")
        if self.top_groups > self.groups:
            raise ValueError(f"top_groups must be at most groups = {self.groups}, got {self.top_groups}")
        if self.method == "greedy" and self.groups > 1:
            raise ValueError(f'groups must be 1 where method is "greedy", which knows no groups, got {self.groups}')
        size = self.num_experts // self.groups
        if self.method == "noaux_tc" and size < _BEST_OF_GROUP:
            raise ValueError(f'groups must leave each group two experts where method is "noaux_tc", got {self.groups}')
        usable = self.top_groups * size
        if self.k > usable:
            raise ValueError(f"k must be at most {usable}, the experts of {self.top_groups} group(s), got {self.k}")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns float32 weight ``[T, k]``, int64 index ``[T, k]``, and the float32 logits ``[T, num_experts]``.

        Args:
            x: ``[T, width]``, of any floating dtype. Autocast does not round the logits.
        """
        check_floating("x", x)
        if x.dim() != 2 or x.shape[1] != self.width:
            raise ValueError(f"x must be [T, {self.width}], got shape {tuple(x.shape)}")
        with nullcontext() if autocast_dtype(x) is None else torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.weight.float())  # [T, E]
        scores = logits.softmax(-1) if self.scoring == "softmax" else logits.sigmoid()
        index = self._choice(scores.detach()).sort(dim=-1, descending=True, stable=True).indices[:, : self.k]
        weight = scores.gather(1, index)
        if self.normalise:
            weight = weight / (weight.sum(-1, keepdim=True) + _LEAST_SUM)
        return weight * self.scale, index, logits

    def _choice(self, scores: Tensor) -> Tensor:
        """Returns [T, E], by which experts are chosen; -inf for those of groups that a token may not use."""
        if self.correction_bias is not None:
            scores = scores + self.correction_bias
        if self.method == "greedy" or self.groups == self.top_groups:
            return scores
        of_group = scores.unflatten(1, (self.groups, -1))  # [T, groups, E / groups]
        best = of_group.topk(_BEST_OF_GROUP if self.method == "noaux_tc" else 1, dim=-1).values.sum(-1)
        chosen = best.sort(dim=-1, descending=True, stable=True).indices[:, : self.top_groups]
        allowed = torch.zeros_like(best).scatter_(1, chosen, 1.0) > 0
        return of_group.masked_fill(~allowed[..., None], -torch.inf).flatten(1)

    def extra_repr(self) -> str:
        groups = f", groups={self.groups}, top_groups={self.top_groups}" if self.groups > 1 else ""
        return (
            f"{self.width}, num_experts={self.num_experts}, k={self.k}, scoring={self.scoring!r}, "
            f"method={self.method!r}{groups}, scale={self.scale}, normalise={self.normalise}"
        )


def _not_narrower(before: Tensor, after: Tensor) -> Tensor:
    """Returns `after`, a tensor moved or converted, in the dtype of `before` if its own is narrower."""
    if not after.is_floating_point() or after.element_size() >= before.element_size():
        return after
    return torch.empty_like(after, dtype=before.dtype) if before.is_meta else before.to(after.device)
