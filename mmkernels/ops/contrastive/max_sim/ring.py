"""Late-interaction scores over the ranks of a group: documents travel round the ring, queries stay.

Each rank gets the scores of its own queries with the documents of all ranks. No rank holds another's tokens but the
pieces that are under way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.ops.common.dtypes import wide_dtype
from mmkernels.ops.contrastive.max_sim import OP, checked
from mmkernels.ops.contrastive.max_sim.spec import Arguments, Results
from mmkernels.ops.contrastive.ring import PIECE_BYTES, TextGradient
from mmkernels.runtime.arguments import lay_out, lay_out_backward
from mmkernels.runtime.checks import requires_grad
from mmkernels.runtime.dispatch import choose, resolve
from mmkernels.runtime.group import Group, Piece, check_group, circulate, told_to_group

CALL = "max_sim"
_BACKWARD = lay_out_backward("max_sim", lay_out(Arguments), lay_out(Results), ("index",)).record


class RankScores(NamedTuple):
    """Scores over a group.

    Args:
        scores: wide [n, M], of this rank's queries with the documents of all ranks, in the order of ranks.
        queries, documents: how many each rank has.
        rank: of this process in the group.
    """

    scores: Tensor
    queries: list[int]
    documents: list[int]
    rank: int

    @property
    def first(self) -> int:
        """The column of this rank's first document."""
        return sum(self.documents[: self.rank])


def scores_over_ranks(
    query: Tensor,
    document: Tensor,
    group: Any,
    *,
    query_lengths: Tensor | None = None,
    document_lengths: Tensor | None = None,
    same: Mapping[str, Any] | None = None,
    backend: str | None = None,
) -> RankScores:
    """Returns the scores of this rank's queries with all ranks' documents.

    Ranks may hold different numbers of queries and of documents, none too, and documents of different lengths. All
    must call it, and then its backward pass, in the same order. A rank's documents get the sum of the gradients of all
    ranks' scores. There are no second derivatives, and it is not for ``torch.compile``.

    Args:
        query, document, query_lengths, document_lengths, backend: of this rank, as of `max_sim`.
        group: a ``torch.distributed.ProcessGroup``.
        same: what else must be the same on every rank, see `Group.agree`.

    Raises:
        TypeError, ValueError, BackendError: as `max_sim`; every rank raises ValueError where one rank's arguments are
            bad, or ranks differ in channels, dtype or `same`.
        GroupError: a rank has died, is late, or called something else.
    """
    name = check_group(group)
    try:
        args = checked(query, document, query_lengths, document_lengths, paired=False)
        check_group(group, args.query.device)
        backend = resolve(backend)
        OP.choose(backend, args)
    except Exception as error:  # of any kind: the other ranks wait
        told_to_group(error, name, f"{CALL}, forward", query)
        raise
    keep = torch.is_grad_enabled() and (requires_grad(args.query) or requires_grad(args.document))
    call = _Call(args, name, backend, keep, same or {})
    scores: Tensor = _OverRanks.apply(args.query, args.document, call)
    return RankScores(scores, call.queries, call.documents, call.group.rank)


class _Call:
    """What the ranks have agreed on, and what the backward pass reads.

    Args:
        args: of this rank.
        name: of the group.
        keep: whether this rank wants gradients.
        more: what else must be the same on every rank.
    """

    def __init__(self, args: Arguments, name: str, backend: str, keep: bool, more: Mapping[str, Any]) -> None:
        self.args, self.name, self.backend = args, name, backend
        self.group = Group(name, f"{CALL}, forward", args.query.device)
        document = args.document
        same: dict[str, Any] = {
            "the number of channels": document.shape[2],
            "the dtype": str(document.dtype),
            "the type of device": document.device.type,
        }
        own = {"queries": args.query.shape[0], "documents": document.shape[0], "tokens": document.shape[1]}
        said = self.group.agree(same | dict(more), own | {"keep": keep, "document": requires_grad(document)})
        self.queries, self.documents = ([x[key] for x in said] for key in ("queries", "documents"))
        self.first = [0, *accumulate(self.documents)]
        self.tokens = max(x["tokens"] for x in said)
        self.keep = keep
        self.travels = any(x["keep"] and x["document"] for x in said)
        row_bytes = self.tokens * document.shape[2] * document.element_size()
        self.piece_rows = max(1, PIECE_BYTES * (1 if document.is_cpu else 16) // row_bytes)

    def circulate(self, group: Group, document: Tensor, visit: Callable[..., Any], **results: Any) -> None:
        """Let all ranks' documents, padded to one length, and their lengths visit every rank."""
        lengths, own = self.args.document_lengths, document.shape[1]
        if lengths is None:
            lengths = torch.full((document.shape[0],), own, dtype=torch.int64, device=document.device)
        padded = F.pad(document, (0, 0, 0, self.tokens - own)) if own < self.tokens else document
        circulate(group, self.documents, self.piece_rows, [padded, lengths], visit, **results)

    def columns(self, piece: Piece) -> slice:
        """Returns the numbers of a piece's documents among all ranks'."""
        first = self.first[piece.owner] + piece.start
        return slice(first, first + piece.rows)

    def block(self, query: Tensor, tensors: list[Tensor]) -> dict[str, Any]:
        """Returns the arguments of this rank's queries with a piece of documents."""
        document, lengths = tensors
        return {
            "query": query,
            "document": document,
            "query_lengths": self.args.query_lengths,
            "document_lengths": lengths,
            "paired": False,
            "keep_index": self.keep,
        }


class _OverRanks(torch.autograd.Function):
    """The scores of a rank's queries; gradients travel with the documents."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, document: Tensor, call: _Call) -> Tensor:
        columns = call.first[-1]
        scores = query.new_empty(query.shape[0], columns, dtype=wide_dtype(query))
        index = query.new_empty(query.shape[0], columns if call.keep else 0, query.shape[1], dtype=torch.int32)

        def visit(piece: Piece, tensors: list[Tensor]) -> None:
            at = call.columns(piece)
            found, winners = OP(Arguments(**call.block(query, tensors)), call.backend)
            scores[:, at] = found
            if call.keep:
                index[:, at] = winners

        call.circulate(call.group, document, visit)
        ctx.save_for_backward(query, document, index)
        ctx.call = call
        return scores

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, flow: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        query, document, index = ctx.saved_tensors
        call: _Call = ctx.call
        need_query, need_document, _ = ctx.needs_input_grad
        group = Group(call.name, f"{CALL}, backward", query.device)
        group.agree({"a backward pass": True}, {})
        wide = wide_dtype(query)
        of_query = query.new_zeros(query.shape, dtype=wide) if need_query else None
        like = document.new_empty(()).expand(document.shape[0], call.tokens * document.shape[2])  # takes no memory
        of_document = TextGradient(like, call.travels, document.dtype if need_document else None)

        def visit(piece: Piece, tensors: list[Tensor]) -> list[Tensor] | None:
            at = call.columns(piece)
            record = _BACKWARD(
                **call.block(query, tensors),
                index=index[:, at].contiguous(),
                grad_scores=flow[:, at].contiguous(),
                need_query=need_query,
                need_document=call.travels,
            )
            run = choose("max_sim_backward", call.backend, record, forced_may_fall_back=True).run
            of_rows, of_tokens = run(record)
            if of_query is not None:
                of_query.add_(of_rows)
            return [of_tokens.to(wide).flatten(1)] if call.travels else None

        call.circulate(
            group, document, visit, empty=of_document.empty, merge=of_document.merge, home=of_document.home
        )  # fmt: skip
        kept = of_document.kept
        return (
            None if of_query is None else of_query.to(query.dtype),
            None if kept is None else kept.unflatten(1, (call.tokens, -1))[:, : document.shape[1]],
            None,
        )
