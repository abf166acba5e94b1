"""The peers of `max_sim`: the einsum compiled, a loop over queries as users write it to save memory, three packages."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from mmkernels.bench.peers import Call, CantRunError, Peer, check_room, compiled, first_line
from mmkernels.spec import Inputs

_TENSORS = 2  # of the products' size, that the einsum and its maximum hold


def loop(inputs: Inputs) -> Call:
    """One query at a time with all documents, padding filled with -inf."""
    query, document, mask = _tensors(inputs)
    check_room(query.shape[1] * document.shape[:2].numel() * 4 * _TENSORS, query.device)

    def call() -> Tensor:
        return torch.stack([_scores(one[None], document, mask)[0] for one in query])

    return call


def compiled_einsum(inputs: Inputs) -> Call:
    """All products at once, by ``torch.compile``."""
    query, document, mask = _tensors(inputs)
    _check_products(query, document)
    return compiled(_scores, query, document, mask)


def sentence_transformers(inputs: Inputs) -> Call:
    """sentence-transformers' `maxsim`."""
    query, document, mask = _tensors(inputs)
    _check_products(query, document)
    maxsim = _function("sentence_transformers.util", "maxsim")
    return lambda: maxsim(query, document, b_mask=mask).float()


def pylate(inputs: Inputs) -> Call:
    """PyLate's `colbert_scores`; its masks make products 0, which may win, so it runs without lengths."""
    query, document, mask = _tensors(inputs)
    if mask is not None:
        raise CantRunError("only without lengths: what its masks hide has the product 0")
    _check_products(query, document)
    colbert_scores = _function("pylate.scores", "colbert_scores")
    return lambda: colbert_scores(query, document).float()


def late_interaction_kernels(inputs: Inputs) -> Call:
    """The Triton kernels of late-interaction-kernels."""
    query, document, mask = _tensors(inputs)
    maxsim = _function("late_interaction_kernels", "maxsim")
    return lambda: maxsim(query, document, d_mask=mask).float()


def _scores(query: Tensor, document: Tensor, mask: Tensor | None) -> Tensor:
    products = torch.einsum("nid,mjd->nmij", query, document)
    if mask is not None:
        products = products.masked_fill(~mask[:, None], -torch.inf)
    return products.max(-1).values.sum(-1, dtype=torch.float32)


def _tensors(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns query, document, and which of the documents' tokens are no padding."""
    if inputs.get("paired") or inputs.get("query_lengths") is not None:
        raise CantRunError("only all queries with all documents, and queries without padding")
    query, document, lengths = inputs["query"], inputs["document"], inputs.get("document_lengths")
    if lengths is None:
        return query, document, None
    return query, document, torch.arange(document.shape[1], device=lengths.device) < lengths[:, None]


def _check_products(query: Tensor, document: Tensor) -> None:
    check_room(_TENSORS * query.shape[:2].numel() * document.shape[:2].numel() * query.element_size(), query.device)


def _function(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise CantRunError(f"{module.partition('.')[0]} is not installed, or too old ({first_line(error)})") from error


PEERS = (
    Peer("loop", loop),
    Peer("compiled", compiled_einsum, slow=True),
    Peer("sentence-transformers", sentence_transformers),
    Peer("pylate", pylate),
    Peer("late-interaction-kernels", late_interaction_kernels, device="cuda"),
)
