"""Where in a gallery the right answer stands, for recall at any k, without the scores' matrix."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from mmkernels.ops.contrastive.inputs import check_more_features
from mmkernels.ops.contrastive.retrieval_ranks import chunked, ring
from mmkernels.ops.contrastive.retrieval_ranks.spec import Arguments, Results, reference
from mmkernels.ops.contrastive.retrieval_ranks.tokens import token_ranks
from mmkernels.runtime.backends import cpu_kernel, triton_kernel
from mmkernels.runtime.checks import check_floating, check_range, check_tensor, without_autocast
from mmkernels.runtime.dispatch import Backend, define, resolve

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["retrieval_ranks"]

_WITHOUT_SHAPE = (UninitializedParameter, UninitializedBuffer)


def retrieval_ranks(
    query: Tensor,
    gallery: Tensor,
    target: Tensor,
    *,
    query_lengths: Tensor | None = None,
    gallery_lengths: Tensor | None = None,
    group: ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    """How many items of a gallery stand before each query's right answer, ordered by inner product.

    Exact, and in memory linear in the features: recall@k is ``(ranks < k).float().mean()``.

    Args:
        query: ``[N, d]``, float16, bfloat16, float32 or float64; normalised, if cosine similarity is meant. Or tokens
            ``[N, Lq, d]``: a score is that of `max_sim`, late interaction.
        gallery: ``[M, d]``, query's dtype and device; ``[M, Ld, d]`` for queries of several tokens.
        target: int64 ``[N]``, each query's right answer, a row of the gallery. Values are checked on a CPU; on a GPU,
            where that would wait for the device, a target outside of the gallery gets the rank M.
        query_lengths, gallery_lengths: int64 or int32 ``[N]`` and ``[M]``, how many tokens are no padding, as of
            `max_sim`; only where queries are several tokens.
        group: ranks that each hold their own queries and a part of the gallery, as many as they have, none too; or
            None: this process alone. Over a group `target` is a row of all ranks' galleries, in the order of ranks.
        backend: None (``use_backend``'s choice, else the first that can), "triton" (GPUs), "cpu" (float32, bfloat16 and
            float16), "chunked" (any device, float64 too) or "reference".

    Returns:
        ``[N]`` int64, 0 is best. Items of the same score as the right answer stand before it if their index is lower,
        as in a stable descending sort; on "cpu" and "triton" equal rows of the gallery do get equal scores, while a
        library's matrix product may round them apart. A NaN score stands last: a query or right answer with NaN gets
        M - 1. Scores are summed in float32 (float64 for float64 features). No gradient.

    Autocast rounds nothing here: features keep their dtype. Under autocast query and gallery may differ in it, and the
    wider one is taken.

    Over a group the galleries travel round the ring of ranks twice, in pieces, and each rank gets the ranks of its own
    queries among all items.

    Raises:
        TypeError: a wrong dtype or type. ValueError: a wrong shape, device or target. Each names the argument, what it
            must be and what it got. Over a group every rank raises ValueError where one rank's arguments are bad, or
            ranks differ in channels or dtype.
        BackendError: a forced backend can't run this call.
        GroupError: (a RuntimeError) a rank has died, is late, or called something else.

    Source: recall@k as in Karpathy & Fei-Fei, "Deep Visual-Semantic Alignments for Generating Image Descriptions",
    2015, section 4.2.

    Example:
        >>> import torch, mmkernels
        >>> text = torch.nn.functional.normalize(torch.randn(1000, 64), dim=1)
        >>> image = text + 0.1 * torch.randn(1000, 64)
        >>> ranks = mmkernels.retrieval_ranks(text, image, torch.arange(1000))
        >>> recall_at_5 = (ranks < 5).float().mean()
    """
    if isinstance(query, Tensor) and not isinstance(query, _WITHOUT_SHAPE) and query.dim() == 3:
        return token_ranks(query, gallery, target, query_lengths, gallery_lengths, group, backend)
    for name, lengths in (("query_lengths", query_lengths), ("gallery_lengths", gallery_lengths)):
        if lengths is not None:
            raise ValueError(f"{name} must be None where query is [N, d] and not [N, Lq, d], got lengths")
    if group is not None:
        checked = partial(_checked, query, gallery, target, least=0)
        return ring.ranks(checked, group, backend, query)
    args = _checked(query, gallery, target, least=1)
    check_range("target", target, 0, gallery.shape[0] - 1)  # compiled code leaves it to the backends
    ranks: Tensor = OP(args, resolve(backend))
    return ranks


def _checked(query: Tensor, gallery: Tensor, target: Tensor, least: int) -> Arguments:
    """Returns the record of a call; `least`: the items that the gallery must have."""
    query, gallery = without_autocast(query, gallery)
    check_floating("query", query)
    if query.dim() != 2 or query.shape[1] == 0:
        raise ValueError(
            f"query must be [N, d] or [N, Lq, d] with at least one channel, got shape {tuple(query.shape)}"
        )
    check_more_features("gallery", gallery, query, "query", least=least)
    check_tensor("target", target)
    if target.dtype != torch.int64:
        raise TypeError(f"target must be int64, got {target.dtype}")
    if tuple(target.shape) != (query.shape[0],):
        raise ValueError(f"target must be [{query.shape[0]}], one for each query, got shape {tuple(target.shape)}")
    if not (target.is_cpu and query.is_cpu) and target.device != query.device:
        raise ValueError(f"target must be on query's device {query.device}, got {target.device}")
    return Arguments(query=query.detach(), gallery=gallery.detach(), target=target)


def _fake(args: Arguments) -> Tensor:
    return args.query.new_empty(args.query.shape[0], dtype=torch.int64)


OP = define(
    "retrieval_ranks",
    Arguments,
    Results,
    fake=_fake,
    backends=[
        triton_kernel(f"{__name__}.triton", "forward"),
        cpu_kernel("retrieval_ranks_cpu"),
        Backend("chunked", chunked.forward),
        Backend("reference", reference),
    ],
)
