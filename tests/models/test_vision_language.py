"""What all models share in which images are tokens of the text: losses, logits, generation, and what they refuse."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from visual_prompts import SIZES, EncoderCalls, given, image, model, padded, text

from mmkernels.models import ContextCache, QwenVL

A, B = image(2, 3, 1), image(4, 2, 2)
IDS = torch.tensor([text(5, A, 6, 7, B, 8, 9, 10)])
LABELS = torch.full_like(IDS, -100)
LABELS[0, [7, 17, 19]] = IDS[0, [7, 17, 19]]  # one of them is predicted by an image's last token


def close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reducer", [None, "pool:2", "tome:0.5", "select:2", "diverse:0.5"])
@pytest.mark.parametrize("size", SIZES)
def test_the_loss_is_that_of_the_logits(size: str, reducer: str | None) -> None:
    of = QwenVL.from_size(size, dtype=torch.float64, reduce=reducer).eval()
    out = of(IDS, **given(A, B), labels=LABELS, return_logits=True)
    left = IDS.shape[1] - 14 + sum(of.encode(*given(A, B).values()).lengths)
    assert out.logits.shape == (1, left, 128) and out.kv_cache is None
    labels = LABELS[IDS != 127] if reducer else LABELS[0]
    scores = out.logits[0]
    if reducer:  # the logits of text tokens, and those that predict them: the last ones of an image do
        tokens = of.encode(*given(A, B).values()).lengths
        stay = torch.tensor(text(5, (A[0], (1, tokens[0])), 6, 7, (B[0], (1, tokens[1])), 8, 9, 10))
        full = torch.full_like(stay, -100)
        full[stay != 127] = labels
        labels = full
    close(out.loss, F.cross_entropy(scores[:-1], labels[1:]))
    assert of(IDS, **given(A, B), labels=LABELS).logits is None


@pytest.mark.parametrize("size", SIZES)
def test_gradients_reach_every_parameter(size: str) -> None:
    """And are the same whether the images are encoded in the call or before it."""
    of = QwenVL.from_size(size, dtype=torch.float64)
    of(IDS, **given(A, B), labels=LABELS).loss.backward()
    expected = {name: parameter.grad for name, parameter in of.named_parameters()}
    of.zero_grad()
    of(IDS, images=of.encode(*given(A, B).values()), labels=LABELS).loss.backward()
    for name, parameter in of.named_parameters():
        if not name.endswith("k_proj.bias"):  # no gradient: scores shift alike
            assert expected[name] is not None and float(expected[name].abs().max()) > 0, name
        close(parameter.grad, expected[name])


def test_a_layer_in_place_of_the_head_is_called() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    of = QwenVL.from_size("tiny", dtype=torch.float64).eval()
    head = Doubled(64, 128, bias=False, dtype=torch.float64)
    head.weight = of.head.weight
    plain = of(IDS, **given(A, B)).logits
    of.head = head
    out = of(IDS, **given(A, B), labels=LABELS, return_logits=True)
    close(out.logits, 2 * plain)
    torch.testing.assert_close(out.loss.double(), F.cross_entropy(2 * plain[0, :-1], LABELS[0, 1:]))


def test_labels_of_a_continuation() -> None:
    """The loss of a second turn is that of its tokens, given all before them but for the first of them."""
    of = model()
    with torch.no_grad():
        whole = of(IDS, **given(A, B)).logits
        cache = of(IDS[:, :-3], **given(A, B)).kv_cache
        out = of(IDS[:, -3:], kv_cache=cache, labels=IDS[:, -3:])
    close(out.loss, F.cross_entropy(whole[0, -3:-1], IDS[0, -2:]))
    assert out.kv_cache is cache and cache.num_tokens == IDS.shape[1]


@pytest.mark.parametrize("size", SIZES)
def test_every_split_into_calls_gives_the_same_logits(size: str) -> None:
    of = model(size)
    with torch.no_grad():
        whole = of(IDS, **given(A, B)).logits
        for first, images, rest in ((1, [], [A, B]), (7, [A], [B]), (9, [A], [B]), (18, [A, B], [])):
            start = of(IDS[:, :first], **given(*images))
            more = of(IDS[:, first:], **given(*rest), kv_cache=start.kv_cache)
            close(torch.cat([start.logits, more.logits], dim=1), whole)
            assert more.kv_cache.image_ids == [0, 1]


@pytest.mark.parametrize("side", ["left", "right"])
def test_last_logits_only_is_each_rows_last_token(side: str) -> None:
    of = model()
    ids, mask = padded([text(5, A, 6), text(7, 8, 9), text(B, 10, 11, 12)], side)
    with torch.no_grad():
        every = of(ids, **given(A, B), attention_mask=mask).logits
        last = of(ids, **given(A, B), attention_mask=mask, last_logits_only=True).logits
    places = ids.shape[1] - 1 if side == "left" else mask.sum(1) - 1
    close(last[:, 0], every[torch.arange(3), places])


def test_a_single_shortened_row_needs_no_mask_of_keys() -> None:
    of = QwenVL.from_size("tiny", dtype=torch.float64, reduce="pool:2").eval()
    with torch.no_grad():
        assert not of(IDS, **given(A, B)).kv_cache._padded
        ids, mask = padded([text(5, A, 6), text(7, 8, 9)])
        assert of(ids, **given(A), attention_mask=mask).kv_cache._padded


# Generation.


def test_a_row_that_ended_stays_ended() -> None:
    of = model()
    ids, mask = padded([text(5, A, 6), text(7, 8, 9)])
    free = of.generate(ids, **given(A), attention_mask=mask, max_new_tokens=6, eos_token_id=()).tokens
    end = int(free[0, 1])
    assert end not in free[1, :2].tolist() and int(free[0, 0]) != end
    out = of.generate(ids, **given(A), attention_mask=mask, max_new_tokens=6, eos_token_id=end)
    assert out.tokens[0, :2].tolist() == free[0, :2].tolist() and (out.tokens[0, 2:] == 0).all()
    ended = free[1].tolist().index(end) + 1 if end in free[1] else 6
    assert out.tokens[1, :ended].tolist() == free[1, :ended].tolist()
    more = torch.tensor([[20, 21], [22, 23]])
    found = of(more, kv_cache=out.kv_cache, last_logits_only=True).logits
    said = text(5, A, 6) + free[0, :2].tolist() + [20, 21]  # without the padding behind the end
    with torch.no_grad():
        close(found[:1], of(torch.tensor([said]), **given(A), last_logits_only=True).logits)


def test_a_generated_marker_stands_for_no_image() -> None:
    """It is read as a word, in this turn and in the next one."""
    of = QwenVL.from_size("tiny", dtype=torch.float64).eval()
    of.head = nn.Linear(64, 128, dtype=torch.float64)
    with torch.no_grad():
        of.head.bias[127] = 1e3
    out = of.generate(IDS, **given(A, B), max_new_tokens=3, eos_token_id=())
    more = of.generate(torch.tensor([[20]]), kv_cache=out.kv_cache, max_new_tokens=2, eos_token_id=())
    assert out.tokens.tolist() == [[127] * 3] and more.tokens.tolist() == [[127] * 2]
    assert more.kv_cache.image_ids == [0, 1] and more.kv_cache.visual_tokens().tolist() == [14]


def test_draws_follow_the_seed() -> None:
    of = model()
    draws = [
        of.generate(IDS, **given(A, B), max_new_tokens=8, temperature=1.0, seed=seed, eos_token_id=()).tokens.tolist()
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_images_are_encoded_once_in_a_generation() -> None:
    of = model()
    with EncoderCalls(of) as patches:
        of.generate(IDS, **given(A, B), max_new_tokens=5, eos_token_id=())
    assert patches == [24 + 32], "both images in one call"


def test_no_more_memory_is_taken_than_a_text_may_have() -> None:
    of = model()
    out = of.generate(IDS, **given(A, B), max_new_tokens=10**12, eos_token_id=tuple(range(128)))
    assert out.kv_cache.num_tokens == IDS.shape[1]


def test_a_text_ends_where_it_may_not_be_longer() -> None:
    of = model()
    before, most = of.config.text_length, IDS.shape[1] + 3
    object.__setattr__(of.config, "text_length", most)
    try:
        out = of.generate(IDS, **given(A, B), max_new_tokens=50, eos_token_id=())
        assert out.kv_cache.num_tokens == most and out.tokens.shape[1] == 4  # the last one is not in the cache
        with pytest.raises(ValueError, match="text_length"):
            of.generate(IDS[:, :1], kv_cache=out.kv_cache, max_new_tokens=1)
    finally:
        object.__setattr__(of.config, "text_length", before)


# What is refused.


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"inputs of QwenVL .* pixel_values.*; got image_sizes"):
        model()(IDS, image_sizes=3)
    of = model()
    with pytest.raises(ValueError, match="labels need the logits of every token: last_logits_only must be False"):
        of(IDS, **given(A, B), labels=LABELS, last_logits_only=True)
    with pytest.raises(ValueError, match="input_ids must have at least one token, got none"):
        of(IDS[:, :0])
    with pytest.raises(ValueError, match="max_new_tokens must be a positive integer, got 0"):
        of.generate(IDS, **given(A, B), max_new_tokens=0)
    for ids, error in ((IDS[0], ValueError), (IDS.tolist(), TypeError), (IDS.float(), ValueError)):
        with pytest.raises(error, match=r"input_ids must be integers \[B, L\], got "):
            of.generate(ids)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="pictures"):
        of(IDS, pictures=1)
    for text_, message in (
        ("shuffle:2", "without weights"),
        ("half", "without weights"),
        ("pool", "a reducer must be"),
    ):
        with pytest.raises(ValueError, match=message):
            QwenVL.from_size("tiny").set_reducer(text_)


def test_texts_that_are_too_long() -> None:
    """Refused before anything is encoded; with a reducer, what counts is what is left."""
    of = QwenVL.from_size("tiny", dtype=torch.float64, text_length=19).eval()
    with EncoderCalls(of) as patches:
        with pytest.raises(ValueError, match=r"at most 19 tokens \(text_length\) with 0 in kv_cache, got 20"):
            of(IDS, **given(A, B))
        assert patches == []
    out = of.generate(torch.tensor([[5] * 16]), max_new_tokens=3, eos_token_id=())
    with pytest.raises(ValueError, match=r"with 18 in kv_cache, got 2"):
        of(torch.tensor([[5]]), kv_cache=out.kv_cache)
    assert out.kv_cache.num_tokens == 18
    of.set_reducer("pool:2")
    reduced = of.encode(*given(A, B).values())
    assert of(IDS, **given(A, B)).logits.shape[1] == 20 - 14 + 4
    of.set_reducer(None)
    assert of(IDS, images=reduced).logits.shape[1] == 20 - 14 + 4


def test_the_cache_is_as_it_was_after_an_error() -> None:
    of = model()
    cache = of(IDS, **given(A, B)).kv_cache
    position = cache.next_position
    for bad in ({"input_ids": torch.tensor([[5, 127, 6]])}, {"input_ids": torch.tensor([[500]])}):
        with pytest.raises(ValueError, match="input_ids"):
            of(**bad, kv_cache=cache)
    assert cache.num_tokens == IDS.shape[1] and torch.equal(cache.next_position, position)
    assert isinstance(cache, ContextCache) and cache.num_images == 2
