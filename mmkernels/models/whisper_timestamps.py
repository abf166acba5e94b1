"""When each token of a `Whisper`'s text is spoken, from the attention of chosen heads to the sound, and the words.

Source: the authors' code of Radford et al., "Robust Speech Recognition via Large-Scale Weak Supervision", 2022; dynamic
time warping by Sakoe and Chiba, "Dynamic Programming Algorithm Optimization for Spoken Word Recognition", 1978.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.models.whisper_decoder import WhisperCache
from mmkernels.nn.checks import described
from mmkernels.ops.attention.attention_weights import attention_weights
from mmkernels.runtime.checks import can_look

SECONDS = 0.02  # between two features of a sound


def head_index(heads: Sequence[tuple[int, int]], device: torch.device) -> dict[int, Tensor]:
    """Returns layer -> its heads, int64 ``[h]``, of pairs (layer, head)."""
    layers = sorted({layer for layer, _ in heads})
    return {layer: torch.tensor([head for at, head in heads if at == layer], device=device) for layer in layers}


def token_times_of(
    cache: WhisperCache,
    lengths: Tensor,
    rows: Tensor | None,
    frame_lengths: Tensor | None,
    *,
    filter_width: int,
) -> Tensor:
    """Returns when each token begins, in seconds, float32 ``[B, n]``; one call for each layer that has chosen heads.

    The attention of each token to the sound is standardised over the tokens, smoothed over the frames, averaged over
    the heads, and aligned: a token begins where its part of the best path does.

    Args:
        cache: has the sounds and the queries that were kept.
        lengths: the tokens of each row, int64 ``[B]``.
        rows: of which row of its call each token is, int64 ``[B, n]``; None: of the row of its text.
        frame_lengths: the lengths of the sounds in frames: what lies behind them counts for nothing; None: all counts.
        filter_width: of the median filter over the frames.

    Raises:
        TypeError, ValueError: `frame_lengths` has a wrong type or shape.
    """
    assert cache.sound is not None
    batch = cache.sound.batch
    check_frame_lengths(frame_lengths, batch)
    counts: list[int] = lengths.tolist()  # the path is found by the host
    longest = max(counts, default=0)
    times = torch.zeros(batch, longest)
    if longest < 2:
        return times.to(lengths.device)
    weights = torch.cat([_weights(cache, layer, longest - 1, rows) for layer in cache.heads], dim=1)
    frames = [weights.shape[3]] * batch if frame_lengths is None else [n // 2 for n in frame_lengths.tolist()]
    for row, (count, length) in enumerate(zip(counts, frames, strict=True)):
        if count > 1 and length > 0:
            matrix = _matrix(weights[row, :, : count - 1, :length], filter_width)
            starts = _starts(warped_path(-matrix.double().cpu().numpy()))
            times[row, : count - 1] = torch.from_numpy(starts * SECONDS)
            times[row, count - 1 :] = times[row, count - 2]
    return times.to(lengths.device)


def check_frame_lengths(frame_lengths: Tensor | None, batch: int) -> None:
    """Raises unless lengths are integers ``[B]``, or None."""
    if frame_lengths is None:
        return
    if not isinstance(frame_lengths, Tensor) or frame_lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"frame_lengths must be an int32 or int64 tensor, got {described(frame_lengths)}")
    if tuple(frame_lengths.shape) != (batch,):
        raise ValueError(f"frame_lengths must be [{batch}], one for each sound, got shape {tuple(frame_lengths.shape)}")


def check_finite(name: str, x: Tensor, lengths: Tensor | None) -> None:
    """Raises where a number within a sound is NaN or infinite, if that is seen without a sync: x is on a CPU.

    Args:
        name: of x, for the error.
        x: ``[B, ..., T]``, spectrograms.
        lengths: integers ``[B]``; what is behind them does not count. None: all of x counts.
    """
    looked = [x] if lengths is None else [x, lengths]
    if not all(each.device.type == "cpu" and can_look(each) for each in looked):
        return
    wrong = ~x.isfinite()
    if lengths is not None:
        wrong = wrong & (torch.arange(x.shape[-1]) < lengths[:, None, None])
    if wrong.any():
        raise ValueError(f"{name} must be finite, got NaN or infinity")


def _weights(cache: WhisperCache, layer: int, count: int, rows: Tensor | None) -> Tensor:
    """Returns the attention of the first `count` tokens, by the layer's chosen heads, ``[B, h, count, frames]``."""
    assert cache.sound is not None
    queries = torch.cat(cache.queries[layer][:count], dim=2)  # [R, h, count, D]
    if rows is not None:
        step = torch.arange(count, device=rows.device)
        queries = queries.transpose(1, 2)[rows[:, 1 : count + 1], step].transpose(1, 2)  # [B, h, count, D]
    key = cache.sound.layers[layer][0].index_select(1, cache.heads[layer])
    return attention_weights(queries, key, cache.sound.mask)


def _matrix(weights: Tensor, filter_width: int) -> Tensor:
    """Returns how well each token goes with each frame, ``[tokens, frames]``, of attention ``[heads, tokens, frames]``.

    A frame to which all tokens attend alike says nothing: it counts as 0.
    """
    deviation, mean = torch.std_mean(weights, dim=1, keepdim=True, correction=0)
    standard = ((weights - mean) / deviation).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    return median_filter(standard, filter_width).mean(0)


def median_filter(x: Tensor, width: int) -> Tensor:
    """Returns the median of `width` neighbours along the last dim, which is mirrored at its ends.

    Where the dim is too short to be mirrored, x stays as it is.

    Args:
        x: floating ``[..., n]``, without NaN.
        width: an odd number.

    Example:
        >>> import torch
        >>> median_filter(torch.tensor([[0.0, 9.0, 1.0, 2.0, 3.0]]), 3)
        tensor([[9., 1., 2., 2., 2.]])
    """
    half = width // 2
    if half == 0 or x.shape[-1] <= half:
        return x
    flat = F.pad(x.flatten(0, -2)[None], (half, half), mode="reflect")[0]
    places = list(flat.unfold(-1, x.shape[-1], 1).unbind(1))  # place p holds the neighbour p - half of each element
    for last in range(width - 1, half - 1, -1):  # the largest of the rest moves to the end, until the median is there
        for place in range(last):
            lower, upper = places[place], places[place + 1]
            places[place], places[place + 1] = torch.minimum(lower, upper), torch.maximum(lower, upper)
    return places[half].view_as(x)


def warped_path(cost: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Returns the cheapest path through a matrix, from its first to its last element: rows and columns of its steps.

    A step goes to the next row, the next column, or both. Sums are rounded to float32, as in the authors' code, so that
    equal paths are told apart in the same way; a diagonal of the matrix is one operation.

    Args:
        cost: float64 ``[N, M]``, both at least 1.

    Source: Sakoe and Chiba, 1978, without their weights and window.

    Example:
        >>> import numpy as np
        >>> rows, columns = warped_path(np.array([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]]))
        >>> rows.tolist(), columns.tolist()
        ([0, 1, 1], [0, 1, 2])
    """
    steps = _steps(cost)
    i, j = cost.shape[0], cost.shape[1]
    rows, columns = [], []
    while i > 0 and j > 0:
        rows.append(i - 1)
        columns.append(j - 1)
        step = steps[i + j, i]
        i, j = i - (step < 2), j - (step != 1)
    return np.array(rows[::-1], dtype=np.int64), np.array(columns[::-1], dtype=np.int64)


def _steps(cost: npt.NDArray[np.float64]) -> npt.NDArray[np.int8]:
    """Returns how the best path reaches element (i, j), counted from 1, at ``[i + j, i]``.

    0: from the row and column before; 1: from the row before; 2: from the column before, also where two are equal.
    """
    count, length = cost.shape
    skewed = np.zeros((count + length + 1, count + 1))  # [i + j, i]
    for i in range(count):
        skewed[i + 2 : i + 2 + length, i + 1] = cost[i]
    steps = np.zeros((count + length + 1, count + 1), dtype=np.int8)
    before = np.full(count + 1, np.inf, dtype=np.float32)  # the sums of the last diagonal but one, and of the last one
    last = np.full(count + 1, np.inf, dtype=np.float32)
    before[0] = 0.0
    for diagonal in range(2, count + length + 1):
        low, high = max(1, diagonal - length), min(count, diagonal - 1) + 1
        both, row, column = before[low - 1 : high - 1], last[low - 1 : high - 1], last[low:high]
        step = np.where((row < both) & (row < column), 1, 2)
        step[(both < row) & (both < column)] = 0
        best = np.where(step == 0, both, np.where(step == 1, row, column))
        steps[diagonal, low:high] = step
        sums = np.full(count + 1, np.inf, dtype=np.float32)
        sums[low:high] = skewed[diagonal, low:high] + best
        before, last = last, sums
    return steps


def _starts(path: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    """Returns the column at which a path reaches each row."""
    rows, columns = path
    return columns[np.diff(rows, prepend=-1) > 0]


class Word(NamedTuple):
    """A word and when it is spoken.

    Attributes:
        text: with the space before it, where there is one.
        start, end: in seconds from the start of the sound.
        tokens: how many tokens it has.
    """

    text: str
    start: float
    end: float
    tokens: int


_BEFORE = "\"'“¿([{-"  # signs that belong to the next word
_BEHIND = "\"'.。,，!！?？:：”)]}、"  # signs that belong to the word before


def words(tokens: Sequence[int], times: Sequence[float], tokenizer: Any, *, special: int) -> list[Word]:
    """Returns the words of a text with their times.

    A word begins with a space, or where a text has none, with each character; signs go with their word. A word ends
    where the next token begins.

    Args:
        tokens, times: of one row of a `WhisperGeneration`, up to its length.
        tokenizer: its ``decode`` returns the text of tokens.
        special: the first special token: it and those above it (the end of the text, times) are no words.

    Source: the authors' code of Radford et al., 2022, which also cuts some words at a sign inside them ("isn't",
        "well-known", "$5.00").

    Example:
        >>> class Letters:
        ...     def decode(self, tokens): return "".join(chr(token) for token in tokens)
        >>> words([ord(c) for c in " to be."] + [200], [0.0, 0.1, 0.2, 0.5, 0.5, 0.6, 0.9, 1.0], Letters(), special=200)
        [Word(text=' to', start=0.0, end=0.5, tokens=3), Word(text=' be.', start=0.5, end=1.0, tokens=4)]
    """
    if len(tokens) != len(times):
        raise ValueError(f"times must be {len(tokens)}, one for each token, got {len(times)}")
    found: list[Word] = []
    for text, first, last in _characters(tokens, tokenizer, special):
        end = times[last] if last < len(times) else times[-1]
        word = Word(text, times[first], end, last - first)
        if found and _goes_on(found[-1].text, text):
            before = found.pop()
            word = Word(before.text + text, before.start, end, before.tokens + word.tokens)
        found.append(word)
    return found


def _characters(tokens: Sequence[int], tokenizer: Any, special: int) -> list[tuple[str, int, int]]:
    """Returns the shortest runs of tokens that are whole characters: text, first token, token behind the last."""
    runs, first = [], 0
    for place, token in enumerate(tokens):
        if token >= special:
            first = place + 1
            continue
        text = tokenizer.decode(list(tokens[first : place + 1]))
        if not text.endswith("\ufffd"):
            runs.append((text, first, place + 1))
            first = place + 1
    return runs


def _goes_on(word: str, text: str) -> bool:
    """Whether a text belongs to the word before it."""
    if text[:1].isspace():
        return not word.strip()  # of several spaces each belongs to the word behind them
    if not text or not word.strip() or word.strip() in _BEFORE:
        return True
    return text[0] in _BEHIND or _has_spaces(word[-1] + text[0])


def _has_spaces(characters: str) -> bool:
    """Whether a writing puts spaces between words: not those of East Asia, nor Thai, Lao, Khmer and Burmese."""
    ranges = ((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF), (0x3400, 0x9FFF))
    return not any(low <= ord(character) <= high for character in characters for low, high in ranges)
