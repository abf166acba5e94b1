"""Conditional generation: which tokens are learned, and the loss against its formula."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from objective_formulas import check_against, head, logits_of
from torch import Tensor

from mmkernels.objectives import (
    conditional_generation,
    conditional_generation_loss,
    generation_targets,
    shifted_targets,
)

IDS = torch.randint(1, 23, (3, 9), generator=torch.Generator().manual_seed(0))
IMAGES = torch.zeros(3, 9, dtype=torch.bool).index_fill_(1, torch.tensor([2, 6]), True)
PADDED = torch.tensor([[1] * 9, [1] * 6 + [0] * 3, [0] * 2 + [1] * 7])  # not at all, on the right, on the left


def targets_one_by_one(ids: Tensor, prompts: list[int] | None, images: Tensor | None, valid: Tensor | None) -> Tensor:
    """Token by token: what position i of a row has to predict."""
    targets = torch.full_like(ids, -100)
    for row in range(len(ids)):
        text = [i for i in range(ids.shape[1]) if valid is None or valid[row, i]]
        for place, (i, after) in enumerate(pairwise(text), 1):
            answers = prompts is None or place >= prompts[row]
            if answers and not (images is not None and images[row, after]):
                targets[row, i] = ids[row, after]
    return targets


@pytest.mark.parametrize("valid", [None, PADDED, PADDED.bool()])
@pytest.mark.parametrize("images", [None, IMAGES, IMAGES.int()])
@pytest.mark.parametrize("prompts", [None, [4, 0, 2], [3, 3, 3], [100, 9, 1]])
def test_targets_are_the_next_token_of_the_answer(
    prompts: list[int] | None, images: Tensor | None, valid: Tensor | None
) -> None:
    lengths = None if prompts is None else torch.tensor(prompts)
    targets = generation_targets(IDS.int(), prompt_lengths=lengths, image_mask=images, attention_mask=valid)
    assert targets.dtype == torch.int64
    assert torch.equal(targets, targets_one_by_one(IDS, prompts, images, valid))
    if prompts is not None and len(set(prompts)) == 1:
        alike = generation_targets(IDS, prompt_lengths=prompts[0], image_mask=images, attention_mask=valid)
        assert torch.equal(alike, targets)


@pytest.mark.parametrize("shape", [(2, 5), (7,), (2, 0), (0, 4), (2, 1)])
def test_shifted_labels(shape: tuple[int, ...]) -> None:
    labels = torch.randint(50, shape)
    shifted = shifted_targets(labels, ignore_index=-1)
    assert shifted.shape == labels.shape
    assert torch.equal(shifted[..., :-1], labels[..., 1:]) and bool((shifted[..., -1:] == -1).all())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "sum", "label_smoothing": 0.1},
        {"reduction": "none", "softcap": 3.0},
        {"z_loss": 0.01, "softcap": 5.0},
    ],
    ids=str,
)
def test_loss_against_the_formula(options: dict[str, Any]) -> None:
    given = {"prompt_lengths": torch.tensor([4, 1, 2]), "image_mask": IMAGES, "attention_mask": PADDED}

    def formula(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        z = logits_of(hidden, weight, bias, options.get("softcap"))
        targets = targets_one_by_one(IDS, [4, 1, 2], IMAGES, PADDED)
        losses = F.cross_entropy(
            z.flatten(0, 1), targets.flatten(), reduction="none", label_smoothing=options.get("label_smoothing", 0.0)
        ).unflatten(0, targets.shape)
        losses = losses + options.get("z_loss", 0.0) * z.logsumexp(-1) ** 2 * (targets >= 0)
        reduction = options.get("reduction", "mean")
        return losses if reduction == "none" else losses.sum() / (1 if reduction == "sum" else (targets >= 0).sum())

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return conditional_generation_loss(hidden, weight, IDS, bias=bias, **given, **options)

    check_against(ours, formula, *head(3, 9))


def test_hidden_states_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Tensor] = []
    loss = conditional_generation.linear_cross_entropy
    monkeypatch.setattr(
        conditional_generation,
        "linear_cross_entropy",
        lambda hidden, *args, **options: taken.append(hidden) or loss(hidden, *args, **options),
    )
    hidden, weight, _ = head(3, 9)
    conditional_generation_loss(hidden, weight, IDS)
    assert taken[0].data_ptr() == hidden.data_ptr() and taken[0].shape == hidden.shape


def test_prompts_alone_have_no_loss() -> None:
    hidden, weight, _ = head(3, 9)
    hidden.requires_grad_()
    assert conditional_generation_loss(hidden, weight, IDS, prompt_lengths=9).isnan()
    loss = conditional_generation_loss(hidden, weight, IDS, prompt_lengths=9, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert loss.item() == 0 and not gradient.any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input_ids": IDS.float()}, TypeError, "input_ids must be integers, got torch.float32"),
        ({"input_ids": IDS[0]}, ValueError, r"input_ids must be \[B, L\], got shape \(9,\)"),
        ({"hidden": head(3, 8)[0]}, ValueError, r"hidden must be \[3, 9, d\] as input_ids, got shape \(3, 8, 5\)"),
        ({"hidden": IDS}, TypeError, "hidden must be float16"),
        ({"prompt_lengths": torch.ones(2).long()}, ValueError, r"prompt_lengths must be \[3\], got shape \(2,\)"),
        ({"prompt_lengths": torch.tensor([1, -1, 2])}, ValueError, "prompt_lengths must be >= 0, got -1"),
        ({"prompt_lengths": -2}, ValueError, "prompt_lengths must be >= 0, got -2"),
        ({"prompt_lengths": 2.0}, TypeError, "prompt_lengths must be integers, got float"),
        ({"image_mask": IMAGES[:2]}, ValueError, r"image_mask must be \[3, 9\] as input_ids, got shape \(2, 9\)"),
        ({"attention_mask": PADDED.float()}, TypeError, "attention_mask must be bool or integers, got torch.float32"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    hidden, weight, _ = head(3, 9)
    with pytest.raises(error, match=message):
        conditional_generation_loss(**{"hidden": hidden, "weight": weight, "input_ids": IDS} | change)


def test_labels_must_have_a_dim_of_tokens() -> None:
    with pytest.raises(ValueError, match=r"labels must be \[\.\.\., L\], got shape \(\)"):
        shifted_targets(torch.tensor(3))
