"""Conversations about images: turns, forks, and what is forgotten under a budget."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from visual_prompts import SIZES, EncoderCalls, given, image, model, padded, text

from mmkernels.models import ContextCache, ContextPolicy, QwenVL
from mmkernels.models.blocks.kv_cache import KVCache

A, B, C = image(2, 3, 1), image(3, 2, 2), image(2, 2, 3)  # 6, 6 and 4 tokens
MORE = torch.tensor([[31, 32, 33]])


def close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def started(of: QwenVL, *parts: object) -> ContextCache:
    """Returns the cache of a conversation that began with these tokens and images."""
    images = [part for part in parts if not isinstance(part, int)]
    with torch.no_grad():
        return of(torch.tensor([text(*parts)]), **given(*images)).kv_cache


def logits(of: QwenVL, ids: Tensor, cache: ContextCache, **arguments: object) -> Tensor:
    with torch.no_grad():
        return of(ids, kv_cache=cache, **arguments).logits


def masked(cache: ContextCache, hidden: Tensor) -> ContextCache:
    """Returns a copy of a cache in which some tokens, bool ``[B, L]``, are hidden instead of removed."""
    copy = cache.fork()
    copy._valid, copy._padded = cache._valid & ~hidden, True
    return copy


@pytest.mark.parametrize("size", SIZES)
def test_turns_equal_one_prompt(size: str) -> None:
    """Three turns; the second encodes nothing, the third its new image only."""
    of, said, images = model(size), [], []
    cache = None
    with EncoderCalls(of) as patches:
        for parts in ([5, A, 6, B, 7], [8, 9], [10, C, 11]):
            new = [part for part in parts if not isinstance(part, int)]
            out = of.generate(
                torch.tensor([text(*parts)]), **given(*new), kv_cache=cache, max_new_tokens=4, eos_token_id=()
            )
            cache, images = out.kv_cache, images + new
            said += text(*parts)
            whole = of.generate(torch.tensor([said]), **given(*images), max_new_tokens=4, eos_token_id=())
            assert out.tokens.tolist() == whole.tokens.tolist()
            said += out.tokens[0].tolist()
            patches.pop()  # of the whole prompt
    assert patches == [48, 16]
    assert cache.image_ids == [0, 1, 2] and cache.visual_tokens().tolist() == [16]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("reducer", [None, "pool:2", "diverse:2"])
def test_a_turn_may_end_with_an_image(size: str, reducer: str | None) -> None:
    """The text goes on behind the whole image, also where its last row was reduced away."""
    of = QwenVL.from_size(size, dtype=torch.float64, reduce=reducer).eval()
    first, second = text(5, A, 6, B), text(7, 8, 9)
    with torch.no_grad():
        whole = of(torch.tensor([first + second]), **given(A, B)).logits[:, -3:]
    cache = started(of, 5, A, 6, B)
    close(logits(of, torch.tensor([second]), cache), whole)
    assert cache.next_position.tolist() == [1 + 3 + 1 + 3 + 3]


@pytest.mark.parametrize("size", SIZES)
def test_encoded_images_are_used_again(size: str) -> None:
    of = model(size)
    visual = of.encode(given(A, B)["pixel_values"], given(A, B)["image_grid_thw"])
    with EncoderCalls(of) as patches, torch.no_grad():
        for parts in ([5, A, 6, B, 7], [A, B, 8, 9], [9, 9, A, 1, 2, 3, B]):
            ids = torch.tensor([text(*parts)])
            again = of(ids, images=visual).logits
            assert patches == []
            assert torch.equal(again, of(ids, **given(A, B)).logits)
            patches.clear()


def test_forks_go_on_alone() -> None:
    """Each continuation is what it would be without the others, and the images are encoded once."""
    of = model()
    with EncoderCalls(of) as patches:
        cache = started(of, 5, A, 6)
        forks = [cache.fork() for _ in range(3)]
        prompts = [[[20, 21]], [[22]], [[23, 24, 25]]]
        found = [logits(of, torch.tensor(ids), fork) for ids, fork in zip(prompts, forks, strict=True)]
        assert patches == [24]
    forks[0].drop([0])
    last = logits(of, MORE, cache)  # the first one goes on too
    with torch.no_grad():
        for ids, fork in zip([*prompts, MORE.tolist()], [*found, last], strict=True):
            whole = of(torch.tensor([text(5, A, 6) + ids[0]]), **given(A)).logits
            close(fork, whole[:, -len(ids[0]) :])
    assert cache.image_ids == [0] and forks[0].image_ids == [] and forks[1].image_ids == [0]


def test_a_fork_copies_nothing_until_it_grows() -> None:
    of = model()
    cache = of(torch.tensor([text(5, A, 6)]), **given(A)).kv_cache  # with gradients, which deepcopy can't copy
    fork, again = cache.fork(), cache.fork().fork()
    for one, other, third in zip(cache._layers, fork._layers, again._layers, strict=True):
        for buffers in zip(one, other, third, strict=True):
            assert len({buffer.view().data_ptr() for buffer in buffers}) == 1
    assert ContextCache(2).fork().image_ids == []
    close(logits(of, MORE, fork), logits(of, MORE, cache))


def test_a_generation_forks_with_its_last_token() -> None:
    of = model()
    out = of.generate(torch.tensor([text(5, A, 6)]), **given(A), max_new_tokens=3, eos_token_id=())
    one, other = (
        of.generate(MORE, kv_cache=cache, max_new_tokens=3, eos_token_id=()).tokens
        for cache in (out.kv_cache.fork(), out.kv_cache)
    )
    assert one.tolist() == other.tolist()


# Forgetting.


@pytest.mark.parametrize("size", SIZES)
def test_a_dropped_image_is_a_hidden_one(size: str) -> None:
    of = model(size)
    cache = started(of, 5, A, 6, B, 7)
    position, reference = cache.next_position, masked(cache, cache._image_of == 0)
    kept = logits(of, MORE, cache.fork())
    cache.drop([0])
    assert cache.image_ids == [1] and cache.num_tokens == 3 + 6
    assert torch.equal(cache.next_position, position)
    found = logits(of, MORE, cache)
    close(found, logits(of, MORE, reference))
    assert float((found - kept).norm() / kept.norm()) > 0.01, "the image hardly matters"
    out = of.generate(MORE, kv_cache=cache, max_new_tokens=3, eos_token_id=()).tokens
    assert out.tolist() == of.generate(MORE, kv_cache=reference, max_new_tokens=3, eos_token_id=()).tokens.tolist()


@pytest.mark.parametrize("size", SIZES)
def test_a_shrunk_image_keeps_its_most_different_tokens(size: str) -> None:
    of = model(size)
    cache = started(of, 5, A, 6, B, 7)
    values = cache._layers[-1][1].view()[0].transpose(0, 1).flatten(1)  # [L, Hkv D]
    stay = farthest(values[cache._image_of[0] == 1], 3)
    columns = (cache._image_of[0] == 1).nonzero()[:, 0]
    hidden = torch.zeros_like(cache._valid)
    hidden[:, columns] = True
    hidden[:, columns[stay]] = False
    reference = masked(cache, hidden)
    cache.shrink(1, 0.5)
    assert cache.visual_tokens().tolist() == [6 + 3] and cache.image_ids == [0, 1]
    close(logits(of, MORE, cache), logits(of, MORE, reference))


def farthest(x: Tensor, keep: int) -> list[int]:
    """Returns the tokens that DivPrune's algorithm 1 keeps."""
    x = torch.nn.functional.normalize(x, dim=1)
    apart = (1 - x @ x.mT).fill_diagonal_(torch.inf)
    chosen = [int(apart.amin(1).argmax())]
    while len(chosen) < keep:
        nearest = apart[:, chosen].amin(1)
        nearest[chosen] = -1
        chosen.append(int(nearest.argmax()))
    return chosen


def test_old_images_are_dropped_for_new_ones() -> None:
    of, policy = model(), ContextPolicy(max_visual_tokens=12)
    cache = started(of, 5, A, 6, B, 7)
    reference = masked(cache, cache._image_of == 0)
    ids = torch.tensor([text(8, C, 9)])
    close(
        logits(of, ids, cache, policy=policy, **given(C)),
        logits(of, ids, reference, **given(C)),
    )
    assert cache.image_ids == [1, 2] and cache.visual_tokens().tolist() == [10]
    logits(of, torch.tensor([text(B, A)]), cache, policy=policy, **given(B, A))
    assert cache.image_ids == [3, 4], "both new images have room only alone"
    logits(of, MORE, cache, policy=ContextPolicy(1))
    assert cache.image_ids == [3, 4], "a turn without images needs no room"


def test_old_images_shrink_before_any_is_dropped() -> None:
    of, policy = model(), ContextPolicy(max_visual_tokens=14, shrink=0.5)
    cache = started(of, 5, A, 6, B, 7)  # 6 + 6
    logits(of, torch.tensor([text(C)]), cache, policy=policy, **given(C))
    assert [int((cache._image_of == number).sum()) for number in range(3)] == [3, 6, 4]  # the oldest first
    logits(of, torch.tensor([text(C)]), cache, policy=policy, **given(C))
    assert [int((cache._image_of == number).sum()) for number in range(4)] == [3, 3, 4, 4]
    logits(of, torch.tensor([text(B)]), cache, policy=policy, **given(B))
    assert [int((cache._image_of == number).sum()) for number in range(5)] == [0, 3, 2, 2, 6], "once is enough"


def test_too_many_new_images_are_refused_before_they_are_encoded() -> None:
    of = model()
    cache = started(of, 5, A, 6)
    tokens, ids = cache.num_tokens, torch.tensor([text(B, 7)])
    with (
        EncoderCalls(of) as patches,
        pytest.raises(ValueError, match="max_visual_tokens must hold the new images, of 6 t"),
    ):
        logits(of, ids, cache, policy=ContextPolicy(5), **given(B))
    assert patches == [] and cache.num_tokens == tokens and cache.image_ids == [0]
    with pytest.raises(ValueError, match="of 6 tokens, got 5"):
        of.generate(ids, **given(B), policy=ContextPolicy(5))


def test_a_budget_counts_reduced_tokens() -> None:
    of = QwenVL.from_size("tiny", dtype=torch.float64, reduce="pool:2").eval()
    cache = started(of, 5, A, 6, A, 7)  # 2 tokens each
    assert cache.visual_tokens().tolist() == [4] and cache.num_tokens == 7
    logits(of, torch.tensor([text(B)]), cache, policy=ContextPolicy(4), **given(B))
    assert cache.image_ids == [1, 2]
    with pytest.raises(ValueError, match="of 4 tokens, got 3"):
        logits(of, torch.tensor([text(A, A)]), cache, policy=ContextPolicy(3), **given(A, A))


# Rows of a batch.

ROWS = [[5, A, 6, B, 7], [8, 9], [C, 10, 11]]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_with_different_images(size: str, side: str) -> None:
    """Each row goes its own way through two turns; one says nothing in the second."""
    of = model(size)
    ids, mask = padded([text(*parts) for parts in ROWS], side)
    second, second_mask = padded([text(12, C), [], text(13, 14)], side)
    first = {"attention_mask": mask, "max_new_tokens": 2, "eos_token_id": ()}
    both = of.generate(ids, **given(A, B, C), **first)
    cache = both.kv_cache
    assert cache.visual_tokens().tolist() == [12, 0, 4]
    found = logits(of, second, cache, attention_mask=second_mask, last_logits_only=True, **given(C))
    for row, (parts, more) in enumerate(zip(ROWS, [[12, C], [], [13, 14]], strict=True)):
        parts = [*parts, *both.tokens[row].tolist(), *more]
        images = [part for part in parts if not isinstance(part, int)]
        with torch.no_grad():
            whole = of(torch.tensor([text(*parts)]), **given(*images), last_logits_only=True).logits
        close(found[row : row + 1], whole)


@pytest.mark.parametrize("size", SIZES)
def test_each_row_has_its_own_budget(size: str) -> None:
    """Only the row that has too many tokens loses an image; the others are padded where it is shorter."""
    of, policy = model(size), ContextPolicy(12)
    ids, mask = padded([text(*parts) for parts in ROWS])
    with torch.no_grad():
        cache = of(ids, **given(A, B, C), attention_mask=mask).kv_cache
    reference = masked(cache, cache._image_of == 0)
    more, more_mask = padded([text(12, C), text(13), text(14, C)])
    arguments = {"attention_mask": more_mask, "last_logits_only": True, **given(C, C)}
    found = logits(of, more, cache, policy=policy, **arguments)
    close(found, logits(of, more, reference, **arguments))
    assert cache.image_ids == [1, 2, 3, 4] and cache.visual_tokens().tolist() == [10, 0, 8]
    expected = of.generate(MORE.expand(3, -1), kv_cache=reference, max_new_tokens=3, eos_token_id=()).tokens
    assert of.generate(MORE.expand(3, -1), kv_cache=cache, max_new_tokens=3, eos_token_id=()).tokens.tolist() == (
        expected.tolist()
    )


def test_everything_may_be_forgotten() -> None:
    """A prompt that is an image alone, dropped, leaves an empty cache whose positions go on."""
    of = model()
    cache = started(of, A)
    cache.drop([0])
    assert cache.num_tokens == 0 and cache.next_position.tolist() == [3]
    assert torch.isfinite(logits(of, MORE, cache)).all()
    assert cache.next_position.tolist() == [6]


# What is refused.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_visual_tokens": 0}, "max_visual_tokens must be a positive integer, got 0"),
        ({"max_visual_tokens": 2.5}, "max_visual_tokens must be a positive integer, got 2.5"),
        ({"max_visual_tokens": 8, "shrink": "half"}, "shrink must be None or between 0 and 1, got 'half'"),
        ({"max_visual_tokens": 8, "shrink": 0}, "shrink must be None or between 0 and 1, got 0"),
        ({"max_visual_tokens": 8, "shrink": 1.0}, "shrink must be None or between 0 and 1, got 1.0"),
    ],
)
def test_bad_policies(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ContextPolicy(**arguments)


def test_bad_images() -> None:
    cache = started(model(), 5, A, 6, B)
    with pytest.raises(ValueError, match=r"image_ids must be among those held, \[0, 1\], got \[2, 7\]"):
        cache.drop([0, 7, 2])
    with pytest.raises(ValueError, match=r"image_id must be among those held, \[0, 1\], got 2"):
        cache.shrink(2, 0.5)
    with pytest.raises(ValueError, match=r"keep must be between 0 and 1, got 1\.5"):
        cache.shrink(1, 1.5)
    with pytest.raises(ValueError, match=r"image_ids must be among those held, \[\], got \[0\]"):
        ContextCache(2).drop([0])
    assert cache.image_ids == [0, 1]
    cache.drop([])
    assert cache.num_tokens == 14


def test_bad_caches() -> None:
    of = model()
    with pytest.raises(ValueError, match="kv_cache must have 2 layers, got 3"):
        logits(of, MORE, ContextCache(3))
    with pytest.raises(TypeError, match="kv_cache must be a ContextCache or None, got KVCache"):
        logits(of, MORE, KVCache(2))
    with pytest.raises(TypeError, match="policy must be a ContextPolicy or None, got int"):
        logits(of, MORE, ContextCache(2), policy=100)
    with pytest.raises(ValueError, match="input_ids must be for kv_cache's batch 1, got 2"):
        logits(of, MORE.expand(2, -1), started(of, 5))
