"""Masked language modelling with image condition: hidden words are predicted from the other words and the image."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Generator, Tensor

from mmkernels.nn.checks import check_positive
from mmkernels.objectives.checks import check_generator, check_hidden, check_token_ids, checked_mask
from mmkernels.ops.linear.inputs import checked_ignore_index
from mmkernels.ops.linear.linear_cross_entropy import linear_cross_entropy
from mmkernels.runtime.checks import check_number, check_range

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class MaskedTokens(NamedTuple):
    """What `mask_tokens` returns.

    Args:
        input_ids: int64 ``[B, L]``, what the model is given.
        targets: int64 ``[B, L]``: the token that stood at a chosen place, `ignore_index` at all others.
    """

    input_ids: Tensor
    targets: Tensor


def mask_tokens(
    input_ids: Tensor,
    mask_token_id: int,
    vocab_size: int,
    *,
    special_ids: Sequence[int] = (),
    image_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    probability: float = 0.15,
    mask_share: float = 0.8,
    random_share: float = 0.1,
    ignore_index: int = -100,
    generator: Generator | None = None,
) -> MaskedTokens:
    """Chooses tokens to be predicted by BERT's recipe: of 15 %, 80 % are masked, 10 % exchanged, 10 % left.

    Each token is chosen independently with `probability`. A chosen one becomes `mask_token_id` with probability
    `mask_share`, a random token with `random_share`, and else stays. Special tokens, tokens of images and padding are
    never chosen, and no random token is one of `special_ids` or `mask_token_id`: a random image marker would move the
    images of a text.

    Args:
        input_ids: integers ``[B, L]``, 0 to `vocab_size` - 1.
        mask_token_id: what stands for a masked token.
        vocab_size: random tokens are drawn from 0 to `vocab_size` - 1.
        special_ids: tokens that are never chosen, such as those of begin, end, padding and images. `mask_token_id` is
            one of them.
        image_mask: bool or integers ``[B, L]``, non-zero where a token stands for a part of an image.
        attention_mask: bool or integers ``[B, L]``, 0: padding.
        probability: 0 to 1, the share of tokens that are predicted.
        mask_share, random_share: 0 to 1 each, and their sum too.
        ignore_index: the target of tokens that are not chosen.
        generator: on the CPU or on `input_ids`' device; None: PyTorch's global generator of that device. The same seed
            and shape give the same choice: what is drawn does not depend on the tokens or masks.

    Returns:
        `MaskedTokens`; `input_ids` is not changed. A row may have no chosen token.

    Raises:
        TypeError: a wrong dtype or type. ValueError: a wrong shape, a share that is not from 0 to 1, a token out of
            range, or `special_ids` leave no token to draw.

    Source: Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers", 2019, section 3.1, task 1; with
    an image as in Li et al., "Align before Fuse" (ALBEF), 2021, equation 3.

    Example:
        >>> import torch
        >>> from mmkernels.objectives import mask_tokens
        >>> ids = torch.arange(5, 105).expand(2, 100)
        >>> seeded = torch.Generator().manual_seed(0)
        >>> masked = mask_tokens(ids, mask_token_id=4, vocab_size=200, special_ids=(0, 1, 2, 3), generator=seeded)
        >>> chosen = masked.targets != -100
        >>> bool((masked.targets == ids)[chosen].all()), bool((masked.input_ids == ids)[~chosen].all())
        (True, True)
    """
    check_token_ids("input_ids", input_ids)
    check_generator(generator)
    checked_ignore_index(ignore_index)
    chance = check_number("probability", probability, "a number from 0 to 1", 0.0, 1.0)
    masked = check_number("mask_share", mask_share, "a number from 0 to 1", 0.0, 1.0)
    changed = masked + check_number("random_share", random_share, "a number from 0 to 1", 0.0, 1.0)
    if changed > 1.0 + 1e-9:
        raise ValueError(f"mask_share + random_share must be at most 1, got {changed}")
    special = _special_ids(mask_token_id, special_ids, vocab_size)
    check_range("input_ids", input_ids, 0, vocab_size - 1)
    ids, shape = input_ids.long(), tuple(input_ids.shape)
    choosable = ~torch.isin(ids, torch.tensor(special, device=ids.device))
    if image_mask is not None:
        choosable &= ~checked_mask("image_mask", image_mask, shape, "input_ids")
    if attention_mask is not None:
        choosable &= checked_mask("attention_mask", attention_mask, shape, "input_ids")

    device = ids.device if generator is None else generator.device
    drawn = torch.rand(2, *shape, generator=generator, device=device).to(ids.device)
    others = torch.randint(vocab_size - len(special), shape, generator=generator, device=device).to(ids.device)
    for token in special:  # in rising order: the n-th token that is not special
        others += others >= token
    chosen = choosable & (drawn[0] < chance)
    given = torch.where(drawn[1] < masked, mask_token_id, torch.where(drawn[1] < changed, others, ids))
    return MaskedTokens(torch.where(chosen, given, ids), torch.where(chosen, ids, ignore_index))


def _special_ids(mask_token_id: int, special_ids: Sequence[int], vocab_size: int) -> list[int]:
    """Returns the tokens that are never chosen or drawn, in rising order."""
    check_positive("vocab_size", vocab_size)
    if not isinstance(special_ids, Iterable):
        raise TypeError(f"special_ids must be a sequence of integers, got {type(special_ids).__name__}")
    for token in (mask_token_id, *special_ids):
        if isinstance(token, bool) or not isinstance(token, int):
            raise TypeError(f"mask_token_id and special_ids must be integers, got {type(token).__name__}")
    special = sorted({mask_token_id, *special_ids})
    if special[0] < 0 or special[-1] >= vocab_size:
        got = special[0] if special[0] < 0 else special[-1]
        raise ValueError(f"mask_token_id and special_ids must be from 0 to {vocab_size - 1}, got {got}")
    if len(special) == vocab_size:
        raise ValueError(f"special_ids must leave a token of the {vocab_size} to draw, got all of them")
    return special


def masked_language_modelling_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    ignore_index: int = -100,
    group: ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy of the chosen tokens, given the other tokens and the image.

    ``loss = -1/T sum log p(y_t | image, masked text)`` over the T chosen tokens, where
    ``p = softmax(hidden weight' + bias)``. Logits are never built, and only the 15 % of rows that have a target are
    multiplied.

    Args:
        hidden: ``[B, L, d]`` of a text encoder that attends to the image, after the head's transform; float16,
            bfloat16, float32 or float64.
        weight: of the head ``[V, d]``, hidden's dtype; usually the embedding's.
        targets: int64 ``[B, L]`` of `mask_tokens`.
        bias: of the head ``[V]``, or None.
        label_smoothing, group, backend: as in `mmkernels.linear_cross_entropy`.
        reduction: "mean" over the chosen tokens (NaN if there is none, as in ``F.cross_entropy``), "sum" (0 then), or
            "none".
        ignore_index: the target of tokens that are not predicted.

    Returns:
        a float32 scalar (float64 for float64 inputs); ``[B, L]`` with reduction="none", 0 where nothing is predicted.
        Differentiable by hidden, weight and bias.

    Raises:
        TypeError, ValueError: as `mmkernels.linear_cross_entropy`, or hidden has another B and L than `targets`.

    Source: Li et al., "Align before Fuse" (ALBEF), 2021, equation 3.

    Example:
        >>> import torch
        >>> from mmkernels.objectives import mask_tokens, masked_language_modelling_loss
        >>> ids = torch.randint(5, 200, (2, 50))
        >>> masked = mask_tokens(ids, mask_token_id=4, vocab_size=200, special_ids=(0, 1, 2, 3))
        >>> hidden = torch.randn(2, 50, 16)  # of the model for masked.input_ids and the images
        >>> masked_language_modelling_loss(hidden, torch.randn(200, 16), masked.targets).shape
        torch.Size([])
    """
    check_token_ids("targets", targets)
    check_hidden(hidden, targets, "targets")
    return linear_cross_entropy(
        hidden,
        weight,
        targets.long(),
        linear_bias=bias,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
        group=group,
        backend=backend,
    )
