"""The late-interaction score (ColBERT's MaxSim) of queries and documents, without the products of their tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.common.dtypes import wide_dtype
from mmkernels.ops.contrastive.max_sim import chunked
from mmkernels.ops.contrastive.max_sim.formula import formula, reference, reference_backward
from mmkernels.ops.contrastive.max_sim.spec import Arguments, Results
from mmkernels.runtime.backends import cpu_kernel, triton_kernel
from mmkernels.runtime.checks import (
    autocast,
    check_bool,
    check_floating,
    check_range,
    check_tensor,
    in_graph,
    requires_grad,
)
from mmkernels.runtime.dispatch import Backend, define, resolve
from mmkernels.runtime.gradient import Gradient

__all__ = ["max_sim"]

_INTEGERS = (torch.int64, torch.int32)


def max_sim(
    query: Tensor,
    document: Tensor,
    *,
    query_lengths: Tensor | None = None,
    document_lengths: Tensor | None = None,
    paired: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Late interaction: the sum over a query's tokens of the largest inner product with one of a document's tokens.

    The score of ColBERT, ColPali and PyLate. The products of tokens, ``[Nq, Nd, Lq, Ld]``, are never stored: a call
    without gradients takes the memory of its inputs and scores, one with gradients also that of the winners, an int32
    for each query token and document, a share of 1 / Ld of the products.

    Args:
        query: tokens ``[Nq, Lq, d]``, float16, bfloat16, float32 or float64, normalised if cosines are meant.
        document: tokens ``[Nd, Ld, d]``, query's dtype and device.
        query_lengths: int64 or int32 ``[Nq]``, on query's device: how many of a query's tokens are no padding, which
            follows them and is never read: NaN there is harmless. None: all. Values are checked on a CPU, 0 to Lq; on a
            GPU, where that would wait for the device, and in compiled code, a value outside counts as the nearest.
        document_lengths: ``[Nd]``, the same of documents.
        paired: score query n with document n only (N = Nq = Nd), as for reranking.
        backend: None (``use_backend``'s choice, else the first that can), "triton" (GPUs), "cpu" (float32, bfloat16 and
            float16), "chunked" (any device, float64 too) or "reference", the naive formula, differentiated by PyTorch's
            own autograd outside ``torch.compile``.

    Returns:
        float32 scores (float64 for float64 tokens) ``[Nq, Nd]``; paired: ``[N]``. A document without tokens, or a query
        without, has the score 0 and gives no gradient. NaN in a token makes the scores of the pairs that it is in NaN.
        Differentiable by query and document: a score's gradient goes to each query token and its best document token;
        of equal products the first document token is taken, on every backend. Gradients are deterministic. Second
        derivatives, and those in forward mode, are computed by the reference formula, at its memory cost.

    Under autocast query and document are cast to the autocast dtype.

    Raises:
        TypeError: a wrong dtype or type. ValueError: a wrong shape, device or length. Each names the argument, what it
            must be and what it got.
        BackendError: a forced backend can't run this call.

    Source: Khattab & Zaharia, "ColBERT: Efficient and Effective Passage Search via Contextualized Late Interaction over
    BERT", 2020, equation 3.

    Example:
        >>> import torch, mmkernels
        >>> question, page = (torch.nn.functional.normalize(torch.randn(n, 20, 128), dim=-1) for n in (4, 6))
        >>> mmkernels.max_sim(question, page, document_lengths=torch.tensor([20, 3, 11, 0, 20, 7])).shape
        torch.Size([4, 6])
        >>> mmkernels.max_sim(question, page[:4], paired=True).shape
        torch.Size([4])
    """
    args = checked(query, document, query_lengths, document_lengths, paired)
    backend = resolve(backend)
    if backend == "reference" and not in_graph():
        with torch._C._DisableAutocast():  # the tokens have been cast
            return formula(args)
    scores: Tensor
    scores, _ = OP(args, backend)
    return scores


def checked(
    query: Tensor,
    document: Tensor,
    query_lengths: Tensor | None,
    document_lengths: Tensor | None,
    paired: bool,
    *,
    name: str = "document",
) -> Arguments:
    """Returns the record of a call; `name`: what the caller's documents are called."""
    query, document = autocast(query, document)
    check_bool("paired", paired)
    check_floating("query", query)
    if query.dim() != 3 or 0 in query.shape[1:]:
        raise ValueError(f"query must be [Nq, Lq, d] with no dim of 0 but Nq, got shape {tuple(query.shape)}")
    check_tensor(name, document)
    dim = query.shape[2]
    if document.dim() != 3 or document.shape[2] != dim or document.shape[1] == 0:
        raise ValueError(
            f"{name} must be [Nd, Ld, {dim}] with Ld >= 1, as query has {dim} channels, got shape "
            f"{tuple(document.shape)}"
        )
    if paired and document.shape[0] != query.shape[0]:
        raise ValueError(
            f"{name} must have as many rows as query, {query.shape[0]}, where paired, got {document.shape[0]}"
        )
    if document.dtype is not query.dtype:
        raise TypeError(f"{name} must have query's dtype {query.dtype}, got {document.dtype}")
    if not (document.is_cpu and query.is_cpu) and document.device != query.device:
        raise ValueError(f"{name} must be on query's device {query.device}, got {document.device}")
    # `torch.jit.trace` traces once more without gradients, and demands the same graph.
    recording = torch.is_grad_enabled() or torch._C._get_tracing_state() is not None
    return Arguments(
        query=query,
        document=document,
        query_lengths=_checked_lengths("query_lengths", query_lengths, query),
        document_lengths=_checked_lengths(f"{name}_lengths", document_lengths, document),
        paired=paired,
        keep_index=recording and (requires_grad(query) or requires_grad(document)),
    )


def _checked_lengths(name: str, lengths: Tensor | None, tokens: Tensor) -> Tensor | None:
    """Returns lengths as int64; tokens: [N, L, d]."""
    if lengths is None:
        return None
    check_tensor(name, lengths)
    if lengths.dtype not in _INTEGERS:
        raise TypeError(f"{name} must be int64 or int32, got {lengths.dtype}")
    count, most, _ = tokens.shape
    if lengths.dim() != 1 or lengths.shape[0] != count:
        raise ValueError(f"{name} must be [{count}], one of each, got shape {tuple(lengths.shape)}")
    if not (lengths.is_cpu and tokens.is_cpu) and lengths.device != tokens.device:
        raise ValueError(f"{name} must be on the tokens' device {tokens.device}, got {lengths.device}")
    check_range(name, lengths, 0, most)
    return lengths.to(torch.int64)


def _fake(args: Arguments) -> tuple[Tensor, Tensor]:
    query, document = args.query, args.document
    pairs = (query.shape[0],) if args.paired else (query.shape[0], document.shape[0])
    index = (*pairs, query.shape[1]) if args.keep_index else (0,)
    return query.new_empty(pairs, dtype=wide_dtype(query)), query.new_empty(index, dtype=torch.int32)


def _formula(args: Any) -> tuple[Tensor, ...]:
    return (formula(args),)


OP = define(
    "max_sim",
    Arguments,
    Results,
    fake=_fake,
    backends=[
        triton_kernel(f"{__name__}.triton.forward", "forward"),
        cpu_kernel("max_sim_cpu"),
        Backend("chunked", chunked.forward),
        Backend("reference", reference),
    ],
    gradient=Gradient(
        saves=("index",),
        formula=_formula,
        backends=[
            triton_kernel(f"{__name__}.triton.backward", "backward"),
            cpu_kernel("max_sim_backward_cpu"),
            Backend("chunked", chunked.backward),
            Backend("reference", reference_backward),
        ],
        contiguous=True,
        prepared=("keep_index", "keep_index"),
    ),
)
