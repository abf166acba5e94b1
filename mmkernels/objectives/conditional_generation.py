"""Conditional generation: the answer is predicted from images and prompt, which carry no label themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmkernels.objectives.checks import check_hidden, check_integers, check_token_ids, checked_mask
from mmkernels.ops.linear.inputs import checked_ignore_index
from mmkernels.ops.linear.linear_cross_entropy import linear_cross_entropy
from mmkernels.runtime.checks import check_range

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def shifted_targets(labels: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Returns what each position predicts, the label of the next one: the last position predicts nothing.

    Shifted so, the labels fit hidden states that are not shifted: no row of these is cut off, which would copy the
    others. Rows whose target is ignored are never multiplied.

    Args:
        labels: integers ``[..., L]``, one for each token, `ignore_index` where it is not learned.
        ignore_index: the target of what predicts nothing.

    Returns:
        int64 ``[..., L]``.

    Raises:
        TypeError: `labels` is not a tensor of integers, or `ignore_index` no int. ValueError: `labels` has no dim.

    Source: the causal language model's loss of Hugging Face transformers, ``ForCausalLMLoss``.

    Example:
        >>> import torch
        >>> from mmkernels.objectives import shifted_targets
        >>> shifted_targets(torch.tensor([[-100, -100, 7, 8]]))
        tensor([[-100,    7,    8, -100]])
    """
    check_integers("labels", labels)
    checked_ignore_index(ignore_index)
    if labels.dim() == 0:
        raise ValueError("labels must be [..., L], got shape ()")
    targets = torch.full_like(labels, ignore_index, dtype=torch.int64)
    targets[..., :-1] = labels[..., 1:]
    return targets


def generation_targets(
    input_ids: Tensor,
    *,
    prompt_lengths: Tensor | int | None = None,
    image_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Returns the token that each position has to predict, `ignore_index` where there is none.

    Position i predicts token i + 1 unless that is a token of the prompt, an image's or padding, or position i is
    padding itself: the first token of a text, which nothing precedes, is never predicted.

    Args:
        input_ids: integers ``[B, L]``: the prompt and its answer, one after the other.
        prompt_lengths: integers ``[B]``, or one number for all rows: how many tokens, images' included, precede the
            answer. They are counted from the first one that `attention_mask` shows, so a row may be padded on the left.
            A row that is prompt alone has no target.
        image_mask: bool or integers ``[B, L]``, non-zero where a token stands for a part of an image.
        attention_mask: bool or integers ``[B, L]``, 0: padding, on either side.
        ignore_index: the target of what predicts nothing.

    Returns:
        int64 ``[B, L]``, for hidden states of all positions: see `shifted_targets`.

    Raises:
        TypeError: a wrong dtype. ValueError: a wrong shape, or a negative prompt length (where that can be seen without
            waiting for a device).

    Source: Liu et al., "Visual Instruction Tuning" (LLaVA), 2023, equation 3: only answers are learned.

    Example:
        >>> import torch
        >>> from mmkernels.objectives import generation_targets
        >>> image = 99
        >>> ids = torch.tensor([[image, image, 5, 6, 7, 2], [0, image, image, 5, 8, 2]])
        >>> generation_targets(ids, prompt_lengths=3, attention_mask=ids != 0)
        tensor([[-100, -100,    6,    7,    2, -100],
                [-100, -100, -100,    8,    2, -100]])
    """
    check_token_ids("input_ids", input_ids)
    shape = tuple(input_ids.shape)
    if attention_mask is None:
        valid = None
        position = torch.arange(shape[1], device=input_ids.device)[None]  # of a token in its text
        learned = torch.ones_like(input_ids, dtype=torch.bool)
    else:
        learned = valid = checked_mask("attention_mask", attention_mask, shape, "input_ids")
        position = valid.cumsum(1) - 1
    if prompt_lengths is not None:
        learned = learned & (position >= _prompt_lengths(prompt_lengths, input_ids))
    if image_mask is not None:
        learned = learned & ~checked_mask("image_mask", image_mask, shape, "input_ids")
    targets = shifted_targets(torch.where(learned, input_ids.long(), ignore_index), ignore_index=ignore_index)
    return targets if valid is None else torch.where(valid, targets, ignore_index)


def _prompt_lengths(lengths: Tensor | int, input_ids: Tensor) -> Tensor:
    """Returns the lengths as ``[B, 1]`` or ``[1, 1]``."""
    if not isinstance(lengths, Tensor):
        if isinstance(lengths, bool) or not isinstance(lengths, int):
            raise TypeError(f"prompt_lengths must be integers, got {type(lengths).__name__}")
        if lengths < 0:
            raise ValueError(f"prompt_lengths must be >= 0, got {lengths}")
        return torch.full((1, 1), lengths, device=input_ids.device)
    check_integers("prompt_lengths", lengths)
    if tuple(lengths.shape) != (input_ids.shape[0],):
        raise ValueError(f"prompt_lengths must be [{input_ids.shape[0]}], got shape {tuple(lengths.shape)}")
    check_range("prompt_lengths", lengths, 0)
    return lengths[:, None]


def conditional_generation_loss(
    hidden: Tensor,
    weight: Tensor,
    input_ids: Tensor,
    *,
    prompt_lengths: Tensor | int | None = None,
    image_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    bias: Tensor | None = None,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    reduction: str = "mean",
    group: ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy of each answer's tokens, given images, prompt and the tokens before.

    ``loss = -1/T sum log p(y_t | image, prompt, y_<t)`` over the T tokens of all answers, where
    ``p = softmax(hidden weight' + bias)``. Logits are never built, and rows of images, prompt and padding are not
    multiplied. Hidden states are taken as the model returns them: the targets are shifted instead.

    Args:
        hidden: the last layer's output ``[B, L, d]``, float16, bfloat16, float32 or float64.
        weight: of the head ``[V, d]``, hidden's dtype.
        input_ids, prompt_lengths, image_mask, attention_mask: as in `generation_targets`.
        bias: of the head ``[V]``, or None.
        label_smoothing, softcap, z_loss, group, backend: as in `mmkernels.linear_cross_entropy`.
        reduction: "mean" over the predicted tokens (NaN if there is none, as in ``F.cross_entropy``), "sum" (0 then),
            or "none".

    Returns:
        a float32 scalar (float64 for float64 inputs); ``[B, L]`` with reduction="none", 0 where nothing is predicted.
        Differentiable by hidden, weight and bias.

    Raises:
        TypeError, ValueError: as `generation_targets` and `mmkernels.linear_cross_entropy`, or hidden has another B and
            L than `input_ids`.

    Source: Liu et al., "Visual Instruction Tuning" (LLaVA), 2023, equation 3.

    Example:
        >>> import torch
        >>> from mmkernels.objectives import conditional_generation_loss
        >>> hidden, head = torch.randn(2, 6, 16, requires_grad=True), torch.randn(100, 16)
        >>> ids = torch.randint(99, (2, 6))
        >>> conditional_generation_loss(hidden, head, ids, prompt_lengths=torch.tensor([3, 5])).backward()
        >>> hidden.grad.abs().sum(-1) > 0  # what predicts a token of an answer
        tensor([[False, False,  True,  True,  True, False],
                [False, False, False, False,  True, False]])
    """
    targets = generation_targets(
        input_ids, prompt_lengths=prompt_lengths, image_mask=image_mask, attention_mask=attention_mask
    )
    check_hidden(hidden, input_ids, "input_ids")
    return linear_cross_entropy(
        hidden,
        weight,
        targets,
        linear_bias=bias,
        label_smoothing=label_smoothing,
        reduction=reduction,
        softcap=softcap,
        z_loss=z_loss,
        group=group,
        backend=backend,
    )
