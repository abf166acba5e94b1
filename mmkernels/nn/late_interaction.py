"""`LateInteractionLoss`: the contrastive loss of ColBERT, ColPali and PyLate, over `max_sim`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.nn.checks import check_choice
from mmkernels.ops.contrastive.max_sim import max_sim
from mmkernels.ops.contrastive.max_sim.ring import RankScores, scores_over_ranks
from mmkernels.runtime.checks import can_look, check_bool, check_number, check_tensor
from mmkernels.runtime.group import Group, check_group, told_to_group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class LateInteractionLoss(nn.Module):
    """InfoNCE over late-interaction scores: of each query, the cross-entropy of its document among all of the batch.

    The products of tokens are never stored, see `max_sim`; scores are, ``[queries, documents]``.

    Args:
        scale: multiplies the scores: 1 / temperature. A score is a sum over a query's tokens, so 1, the default of
            PyLate and sentence-transformers, is already sharp.
        mean_over_tokens: divide each score by the number of its query's tokens, as colpali-engine does.
        query_weight: 0 to 1, the share of the direction from queries to documents; the rest is that from each query's
            own document to queries. 1: queries to documents alone, as in PyLate and sentence-transformers.
        label_smoothing: 0 to 1, as in ``F.cross_entropy``.
        reduction: "mean" or "sum" over queries.
        group: ranks that compute the loss together, or None: this process alone. Each rank passes its own queries and
            documents, as many as it has; its queries are compared to the documents of all ranks, which travel round
            the ring, so that no rank ever holds all of them. Every rank returns the loss of all ranks. Gradients are
            those of the sum over ranks of what they return, so that after the mean over ranks, as under DDP, they are
            those of one process with the whole batch. Not within ``torch.compile``.
        backend: of `max_sim`.

    Raises:
        TypeError, ValueError: an argument is of a wrong type or out of its range.

    Source: Khattab & Zaharia, "ColBERT", 2020, section 3.3; Faysse et al., "ColPali", 2024, section 4.1.

    Example:
        >>> import torch
        >>> from mmkernels.nn import LateInteractionLoss
        >>> question, page = (torch.nn.functional.normalize(torch.randn(4, n, 128), dim=-1) for n in (20, 64))
        >>> mask = torch.arange(20) < torch.tensor([20, 7, 9, 15])[:, None]
        >>> LateInteractionLoss()(question, page, query_mask=mask).shape
        torch.Size([])
        >>> hard = torch.nn.functional.normalize(torch.randn(4, 2, 64, 128), dim=-1)  # two more pages for each question
        >>> LateInteractionLoss()(question, torch.cat([page[:, None], hard], dim=1)).shape
        torch.Size([])
    """

    def __init__(
        self,
        scale: float = 1.0,
        *,
        mean_over_tokens: bool = False,
        query_weight: float = 1.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        group: ProcessGroup | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.scale = check_number("scale", scale, "a number")
        check_bool("mean_over_tokens", mean_over_tokens)
        self.mean_over_tokens = mean_over_tokens
        self.query_weight = check_number("query_weight", query_weight, "a number from 0 to 1", 0.0, 1.0)
        self.label_smoothing = check_number("label_smoothing", label_smoothing, "a number from 0 to 1", 0.0, 1.0)
        check_choice("reduction", reduction, ("mean", "sum"))
        self.reduction = reduction
        self.group = group
        self.backend = backend

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._options().items())

    def _options(self) -> dict[str, Any]:
        """Returns what must be the same on every rank."""
        names = ("scale", "mean_over_tokens", "query_weight", "label_smoothing", "reduction")
        return {name: getattr(self, name) for name in names}

    def forward(
        self,
        query: Tensor,
        document: Tensor,
        *,
        query_mask: Tensor | None = None,
        document_mask: Tensor | None = None,
    ) -> Tensor:
        """Returns the loss, a float32 tensor without a dim (float64 for float64 tokens).

        Args:
            query: tokens ``[N, Lq, d]``, as of `max_sim`.
            document: tokens ``[N, Ld, d]``: document n is query n's; or ``[N, K, Ld, d]``: the first of its K is, and
                the others are hard negatives. Every query is compared to all N or N K documents.
            query_mask, document_mask: ``[N, Lq]`` and ``[N, (K,) Ld]``, bool or integer: 0 where a token does not
                count, anywhere; None: all count.
        """
        if self.group is None:
            query, document, lengths, groups = _checked(query, document, query_mask, document_mask)
        else:
            try:
                query, document, lengths, groups = _checked(query, document, query_mask, document_mask)
            except Exception as error:  # of any kind: the other ranks wait
                told_to_group(error, check_group(self.group), "LateInteractionLoss", query)
                raise
            same = {"the number of documents for each query": groups, **self._options()}
            found = scores_over_ranks(query, document, self.group, **lengths, same=same, backend=self.backend)
            return self._over_ranks(found, self._logits(found.scores, query, lengths["query_lengths"]), groups)
        scores = max_sim(query, document, **lengths, backend=self.backend)
        logits = self._logits(scores, query, lengths["query_lengths"])
        loss = self._of_rows(logits, groups, 0)
        if self.query_weight < 1.0:
            of_documents = self._of_rows(logits[:, ::groups].mT, 1, 0)
            loss = self.query_weight * loss + (1.0 - self.query_weight) * of_documents
        return loss / max(query.shape[0], 1) if self.reduction == "mean" else loss

    def _logits(self, scores: Tensor, query: Tensor, lengths: Tensor | None) -> Tensor:
        logits = scores * self.scale
        if not self.mean_over_tokens:
            return logits
        return logits / (query.shape[1] if lengths is None else lengths.clamp(min=1)[:, None])

    def _of_rows(self, logits: Tensor, step: int, first: int) -> Tensor:
        """Returns the sum of the rows' losses; row n's answer is column ``first + n * step``."""
        answer = torch.arange(first, first + logits.shape[0] * step, step, device=logits.device)
        return F.cross_entropy(logits, answer, label_smoothing=self.label_smoothing, reduction="sum")

    def _over_ranks(self, call: RankScores, logits: Tensor, groups: int) -> Tensor:
        """Returns the loss of all ranks.

        Its gradient on this rank is that of this rank's share, times the number of ranks: as many ranks return the
        loss, and what flows back to all of them reaches each score once, on its own rank.
        """
        assert self.group is not None
        world = len(call.queries)
        share = self.query_weight * self._of_rows(logits, groups, call.first)
        if self.query_weight < 1.0:
            of_documents = self._of_documents(call, logits, groups)
            share = share + (1.0 - self.query_weight) * of_documents
        if self.reduction == "mean":
            share = share / max(sum(call.queries), 1)
        total = Group(self.group.group_name, "LateInteractionLoss", logits.device).sum(share.detach())
        return share * world + (total - share.detach() * world)

    def _of_documents(self, call: RankScores, logits: Tensor, groups: int) -> Tensor:
        """Returns the sum of the losses of this rank's own documents among the queries of all ranks."""
        first = sum(call.queries[: call.rank])
        rows: Tensor = _AllRows.apply(logits[:, ::groups], call.queries, self.group)
        return self._of_rows(rows[:, first : first + call.queries[call.rank]].mT, 1, first)


class _AllRows(torch.autograd.Function):
    """The rows of all ranks; their gradient is the sum of those of all ranks."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int], group: ProcessGroup) -> Tensor:
        ctx.counts, ctx.group = counts, group
        padded = F.pad(rows, (0, 0, 0, max(counts) - rows.shape[0]))
        parts = Group(group.group_name, "LateInteractionLoss, forward", rows.device).gather(padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        counts, group = ctx.counts, ctx.group
        total = Group(group.group_name, "LateInteractionLoss, backward", grad.device).sum(grad)
        return total.split(counts)[group.rank()], None, None


def _checked(
    query: Tensor, document: Tensor, query_mask: Tensor | None, document_mask: Tensor | None
) -> tuple[Tensor, Tensor, dict[str, Any], int]:
    """Returns query, document [N K, Ld, d], the lengths that `max_sim` takes, and K."""
    check_tensor("query", query)
    check_tensor("document", document)
    if query.dim() != 3:
        raise ValueError(f"query must be [N, Lq, d], got shape {tuple(query.shape)}")
    if document.dim() not in (3, 4) or (document.dim() == 4 and document.shape[1] == 0):
        raise ValueError(
            f"document must be [N, Ld, d], or [N, K, Ld, d] with K >= 1, got shape {tuple(document.shape)}"
        )
    groups = document.shape[1] if document.dim() == 4 else 1
    if document.dim() == 4:
        if document_mask is not None:
            check_tensor("document_mask", document_mask)
            if document_mask.shape != document.shape[:3]:
                raise ValueError(
                    f"document_mask must be [N, K, Ld], {tuple(document.shape[:3])} here, got shape "
                    f"{tuple(document_mask.shape)}"
                )
            document_mask = document_mask.flatten(0, 1)
        document = document.flatten(0, 1)
    query, query_lengths = tokens_first("query", query, query_mask)
    document, document_lengths = tokens_first("document", document, document_mask)
    if document.shape[0] != query.shape[0] * groups:
        raise ValueError(
            f"document must be [N, Ld, d] or [N, K, Ld, d] with query's N of {query.shape[0]}, got "
            f"{document.shape[0] // max(groups, 1)}"
        )
    return query, document, {"query_lengths": query_lengths, "document_lengths": document_lengths}, groups


def tokens_first(name: str, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Returns tokens with those that count before the others, in their order, and how many count: int64 [N].

    A mask may have holes (PyLate leaves out punctuation) or padding on the left; `max_sim` takes lengths. Tokens are
    moved only where they must be, as far as that can be seen: on a CPU.

    Args:
        name: of the tokens, for errors.
        tokens: [N, L, d].
        mask: [N, L], bool or integer, 0 where a token does not count; None: all do.
    """
    check_tensor(name, tokens)
    if mask is None:
        return tokens, None
    check_tensor(f"{name}_mask", mask)
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(f"{name}_mask must be bool or integers, got {mask.dtype}")
    if tokens.dim() != 3 or mask.shape != tokens.shape[:2]:
        raise ValueError(
            f"{name}_mask must be of the tokens' shape {tuple(tokens.shape[:-1])}, got {tuple(mask.shape)}"
        )
    if mask.device != tokens.device:
        raise ValueError(f"{name}_mask must be on the tokens' device {tokens.device}, got {mask.device}")
    counts = mask != 0
    lengths = counts.sum(1)
    if mask.is_cpu and can_look(mask) and bool((counts[:, 1:] <= counts[:, :-1]).all()):
        return tokens, lengths
    order = counts.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return tokens.gather(1, order[..., None].expand_as(tokens)), lengths
