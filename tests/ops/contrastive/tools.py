"""What the tests of the contrastive ops share: their definition as loops over rows, inputs, and a step of each loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from harness import SPECS, backends, cotangent, dtype_of, generator, run
from torch import Tensor

from mmkernels import info_nce, sigmoid_contrastive
from mmkernels.spec import Case, Inputs, cast

POSITIVE, NEGATIVE, HIDDEN = "positive", "negative", "hidden"


# The definition, row by row.


class Rows(NamedTuple):
    """One direction.

    Args:
        loss: [rows].
        ranks: of each row; None: it has no positive.
    """

    loss: Tensor
    ranks: list[int | None]

    @property
    def mean(self) -> Tensor:
        """Over the rows that have a positive."""
        return self.loss.sum() / max(1, sum(rank is not None for rank in self.ranks))

    @property
    def statistics(self) -> tuple[float, float, int]:
        """Accuracy, mean rank, rows without a positive."""
        found = [rank for rank in self.ranks if rank is not None]
        if not found:
            return math.nan, math.nan, len(self.ranks)
        return found.count(0) / len(found), sum(found) / len(found), len(self.ranks) - len(found)


def scores_of(image: Tensor, text: Tensor) -> Tensor:
    """[N, M]."""
    if image.dim() == 2:
        return torch.einsum("nd,md->nm", image, text)
    return torch.einsum("nqd,md->nmq", image, text).max(2).values


def row_of(scores: Tensor, kinds: list[str], label_smoothing: float) -> tuple[Tensor, int | None]:
    """Returns loss and rank of one row, from its scores [columns] and what each column is."""
    visible = [column for column, kind in enumerate(kinds) if kind != HIDDEN]
    positives = [column for column in visible if kinds[column] == POSITIVE]
    if not positives:
        return scores.new_zeros(()), None
    target = torch.zeros_like(scores)
    target[visible] += label_smoothing / len(visible)
    target[positives] += (1 - label_smoothing) / len(positives)
    loss = -(target[visible] * (scores[visible] - scores[visible].logsumexp(0))).sum()
    values = scores.nan_to_num(-math.inf, math.inf, -math.inf).tolist()
    order = sorted(visible, key=lambda column: (-values[column], column))
    rank = [kinds[column] for column in order].index(POSITIVE)
    if bool(scores[order[rank]].isnan()):
        rank = len(visible) - len(positives)
    return loss, rank


def by_loops(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    *,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    same_id: str = "positive",
    hard_texts: Tensor | None = None,
    hard_text_ids: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> tuple[Rows, Rows]:
    """Returns the rows of images to texts, and those of texts to images."""

    def kind(i: int, j: int) -> str:
        if image_ids is None or text_ids is None:
            return POSITIVE if i == j else NEGATIVE
        same = int(image_ids[i]) == int(text_ids[j])
        if same_id == "positive":
            return POSITIVE if same else NEGATIVE
        return POSITIVE if i == j else HIDDEN if same else NEGATIVE

    def kind_of_hard(i: int, k: int) -> str:
        if image_ids is None or hard_text_ids is None or int(image_ids[i]) != int(hard_text_ids[k]):
            return NEGATIVE
        return POSITIVE if same_id == "positive" else HIDDEN

    scores = logit_scale * scores_of(image, text)
    of_images, more = scores, 0
    if hard_texts is not None:
        of_images, more = torch.cat([scores, logit_scale * scores_of(image, hard_texts)], 1), len(hard_texts)
    numbers = range(len(image)), range(len(text))
    images = [
        row_of(
            of_images[i],
            [kind(i, j) for j in numbers[1]] + [kind_of_hard(i, k) for k in range(more)],
            label_smoothing,
        )
        for i in numbers[0]
    ]
    texts = [row_of(scores[:, j], [kind(i, j) for i in numbers[0]], label_smoothing) for j in numbers[1]]
    return tuple(Rows(torch.stack([x for x, _ in rows]), [rank for _, rank in rows]) for rows in (images, texts))  # type: ignore[return-value]


def open_clip(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """open_clip's ClipLoss: two matrix products, two cross-entropies, the mean of both."""
    labels = torch.arange(len(image))
    logits_per_image, logits_per_text = logit_scale * image @ text.T, logit_scale * text @ image.T
    return (F.cross_entropy(logits_per_image, labels) + F.cross_entropy(logits_per_text, labels)) / 2


def open_clip_sigmoid(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """open_clip's SigLipLoss: labels of 1 on the diagonal and -1 beside it, the sum divided by the batch."""
    labels = 2 * torch.eye(len(image), dtype=image.dtype) - torch.ones(len(image), len(text))
    return -F.logsigmoid(labels * (logit_scale * image @ text.T + logit_bias)).sum() / len(image)


def features(
    n: int = 7, m: int | None = None, dim: int = 5, queries: int = 0, scale: float = 4.0, seed: int = 0
) -> Inputs:
    """Returns random images and texts, and a scale, in float64."""
    g = generator(seed)

    def draw(*shape: int) -> Tensor:
        return F.normalize(torch.randn(shape, generator=g, dtype=torch.float64), dim=-1)

    image = draw(n, queries, dim) if queries else draw(n, dim)
    text = draw(n if m is None else m, dim)
    return {"image": image, "text": text, "logit_scale": torch.tensor(scale, dtype=torch.float64)}


def check_rows(backend: str, inputs: Inputs, **options: Any) -> None:
    """Assert that every row, statistic and gradient is that of the loops in float64, on inputs as `backend` gets them.

    Args:
        inputs: floating tensors by name, each of which is differentiated by.
    """
    dtype = dtype_of("info_nce", backend)
    ours = {name: x.detach().to(dtype).requires_grad_() for name, x in inputs.items()}
    true = {name: x.detach().double().requires_grad_() for name, x in ours.items()}
    losses, stats = info_nce(**ours, **options, reduction="none", return_stats=True, backend=backend)
    rows = by_loops(**true, **options)
    for mine, want in zip(losses, rows, strict=True):
        torch.testing.assert_close(mine, want.loss.to(dtype))
    check_statistics(stats, rows)
    check_gradients(losses, list(ours.values()), tuple(side.loss for side in rows), list(true.values()))


def check_statistics(stats: tuple[Tensor, ...], rows: tuple[Rows, Rows]) -> None:
    """Assert that `ContrastiveStats` are those of the rows."""
    images, texts = (side.statistics for side in rows)
    want = [x for pair in zip(images, texts, strict=True) for x in pair]
    assert [float(x) for x in stats] == pytest.approx(want, nan_ok=True, rel=1e-6)
    assert all(x.dim() == 0 and not x.requires_grad for x in stats)
    assert stats[-1].dtype == stats[-2].dtype == torch.int64


def check_gradients(
    losses: tuple[Tensor, ...], leaves: list[Tensor], true_losses: tuple[Tensor, ...], true_leaves: list[Tensor]
) -> None:
    """Assert that both have the same gradients for one cotangent."""
    weights = [cotangent(x) for x in losses]
    grads = torch.autograd.grad(losses, leaves, weights)
    truth = torch.autograd.grad(
        [x for x in true_losses if x.requires_grad],
        true_leaves,
        [w.double() for x, w in zip(true_losses, weights, strict=True) if x.requires_grad],
        materialize_grads=True,
    )
    for mine, want in zip(grads, truth, strict=True):
        torch.testing.assert_close(mine, want.to(mine.dtype))


# Both losses.

LOSSES: dict[str, Callable[..., Any]] = {"info_nce": info_nce, "sigmoid_contrastive": sigmoid_contrastive}
EXACT = [name for name in ("chunked", "reference") if name in backends(SPECS["info_nce"])]
HARD = {"hard_texts": features(4, seed=1)["text"]}
BIAS = {"logit_bias": torch.tensor(-2.0, dtype=torch.float64)}

each_exact_backend = pytest.mark.parametrize("backend", EXACT)


each_loss_and_backend = pytest.mark.parametrize(
    ("op", "backend"), [(op, x) for op in LOSSES for x in backends(SPECS[op])]
)


def each_loss(test: Callable[..., None]) -> Callable[..., None]:
    """The test runs for both losses on each of their backends, under Triton's interpreter too."""
    return pytest.mark.interpreted(each_loss_and_backend(test))


def inputs_of(op: str, backend: str | None = None, n: int = 7, **more: Any) -> Inputs:
    """Returns floating tensors by name, in the widest dtype that the backend computes in."""
    inputs = features(n, **more) | (HARD if op == "info_nce" else BIAS)
    return inputs if backend is None else cast(inputs, dtype_of(op, backend))


def kernel_step(op: str, inputs: Inputs, *grads: str) -> tuple[Tensor, ...]:
    """Returns the Triton kernels' outputs and gradients."""
    return run(SPECS[op], Case("here", lambda g: inputs, grads), inputs, "triton").tensors


def step(op: str, inputs: Inputs, wanted: tuple[str, ...] | None = None, **options: Any) -> tuple[Tensor, ...]:
    """Returns the loss, and its gradients by the inputs named."""
    wanted = tuple(inputs) if wanted is None else wanted
    leaves = {name: x.detach().requires_grad_(name in wanted) for name, x in inputs.items()}
    loss = LOSSES[op](**leaves, **options)
    return (loss.detach(), *torch.autograd.grad(3.0 * loss, [leaves[name] for name in wanted]))
