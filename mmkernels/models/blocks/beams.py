"""`beam_search`: the texts that a model finds the most likely, several of which it follows at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmkernels.nn.checks import check_positive
from mmkernels.runtime.checks import check_number

MOST_BEAMS = 1024
"""More are refused before memory is taken, which grows with the beams times the vocabulary."""
MOST_PENALTY = 10.0
"""With a larger length penalty scores of long texts would leave the range of float32."""

_NEVER = -1e9  # added to a score: as good as -inf, but differences are left


class Beams(NamedTuple):
    """The best text of each input.

    Attributes:
        tokens: int64 ``[B, n]``; padding follows the end-of-text token of a row.
        lengths: the tokens of each row, the end-of-text token included, int64 ``[B]``.
        scores: the sum of the log-probabilities of a row's tokens, divided by ``length ** length_penalty``, ``[B]``.
        rows: the row of the call of `step` that each token was scored in, int64 ``[B, n]``; 0 behind the end.
    """

    tokens: Tensor
    lengths: Tensor
    scores: Tensor
    rows: Tensor


class _Texts(NamedTuple):
    """Texts ``[B, K, n]`` with their scores ``[B, K]``, the rows in which their tokens were scored, and their ends."""

    tokens: Tensor
    rows: Tensor
    scores: Tensor
    done: Tensor  # bool [B, K]

    def best(self, scores: Tensor, count: int) -> _Texts:
        """Returns the `count` texts with the largest of other scores ``[B, K]``, which they then have."""
        index = scores.topk(count, dim=1)[1]
        return self._replace(scores=scores).at(index)

    def at(self, index: Tensor) -> _Texts:
        """Returns the texts at these places, int64 ``[B, k]``."""
        long = index[:, :, None].expand(-1, -1, self.tokens.shape[2])
        flat = (self.scores.gather(1, index), self.done.gather(1, index))
        return _Texts(self.tokens.gather(1, long), self.rows.gather(1, long), *flat)

    def longer(self, pad: int) -> _Texts:
        """Returns the texts with padding at the end."""
        more = torch.nn.functional.pad
        return self._replace(tokens=more(self.tokens, (0, 1), value=pad), rows=more(self.rows, (0, 1), value=-1))


def beam_search(
    step: Callable[[Tensor, Tensor], Tensor],
    first: Tensor,
    *,
    num_beams: int,
    max_new_tokens: int,
    eos_token_id: Sequence[int],
    pad_token_id: int,
    length_penalty: float = 1.0,
) -> Beams:
    """Returns the best text of each input.

    In each step the texts that are followed are continued by every token, and the best `num_beams` continuations that
    have not ended are followed next. Texts that end among the best are kept. The search for an input is over when the
    worst of `num_beams` kept texts is better than what the best text that is followed has now. The host looks at this
    once a step.

    Args:
        step: takes the tokens written so far, int64 ``[B * num_beams, n]``, and for each row the row of the last call
            (at first: of an input's row, repeated) that it continues, int64 ``[B * num_beams]``; returns the scores of
            the next token, ``[B * num_beams, vocab]``.
        first: the scores of the first token, ``[B, vocab]``. Scores are log-probabilities; rules may have made some
            -inf.
        num_beams: the texts that are followed for each input, at most `MOST_BEAMS`.
        max_new_tokens: the largest number of tokens, at which a text ends.
        eos_token_id: the tokens that end a text.
        pad_token_id: what follows the end of a text.
        length_penalty: above 1 longer texts are preferred, below 1 shorter ones; from -10 to 10.

    Raises:
        ValueError: `num_beams` or `max_new_tokens` is not positive, `num_beams` or `length_penalty` is too large, or
            the vocabulary has too few tokens beside those that end a text.

    Source: Wu et al., "Google's Neural Machine Translation System", 2016, section 7; the scores and when a search is
    over as in transformers, with ``early_stopping=False``.

    Example:
        >>> import torch
        >>> table = torch.tensor([[-9.0, -0.6, -0.8], [-9.0, -3.0, -3.0], [-0.1, -9.0, -9.0]])  # last token -> next
        >>> step = lambda tokens, rows: table[tokens[:, -1]]
        >>> options = {"max_new_tokens": 3, "eos_token_id": (0,), "pad_token_id": 0}
        >>> beam_search(step, table[:1], num_beams=1, **options).tokens  # the likelier first token
        tensor([[1, 1, 1]])
        >>> beam_search(step, table[:1], num_beams=2, **options).tokens  # the likelier text
        tensor([[2, 0]])
    """
    check_beams(num_beams, length_penalty)
    check_positive("max_new_tokens", max_new_tokens)
    batch, vocab = first.shape
    keep = max(2, 1 + len(eos_token_id)) * num_beams  # so many, that enough are left if the best ones end
    if keep > num_beams * vocab:
        raise ValueError(f"num_beams must leave tokens to choose from {vocab}, got {num_beams}")
    ends = torch.tensor(tuple(eos_token_id), dtype=torch.int64, device=first.device)
    offset = torch.arange(batch, device=first.device)[:, None] * num_beams
    followed, kept = _start(first, num_beams)
    improvable = torch.ones(batch, 1, dtype=torch.bool, device=first.device)
    scores = first.float()[:, None].expand(-1, num_beams, -1)  # [B, num_beams, vocab]
    while True:
        found = _continued(followed, scores, keep, offset)
        length = found.tokens.shape[2]
        last = length == max_new_tokens
        done = torch.isin(found.tokens[:, :, -1], ends) if len(ends) else torch.zeros_like(found.done)
        found = found._replace(done=done | last)
        followed = found.best(found.scores + found.done * _NEVER, num_beams)
        kept = _merged(kept.longer(pad_token_id), found, improvable, length, num_beams, length_penalty)
        reachable = followed.scores[:, :1] / length**length_penalty
        full = kept.done.all(1, keepdim=True)
        improvable = improvable & (~full | (reachable > kept.scores.amin(1, keepdim=True)))
        if last or not bool(improvable.any() & ~found.done.all()):
            break
        rows = followed.rows[:, :, -1].flatten()
        scores = step(followed.tokens.flatten(0, 1), rows).float().unflatten(0, (batch, num_beams))
    return _result(kept)


def check_beams(num_beams: int, length_penalty: float) -> None:
    """Raises unless `beam_search` takes these arguments."""
    check_positive("num_beams", num_beams)
    if num_beams > MOST_BEAMS:
        raise ValueError(f"num_beams must be at most {MOST_BEAMS}, got {num_beams}")
    must = f"a number from {-MOST_PENALTY:g} to {MOST_PENALTY:g}"
    check_number("length_penalty", length_penalty, must, -MOST_PENALTY, MOST_PENALTY)


def _start(first: Tensor, num_beams: int) -> tuple[_Texts, _Texts]:
    """Returns the texts that are followed, of which only the first counts, as all are empty, and those kept: none."""
    empty = first.new_zeros(first.shape[0], num_beams, 0, dtype=torch.int64)
    scores = first.new_full(empty.shape[:2], _NEVER, dtype=torch.float32)
    undone = torch.zeros_like(scores, dtype=torch.bool)
    followed = scores.clone()
    followed[:, 0] = 0.0
    return _Texts(empty, empty, followed, undone), _Texts(empty, empty, scores, undone)


def _continued(texts: _Texts, scores: Tensor, keep: int, offset: Tensor) -> _Texts:
    """Returns the best continuations of texts ``[B, K, n]`` by scores ``[B, K, vocab]``."""
    vocab = scores.shape[-1]
    total, index = (scores + texts.scores[:, :, None]).flatten(1).topk(keep, dim=1)
    beam, token = index // vocab, index % vocab
    before = texts.at(beam)
    tokens = torch.cat([before.tokens, token[:, :, None]], dim=2)
    rows = torch.cat([before.rows, (beam + offset)[:, :, None]], dim=2)
    return _Texts(tokens, rows, total, before.done)


def _merged(
    kept: _Texts, found: _Texts, improvable: Tensor, length: int, num_beams: int, length_penalty: float
) -> _Texts:
    """Returns the best of the texts kept and of those found that end among the best `num_beams`."""
    best = torch.arange(found.scores.shape[1], device=found.scores.device) < num_beams
    done = found.done & best
    scores = found.scores / length**length_penalty + (~improvable) * _NEVER + (~done) * _NEVER
    both = _Texts(
        torch.cat([kept.tokens, found.tokens], dim=1),
        torch.cat([kept.rows, found.rows], dim=1),
        torch.cat([kept.scores, scores], dim=1),
        torch.cat([kept.done, done], dim=1),
    )
    return both.best(both.scores, num_beams)


def _result(kept: _Texts) -> Beams:
    """Returns the best text kept of each input, without what is padding in all of them."""
    rows = kept.rows[:, 0]
    lengths = (rows >= 0).sum(1)
    longest = int(lengths.max()) if len(lengths) else 0
    return Beams(kept.tokens[:, 0, :longest], lengths, kept.scores[:, 0], rows[:, :longest].clamp(min=0))
