"""Fewer visual tokens of a Qwen-VL: against tokens, positions and prompts that are shortened by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from math import ceil, prod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checkpoints import distance, load
from qwen_checkpoints import PLAIN, labelled, prompts
from torch import Tensor

import mmkernels
from mmkernels.models import QwenVL, Visual, qwen_vl
from mmkernels.ops.tokens.select_diverse import select_diverse
from mmkernels.testing.parts import IMAGE, VIDEO

TOLERANCE = 5e-6
KINDS = ("none", "pool:2", "pool:<=4", "tome:0.5", "select:0.5", "select:1", "diverse:0.4")
ROWS = ((3, (1, 4, 6), 2, (1, 10, 6), 1), (4, (-2, 6, 4), 2), (2, (1, 2, 2), (1, 8, 2), 2))

Sizes = list[tuple[int, int, int]]
Groups = list[list[int]]


def given_to(variant: str, padding: str = "left") -> dict[str, Any]:
    return labelled(prompts(variant, *ROWS, padding=padding))


def sizes_of(variant: str, grid: Tensor) -> Sizes:
    """Returns (t, h, w) of what the prompts mark, in tokens."""
    sizes = [(t, h // 2, w // 2) for t, h, w in grid.tolist()]
    return [(1, h, w) for t, h, w in sizes for _ in range(t)] if variant == "qwen3_vl" else sizes


def windows(size: tuple[int, int, int], rows: list[int], columns: list[int]) -> Groups:
    """Returns the tokens of each window of an image; `rows` and `columns`: the window of each row and column."""
    t, h, w = size
    number = lambda f, r, c: (f * h + r) * w + c
    keys = itertools.product(range(t), sorted(set(rows)), sorted(set(columns)))
    return [
        [number(f, r, c) for r in range(h) for c in range(w) if (rows[r], columns[c]) == (i, j)] for f, i, j in keys
    ]


def attention(model: QwenVL, pixels: Tensor, grid: Tensor) -> Tensor:
    """Returns the attention that each token's patches receive in the last layer."""
    sizes = tuple(map(tuple, grid.tolist()))
    encoded = model.vision(pixels, sizes)  # type: ignore[arg-type]
    query, key = (x[0] for x in encoded.heads)  # [H, N, D]
    scores = query @ key.mT / query.shape[-1] ** 0.5
    if encoded.mask is not None:
        scores = scores.masked_fill(~encoded.mask.to_dense(scores.shape[-1])[0], -torch.inf)
    received = scores.softmax(-1).sum(1).mean(0).view(-1, 4).mean(1)
    return received if encoded.order is None else received[encoded.order.argsort()]


def groups_of(kind: str, sizes: Sizes, scores: Tensor, tokens: Tensor) -> list[Groups]:
    """Returns, for each image, the tokens of which each remaining token is the mean."""
    found: list[Groups] = []
    counts = list(map(prod, sizes))
    for size, count, s, x in zip(sizes, counts, scores.split(counts), tokens.split(counts), strict=True):
        if kind == "none":
            found.append([[token] for token in range(count)])
        elif kind == "pool:2":
            found.append(windows(size, [r // 2 for r in range(size[1])], [c // 2 for c in range(size[2])]))
        elif kind.startswith("select"):
            keep = 1 if kind == "select:1" else ceil(count * 0.5)
            found.append([[token] for token in s.topk(keep).indices.sort().values.tolist()])
        elif kind.startswith("diverse"):
            found.append([[token] for token in select_diverse(x, [count], 0.4).sort().values.tolist()])
        else:
            _, lengths, _, to = mmkernels.merge_tokens(x, [count], 0.5)
            found.append([(to == token).nonzero()[:, 0].tolist() for token in range(int(lengths[0]))])
    return found


def by_hand(visual: Visual, groups: list[Groups]) -> Visual:
    """Returns what is left of images, with a marker for each token that is left."""
    starts = [0, *itertools.accumulate(visual.lengths)]
    flat = [[first + token for token in group] for first, image in zip(starts, groups, strict=False) for group in image]
    mean = lambda x: torch.stack([x[group].mean(0) for group in flat])
    lengths = tuple(map(len, groups))
    assert visual.places is not None
    places = mean(visual.places.double()).floor().long()
    deep = tuple(map(mean, visual.deep))
    return visual._replace(tokens=mean(visual.tokens), lengths=lengths, marked=lengths, places=places, deep=deep)


def shortened(given: dict[str, Any], marker: int, visual: Visual, marked: tuple[int, ...]) -> dict[str, Any]:
    """Returns prompts in which each image has only its first markers, padded on the left."""
    keep = [at < left for left, count in zip(visual.lengths, marked, strict=True) for at in range(count)]
    rows = []
    for ids, mask, labels in zip(given["input_ids"], given["attention_mask"], given["labels"], strict=True):
        row = []
        for token, valid, label in zip(ids.tolist(), mask.tolist(), labels.tolist(), strict=True):
            if valid and (token != marker or keep.pop(0)):
                row.append((token, 1, label))
        rows.append(row)
    assert not keep
    longest = max(map(len, rows))
    table = torch.tensor([[(0, 0, -100)] * (longest - len(row)) + row for row in rows])  # [B, L', 3]
    return dict(zip(("input_ids", "attention_mask", "labels"), table.unbind(-1), strict=True))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "pool:<=4"])
@pytest.mark.parametrize("variant", PLAIN)
def test_by_hand(ours: Callable[..., QwenVL], saved: Any, variant: str, kind: str) -> None:
    """Images of several sizes and a video in three prompts: logits, loss and tokens that are generated."""
    plain, model, given = ours(variant), load(saved(variant).folder), given_to(variant)
    model.set_reducer(kind)
    text, hands = given, []
    with torch.no_grad():
        for marker, pixels, grid in (
            (IMAGE, given["pixel_values"], given["image_grid_thw"]),
            (VIDEO, given["pixel_values_videos"], given["video_grid_thw"]),
        ):
            seconds = given.get("second_per_grid_ts") if marker == VIDEO else None
            full = plain.encode(pixels, grid, seconds=seconds)
            groups = groups_of(kind, sizes_of(variant, grid), attention(plain, pixels, grid), full.tokens)
            hand = by_hand(full, groups)
            reduced = model.encode(pixels, grid, seconds=seconds)
            assert (reduced.lengths, reduced.marked) == (hand.lengths, full.lengths)
            assert kind == "none" or sum(reduced.lengths) < 0.75 * sum(full.lengths)
            assert reduced.places is not None and hand.places is not None
            assert torch.equal(reduced.places, hand.places)
            text = shortened(text, marker, hand, full.lengths)
            hands.append(hand)
        out = model(**given, return_logits=True)
        expected = plain(**text, images=hands[0], videos=hands[1], return_logits=True)
        valid = text["attention_mask"].bool()
        if kind == "none":
            valid = given["attention_mask"].bool()
        assert out.logits is not None and expected.logits is not None and out.logits.shape == expected.logits.shape
        assert distance(out.logits[valid], expected.logits[valid]) < TOLERANCE
        assert distance(out.loss, expected.loss) < TOLERANCE
        targets = text["labels"][:, 1:].flatten()
        by_logits = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), targets)
        assert distance(out.loss, by_logits) < TOLERANCE
        del given["labels"], text["labels"]
        tokens = model.generate(**given, max_new_tokens=4, eos_token_id=()).tokens
        assert torch.equal(tokens, plain.generate(**text, images=hands[0], videos=hands[1], max_new_tokens=4,
                                                  eos_token_id=()).tokens)  # fmt: skip


@pytest.mark.parametrize("variant", PLAIN)
def test_padding_on_the_right(ours: Callable[..., QwenVL], saved: Any, variant: str) -> None:
    """The same last logits and the same loss, whichever side is padded."""
    model = load(saved(variant).folder)
    model.set_reducer("pool:2")
    left, right = given_to(variant), given_to(variant, "right")
    with torch.no_grad():
        assert distance(model(**right).loss, model(**left).loss) < TOLERANCE
        del left["labels"], right["labels"]
        last = [model(**given, last_logits_only=True).logits for given in (left, right)]
    assert distance(last[0], last[1]) < TOLERANCE


@pytest.mark.parametrize("variant", PLAIN)
def test_a_budget(ours: Callable[..., QwenVL], variant: str, saved: Any) -> None:
    """Images within it stay as they are, beside those that are pooled."""
    model = load(saved(variant).folder)
    given = given_to(variant)
    full = model.encode(given["pixel_values"], given["image_grid_thw"])
    model.set_reducer("pool:<=6")
    reduced = model.encode(given["pixel_values"], given["image_grid_thw"])
    assert full.lengths == (6, 15, 1, 4) and reduced.lengths == (6, 6, 1, 4)
    assert reduced.places is not None and full.places is not None
    assert torch.equal(reduced.places[:6], full.places[:6]) and torch.equal(reduced.places[-5:], full.places[-5:])
    assert distance(reduced.tokens[-5:], full.tokens[-5:]) < TOLERANCE


def test_places_of_pooled_tokens() -> None:
    """An image of 3 x 5 tokens and a video of two steps of 2 x 3: the mean of a window's places, rounded down."""
    model = QwenVL.from_size("tiny", reduce="pool:2", tokens_per_second=4)
    c = model.config
    with torch.no_grad():
        image = model.encode(torch.rand(60, model.vision.sizes.inputs), [(1, 6, 10)])
        video = model.encode(torch.rand(48, model.vision.sizes.inputs), [(2, 4, 6)], seconds=[1.0])
    assert image.places is not None and video.places is not None
    assert image.places.tolist() == [[0, 0, 0], [0, 0, 2], [0, 0, 4], [0, 2, 0], [0, 2, 2], [0, 2, 4]]
    assert video.places.tolist() == [[0, 0, 0], [0, 0, 2], [4, 0, 0], [4, 0, 2]]
    assert (image.advances, video.advances, image.marked, video.marked) == ((5,), (3,), (15,), (12,))
    # The text behind the image goes on as if all tokens were there.
    ids = torch.tensor([[7, *[c.image_token_id] * 15, 8, 9]])
    out = model(ids, images=image)
    assert out.logits.shape[1] == 3 + 6 and out.kv_cache.next_position.tolist() == [1 + 5 + 2]


@pytest.mark.parametrize("kind", ["pool:2", "tome:0.5", "diverse:0.5"])
def test_scores_that_are_not_used_are_not_computed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They cost a pass over all pairs of patches."""
    monkeypatch.setattr(qwen_vl, "head_scores", lambda *x: pytest.fail("head_scores was called"))
    model = QwenVL.from_size("tiny", reduce=kind)
    assert model.encode(torch.rand(24, model.vision.sizes.inputs), [(1, 4, 6)]).lengths in ((2,), (3,))


def test_reducer_of_the_configuration() -> None:
    assert QwenVL.from_size("tiny", reduce="select:0.25").reducer.text == "select:0.25"  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="reduc"):
        QwenVL.from_size("tiny", reduce="half")


@pytest.mark.parametrize("kind", ["pool:2", "tome:0.5", "select:0.5", "diverse:0.5"])
@pytest.mark.parametrize("size", ["tiny", "tiny_qwen3"])
def test_a_training_step_reaches_every_parameter(size: str, kind: str) -> None:
    model = QwenVL.from_size(size, reduce=kind)
    ids = torch.tensor([[5, *[model.config.image_token_id] * 6, 7, 8, 9]])
    labels = ids.masked_fill(ids == model.config.image_token_id, -100)
    model(ids, torch.rand(24, model.vision.sizes.inputs), image_grid_thw=[(1, 4, 6)], labels=labels).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
        assert name == "vision.positions.weight" or float(parameter.grad.norm()) > 0, name
