"""The parts of word timestamps, each against its formula; and sounds of any length, read in windows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import Saved
from torch import Tensor
from whisper_checkpoints import FRAMES, LENGTH, sounds

from mmkernels.models import Whisper, WhisperTokens
from mmkernels.models.whisper_decoder import SoundKeys, WhisperCache
from mmkernels.models.whisper_long import _Part, _segments
from mmkernels.models.whisper_timestamps import Word, head_index, median_filter, token_times_of, warped_path, words

Store = Callable[[str], Saved]
Ours = Callable[..., Whisper]


@pytest.mark.parametrize("width", [1, 3, 5, 7, 11])
@pytest.mark.parametrize("length", [1, 3, 6, 40])
def test_median_filter(width: int, length: int) -> None:
    x = torch.randn(2, 3, length, generator=torch.Generator().manual_seed(width), dtype=torch.float64)
    found, half = median_filter(x, width), width // 2
    if length <= half:
        assert torch.equal(found, x)
        return
    for place in range(length):
        at = [abs(i) if i < length else 2 * (length - 1) - i for i in range(place - half, place + half + 1)]
        assert torch.equal(found[..., place], x[..., at].median(-1).values)


def _cheapest(cost: np.ndarray[Any, Any]) -> float:
    """The cost of the cheapest path, by the recursion of the paper."""
    total = np.full((cost.shape[0] + 1, cost.shape[1] + 1), np.inf)
    total[0, 0] = 0
    for i in range(cost.shape[0]):
        for j in range(cost.shape[1]):
            total[i + 1, j + 1] = cost[i, j] + min(total[i, j], total[i, j + 1], total[i + 1, j])
    return float(total[-1, -1])


@pytest.mark.parametrize(("count", "length"), [(1, 1), (1, 9), (9, 1), (5, 12), (12, 5), (30, 31)])
def test_the_path_is_a_cheapest_one(count: int, length: int) -> None:
    cost = np.random.default_rng(count).normal(size=(count, length))
    rows, columns = warped_path(cost)
    assert (rows[0], columns[0], rows[-1], columns[-1]) == (0, 0, count - 1, length - 1)
    steps = set(zip(np.diff(rows).tolist(), np.diff(columns).tolist(), strict=True))
    assert steps <= {(0, 1), (1, 0), (1, 1)}
    assert float(cost[rows, columns].sum()) == pytest.approx(_cheapest(cost), abs=1e-4)


def test_equal_paths_are_told_apart_as_by_the_authors() -> None:
    """Of equal ways the one from the column before counts."""
    rows, columns = warped_path(np.zeros((3, 3)))
    assert (rows.tolist(), columns.tolist()) == ([0, 1, 2, 2, 2], [0, 0, 0, 1, 2])
    transformers = pytest.importorskip("transformers.models.whisper.generation_whisper")
    generator = np.random.default_rng(0)
    for shape in ((3, 3), (7, 9), (9, 7)):
        for cost in (np.zeros(shape), generator.integers(0, 3, shape).astype(float)):
            expected = transformers._dynamic_time_warping(cost)
            for ours, theirs in zip(warped_path(cost), expected, strict=True):
                assert ours.tolist() == theirs.tolist()


def _formula(weights: Tensor, width: int) -> list[float]:
    """When tokens begin, by the text of the paper's code, of attention ``[heads, tokens, frames]``."""
    matrix = (weights - weights.mean(1, keepdim=True)) / weights.std(1, keepdim=True, correction=0)
    matrix = median_filter(matrix, width).mean(0)
    rows, columns = warped_path(-matrix.double().numpy())
    return [0.02 * float(columns[rows == token].min()) for token in range(matrix.shape[0])]


@pytest.mark.parametrize("hidden", [False, True])
def test_times_of_kept_queries(hidden: bool) -> None:
    """Queries of several calls and beams, of several layers, are put together; each row has its length."""
    g = torch.Generator().manual_seed(0)
    heads = ((0, 1), (2, 0), (2, 3))
    keys = [(torch.randn(2, 4, 30, 8, generator=g), torch.zeros(2, 4, 30, 8)) for _ in range(3)]
    lengths = torch.tensor([30, 17])
    from mmkernels import SpanMask

    cache = WhisperCache(3)
    cache.sound = SoundKeys(keys, SpanMask.key_padding(lengths) if hidden else None)
    cache.heads = head_index(heads, torch.device("cpu"))
    queries = {layer: 3 * torch.randn(7, 6, 4, 1, 8, generator=g) for layer in (0, 1, 2)}  # [calls, R, H, L, D]
    for layer, each in queries.items():
        for call in each:
            grouped = call.unflatten(0, (2, 3)).transpose(1, 2).flatten(2, 3)  # [B, H, 3 L, D]
            cache.keep(layer, grouped, 6)
    assert set(cache.queries) == {0, 2}
    rows = torch.tensor([[0, 2, 1, 0, 2, 1], [3, 5, 4, 4, 0, 0]])
    frames = torch.tensor([60, 34])
    found = token_times_of(cache, torch.tensor([6, 4]), rows, frames, filter_width=3)
    for row, (count, length) in enumerate(((6, 30), (4, 17))):
        chosen = []
        for layer, head in heads:
            query = torch.stack([queries[layer][call, rows[row, call + 1], head, 0] for call in range(count - 1)])
            scores = query @ keys[layer][0][row, head].T / math.sqrt(8)
            chosen.append(scores[:, :length].softmax(-1) if hidden else scores.softmax(-1)[:, :length])
        expected = _formula(torch.stack(chosen), 3)
        expected += [expected[-1]] * (6 - len(expected))
        assert found[row].tolist() == pytest.approx(expected, abs=1e-6)


# Words.


class Letters:
    """A tokenizer whose tokens are bytes."""

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" to be, or not", [" to", " be,", " or", " not"]),
        (" it's (no) fun!", [" it's", " (no)", " fun!"]),
        ("Über Öl", ["Über", " Öl"]),  # letters of two bytes
        ("你好。再见", ["你", "好。", "再", "见"]),  # no spaces between words
        ("  double  space", ["  double", "  space"]),
        ("", []),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    tokens = [*text.encode(), 256, 257]
    times = [0.1 * place for place in range(len(tokens))]
    found = words(tokens, times, Letters(), special=256)
    assert [word.text for word in found] == expected
    assert sum(word.tokens for word in found) == len(tokens) - 2
    start = 0
    for word in found:
        assert [word.start, word.end] == pytest.approx([times[start], times[start + word.tokens]])
        start += word.tokens


def test_words_of_a_whisper_tokenizer() -> None:
    """The words of transformers, which has the authors' way to find them."""
    from transformers import WhisperTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    from transformers.models.whisper import tokenization_whisper as theirs

    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("'", "s")]
    pieces = [*bytes_to_unicode().values(), *(first + last for first, last in merges), "<|endoftext|>"]
    tokenizer = WhisperTokenizer(vocab={piece: number for number, piece in enumerate(pieces)}, merges=merges)
    for text in (' It\'s the other way, "yes" (no)!', "the thing", " Über. ¿Qué tal? ¡Hola!"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        expected, _, places = theirs._combine_tokens_into_words(tokenizer, ids, "english")
        found = words(ids, [0.0] * len(ids), tokenizer, special=len(pieces) - 1)
        assert [word.text for word in found] == expected
        assert [word.tokens for word in found] == [len(place) for place in places]


def test_words_between_times() -> None:
    tokens = [300, *b" a", 301, 301, *b" b", 302]
    found = words(tokens, [0, 1, 2, 3, 4, 5, 6, 7], Letters(), special=256)
    assert found == [Word(" a", 1, 3, 2), Word(" b", 5, 7, 2)]
    with pytest.raises(ValueError, match="times must be 8, one for each token, got 2"):
        words(tokens, [0, 1], Letters(), special=256)


# Long sounds.


@pytest.mark.parametrize(
    "options",
    [
        {"token_times": True},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"language": "de", "num_beams": 3}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("variant", ["whisper", pytest.param("whisper_shards", marks=pytest.mark.slow)])
def test_long_sounds_as_in_transformers(variant: str, options: dict[str, Any], saved: Store, ours: Ours) -> None:
    theirs, lengths = saved(variant).theirs, torch.tensor([270, 130, 230])
    features = sounds(theirs, 3, frames=270)
    mask = (torch.arange(270) < lengths[:, None]).long()
    given = {("return_token_timestamps" if name == "token_times" else name): value for name, value in options.items()}
    theirs.generation_config.max_length = LENGTH
    expected = theirs.generate(
        features * mask[:, None], attention_mask=mask, return_timestamps=True, return_segments=True, **given
    )["segments"]
    found = ours(variant).transcribe(features, lengths, **options)
    assert [len(each) for each in found] == [len(each) for each in expected]
    assert min(len(each) for each in found) > 1
    for row, other in zip(found, expected, strict=True):
        for segment, reference in zip(row, other, strict=True):
            assert segment.tokens.tolist() == reference["tokens"].tolist()
            assert segment.start == pytest.approx(float(reference["start"]), abs=1e-6)
            assert segment.end == pytest.approx(float(reference["end"]), abs=1e-6)
            if "token_times" in options and float(reference["token_timestamps"].min()) >= 0:
                torch.testing.assert_close(segment.token_times, reference["token_timestamps"].float())


@pytest.mark.slow
def test_all_of_a_long_sound_is_heard(saved: Store, ours: Ours) -> None:
    """Segments follow each other up to the end; what lies behind a length, and other sounds, change nothing."""
    model, features = ours("whisper"), sounds(saved("whisper").theirs, 2, frames=500)
    lengths = torch.tensor([500, 233])
    found = model.transcribe(features, lengths, language="en", hide_padding=True)
    noisy = features.masked_fill(torch.arange(500) >= lengths[:, None, None], float("nan"))
    for row, segments in enumerate(model.transcribe(noisy, lengths, language="en", hide_padding=True)):
        whole = features[row : row + 1, :, : int(lengths[row])]
        alone = model.transcribe(whole, language="en", frame_lengths=lengths[row : row + 1], hide_padding=True)[0]
        assert [x.tokens.tolist() for x in segments] == [x.tokens.tolist() for x in found[row]]
        assert [x.tokens.tolist() for x in alone] == [x.tokens.tolist() for x in segments]
        assert all(before.start <= after.start for before, after in pairwise(segments))
        assert segments[-1].start < float(lengths[row]) * 0.01
    assert model.transcribe(features[:, :, :100], torch.tensor([100, 0]), language="en")[1] == []


def _part(*tokens: int) -> _Part:
    return _Part(list(tokens), torch.tensor(tokens), None)


@pytest.mark.parametrize(
    ("tokens", "expected", "step"),
    [  # times: 100 is 0.00, 150 is 1.00; the window has 200 frames
        ((100, 5, 6), [(0.0, 2.0, 3)], 200),  # no end was written
        ((100, 5, 130), [(0.0, 0.6, 3)], 200),
        ((100, 5, 110, 110, 6, 130), [(0.0, 0.2, 3), (0.2, 0.6, 3)], 200),  # nothing is said behind the last time
        ((100, 5, 110, 110), [(0.0, 0.2, 4)], 20),
        ((100, 5, 110, 112, 6, 130, 131), [(0.0, 0.2, 3), (0.24, 0.6, 4)], 60),  # the next window begins at 0.60
        ((100, 5, 110, 112, 6), [(0.0, 0.2, 4)], 20),  # what was cut off is left to the next window
        ((), [(0.0, 2.0, 0)], 200),
    ],
)
def test_segments_of_a_window(tokens: tuple[int, ...], expected: list[tuple[float, float, int]], step: int) -> None:
    segments, found = _segments(_part(*tokens), 100, 200, 3.0)
    assert found == step
    assert [len(x.tokens) for x in segments] == [count for _, _, count in expected]
    seconds = [second for x in segments for second in (x.start, x.end)]
    assert seconds == pytest.approx([3 + second for start, end, _ in expected for second in (start, end)])


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda m, s: m.transcribe(s[0]), ValueError, r"input_features must be \[B, 80, T\], B and T at least 1"),
        (lambda m, s: m.transcribe(s[:, :, :0]), ValueError, "B and T at least 1"),
        (lambda m, s: m.transcribe(s.long()), TypeError, "input_features must be"),
        (lambda m, s: m.transcribe(s, torch.tensor([1, 2, 3])), ValueError, r"frame_lengths must be \[2\]"),
        (lambda m, s: m.transcribe(s, torch.tensor([1, 101])), ValueError, "frame_lengths must be from 0 to 100"),
        (lambda m, s: m.transcribe(s, torch.tensor([0, 9]), language=["de"]), ValueError, "one language or 2, one for"),
        (
            lambda m, s: m.transcribe(s, torch.tensor([0, 0]), language="xx"),
            ValueError,
            "language must be one of de, en",
        ),
        (lambda m, s: m.transcribe(s, torch.tensor([0, 0]), task="sing"), ValueError, "task must be one of"),
        (lambda m, s: m.transcribe(s, torch.tensor([0, 0]), prompt_ids=[1]), TypeError, "prompt_ids must be an int32"),
        (lambda m, s: m.transcribe(s, hide_padding=1), TypeError, "hide_padding must be a bool, got int"),
        (lambda m, s: m.transcribe(s, [1, 2]), TypeError, "frame_lengths must be an int32 or int64 tensor, got list"),
    ],
)
def test_wrong_long_sounds(
    call: Callable[..., Any], error: type[Exception], match: str, saved: Store, ours: Ours
) -> None:
    with pytest.raises(error, match=match):
        call(ours("whisper"), sounds(saved("whisper").theirs))


def test_languages_beside_a_sound_without_frames(saved: Store, ours: Ours) -> None:
    model, features = ours("whisper"), sounds(saved("whisper").theirs)
    empty, german = model.transcribe(features, torch.tensor([0, FRAMES]), language=["en", "de"])
    (alone,) = model.transcribe(features[1:], language="de")
    assert not empty and [x.tokens.tolist() for x in german] == [x.tokens.tolist() for x in alone]


def test_a_model_without_times_cannot_transcribe() -> None:
    model = Whisper(replace(Whisper.sizes["tiny"], tokens=WhisperTokens())).eval()
    with pytest.raises(ValueError, match="the model must have tokens of times to transcribe, got none"):
        model.transcribe(torch.randn(1, 80, 100))
