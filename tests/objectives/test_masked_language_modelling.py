"""Masked language modelling: BERT's recipe, what is never masked, and the loss against its formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from objective_formulas import check_against, head, logits_of
from torch import Tensor

from mmkernels.objectives import MaskedTokens, mask_tokens, masked_language_modelling_loss

VOCAB, MASK, SPECIAL = 40, 4, (0, 1, 39, 20)
IDS = torch.randint(VOCAB, (100, 300), generator=torch.Generator().manual_seed(0))
IMAGES = torch.zeros(100, 300, dtype=torch.bool)
IMAGES[:, 10:60] = True
VALID = (torch.arange(300) < torch.randint(100, 300, (100, 1), generator=torch.Generator().manual_seed(1))).int()


def masked(seed: int = 0, ids: Tensor = IDS, **options: Any) -> MaskedTokens:
    given = {"special_ids": SPECIAL, "generator": torch.Generator().manual_seed(seed)} | options
    return mask_tokens(ids, MASK, VOCAB, **given)


def test_the_recipe_of_bert() -> None:
    given, targets = masked(image_mask=IMAGES, attention_mask=VALID)
    special = torch.isin(IDS, torch.tensor([*SPECIAL, MASK]))
    choosable = ~special & ~IMAGES & VALID.bool()
    chosen = targets != -100
    assert torch.equal(targets[chosen], IDS[chosen]) and torch.equal(given[~chosen], IDS[~chosen])
    assert not (chosen & ~choosable).any()

    def near(found: Tensor, among: Tensor, share: float) -> bool:
        """Whether a share is within five standard deviations."""
        n = int(among.sum())
        return abs(int((found & among).sum()) / n - share) < 5 * (share * (1 - share) / n) ** 0.5

    exchanged = chosen & (given != MASK) & (given != IDS)
    assert near(chosen, choosable, 0.15)
    assert near(given == MASK, chosen, 0.8)
    assert near(exchanged, chosen, 0.1 * (1 - 1 / (VOCAB - 5)))  # a random token may be the one that was there
    assert not torch.isin(given[exchanged], torch.tensor(SPECIAL)).any()


def test_a_seed_draws_the_same_whatever_the_masks() -> None:
    first, second, other = masked(3), masked(3), masked(4)
    assert torch.equal(first.input_ids, second.input_ids) and torch.equal(first.targets, second.targets)
    assert not torch.equal(first.targets, other.targets)
    shown = VALID.bool()
    padded = masked(3, attention_mask=VALID)
    assert torch.equal(padded.targets[shown], first.targets[shown])
    assert torch.equal(padded.input_ids[shown], first.input_ids[shown])
    torch.manual_seed(5)
    default = masked(generator=None)
    torch.manual_seed(5)
    assert torch.equal(default.targets, masked(generator=None).targets)


@pytest.mark.parametrize(("mask_share", "random_share"), [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0)])
def test_shares_at_their_ends(mask_share: float, random_share: float) -> None:
    ids = torch.full((100, 350), 7)
    none = masked(ids=ids, probability=0.0)
    assert torch.equal(none.input_ids, ids) and bool((none.targets == -100).all())
    every = masked(ids=ids, probability=1.0, mask_share=mask_share, random_share=random_share)
    assert torch.equal(every.targets, ids)
    if random_share:  # each of the 35 tokens that are not special 1000 times, within five standard deviations
        counts = every.input_ids.flatten().bincount(minlength=VOCAB)
        assert not counts[[*SPECIAL, MASK]].any()
        counts = counts[[token for token in range(VOCAB) if token not in (*SPECIAL, MASK)]]
        assert counts.min() > 840 and counts.max() < 1160
    else:
        assert bool((every.input_ids == (MASK if mask_share else 7)).all())


def test_input_is_not_changed_and_may_be_empty() -> None:
    before = IDS.clone()
    masked()
    assert torch.equal(IDS, before)
    assert masked(ids=IDS[:0]).targets.shape == (0, 300)
    assert masked(ids=IDS.int(), ignore_index=-1).targets.dtype == torch.int64


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_against_the_formula(reduction: str) -> None:
    targets = masked(ids=IDS[:4, :25], attention_mask=VALID[:4, :25], probability=0.4).targets

    def formula(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        z = logits_of(hidden, weight, bias).flatten(0, 1)
        loss = F.cross_entropy(z, targets.flatten(), reduction=reduction, label_smoothing=0.1)
        return loss.view(4, 25) if reduction == "none" else loss

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return masked_language_modelling_loss(
            hidden, weight, targets, bias=bias, reduction=reduction, label_smoothing=0.1
        )

    check_against(ours, formula, *head(4, 25, VOCAB))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input_ids": IDS.float()}, TypeError, "input_ids must be integers"),
        ({"input_ids": IDS[0]}, ValueError, r"input_ids must be \[B, L\]"),
        ({"input_ids": IDS + 1}, ValueError, "input_ids must be from 0 to 39, got 1 to 40"),
        ({"probability": 1.5}, ValueError, r"probability must be a number from 0 to 1, got 1\.5"),
        ({"mask_share": -0.1}, ValueError, "mask_share must be a number from 0 to 1"),
        ({"mask_share": 0.8, "random_share": 0.3}, ValueError, r"mask_share \+ random_share must be at most 1"),
        ({"mask_token_id": 40}, ValueError, "mask_token_id and special_ids must be from 0 to 39, got 40"),
        ({"special_ids": ("<s>",)}, TypeError, "mask_token_id and special_ids must be integers, got str"),
        ({"special_ids": range(40)}, ValueError, "special_ids must leave a token"),
        ({"special_ids": 3}, TypeError, "special_ids must be a sequence of integers, got int"),
        ({"generator": 3}, TypeError, "generator must be a torch.Generator or None, got int"),
        ({"ignore_index": -100.0}, TypeError, "ignore_index must be an int, got float"),
        ({"vocab_size": 0}, ValueError, "vocab_size must be a positive integer"),
        ({"image_mask": IMAGES.T}, ValueError, r"image_mask must be \[100, 300\] as input_ids"),
        ({"attention_mask": VALID.float()}, TypeError, "attention_mask must be bool or integers"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mask_tokens(**{"input_ids": IDS, "mask_token_id": MASK, "vocab_size": VOCAB} | change)


def test_bad_hidden() -> None:
    with pytest.raises(ValueError, match=r"hidden must be \[4, 25, d\] as targets, got shape \(4, 24, 5\)"):
        masked_language_modelling_loss(*head(4, 24)[:2], IDS[:4, :25])
