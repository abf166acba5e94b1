"""`LinearCrossEntropyLoss`: Liger's fused linear cross-entropy, over the op that never builds the logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmkernels.nn.checks import check_choice
from mmkernels.ops.linear.linear_cross_entropy import CrossEntropy, cross_entropy
from mmkernels.runtime.checks import FINITE, check_bool, check_floating, check_number


@dataclass(frozen=True)
class CrossEntropyOutput:
    """The result of `LinearCrossEntropyLoss` where more than the loss is asked for; None: it was not.

    Attributes:
        loss: as without the others; the only one that is differentiable.
        z_loss: the part of `loss` that is the z-loss, with its shape.
        token_accuracy: float32, the share of tokens, of those not ignored, whose target has the largest logit; NaN
            without such a token. With reduction="none" 1 or 0 of each token, 0 where ignored.
        predicted_tokens: int64, one for each token, the one with the largest logit; -1 where ignored.
    """

    loss: Tensor
    z_loss: Tensor | None = None
    token_accuracy: Tensor | None = None
    predicted_tokens: Tensor | None = None


class LinearCrossEntropyLoss(nn.Module):
    """The loss of a linear head, constructed and called as ``liger_kernel``'s ``LigerFusedLinearCrossEntropyLoss``.

    ``loss_i = w[y_i] (1 - e) (-log p_i[y_i]) + e / V sum_c w[c] (-log p_i[c]) + lse_square_scale lse_i^2`` with
    ``p_i = softmax(softcap(input_i weight' + bias))``, the class weights w (1 without) and the label smoothing e.
    Logits are never built, and ignored rows are not multiplied. Gradients are those of `linear_cross_entropy`: computed
    with the loss, in three products, for a mean or a sum; in four with reduction="none" or `use_token_scaling`.

    Args:
        ce_weight: w, floating ``[V]``, or None. A buffer that state dicts leave out.
        ignore_index: the target of rows that don't count.
        lse_square_scale: >= 0, of the z-loss, which is part of the loss.
        label_smoothing: e, from 0 to 1.
        reduction: "mean": the cross-entropies' sum divided by that of ``w[y_i]``, the z-losses' by the number of rows
            that are not ignored, and 0 if there is none, as Liger's (PyTorch's is NaN); "sum"; or "none": one loss for
            each row, 0 where ignored.
        softcap: a number above 0, or None: logits z become ``softcap tanh(z / softcap)``.
        return_z_loss, return_token_accuracy, return_predicted_tokens: return a `CrossEntropyOutput` with these.
        accum_dtype: None or ``torch.float32``. Both are the same here: gradients are always summed in float32 (float64
            for float64 inputs). Nothing else can be had.
        use_token_scaling: whether each row's loss is multiplied by ``p_i[y_i]``, taken as a constant (dynamic
            fine-tuning).

    Raises:
        TypeError: a wrong type. ValueError: a number or name that is none of the above.

    Source: Hsu et al., "Liger Kernel: Efficient Triton Kernels for LLM Training", 2024, section 3.2; z-loss: Chowdhery
    et al., "PaLM", 2022, section 5; token scaling: Wu et al., "On the Generalization of SFT", 2025.

    Example:
        >>> import torch
        >>> from mmkernels.nn import LinearCrossEntropyLoss  # instead of: LigerFusedLinearCrossEntropyLoss
        >>> head, hidden = torch.nn.Linear(64, 1000, bias=False), torch.randn(8, 64, requires_grad=True)
        >>> target = torch.randint(1000, (8,))
        >>> LinearCrossEntropyLoss()(head.weight, hidden, target).backward()
        >>> out = LinearCrossEntropyLoss(lse_square_scale=1e-4, return_z_loss=True)(head.weight, hidden, target)
        >>> bool(out.z_loss < out.loss)
        True
    """

    ce_weight: Tensor | None

    def __init__(
        self,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ) -> None:
        super().__init__()
        if ce_weight is not None:
            check_floating("ce_weight", ce_weight)
        check_number("lse_square_scale", lse_square_scale, "a finite number >= 0", 0.0)
        check_number("label_smoothing", label_smoothing, "a number from 0 to 1", 0.0, 1.0)
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        if softcap is not None:
            check_number("softcap", softcap, "None or a finite number above 0", torch.finfo(torch.float32).tiny, FINITE)
        for name, flag in (
            ("return_z_loss", return_z_loss),
            ("use_token_scaling", use_token_scaling),
            ("return_token_accuracy", return_token_accuracy),
            ("return_predicted_tokens", return_predicted_tokens),
        ):
            check_bool(name, flag)
        if accum_dtype not in (None, torch.float32):
            raise ValueError(
                f"accum_dtype must be None or torch.float32, in which gradients are always summed; got {accum_dtype}"
            )
        self.register_buffer("ce_weight", ce_weight, persistent=False)
        self.ignore_index = ignore_index
        self.lse_square_scale = lse_square_scale
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.softcap = softcap
        self.return_z_loss = return_z_loss
        self.accum_dtype = accum_dtype
        self.use_token_scaling = use_token_scaling
        self.return_token_accuracy = return_token_accuracy
        self.return_predicted_tokens = return_predicted_tokens

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor | CrossEntropyOutput:
        """Returns the loss, or a `CrossEntropyOutput` if more was asked for.

        Args:
            lin_weight: of the head, ``[V, d]``.
            _input: hidden states ``[T, d]``, or ``[..., d]``, of lin_weight's dtype: float16, bfloat16, float32 or
                float64.
            target: int64 ``[T]``, or ``[...]``: 0 to V - 1, or `ignore_index`.
            bias: of the head, ``[V]``, or None.

        Returns:
            float32 (float64 for float64 inputs), a scalar, or of target's shape with reduction="none".

        Raises:
            TypeError, ValueError: as `mmkernels.linear_cross_entropy`; there `_input` is called input.
        """
        found = self._scaled(lin_weight, _input, target, bias) if self.use_token_scaling else self._call(
            lin_weight, _input, target, bias, self.reduction, self.lse_square_scale
        )  # fmt: skip
        loss, z_loss, live = found.loss, found.z_loss, target != self.ignore_index
        if self.reduction == "mean":
            loss, z_loss = (torch.where(live.any(), x, 0.0) for x in (loss, z_loss))
        if not (self.return_z_loss or self.return_token_accuracy or self.return_predicted_tokens):
            return loss
        accuracy: Tensor | None = None
        if self.return_token_accuracy:
            right = ((found.best_index == target) & live).float()
            accuracy = right if self.reduction == "none" else right.sum() / live.sum()
        return CrossEntropyOutput(
            loss,
            z_loss if self.return_z_loss else None,
            accuracy,
            found.best_index if self.return_predicted_tokens else None,
        )

    def _call(
        self, weight: Tensor, hidden: Tensor, target: Tensor, bias: Tensor | None, reduction: str, z_loss: float
    ) -> CrossEntropy:
        return cross_entropy(
            hidden,
            weight,
            target,
            linear_bias=bias,
            weight=self.ce_weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction=reduction,
            softcap=self.softcap,
            z_loss=z_loss,
            group=None,
            backend=None,
            return_best=self.return_token_accuracy or self.return_predicted_tokens,
        )

    def _scaled(self, weight: Tensor, hidden: Tensor, target: Tensor, bias: Tensor | None) -> CrossEntropy:
        """Returns the results with each row's losses times its target's probability."""
        live, z_loss, divisor = target != self.ignore_index, self.lse_square_scale, torch.ones(())
        if self.reduction == "mean":
            divisor = count = live.sum()
            if self.ce_weight is not None:
                divisor = self.ce_weight[torch.where(live, target, 0)].where(live, 0.0).sum()
                z_loss = z_loss * float(divisor / count.clamp(min=1))  # its sum is divided by the number of rows
        rows = self._call(weight, hidden, target, bias, "none", z_loss)
        chance = rows.logprobs.detach().exp()
        losses, z_losses = rows.loss * chance, rows.z_loss * chance
        if self.reduction != "none":
            losses, z_losses = losses.sum() / divisor, z_losses.sum() / divisor
        return rows._replace(loss=losses, z_loss=z_losses)
