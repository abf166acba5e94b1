"""Beam search: against all texts that there are, and the caches whose rows it chooses."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from mmkernels.models.blocks.beams import beam_search
from mmkernels.models.blocks.kv_cache import KVCache
from mmkernels.nn import TokenBuffer

VOCAB, END, LENGTH = 5, 4, 4


def _tables(batch: int, seed: int) -> Tensor:
    """Log-probabilities of the next token by the step, the last token (or none: VOCAB) and the input."""
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(batch, LENGTH, VOCAB + 1, VOCAB, generator=generator)).log_softmax(-1)


def _all_texts() -> list[tuple[int, ...]]:
    words = [token for token in range(VOCAB) if token != END]
    ended = [(*text, END) for n in range(LENGTH) for text in itertools.product(words, repeat=n)]
    return ended + list(itertools.product(words, repeat=LENGTH))


def _score(table: Tensor, text: tuple[int, ...], penalty: float) -> float:
    before = (VOCAB, *text[:-1])
    return sum(float(table[i, b, token]) for i, (b, token) in enumerate(zip(before, text, strict=True))) / (
        len(text) ** penalty
    )


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(4))
def test_many_beams_find_the_best_of_all_texts(seed: int, penalty: float) -> None:
    tables, beams = _tables(3, seed), 64
    rows_seen: list[Tensor] = []

    def step(tokens: Tensor, rows: Tensor) -> Tensor:
        rows_seen.append(rows)
        at = torch.arange(len(tokens)) // beams
        return tables[at, tokens.shape[1], tokens[:, -1]]

    found = beam_search(
        step,
        torch.cat([tables[:, 0, VOCAB]]),
        num_beams=beams,
        max_new_tokens=LENGTH,
        eos_token_id=(END,),
        pad_token_id=END,
        length_penalty=penalty,
    )
    for row in range(3):
        text = tuple(found.tokens[row, : int(found.lengths[row])].tolist())
        assert float(found.scores[row]) == pytest.approx(_score(tables[row], text, penalty), abs=1e-5)
        # The search is over when no text that is followed has a better score now, though it might get one.
        best = max(_score(tables[row], other, penalty) for other in _all_texts())
        assert penalty > 0 or float(found.scores[row]) == pytest.approx(best, abs=1e-5)
        assert found.tokens[row, len(text) :].eq(END).all()
        assert found.rows[row].div(beams, rounding_mode="floor").eq(row)[: len(text)].all()


def test_one_beam_is_greedy_where_nothing_ends() -> None:
    tables = _tables(2, 0)[..., :-1].contiguous()
    step = lambda tokens, rows: tables[torch.arange(2), tokens.shape[1], tokens[:, -1]]
    options = {"max_new_tokens": LENGTH, "eos_token_id": (), "pad_token_id": 0}
    found = beam_search(step, tables[:, 0, VOCAB], num_beams=1, **options)  # type: ignore[arg-type]
    token, expected = torch.full((2,), VOCAB), []
    for i in range(LENGTH):
        token = tables[torch.arange(2), i, token].argmax(-1)
        expected.append(token)
    assert torch.equal(found.tokens, torch.stack(expected, 1)) and found.lengths.tolist() == [LENGTH] * 2


def test_rows_lead_back_to_what_was_scored() -> None:
    """The row of each token is that of the call in which the text so far stood there."""
    beams, tables = 3, _tables(2, 7)
    calls: list[Tensor] = [torch.zeros(6, 0, dtype=torch.int64)]

    def step(tokens: Tensor, rows: Tensor) -> Tensor:
        assert torch.equal(tokens[:, :-1], calls[-1][rows])  # a row goes on with what stood in the row that it names
        calls.append(tokens)
        return tables[torch.arange(6) // beams, tokens.shape[1], tokens[:, -1]]

    found = beam_search(
        step, tables[:, 0, VOCAB], num_beams=beams, max_new_tokens=LENGTH, eos_token_id=(END,), pad_token_id=END
    )
    for row in range(2):
        for place in range(int(found.lengths[row])):
            assert torch.equal(calls[place][found.rows[row, place]], found.tokens[row, :place])


def _chain(*scores: dict[int, float]) -> Tensor:
    """Scores by the step alone, ``[LENGTH, VOCAB]``."""
    table = torch.full((LENGTH, VOCAB), -50.0)
    for place, each in enumerate(scores):
        for token, score in each.items():
            table[place, token] = score
    return table


def test_a_search_goes_on_while_a_better_text_is_followed() -> None:
    """Two texts have ended after two tokens, but the one that is followed is better than the worse of them."""
    table = _chain({1: -0.1, END: -3.0}, {2: -0.1, END: -2.4}, {END: -0.1})
    step = lambda tokens, rows: table[tokens.shape[1]].expand(len(tokens), -1)
    options = {"max_new_tokens": LENGTH, "eos_token_id": (END,), "pad_token_id": 0}
    found = beam_search(step, table[:1], num_beams=2, **options)  # type: ignore[arg-type]
    assert found.tokens.tolist() == [[1, 2, END]] and float(found.scores[0]) == pytest.approx(-0.1)


def test_an_input_whose_search_is_over_gets_nothing_more() -> None:
    """The second input goes on; a text of the first that would end then, with a better mean, comes too late."""
    over = _chain({END: -0.5, 1: -0.9}, {END: -0.01}, {END: -0.01})
    more = _chain({1: -0.1}, {2: -0.1}, {END: -0.1})
    tables = torch.stack([over, more])
    step = lambda tokens, rows: tables[:, tokens.shape[1]]
    options = {"max_new_tokens": LENGTH, "eos_token_id": (END,), "pad_token_id": 0}
    found = beam_search(step, tables[:, 0], num_beams=1, **options)  # type: ignore[arg-type]
    assert found.tokens.tolist() == [[END, 0, 0], [1, 2, END]] and found.lengths.tolist() == [1, 3]
    assert found.scores.tolist() == pytest.approx([-0.5, -0.1])


def test_tokens_that_may_not_come() -> None:
    first = torch.full((1, VOCAB), -math.inf)
    first[:, 2] = 0.0
    step = lambda tokens, rows: torch.full((len(tokens), VOCAB), -math.inf).index_fill(1, torch.tensor([1, END]), -1.0)
    found = beam_search(step, first, num_beams=2, max_new_tokens=3, eos_token_id=(END,), pad_token_id=0)
    assert found.tokens.tolist() in ([[2, END]], [[2, 1, END]])
    assert found.scores.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_beams": 0}, "num_beams must be a positive integer, got 0"),
        ({"num_beams": 1025}, "num_beams must be at most 1024, got 1025"),
        ({"length_penalty": 1e308}, r"length_penalty must be a number from -10 to 10, got 1e\+308"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a positive integer, got 0"),
        ({"eos_token_id": tuple(range(9))}, "num_beams must leave tokens to choose from 5, got 2"),
    ],
)
def test_wrong_arguments(changes: dict[str, object], match: str) -> None:
    options = {"num_beams": 2, "max_new_tokens": 3, "eos_token_id": (END,), "pad_token_id": 0} | changes
    with pytest.raises(ValueError, match=match):
        beam_search(lambda tokens, rows: torch.zeros(2, 5), torch.zeros(1, 5), **options)  # type: ignore[arg-type]


# The caches.


@pytest.mark.parametrize("reserve", [0, 7])
def test_buffers_take_rows(reserve: int) -> None:
    buffer, expected = TokenBuffer(reserve), torch.zeros(3, 2, 0, 4)
    generator = torch.Generator().manual_seed(0)
    for rows in ([2, 0, 0], [1, 2, 0], [0, 0, 1, 1, 2], [4, 3, 2, 1, 0], [1]):
        new = torch.randn(expected.shape[0], 2, 3, 4, generator=generator)
        buffer.append(new)
        expected = torch.cat([expected, new], dim=2)
        assert torch.equal(buffer.view(), expected)
        index = torch.tensor(rows)
        buffer.take(index)
        expected = expected[index]
        assert torch.equal(buffer.view(), expected)
    with pytest.raises(RuntimeError, match="nothing was appended yet"):
        TokenBuffer().take(torch.tensor([0]))


def test_buffers_take_rows_with_gradients() -> None:
    buffer, x = TokenBuffer(9), torch.randn(2, 1, 3, 4, requires_grad=True)
    buffer.append(x)
    buffer.take(torch.tensor([1, 1]))
    buffer.view().sum().backward()
    assert torch.equal(x.grad, torch.tensor([0.0, 2.0])[:, None, None, None].expand(2, 1, 3, 4))  # type: ignore[arg-type]


def test_caches_take_rows() -> None:
    cache = KVCache(1)
    cache.take(torch.tensor([0]))  # of nothing: nothing
    valid = torch.tensor([[True, True], [False, True]])
    cache.extend(valid)
    key, value = torch.randn(2, 1, 2, 4), torch.randn(2, 1, 2, 4)
    cache.append(0, key, value)
    cache.pending = torch.tensor([[5], [6]]), torch.tensor([[True], [False]])
    rows = torch.tensor([1, 0, 1])
    cache.take(rows)
    assert cache.batch_size == 3 and cache.num_tokens == 2
    assert cache.pending[0].tolist() == [[6], [5], [6]] and cache.pending[1].tolist() == [[False], [True], [False]]
    positions, mask = cache.extend(torch.ones(3, 1, dtype=torch.bool))
    assert positions.tolist() == [[1], [2], [1]]
    assert mask.to_dense(3)[:, 0, 0].int().tolist() == [[0, 1, 1], [1, 1, 1], [0, 1, 1]]
    new = torch.randn(3, 1, 1, 4)
    keys, values = cache.append(0, new, new)
    assert torch.equal(keys, torch.cat([key[rows], new], dim=2))
    assert torch.equal(values, torch.cat([value[rows], new], dim=2))
