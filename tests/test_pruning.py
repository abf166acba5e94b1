"""Pruning methods: cases worked by hand, and the papers' formulas written out on random tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from mmkernels import SpanMask, pruning, use_backend
from mmkernels.ops.tokens.select_tokens import Selection

BACKENDS = ("", "cpu", "reference")


@pytest.fixture(params=BACKENDS, ids=lambda name: name or "automatic")
def backend(request: pytest.FixtureRequest) -> Iterator[None]:
    with use_backend(request.param):
        yield


on_backends = pytest.mark.usefixtures("backend")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def places(selection: Selection) -> list[int]:
    return selection.positions.flatten().tolist()


# FastV.


@on_backends
def test_fastv_by_hand() -> None:
    """One head; the last query (2, 0) scores the keys' first components, so visual tokens 2 and 4 get most."""
    key = torch.tensor([[0.0, 9.0], [0.1, 0.0], [0.7, 0.0], [0.2, 0.0], [0.9, 0.0], [0.0, 1.0]])[None, None]
    query = torch.tensor([[2.0, 0.0]])[None, None]
    hidden = torch.arange(12.0).view(1, 6, 2)
    kept = pruning.fastv(hidden, query, key, slice(1, 5), 0.5)
    assert places(kept) == [0, 2, 4, 5] and kept.lengths == 4
    assert torch.equal(kept.x, hidden[:, [0, 2, 4, 5]])


@pytest.mark.parametrize("queries", [1, 20], ids=["last query", "all queries"])
@on_backends
def test_fastv_is_the_papers_formula(queries: int) -> None:
    hidden, query, key = drawn(2, 20, 8), drawn(2, 4, 20, 16, seed=1)[:, :, -queries:], drawn(2, 2, 20, 16, seed=2)
    mask = SpanMask.causal(queries, 20)
    scores = query @ key.repeat_interleave(2, 1).mT / 4
    scores = scores.masked_fill(~mask.to_dense(20), -torch.inf).softmax(-1)
    received = scores.sum(2).mean(1)[:, 3:15]  # over queries, then the mean over heads
    best = received.topk(5).indices.sort().values + 3
    expected = torch.cat([torch.arange(3).expand(2, 3), best, torch.arange(15, 20).expand(2, 5)], 1)
    kept = pruning.fastv(hidden, query, key, slice(3, 15), 5, mask)
    assert torch.equal(kept.positions % 20, expected)
    assert torch.equal(kept.x, hidden.gather(1, expected[..., None].expand(-1, -1, 8)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"visual": (3, 9)}, TypeError, r"visual must be a slice, the places of the visual tokens, got tuple"),
        ({"visual": slice(3, 40)}, ValueError, r"visual must be slice\(first, last\) within hidden's 20 tokens"),
        ({"visual": slice(3, 9, 2)}, ValueError, r"visual must be slice\(first, last\) within hidden's 20 tokens"),
        ({"keep": 7}, ValueError, r"keep must be from 0 to 6 for image 0 of 6 tokens, got 7"),
        ({"keep": 0.0}, ValueError, r"keep must be above 0 and at most 1"),
        ({"hidden": drawn(20, 8)}, ValueError, r"hidden must be \[B, L, C\], got shape \(20, 8\)"),
        ({"hidden": drawn(2, 20, 8)}, ValueError, r"query must be of hidden's 2 prompts, got shape \(1, 2, 1, 16\)"),
        ({"key": drawn(1, 2, 19, 16)}, ValueError, r"key must be \[B, H, 20, D\]"),
        ({"key": None}, TypeError, r"key must be a tensor, got NoneType"),
        ({"key": drawn(20, 16)}, ValueError, r"key must be \[B, H, 20, D\] for hidden's tokens, got shape \(20, 16\)"),
        ({"query": drawn(2, 2, 1, 16)}, ValueError, r"query must be of hidden's 1 prompts, got shape \(2, 2, 1, 16\)"),
    ],
)
def test_fastv_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {
        "hidden": drawn(1, 20, 8), "query": drawn(1, 2, 1, 16), "key": drawn(1, 2, 20, 16), "visual": slice(3, 9),
        "keep": 3,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        pruning.fastv(**given | change)


# VisionZip.


@on_backends
def test_visionzip_by_hand() -> None:
    """Of six tokens, 2 is dominant; 0 and 3 are contextual (every second of 0, 1, 3, 4, 5), and 1, 4, 5 join them."""
    x = torch.tensor([[1.0, 0.0], [3.0, 0.0], [9.0, 9.0], [0.0, 1.0], [0.0, 5.0], [0.0, 7.0]])
    scores = torch.tensor([0.1, 0.1, 0.9, 0.1, 0.1, 0.1])
    kept = pruning.visionzip(x, [6], 1, 2, scores)
    assert kept.lengths == (3,) and places(kept) == [2, 0, 3]
    assert torch.equal(kept.x, torch.tensor([[9.0, 9.0], [4.0, 0.0], [0.0, 7.0]]))  # 1 + 3; 1 + (5 + 7) / 2


def visionzip_formula(x: Tensor, scores: Tensor, keys: Tensor, dominant: int, contextual: int) -> Tensor:
    """The paper's steps, of one image."""
    best = scores.topk(dominant).indices.sort().values
    rest = torch.ones(len(x), dtype=torch.bool).index_fill(0, best, False).nonzero().flatten()
    targets = rest[:: len(rest) // contextual][:contextual]
    merged = torch.tensor([i for i in rest.tolist() if i not in targets.tolist()])
    unit = F.normalize(keys.double(), dim=1)
    into = (unit[merged] @ unit[targets].T).argmax(1)
    out = [x[best]]
    for number, target in enumerate(targets):
        group = x[merged[into == number]]
        out.append((x[target] + (group.mean(0) if len(group) else 0))[None])
    return torch.cat(out)


@on_backends
def test_visionzip_is_the_papers_steps() -> None:
    x, scores, keys = drawn(3, 50, 12), drawn(3, 50, seed=1), drawn(3, 50, 8, seed=2)
    expected = torch.stack([visionzip_formula(*given, 7, 6) for given in zip(x, scores, keys, strict=True)])
    kept = pruning.visionzip(x, 50, 7, 6, scores, keys)
    assert kept.lengths == 13
    torch.testing.assert_close(kept.x, expected)
    lengths = (50, 30, 20)
    flat, flat_scores, flat_keys = (given.flatten(0, 1)[:100] for given in (x, scores, keys))
    packed = pruning.visionzip(flat, lengths, (7, 4, 2), (6, 3, 1), flat_scores, flat_keys)
    parts = [given.split(lengths) for given in (flat, flat_scores, flat_keys)]
    counts = zip(*parts, (7, 4, 2), (6, 3, 1), strict=True)
    torch.testing.assert_close(packed.x, torch.cat([visionzip_formula(*given) for given in counts]))
    assert packed.lengths == (13, 7, 3)


def test_visionzip_refuses_more_than_there_are() -> None:
    with pytest.raises(ValueError, match=r"contextual must be from 1 to 3 for image 0, of which 3 tokens are left"):
        pruning.visionzip(drawn(10, 4), [10], 7, 4, drawn(10))


# DART.


@on_backends
def test_dart_by_hand() -> None:
    """The pivot is the longest token, 1; 3 is opposite to it and 0 at a right angle, 2 and 4 are nearly the same."""
    x = torch.tensor([[0.0, 1.0], [8.0, 0.0], [2.0, 0.1], [-1.0, 0.0], [3.0, 1.0]])
    kept = pruning.dart(x, [5], 3, pivots=1)
    assert places(kept) == [0, 1, 3] and kept.lengths == (3,)
    assert torch.equal(kept.x, x[[0, 1, 3]])


@on_backends
def test_dart_is_the_papers_formula() -> None:
    x, keys = drawn(2, 60, 12), drawn(2, 60, 6, seed=1)
    expected = []
    for tokens, of_keys in zip(x, keys, strict=True):
        pivots = of_keys.abs().sum(1).topk(4).indices
        unit = F.normalize(tokens.double(), dim=1)
        least = (unit @ unit[pivots].T).min(1).values
        least[pivots] = -2.0  # kept in any case
        expected.append(least.topk(20, largest=False).indices.sort().values)
    kept = pruning.dart(x, 60, 20, pivots=4, metric=keys)
    assert torch.equal(kept.positions - torch.tensor([[0], [60]]), torch.stack(expected))
    packed = pruning.dart(x.flatten(0, 1), (60, 60), (20, 20), pivots=4, metric=keys.flatten(0, 1))
    assert torch.equal(packed.positions, kept.positions.flatten()) and packed.lengths == (20, 20)


@pytest.mark.parametrize("pivots", [0, 6])
def test_dart_refuses_pivots(pivots: int) -> None:
    with pytest.raises(ValueError, match=rf"pivots must be from 1 to keep = 5, got {pivots}"):
        pruning.dart(drawn(20, 4), [20], 5, pivots=pivots)
    with pytest.raises(TypeError, match=r"pivots must be an integer, got float"):
        pruning.dart(drawn(20, 4), [20], 5, pivots=0.5)  # type: ignore[arg-type]


@on_backends
def test_dart_of_tokens_whose_norm_float16_does_not_hold() -> None:
    x = torch.full((6, 1024), 80.0)
    x[4], x[2] = 100.0, 90.0
    kept = pruning.dart(x.half(), [6], 2, pivots=2)
    assert places(kept) == [2, 4]


# CDPruner and DivPrune.


@on_backends
def test_cdpruner_by_hand() -> None:
    """The text is (1, 0): relevances are 1, 1, 0.6 and 0, which are the qualities too, as they are from 0 to 1.

    The first token is 0; of 1 nothing lies outside of its span, of 2 the part (0, 0.8): its quality makes it 0.48, and
    that of 3 is 0.
    """
    x = torch.tensor([[2.0, 0.0], [3.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    kept = pruning.cdpruner(x, [4], 2, x, torch.tensor([[5.0, 0.0]]), [1])
    assert places(kept) == [0, 2] and torch.equal(kept.x, x[[0, 2]]) and kept.lengths == (2,)


def greedy_determinants(similarity: Tensor, keep: int) -> list[int]:
    """Chooses the token with which the determinant of the chosen ones' similarities is largest, from the definition."""
    chosen: list[int] = []
    for _ in range(keep):
        others = [i for i in range(len(similarity)) if i not in chosen]
        chosen.append(max(others, key=lambda i: float(similarity[[*chosen, i]][:, [*chosen, i]].det())))
    return sorted(chosen)


@on_backends
def test_cdpruner_is_the_papers_formula() -> None:
    x, image, text = drawn(2, 30, 16), drawn(2, 30, 8, seed=1), drawn(2, 3, 8, seed=2)
    expected = []
    for tokens, embeds, words in zip(x.double(), image.double(), text.double(), strict=True):
        relevance = (F.normalize(embeds, dim=1) @ F.normalize(words, dim=1).T).mean(1)
        relevance = (relevance - relevance.min()) / (relevance.max() - relevance.min())
        unit = F.normalize(tokens, dim=1)
        expected.append(greedy_determinants(relevance[:, None] * (unit @ unit.T) * relevance, 6))
    kept = pruning.cdpruner(x, 30, 6, image, text, 3)
    assert (kept.positions - torch.tensor([[0], [30]])).tolist() == expected
    assert torch.equal(kept.x, x.flatten(0, 1)[kept.positions]) and kept.lengths == 6
    flat = [given.flatten(0, 1) for given in (x, image, text)]
    packed = pruning.cdpruner(flat[0], (30, 30), (6, 6), *flat[1:], (3, 3))
    assert torch.equal(packed.positions, kept.positions.flatten()) and packed.lengths == (6, 6)


@on_backends
def test_equal_relevances_count_1() -> None:
    x = F.normalize(drawn(1, 12, 8), dim=2)
    text, embeds = torch.ones(1, 1, 4), torch.ones(1, 12, 4)
    relevant = pruning.cdpruner(x, 12, 4, embeds, text, 1)
    assert sorted(places(relevant)) == greedy_determinants(x[0].double() @ x[0].double().T, 4)


@on_backends
def test_relevance_of_nan_comes_last_and_leaves_the_others_alone() -> None:
    """The relevances of the first four are 1, 0.6, 0 and 0.96: 0 is first, then 1 adds 0.6 * 0.8, and 3 0.96 * 0.28."""
    x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [0.96, -0.28], [0.0, -1.0]])
    embeds = x.clone()
    embeds[4] = torch.nan
    kept = pruning.cdpruner(x, [5], 2, embeds, torch.tensor([[1.0, 0.0]]), [1])
    assert places(kept) == [0, 1] == places(pruning.cdpruner(x[:4], [4], 2, x[:4], torch.tensor([[1.0, 0.0]]), [1]))
    assert places(pruning.cdpruner(x, [5], 5, embeds, torch.tensor([[1.0, 0.0]]), [1])) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("shape", [(2, 9, 3), (20, 3), (2, 10)])
def test_a_metric_of_other_tokens_is_refused(shape: tuple[int, ...]) -> None:
    x, other = drawn(2, 10, 8), drawn(*shape)
    message = rf"metric must be \[2, 10, D\], a row for each token, got shape {re.escape(str(shape))}"
    with pytest.raises(ValueError, match=message):
        pruning.divprune(x, 10, 4, metric=other)
    with pytest.raises(ValueError, match=message):
        pruning.dart(x, 10, 8, metric=other)
    with pytest.raises(ValueError, match=message):
        pruning.visionzip(x, 10, 4, 2, drawn(2, 10), other)
    with pytest.raises(ValueError, match=message):
        pruning.cdpruner(x, 10, 4, x, drawn(2, 1, 8), 1, metric=other)
    with pytest.raises(ValueError, match=message.replace("metric", "image_embeds")):
        pruning.cdpruner(x, 10, 4, other, drawn(2, 1, shape[-1]), 1)


@on_backends
def test_divprune_by_hand() -> None:
    """0 is farthest from its nearest neighbour, then 3 is farthest from it, then 1 or 2 from both."""
    x = torch.tensor([[-1.0, 0.0], [0.6, 0.8], [0.8, 0.6], [1.0, 0.0]])
    kept = pruning.divprune(x, [4], 3)
    assert places(kept) == [0, 1, 3] and torch.equal(kept.x, x[[0, 1, 3]])


# EVS.


@on_backends
def test_evs_by_hand() -> None:
    """Two frames more of two tokens: token 3 turns, 4 turns back a little, 2 and 5 stay."""
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [1.0, 0.5], [0.0, 3.0]])
    kept = pruning.evs(x, [(3, 1, 2)], 0.5)
    assert places(kept) == [0, 1, 3] and kept.lengths == (3,)
    assert places(pruning.evs(x, [(3, 1, 2)], 0.6)) == [0, 1, 3, 4]
    assert places(pruning.evs(x, [(3, 1, 2)], 0.1)) == [0, 1]  # the first frame is kept


@on_backends
def test_evs_of_several_videos() -> None:
    x, grids = drawn(3 * 4 + 2 * 6, 8), [(3, 2, 2), (2, 2, 3)]
    kept = pruning.evs(x, grids, 0.5)
    assert kept.lengths == (6, 6)
    first = x[:12].view(3, 4, 8)
    changes = 1 - F.cosine_similarity(first[1:], first[:-1], dim=2)
    assert places(kept)[:6] == [0, 1, 2, 3, *sorted((4 + changes.flatten().topk(2).indices).tolist())]
    assert places(kept)[6:] == [12, 13, 14, 15, 16, 17]
    batched = pruning.evs(x.view(1, 24, 8), (4, 2, 3), 0.5)
    assert batched.x.shape == (1, 12, 8)
    for keep in (2, 0.0, 1.5):
        with pytest.raises(ValueError, match=r"keep must be a share of the tokens, a float above 0 and at most 1, got"):
            pruning.evs(x, grids, keep)


# All of them.

GIVEN = {"query": drawn(2, 2, 1, 8), "key": drawn(2, 2, 40, 8), "scores": drawn(2, 40), "text": drawn(2, 3, 12)}
METHODS: dict[str, Callable[[Tensor], Selection]] = {
    "fastv": lambda x: pruning.fastv(x, GIVEN["query"], GIVEN["key"], slice(8, 40), 0.25),
    "visionzip": lambda x: pruning.visionzip(x, 40, 5, 3, GIVEN["scores"]),
    "dart": lambda x: pruning.dart(x, 40, 10),
    "cdpruner": lambda x: pruning.cdpruner(x, 40, 10, x, GIVEN["text"], 3),
    "divprune": lambda x: pruning.divprune(x, 40, 10),
    "evs": lambda x: pruning.evs(x, (5, 2, 4), 0.5),
}


OTHERS: dict[str, Callable[[Tensor, Any], Selection]] = {
    "visionzip": lambda x, lengths: pruning.visionzip(x, lengths, 5, 3, x[..., 0]),
    "dart": lambda x, lengths: pruning.dart(x, lengths, 10),
    "cdpruner": lambda x, lengths: pruning.cdpruner(x, lengths, 10, x, x, lengths),
    "divprune": lambda x, lengths: pruning.divprune(x, lengths, 10),
    "evs": lambda x, lengths: pruning.evs(x, [(n, 1, 1) for n in lengths] if x.dim() == 2 else (lengths, 1, 1), 0.5),
}


@on_backends
@pytest.mark.parametrize("method", OTHERS)
def test_no_images(method: str) -> None:
    kept = OTHERS[method](drawn(0, 12), [])
    assert kept.x.shape == (0, 12) and kept.lengths == () and kept.positions.shape == (0,)
    if method == "evs":  # a batch's grid is of one image
        with pytest.raises(ValueError, match=r"x must have an image or more as .*, got shape \(0, 40, 12\)"):
            OTHERS[method](drawn(0, 40, 12), 40)
        return
    kept = OTHERS[method](drawn(0, 40, 12), 40)
    count = 8 if method == "visionzip" else 10
    assert kept.x.shape == (0, count, 12) and kept.lengths == count and kept.positions.shape == (0, count)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x: pruning.visionzip(x, [40], 5, 3, x[:, 0], x[:39]),
            r"metric must be \[40, D\], a row for each token",
        ),
        (lambda x: pruning.dart(x, [40], 10, metric=x[None]), r"metric must be \[40, D\], .*, got shape \(1, 40, 12\)"),
        (lambda x: pruning.divprune(x, [40], 10, metric=x[:39]), r"metric must be \[40, D\], a row for each token"),
        (lambda x: pruning.cdpruner(x, [40], 10, x[:39], x, [40]), r"image_embeds must be \[40, D\], a row for each"),
        (
            lambda x: pruning.cdpruner(x, [40], 10, x, x, [40], metric=x[:39]),
            r"metric must be \[40, D\], a row for each",
        ),
        (lambda x: pruning.cdpruner(x, [40], 10, x, x[0], [1]), r"text_embeds must be \[tokens, C\] or"),
        (
            lambda x: pruning.cdpruner(x, [40], 10, x, x[:2], [3]),
            r"text_lengths must match text_embeds's 2 tokens, got 3",
        ),
        (
            lambda x: pruning.cdpruner(x, [40], 10, x, x[:0], [0]),
            r"text_lengths must be 1 or more for each of 1 images",
        ),
        (
            lambda x: pruning.cdpruner(x, [40], 10, x, x[:2], [1, 1]),
            r"text_lengths must be .* for each of 1 images, got",
        ),
    ],
)
def test_what_belongs_to_tokens_is_refused_by_name(call: Callable[[Tensor], Selection], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(drawn(40, 12))


@on_backends
@pytest.mark.parametrize("method", METHODS)
def test_gradients_flow_to_what_is_kept(method: str) -> None:
    x = drawn(2, 40, 12, seed=3).requires_grad_()
    kept = METHODS[method](x)
    (grad,) = torch.autograd.grad(kept.x.sum(), x)
    assert grad.flatten(0, 1)[kept.positions.flatten()].eq(1).all()
    if method != "visionzip":  # where the rest is merged
        assert grad.sum() == kept.x.numel()


@pytest.mark.parametrize("method", METHODS)
def test_methods_compile_into_one_graph(method: str) -> None:
    x = drawn(2, 40, 12, seed=3)
    torch._dynamo.reset()
    compiled = torch.compile(METHODS[method], backend="eager", fullgraph=True)(x)
    expected = METHODS[method](x)
    assert torch.equal(compiled.x, expected.x) and torch.equal(compiled.positions, expected.positions)


def test_a_share_is_a_constant_of_compiled_code_and_a_number_is_not() -> None:
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(
        lambda x, keep: pruning.divprune(x, x.shape[1], keep).x, backend="aot_eager", dynamic=True, fullgraph=True
    )
    graphs = []
    for tokens, keep in ((40, 0.25), (40, 0.5), (60, 0.5), (40, 10), (40, 20), (60, 20)):
        x = drawn(2, tokens, 12)
        assert torch.equal(compiled(x, keep), pruning.divprune(x, tokens, keep).x)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [1, 2, 2, 3, 3, 3]


OF_ANY_SIZE: dict[str, Callable[[Tensor], Selection]] = {
    "fastv": lambda x: pruning.fastv(x, x[:, None, -1:], x[:, None], slice(4, -4), 0.25),
    "visionzip": lambda x: pruning.visionzip(x, x.shape[1], 0.25, 0.1, x[..., 0]),
    "dart": lambda x: pruning.dart(x, x.shape[1], 0.5),
    "cdpruner": lambda x: pruning.cdpruner(x, x.shape[1], 0.25, x, x[:, :3], 3),
    "divprune": lambda x: pruning.divprune(x, x.shape[1], 0.25),
    "evs": lambda x: pruning.evs(x, (x.shape[1] // 4, 2, 2), 0.5),
}


@pytest.mark.parametrize("method", METHODS)
def test_one_graph_serves_images_of_any_size(method: str) -> None:
    torch._dynamo.reset()
    graphs = CompileCounter()
    compiled = torch.compile(OF_ANY_SIZE[method], backend=graphs, fullgraph=True, dynamic=True)
    for tokens in (24, 36, 60):
        x = drawn(2, tokens, 12, seed=tokens)
        assert torch.equal(compiled(x).positions, OF_ANY_SIZE[method](x).positions)
    assert graphs.frame_count == 1


@on_backends
@pytest.mark.parametrize(
    ("visual", "dropped"),
    [
        (slice(None, 19), range(19)),
        (slice(-6, None), range(14, 20)),
        (slice(2, -15), range(2, 5)),
        (slice(-99, 4), range(4)),
        (slice(9, 9), ()),
        (slice(9, 3), ()),
        (slice(30, None), ()),
    ],
)
def test_fastv_takes_any_slice(visual: slice, dropped: Any) -> None:
    kept = pruning.fastv(drawn(1, 20, 8), drawn(1, 2, 1, 16), drawn(1, 2, 20, 16), visual, 0)
    assert kept.positions.flatten().tolist() == [at for at in range(20) if at not in dropped]
