"""The ops that merge tokens: cases worked by hand, ties, NaN, rounds, gradients, proportional attention."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from harness import SPECS, backends, dtype_of, each_backend, examples, generator, peak_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import mmkernels
from mmkernels.ops.tokens.match_tokens import chunked
from mmkernels.ops.tokens.match_tokens.spec import alike

NAN, INF = math.nan, math.inf


def _rows(*degrees: float) -> Tensor:
    """Unit vectors at these angles; NaN and inf stay."""
    x = torch.tensor(degrees, dtype=torch.float64)
    rows = torch.stack([(x * math.pi / 180).cos(), (x * math.pi / 180).sin()], 1).float()
    return torch.where(x.isfinite()[:, None], rows, x[:, None].float())


def _match(metric: Tensor, keep: Any, backend: str, **more: Any) -> list[int]:
    lengths = more.pop("lengths", (len(metric),))
    assignment, left = mmkernels.match_tokens(metric, lengths, keep, backend=backend, **more)
    assert sum(left) == int(assignment.max()) + 1
    return assignment.tolist()


# Cases worked by hand. Tokens 0, 2, 4, ... may merge into tokens 1, 3, 5, ...


@each_backend("match_tokens", interpreted=False)
def test_the_most_similar_tokens_merge_first_each_into_its_best(backend: str) -> None:
    # Tokens 0 and 1 are 10 degrees apart, 2 and 3 are 8; of token 4 the nearest is token 5, at 90.
    metric = _rows(0, 10, 92, 100, 200, 290)
    assert _match(metric, 6, backend) == [0, 1, 2, 3, 4, 5]
    assert _match(metric, 5, backend) == [0, 1, 2, 2, 3, 4]
    assert _match(metric, 4, backend) == [0, 0, 1, 1, 2, 3]
    assert _match(metric, 3, backend) == [0, 0, 1, 1, 2, 2]


@each_backend("match_tokens", interpreted=False)
def test_a_further_round_compares_means(backend: str) -> None:
    # Means at 5, 96 and 245 degrees: those at places 0 and 2 may merge into that at place 1, 91 and 149 degrees away.
    metric = _rows(0, 10, 92, 100, 200, 290)
    assert _match(metric, 2, backend) == [0, 0, 0, 0, 1, 1]
    assert _match(metric, 1, backend) == [0, 0, 0, 0, 0, 0]
    # The mean of tokens 4 and 5 leans to the larger: to 215 degrees, 119 from 96; that of 0 and 1 is 126 away by now.
    sizes = torch.tensor([1.0, 1.0, 1.0, 1.0, 50.0, 1.0])
    metric = _rows(-30, -30, 92, 100, 200, 290)
    assert _match(metric, 2, backend) == [0, 0, 0, 0, 1, 1]
    assert _match(metric, 2, backend, sizes=sizes) == [0, 0, 1, 1, 1, 1]


@each_backend("match_tokens", interpreted=False)
def test_protected_tokens_neither_merge_nor_are_merged_into(backend: str) -> None:
    metric = _rows(0, 0, 0, 0, 30, 90)
    wants = [[0, 0, 1, 2, 3, 4], [0, 1, 1, 2, 3, 4], [0, 1, 2, 2, 3, 4], [0, 1, 2, 3, 3, 4], [0, 1, 2, 3, 4, 4]]
    for protect, want in enumerate(wants):
        assert _match(metric, 5, backend, protect=protect) == want
    assert _match(metric, 2, backend, protect=1) == [0, 1, 1, 1, 1, 1]
    assert _match(metric, 6, backend, protect=9) == [0, 1, 2, 3, 4, 5]


@each_backend("match_tokens")
def test_of_equally_similar_tokens_the_first(backend: str) -> None:
    metric = torch.ones(6, 4)
    assert _match(metric, 5, backend) == [0, 0, 1, 2, 3, 4]
    assert _match(metric, 4, backend) == [0, 0, 0, 1, 2, 3]
    assert _match(metric, 3, backend) == [0, 0, 0, 1, 0, 2]
    # Two images, and more of them than one tile has lanes and rows.
    many = torch.ones(400, 4)
    assert _match(many, (197, 198), backend, lengths=(200, 200)) == _all_equal(200, 3, 0) + _all_equal(200, 2, 197)


def _all_equal(length: int, merges: int, start: int) -> list[int]:
    """Tokens 0, 2, ... merge into token 1, which is then the first of the image."""
    found, rank = [], start
    for i in range(length):
        gone = i % 2 == 0 and i < 2 * merges
        found.append(start if gone else rank)
        rank += 0 if gone else 1
    return found


@each_backend("match_tokens", interpreted=False)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_token_that_is_not_finite_is_the_least_similar(backend: str, bad: float) -> None:
    assert _match(_rows(bad, 0, 120, 50), 3, backend) == [0, 1, 2, 2]
    assert _match(_rows(bad, 0, 120, 50), 2, backend) == [0, 0, 1, 1], "into the first, if it must"
    assert _match(_rows(0, bad, 45, 50), 3, backend) == [0, 1, 2, 2]
    assert _match(_rows(0, bad, 45, 50), 2, backend) == [1, 0, 1, 1], "nothing joins it"
    assert _match(_rows(0, bad, 45, bad), 2, backend) == [0, 0, 0, 1], "if all are such, the first"
    some = _rows(bad, 0, 120, 50)
    some[0, 1] = 1.0
    assert _match(some, 3, backend) == [0, 1, 2, 2]


@each_backend("merge_tokens", interpreted=False)
def test_nan_stays_in_its_group(backend: str) -> None:
    x = torch.ones(6, 5)
    x[4] = NAN
    merged, *_ = mmkernels.merge_tokens(x, (6,), 3, backend=backend)
    assert merged.isnan().all(1).tolist() == [True, False, False]
    merged, *_ = mmkernels.merge_tokens(x, (6,), 4, backend=backend)
    assert merged.isnan().all(1).tolist() == [False, False, True, False], "it merges after all others"


@each_backend("match_tokens", interpreted=False)
def test_a_token_of_zeros_has_the_similarity_0(backend: str) -> None:
    metric = _rows(0, 0, 100)
    metric[0] = 0.0  # to token 1: 0, above the -0.17 of token 2
    assert _match(metric, 2, backend) == [0, 0, 1]
    metric = _rows(0, 0, 80)  # below the 0.17 of token 2
    metric[0] = 0.0
    assert _match(metric, 2, backend) == [0, 1, 1]
    assert _match(torch.zeros(4, 3), 3, backend) == [0, 0, 1, 2]
    assert _match(torch.zeros(4, 0), 3, backend) == [0, 0, 1, 2]


@each_backend("match_tokens", interpreted=False)
@pytest.mark.parametrize("scale", [1e-36, 1e-20, 1e15, 1e37])
def test_rows_of_any_length(backend: str, scale: float) -> None:
    """Whose squares are not finite, or 0."""
    metric = _rows(0, 10, 92, 100, 200, 290) * torch.tensor([1, scale, scale, 1, scale, scale])[:, None]
    assert _match(metric, 4, backend) == [0, 0, 1, 1, 2, 3]


# Means, their gradients, and the way back.


@each_backend("merge_tokens", interpreted=False)
def test_a_group_is_the_mean_weighted_by_size(backend: str) -> None:
    x = torch.tensor([[4.0, 0.0], [1.0, 0.0], [2.0, 0.0], [0.0, 8.0]], requires_grad=True)
    sizes = torch.tensor([1.0, 3.0, 2.0, 5.0], requires_grad=True)
    merged, lengths, total, assignment = mmkernels.merge_tokens(x, (4,), 2, sizes=sizes, backend=backend)
    assert assignment.tolist() == [0, 0, 0, 1] and lengths == (2,)
    torch.testing.assert_close(merged, torch.tensor([[(4 * 1 + 1 * 3 + 2 * 2) / 6, 0.0], [0.0, 8.0]]))
    torch.testing.assert_close(total, torch.tensor([6.0, 5.0]))
    of_x, of_sizes = torch.autograd.grad(merged[0, 0] + 10 * total[0], (x, sizes))
    torch.testing.assert_close(of_x, torch.tensor([[1 / 6, 0.0], [3 / 6, 0.0], [2 / 6, 0.0], [0.0, 0.0]]))
    mean = 11 / 6
    want = torch.tensor([10 + (4 - mean) / 6, 10 + (1 - mean) / 6, 10 + (2 - mean) / 6, 0.0])
    torch.testing.assert_close(of_sizes, want)


@each_backend("merge_tokens", interpreted=False)
def test_one_call_equals_several_that_pass_sizes_on(backend: str) -> None:
    g, dtype = generator(), dtype_of("merge_tokens", backend)
    x, metric = torch.randn(40, 6, generator=g).to(dtype), alike(g, 40, 16, 1).to(dtype)
    options: dict[str, Any] = {"protect": 1, "backend": backend}
    once = mmkernels.merge_tokens(x, (40,), 13, metric=metric, **options)
    first = mmkernels.merge_tokens(x, (40,), 21, metric=metric, **options)
    means = mmkernels.merge_tokens(metric, (40,), 21, assignment=first[3], **options)[0]
    again = mmkernels.merge_tokens(first[0], first[1], 13, metric=means, sizes=first[2], **options)
    torch.testing.assert_close(again[:1] + again[2:3], once[:1] + once[2:3])
    assert torch.equal(again[3][first[3]], once[3])
    assert once[2].sum() == 40 and once[2][0] == 1


@each_backend("merge_tokens", interpreted=False)
def test_a_token_that_is_alone_keeps_its_bits(backend: str) -> None:
    g = generator()
    x, sizes = torch.randn(30, 19, generator=g), 0.1 + torch.rand(30, generator=g)
    merged, _, total, assignment = mmkernels.merge_tokens(x, (30,), 20, sizes=sizes, backend=backend)
    alone = assignment.bincount() == 1
    if backend not in ("reference", "chunked"):
        assert torch.equal(merged[alone], x[alone[assignment]])
    assert torch.equal(total[alone], sizes[alone[assignment]])


@each_backend("merge_tokens", interpreted=False)
def test_tokens_keep_their_order(backend: str) -> None:
    """A group stands where its token at an odd place stood."""
    x = torch.arange(50.0)[:, None].expand(50, 3)
    metric = alike(generator(3), 50, 16).float()
    merged, _, _, assignment = mmkernels.merge_tokens(x, (50,), 31, metric=metric, backend=backend)
    found = [max((i for i in range(50) if assignment[i] == j), key=lambda i: i % 2) for j in range(31)]
    assert found == sorted(found) and merged.shape == (31, 3)


@each_backend("unmerge_tokens", interpreted=False)
def test_unmerging_gives_each_token_its_group(backend: str) -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    tokens = mmkernels.unmerge_tokens(x, torch.tensor([1, 0, 1]), backend=backend)
    assert tokens.tolist() == [[3.0, 4.0], [1.0, 2.0], [3.0, 4.0]]
    (grad,) = torch.autograd.grad(tokens, x, torch.tensor([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]]))
    assert grad.tolist() == [[10.0, 20.0], [101.0, 202.0]]
    x = torch.randn(2, 9, 4, generator=generator())
    merged, _, _, assignment = mmkernels.merge_tokens(x, 9, 6, protect=1, backend=backend)
    tokens = mmkernels.unmerge_tokens(merged, assignment, backend=backend)
    assert tokens.shape == x.shape and torch.equal(tokens[:, 0], x[:, 0])


def test_batched_and_packed_are_the_same() -> None:
    x = torch.randn(3, 20, 8, generator=generator())
    batched = mmkernels.merge_tokens(x, 20, 12)
    packed = mmkernels.merge_tokens(x.flatten(0, 1), torch.tensor([20, 20, 20]), [12, 12, 12])
    assert batched[0].shape == (3, 12, 8) and batched[1] == 12 and batched[2].shape == (3, 12)
    assert packed[1].tolist() == [12, 12, 12]
    for one, other in ((batched[0], packed[0]), (batched[2], packed[2]), (batched[3], packed[3])):
        assert torch.equal(one.flatten(0, 1), other)


def test_autocast_rounds_nothing() -> None:
    x, metric = torch.randn(12, 8, generator=generator()), alike(generator(), 12, 8).float()
    want = mmkernels.merge_tokens(x, (12,), 5, metric=metric)
    with torch.autocast("cpu", torch.bfloat16):
        found = mmkernels.merge_tokens(x, (12,), 5, metric=metric)
    torch.testing.assert_close(found, want, rtol=0, atol=0)


def test_an_exported_program_and_a_graph_serve_other_sizes() -> None:
    class Halve(torch.nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            merged, _, sizes, assignment = mmkernels.merge_tokens(x, x.shape[1], 0.5, protect=1)
            return mmkernels.unmerge_tokens(merged, assignment), sizes

    model = Halve()
    program = torch.export.export(model, (torch.randn(2, 16, 8),), dynamic_shapes=({1: torch.export.Dim.AUTO},))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (16, 21, 40):
        x = torch.randn(2, tokens, 8, generator=generator())
        for found in (program.module()(x), compiled(x)):
            torch.testing.assert_close(found, model(x))


# Any images.


def _by_loops(metric: list[list[float]], lengths: list[int], kept: list[int], protect: int) -> list[int]:
    """The definition, number by number; sizes are 1."""
    found, start, first = [], 0, 0
    for length, keep in zip(lengths, kept, strict=True):
        groups = [[first + i] for i in range(length)]
        while len(groups) > keep:
            mean = [[sum(metric[i][c] for i in group) / len(group) for c in range(len(metric[0]))] for group in groups]
            unit = [[x / math.hypot(*row) for x in row] for row in mean]
            cosine = lambda a, b, unit=unit: sum(x * y for x, y in zip(unit[a], unit[b], strict=True))
            free = range(protect, len(groups))
            best = {a: max((b for b in free if b % 2), key=lambda b, a=a: cosine(a, b)) for a in free if a % 2 == 0}
            order = sorted(best, key=lambda a: -cosine(a, best[a]))
            gone = order[: len(groups) - keep]
            for a in gone:
                groups[best[a]] = groups[best[a]] + groups[a]
            groups = [group for place, group in enumerate(groups) if place not in gone]
        rank = {i: place for place, group in enumerate(groups) for i in group}
        found += [start + rank[first + i] for i in range(length)]
        start, first = start + keep, first + length
    return found


@each_backend("match_tokens", interpreted=False)
@examples(25)
@given(data=st.data(), protect=st.integers(0, 3), count=st.integers(0, 4), seed=st.integers(0, 1000))
def test_any_images(backend: str, data: st.DataObject, protect: int, count: int, seed: int) -> None:
    lengths = [data.draw(st.integers(0, 40)) for _ in range(count)]
    kept = [data.draw(st.integers(min(n, protect + 1), n)) for n in lengths]
    g = generator(seed)
    metric = torch.cat([torch.zeros(0, 12), *(alike(g, n, 12, protect) for n in lengths)]).float()
    want = _by_loops(metric.tolist(), lengths, kept, protect)
    assert mmkernels.match_tokens(metric, lengths, kept, protect=protect, backend=backend)[0].tolist() == want


@pytest.mark.parametrize("bands", [1, 7, 20])
def test_bands_of_any_height_find_the_same(bands: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The chunked backend's; equal similarities lie on both sides of a band's edge."""
    metric = torch.randint(2, (90, 4), generator=generator()).double() * 2 - 1
    monkeypatch.setattr(chunked, "STRIP_BYTES", bands * 8 * 45)
    assert _match(metric, 30, "chunked") == _match(metric, 30, "reference")


def test_no_image() -> None:
    for backend in backends(SPECS["merge_tokens"]):
        merged, lengths, sizes, assignment = mmkernels.merge_tokens(torch.zeros(0, 4), (), (), backend=backend)
        assert (merged.shape, lengths, sizes.shape, assignment.shape) == ((0, 4), (), (0,), (0,))


@pytest.mark.parametrize("share", [0.3, 0.5, 0.999, 1.0])
def test_a_share_is_rounded_up_for_each_image(share: float) -> None:
    lengths = (7, 1, 40, 0)
    _, left = mmkernels.match_tokens(torch.randn(48, 4), lengths, share)
    assert left == tuple(math.ceil(share * n) for n in lengths)
    _, left = mmkernels.match_tokens(torch.randn(48, 4), lengths, share, protect=4)
    assert left == tuple(max(min(n, 5), math.ceil(share * n)) for n in lengths)


# Beside attention.


@pytest.mark.parametrize("backend", [x for x in backends(SPECS["cross_attention"]) if x != "triton"])
def test_proportional_attention_counts_each_merged_token_by_its_size(backend: str) -> None:
    """Merged equal tokens with the bias log(sizes) are seen as all of them were."""
    g = generator()
    kinds = torch.randn(2, 5, 16, generator=g)
    tokens = kinds[:, torch.tensor([0, 0, 1, 1, 0, 2, 1, 3, 2, 4])]  # of each kind one is at an odd place
    merged, _, sizes, _ = mmkernels.merge_tokens(tokens, 10, 5)
    query = torch.randn(2, 4, 7, 8, generator=g)
    heads = lambda x: x.unflatten(-1, (2, 8)).transpose(1, 2).repeat_interleave(2, 1)
    bias = sizes.log()[:, None, None, :]
    found = mmkernels.cross_attention(query, heads(merged), heads(merged), bias=bias, backend=backend)
    want = mmkernels.cross_attention(query, heads(tokens), heads(tokens), backend=backend)
    torch.testing.assert_close(found, want)


def test_proportional_attention_of_packed_images() -> None:
    g = generator()
    kinds = torch.randn(4, 8, generator=g)
    tokens = kinds[torch.tensor([0, 0, 1, 1, 0, 1, 2, 2, 2, 2, 3, 3])]
    merged, lengths, sizes, _ = mmkernels.merge_tokens(tokens, (6, 6), (2, 2))
    query = torch.randn(1, 1, 3, 8, generator=g)
    see = lambda keys: mmkernels.SpanMask.packed([1, 2], list(keys))
    heads = lambda x: x[None, None]
    found = mmkernels.cross_attention(
        query, heads(merged), heads(merged), see(lengths), bias=sizes.log()[None, None, None]
    )
    torch.testing.assert_close(found, mmkernels.cross_attention(query, heads(tokens), heads(tokens), see((6, 6))))


# Memory.


@pytest.mark.parametrize("backend", [x for x in ("cpu", "chunked") if x in backends(SPECS["match_tokens"])])
def test_similarities_take_no_memory(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 8,192 tokens they would be 64 MiB; the metric is 1 MiB."""
    monkeypatch.setattr(chunked, "STRIP_BYTES", 1 << 20)
    metric = torch.randn(8192, 32)
    assert peak_of(lambda: mmkernels.match_tokens(metric, (8192,), 0.5, backend=backend)) < 12 << 20
