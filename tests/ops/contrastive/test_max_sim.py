"""`max_sim` beside loops over tokens: ties, padding, NaN, what is kept, sizes of 0, bad input, memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from harness import SPECS, dtype_of, each_backend, generator, needed, peak_of
from torch import Tensor

import mmkernels
from mmkernels import max_sim
from mmkernels.ops.contrastive.max_sim import OP, checked, chunked
from mmkernels.ops.contrastive.max_sim.cases import tokens
from mmkernels.runtime.dispatch import TABLES

NAN = math.nan
SPEC = SPECS["max_sim"]


def by_loops(query: Tensor, document: Tensor, flow: Tensor, lengths: tuple[list[int], list[int]]) -> list[Tensor]:
    """Returns the scores and both gradients, token by token."""
    scores, of_query, of_document = flow.new_zeros(flow.shape), torch.zeros_like(query), torch.zeros_like(document)
    for n, m in ((n, m) for n in range(len(query)) for m in range(len(document))):
        for i in range(lengths[0][n]):
            best, who = -math.inf, None
            for j in range(lengths[1][m]):
                product = float(query[n, i] @ document[m, j])
                if product > best:
                    best, who = product, j
            if who is not None:
                scores[n, m] += best
                of_query[n, i] += flow[n, m] * document[m, who]
                of_document[m, who] += flow[n, m] * query[n, i]
    return [scores, of_query, of_document]


def step(query: Tensor, document: Tensor, flow: Tensor, backend: str, **options: Any) -> list[Tensor]:
    """Returns the scores and both gradients."""
    leaves = [x.clone().requires_grad_() for x in (query, document)]
    scores = max_sim(*leaves, **options, backend=backend)
    return [scores.detach(), *torch.autograd.grad(scores, leaves, flow.to(scores))]


@each_backend("max_sim")
def test_beside_loops(backend: str) -> None:
    """Tokens of small whole numbers: most maxima are reached by several, of which the first counts."""
    g, dtype = generator(), dtype_of("max_sim", backend)
    query, document = (torch.randint(-2, 3, shape, generator=g).to(dtype) for shape in ((3, 5, 4), (4, 18, 4)))
    flow = torch.randint(-3, 4, (3, 4), generator=g).to(dtype)
    lengths = [5, 0, 3], [18, 1, 0, 17]
    options = dict(zip(("query_lengths", "document_lengths"), map(torch.tensor, lengths), strict=True))
    want = by_loops(query, document, flow, lengths)
    for x, y in zip(step(query, document, flow, backend, **options), want, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)
    options["document_lengths"] = options["document_lengths"][:3]
    pairs = step(query, document[:3], flow.diagonal(), backend, paired=True, **options)
    want = by_loops(query, document[:3], torch.diag(flow.diagonal()), lengths)
    torch.testing.assert_close(pairs[0], want[0].diagonal(), rtol=0, atol=0)
    for x, y in zip(pairs[1:], want[1:], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@each_backend("max_sim")
def test_nan_reaches_its_pairs_alone(backend: str) -> None:
    g, dtype = generator(1), dtype_of("max_sim", backend)
    query, document = tokens(g, 3, 5, 8).to(dtype), tokens(g, 4, 20, 8).to(dtype)
    clean = max_sim(query, document, backend=backend)
    query[1, 2, 3], document[2, 17] = NAN, NAN
    scores = max_sim(query, document, backend=backend)
    reached = torch.zeros(3, 4, dtype=torch.bool)
    reached[1], reached[:, 2] = True, True
    assert torch.equal(scores.isnan(), reached)
    torch.testing.assert_close(scores[~reached], clean[~reached])
    pairs = max_sim(query, document[1:], paired=True, backend=backend)
    assert pairs.isnan().tolist() == [False, True, False]


@each_backend("max_sim")
def test_inf_is_no_nan(backend: str) -> None:
    query, document = torch.ones(1, 2, 4), torch.ones(1, 6, 4)
    document[0, 4] = math.inf
    assert max_sim(query, document, backend=backend).tolist() == [[math.inf]]
    document[0, 4], document[0, 1] = -math.inf, math.inf
    assert max_sim(query, document, backend=backend).tolist() == [[math.inf]]
    assert max_sim(query, document[:, 4:5], backend=backend).tolist() == [[-math.inf]]


@each_backend("max_sim")
@pytest.mark.parametrize("sizes", [(0, 3), (2, 0), (0, 0)], ids=str)
def test_nothing_to_score(backend: str, sizes: tuple[int, int]) -> None:
    query, document = (torch.ones(n, 3, 8) for n in sizes)
    scores, of_query, of_document = step(query, document, torch.ones(sizes), backend)
    assert scores.shape == sizes and not of_query.any() and not of_document.any()
    assert of_query.shape == query.shape and of_document.shape == document.shape


def test_padding_is_never_read_by_a_gradient() -> None:
    """NaN in padding on both sides, and gradients of what pads are 0."""
    g = generator(2)
    for backend in needed([entry.name for entry in TABLES["max_sim"] if entry.why_not() is None]):
        query, document = tokens(g, 2, 6, 8).float(), tokens(g, 3, 9, 8).float()
        query[0, 4:], document[1, 2:] = NAN, NAN
        options = {"query_lengths": torch.tensor([4, 6]), "document_lengths": torch.tensor([9, 2, 5])}
        found = step(query, document, torch.ones(2, 3), backend, **options)
        assert all(bool(x.isfinite().all()) for x in found), backend
        assert not found[1][0, 4:].any() and not found[2][1, 2:].any() and not found[2][2, 5:].any(), backend


@each_backend("max_sim")
@pytest.mark.parametrize("paired", [False, True])
def test_an_empty_document_gets_no_gradient(backend: str, paired: bool) -> None:
    """Though a query's token is NaN: it has no best token there."""
    query, document = torch.ones(2, 3, 8), torch.ones(2, 5, 8)
    query[:, 1] = NAN
    options = {"document_lengths": torch.tensor([5, 0]), "paired": paired}
    flow = torch.ones(2) if paired else torch.ones(2, 2)
    _, of_query, of_document = step(query, document, flow, backend, **options)
    assert not of_document[1].any()
    assert of_query.isfinite().all() and bool(of_query[1].any()) != paired


@each_backend("max_sim", interpreted=False)
def test_a_token_that_is_the_best_of_thousands(backend: str) -> None:
    """Its gradient is a sum of as many rows, with the error of PyTorch's product at most twice."""
    g = generator(5)
    query, document = (torch.rand(shape, generator=g) for shape in ((64, 256, 20), (2, 3, 20)))
    document[:, 0] += 1
    flow = torch.ones(64, 2)

    def error(found: Tensor) -> float:
        return float((found[:, 0] - query.double().sum((0, 1))).abs().max())

    leaf = document.clone().requires_grad_()
    scores = torch.einsum("nid,mjd->nmij", query, leaf).amax(-1).sum(-1)
    theirs = torch.autograd.grad(scores, leaf, flow)[0]
    assert error(step(query, document, flow, backend)[2]) <= 2 * error(theirs)


def test_winners_are_kept_for_gradients_alone() -> None:
    query, document = torch.ones(2, 3, 8), torch.ones(4, 5, 8)
    plain, leaf = (
        checked(query, document, None, None, False),
        checked(query.requires_grad_(), document, None, None, False),
    )
    assert not plain.keep_index and leaf.keep_index
    for entry in TABLES["max_sim"]:
        if entry.why_not(plain) is None:
            assert OP(plain, entry.name)[1].shape == (0,)
            index = OP(leaf, entry.name)[1]
            assert index.shape == (2, 4, 3) and index.dtype == torch.int32 and not index.any()
    with torch.no_grad():
        assert not checked(query, document, None, None, False).keep_index


def test_bands_of_any_size_score_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The chunked backend's, forward and backward."""
    g = generator(3)
    query, document, flow = tokens(g, 3, 5, 8), tokens(g, 4, 11, 8), tokens(g, 3, 4)
    options = {"document_lengths": torch.tensor([11, 0, 4, 7])}
    whole = step(query, document, flow, "chunked", **options)
    pairs = step(query, document[:3], flow[:, 0], "chunked", paired=True)
    for numbers in (1, 12, 40, 130):
        monkeypatch.setattr(chunked, "STRIP_BYTES", 8 * numbers)
        for x, y in zip(step(query, document, flow, "chunked", **options), whole, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-14, atol=1e-14)
        for x, y in zip(step(query, document[:3], flow[:, 0], "chunked", paired=True), pairs, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-14, atol=1e-14)


def test_matrices_of_zeros_and_ones_add_as_an_index_does() -> None:
    """What the chunked backend does on an accelerator, whose index_add has no fixed order."""
    g = generator(4)
    rows, weight = torch.randn(20, 8, generator=g).double(), torch.randn(20, generator=g).double()
    index = torch.randint(-1, 6, (20,), generator=g)
    weight[index < 0] = 0.0
    there, here = (torch.zeros(6, 8, dtype=torch.float64) for _ in range(2))
    chunked._add_rows(here, index, weight, rows)
    chunked._add_by_product(there, index.clamp(min=0), weight, rows)
    torch.testing.assert_close(there, here)


def test_compiled_lengths_are_clamped() -> None:
    """In a graph no value is looked at."""
    query, document = torch.ones(2, 3, 8), torch.ones(2, 5, 8)
    lengths = torch.tensor([-4, 99])
    with pytest.raises(ValueError, match=r"query_lengths must be from 0 to 3, got -4 to 99"):
        max_sim(query, document, query_lengths=lengths)
    call = torch.compile(lambda n: max_sim(query, document, query_lengths=n, document_lengths=n), backend="eager")
    assert call(lengths).tolist() == [[0.0, 0.0], [0.0, 24.0]]


_BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"query": "text"}, TypeError, "query must be a tensor, got str"),
    (
        {"query": torch.ones(2, 8)},
        ValueError,
        r"query must be \[Nq, Lq, d\] with no dim of 0 but Nq, got shape \(2, 8\)",
    ),
    ({"query": torch.ones(2, 0, 8)}, ValueError, r"query must be \[Nq, Lq, d\]"),
    (
        {"query": torch.ones(2, 3, 8, dtype=torch.int64)},
        TypeError,
        "query must be float16, bfloat16, float32 or float64",
    ),
    (
        {"document": torch.ones(2, 5, 7)},
        ValueError,
        r"document must be \[Nd, Ld, 8\] with Ld >= 1, as query has 8 channels",
    ),
    (
        {"document": torch.ones(2, 5, 8).double()},
        TypeError,
        "document must have query's dtype torch.float32, got torch.float64",
    ),
    ({"document": torch.ones(2, 5, 8, device="meta")}, ValueError, "document must be on query's device cpu, got meta"),
    (
        {"document": torch.ones(3, 5, 8), "paired": True},
        ValueError,
        "document must have as many rows as query, 2, where paired",
    ),
    ({"paired": 1}, TypeError, "paired must be a bool, got int"),
    ({"query_lengths": torch.ones(2)}, TypeError, "query_lengths must be int64 or int32, got torch.float32"),
    (
        {"query_lengths": torch.ones(3, dtype=torch.int64)},
        ValueError,
        r"query_lengths must be \[2\], one of each, got shape \(3,\)",
    ),
    ({"document_lengths": [5, 5]}, TypeError, "document_lengths must be a tensor, got list"),
    ({"document_lengths": torch.tensor([5, 6])}, ValueError, "document_lengths must be from 0 to 5, got 5 to 6"),
]


@pytest.mark.parametrize(("bad", "error", "message"), _BAD, ids=[message[:40] for *_, message in _BAD])
def test_bad_input(bad: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        max_sim(**{"query": torch.ones(2, 3, 8), "document": torch.ones(2, 5, 8)} | bad)


def test_exported_under_its_name() -> None:
    assert mmkernels.max_sim is max_sim and "max_sim" in mmkernels.__all__


@pytest.mark.alone
@pytest.mark.parametrize(
    "backend", [name for name in ("cpu", "chunked") if name in [x.name for x in TABLES["max_sim"]]]
)
def test_memory_is_a_small_share_of_the_products(backend: str) -> None:
    """16 x 16 pairs of 512 x 512 tokens: 268 MB of products, and three times that in a training step by the formula."""
    entry = next(entry for entry in TABLES["max_sim"] if entry.name == backend)
    if entry.why_not() is not None:
        pytest.skip(str(entry.why_not()))
    query, document = (torch.randn(16, 512, 32, generator=generator()).requires_grad_() for _ in range(2))
    products = 4 * 16 * 16 * 512 * 512

    def train() -> None:
        max_sim(query, document, backend=backend).sum().backward()
        query.grad = document.grad = None

    train()
    assert peak_of(train) < products / 10


@pytest.mark.alone
def test_chunked_scores_take_no_winners() -> None:
    """Without gradients no number is kept for each query token and document: they would be 64 MiB."""
    query, document = torch.ones(64, 256, 4), torch.ones(1024, 2, 4)
    assert peak_of(lambda: max_sim(query, document, backend="chunked")) < 4 * 64 * 1024 * 256 / 2
