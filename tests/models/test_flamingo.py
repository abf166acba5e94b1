"""Flamingo against transformers' Idefics."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from checkpoints import Saved, check_gradients, distance, load, their_gradients
from idefics_checkpoints import IMAGE, VARIANTS, greedy, image_attention_mask, prompts, rows_of
from pairwise import parametrize
from torch import Tensor

import mmkernels
from mmkernels.models import Flamingo

# Both models compute in float32, in another order: measured over all cases here, at most 1.5e-6. The smallest real
# difference tried (the image encoder's norms with epsilon 1e-6 for 1e-5) gives 1.8e-5, one token's wrong image 0.2.
TOLERANCE = 5e-6
BACKENDS = ("chunked", "reference")
PADDINGS = (None, "left", "right")
NEW = 6  # tokens that are generated

Ours = Callable[[str], Flamingo]
Checkpoints = Callable[[str], Saved]


@pytest.fixture(scope="module")
def theirs(saved: Checkpoints) -> Callable[..., tuple[Tensor, Tensor]]:
    """variant, images, padding -> the logits of transformers' model, of these images and of others; computed once."""

    @cache
    def get(variant: str, images: int, padding: str | None) -> tuple[Tensor, Tensor]:
        ids, mask, pixels = prompts(images, padding)
        given = {"input_ids": ids, "attention_mask": mask, "image_attention_mask": image_attention_mask(ids, images)}
        with torch.no_grad():
            first, second = (saved(variant).theirs(pixel_values=x, **given).logits for x in (pixels, pixels.flip(0, 3)))
        return first, second

    return get


@parametrize("variant, images, padding, backend", list(itertools.product(VARIANTS, range(1, 6), PADDINGS, BACKENDS)))
def test_logits(
    ours: Ours,
    theirs: Callable[..., tuple[Tensor, Tensor]],
    variant: str,
    images: int,
    padding: str | None,
    backend: str,
) -> None:
    model = ours(variant)
    ids, mask, pixels = prompts(images, padding)
    sees = image_attention_mask(ids, images)
    with torch.no_grad(), mmkernels.use_backend(backend):
        by_markers = model(ids, pixels, attention_mask=mask).logits
        by_mask = model(ids, pixels, attention_mask=mask, image_attention_mask=sees).logits
    expected, other = theirs(variant, images, padding)
    valid = mask.bool()
    assert distance(by_markers[valid], expected[valid]) < TOLERANCE
    assert torch.equal(by_markers[valid], by_mask[valid])
    assert distance(other[valid], expected[valid]) > 0.05, "the image hardly matters: parity would prove little"


@pytest.fixture(scope="module")
def their_tokens(saved: Checkpoints) -> Callable[..., list[list[int]]]:
    """variant, images, padding -> the next tokens of each row by transformers' model, which are computed once."""

    @cache
    def get(variant: str, images: int, padding: str | None) -> list[list[int]]:
        model = saved(variant).theirs
        ids, mask, pixels = prompts(images, padding)
        expected = [greedy(model, text, pixels[row], NEW) for row, text in enumerate(rows_of(ids, mask))]
        if padding != "right":  # transformers' generate reads the last column's logits, padding or not
            tokens = model.generate(
                input_ids=ids,
                attention_mask=mask,
                pixel_values=pixels,
                image_attention_mask=image_attention_mask(ids, images),
                max_new_tokens=NEW,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            assert tokens[:, ids.shape[1] :].tolist() == expected
        return expected

    return get


GENERATED = list(itertools.product(["resampler", "patches", "decoupled"], [1, 3, 5], PADDINGS, BACKENDS))


@parametrize("variant, images, padding, backend", GENERATED)
def test_greedy_generation(
    ours: Ours,
    their_tokens: Callable[..., list[list[int]]],
    variant: str,
    images: int,
    padding: str | None,
    backend: str,
) -> None:
    model = ours(variant)
    ids, mask, pixels = prompts(images, padding)
    given = {"attention_mask": mask, "max_new_tokens": NEW, "eos_token_id": ()}
    sees = image_attention_mask(ids, images) * mask[..., None]  # here padding sees nothing
    with mmkernels.use_backend(backend):
        by_markers = model.generate(ids, pixels, **given)
        by_mask = model.generate(ids, pixels, image_attention_mask=sees, **given)
    assert by_markers.tokens.tolist() == by_mask.tokens.tolist() == their_tokens(variant, images, padding)


def count_images(model: Flamingo) -> list[int]:
    """Returns a list that gets the number of images of each later call of the encoder."""
    counts: list[int] = []
    model.vision.register_forward_hook(lambda module, args, out: counts.append(len(args[0])))
    return counts


@pytest.mark.parametrize("variant", ["resampler", "patches"])
def test_turns(saved: Checkpoints, variant: str) -> None:
    """Three turns of two conversations, padded on either side; the second encodes nothing, the third one new image."""
    model, theirs = load(saved(variant).folder), saved(variant).theirs
    encoded = count_images(model)
    ids, mask, pixels = prompts(2, "left")
    texts: list[list[int]] = [[], []]  # of each row so far
    images, caches = pixels[:, :0], {}

    def turn(ids: Tensor, mask: Tensor | None, new: Tensor | None, count: int) -> None:
        nonlocal images, caches
        out = model.generate(ids, new, attention_mask=mask, max_new_tokens=count, eos_token_id=(), **caches)
        caches = {"kv_cache": out.kv_cache, "visual_cache": out.visual_cache}
        images = images if new is None else torch.cat([images, new], dim=1)
        for row, text in enumerate(rows_of(ids, torch.ones_like(ids) if mask is None else mask)):
            texts[row] += text
            assert out.tokens[row].tolist() == greedy(theirs, texts[row], images[row], count)
            texts[row] += out.tokens[row].tolist()

    turn(ids, mask, pixels, 4)
    assert encoded == [4]
    turn(torch.tensor([[7, 8, 9], [11, 12, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]]), None, 3)
    assert encoded == [4], "a turn without new images must encode nothing"
    turn(torch.tensor([[21, IMAGE, 22], [23, 24, IMAGE]]), None, torch.randn(2, 1, 3, 32, 32), 3)
    assert encoded == [4, 2]
    assert caches["visual_cache"].image_ids == [0, 1, 2]


@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_rows_that_end_early(saved: Checkpoints, ours: Ours, padding: str | None) -> None:
    """A row ends at its end-of-text token, the others continue; the next turn sees no padding between them."""
    model, theirs = ours("resampler"), saved("resampler").theirs
    ids, mask, pixels = prompts(2, padding)
    rows = rows_of(ids, mask)
    free = [greedy(theirs, text, pixels[row], 6) for row, text in enumerate(rows)]
    end = next(token for token in free[0][:4] if token not in free[1])
    cut = free[0].index(end) + 1
    out = model.generate(ids, pixels, attention_mask=mask, max_new_tokens=6, eos_token_id=end)
    assert out.tokens.tolist() == [free[0][:cut] + [0] * (6 - cut), free[1]]

    turn = torch.tensor([[7, 8], [9, 10]])
    with torch.no_grad():
        logits = model(turn, kv_cache=out.kv_cache, visual_cache=out.visual_cache).logits
    texts = [rows[0] + free[0][:cut] + [7, 8], rows[1] + free[1] + [9, 10]]
    for row, text in enumerate(texts):
        sees = image_attention_mask(torch.tensor([text]), 2)
        with torch.no_grad():
            given = {"pixel_values": pixels[row : row + 1], "image_attention_mask": sees}
            expected = theirs(input_ids=torch.tensor([text]), **given).logits
        assert distance(logits[row], expected[0, -2:]) < TOLERANCE

    single = model.generate(ids[:1], pixels[:1], attention_mask=mask[:1], max_new_tokens=6, eos_token_id=[end])
    assert single.tokens.tolist() == [free[0][:cut]]


def test_many_questions_on_one_image(saved: Checkpoints) -> None:
    model, theirs = load(saved("resampler").folder), saved("resampler").theirs
    ids, mask, pixels = prompts(1, "right", rows=3)
    given = {"input_ids": ids, "attention_mask": mask}
    cache = model.cache_images(model.resample(model.encode_images(pixels[:1])))
    assert cache.batch_size == 1
    encoded = count_images(model)
    with torch.no_grad():
        logits = model(**given, visual_cache=cache).logits
        same = pixels[:1].expand(3, -1, -1, -1, -1)
        expected = theirs(**given, pixel_values=same, image_attention_mask=image_attention_mask(ids, 1)).logits
    assert distance(logits[mask.bool()], expected[mask.bool()]) < TOLERANCE
    out = model.generate(**given, visual_cache=cache, max_new_tokens=3, eos_token_id=())
    assert out.tokens.tolist() == [greedy(theirs, text, pixels[0], 3) for text in rows_of(ids, mask)]
    assert encoded == []
    assert cache.batch_size == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hole", [False, True])
def test_tokens_that_see_several_images(saved: Checkpoints, ours: Ours, hole: bool, backend: str) -> None:
    """A run of images is a span; a hole that only some tokens have needs a dense mask.

    Generated tokens see what the last token of the prompt sees.
    """
    model, theirs = ours("resampler"), saved("resampler").theirs
    ids, _, pixels = prompts(3, None)
    sees = torch.zeros(2, ids.shape[1], 3, dtype=torch.long)
    sees[:, 3:6, :2] = 1
    sees[:, 6:, 1] = 1
    sees[0, 8:] = torch.tensor([1, 0, 1]) if hole else torch.tensor([1, 1, 1])
    with torch.no_grad(), mmkernels.use_backend(backend):
        their_logits = theirs(input_ids=ids, pixel_values=pixels, image_attention_mask=sees).logits
        logits = model(ids, pixels, image_attention_mask=sees).logits
        out = model.generate(ids, pixels, image_attention_mask=sees, max_new_tokens=4, eos_token_id=())
    assert distance(logits, their_logits) < TOLERANCE
    expected = [greedy(theirs, ids[r].tolist(), pixels[r], 4, sees[r : r + 1]) for r in range(2)]
    assert out.tokens.tolist() == expected

    # The next turn's markers stand for new images; tokens before them still see several.
    turn, more = torch.tensor([[9, IMAGE, 10], [9, 11, IMAGE]]), torch.randn(2, 1, 3, 32, 32)
    with mmkernels.use_backend(backend):
        caches = {"kv_cache": out.kv_cache, "visual_cache": out.visual_cache}
        again = model.generate(turn, more, max_new_tokens=2, eos_token_id=(), **caches)
    for row in range(2):
        text = ids[row].tolist() + expected[row] + turn[row].tolist()
        all_sees = torch.zeros(1, len(text), 4, dtype=torch.long)
        all_sees[0, : ids.shape[1], :3] = sees[row]
        all_sees[0, ids.shape[1] :, :3] = sees[row, -1]
        marker = text.index(IMAGE, ids.shape[1])
        all_sees[0, marker:] = torch.tensor([0, 0, 0, 1])
        images = torch.cat([pixels[row], more[row]])
        assert again.tokens[row].tolist() == greedy(theirs, text, images, 2, all_sees)


def test_text_without_images(saved: Checkpoints, ours: Ours) -> None:
    model, theirs = ours("resampler"), saved("resampler").theirs
    ids = torch.randint(5, IMAGE, (2, 7))
    with torch.no_grad():
        nothing = {"pixel_values": torch.zeros(2, 1, 3, 32, 32), "image_attention_mask": torch.zeros(2, 7, 1)}
        expected = theirs(input_ids=ids, **nothing).logits
        assert distance(model(ids).logits, expected) < TOLERANCE
        assert distance(model(ids, **nothing).logits, expected) < TOLERANCE
    new = model.generate(ids[:1], max_new_tokens=3, eos_token_id=()).tokens.tolist()
    assert new == [greedy(theirs, ids[0].tolist(), torch.zeros(1, 3, 32, 32), 3)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", ["resampler", "patches", "norms"])
def test_loss_and_gradients(saved: Checkpoints, variant: str, backend: str, tmp_path: Path) -> None:
    checkpoint = saved(variant)
    model, theirs = load(checkpoint.folder), checkpoint.theirs
    ids, mask, pixels = prompts(3, "right")
    given = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
    given["labels"] = ids.masked_fill(mask == 0, -100).masked_fill(ids == IMAGE, -100)
    theirs.zero_grad()
    expected = theirs(**given, image_attention_mask=image_attention_mask(ids, 3)).loss
    expected.backward()
    with mmkernels.use_backend(backend):
        out = model(**given)
    out.loss.backward()
    assert out.kv_cache is None
    assert distance(out.loss, expected) < TOLERANCE
    # A gradient passes twice as many operations as the logits, some of which cancel: measured at most 5.1e-6.
    check_gradients(model, their_gradients(checkpoint, tmp_path), 2e-5)


def test_bfloat16_is_close(saved: Checkpoints, ours: Ours) -> None:
    ids, mask, pixels = prompts(2, "left")
    with torch.no_grad():
        exact = ours("norms")(ids, pixels, attention_mask=mask).logits
        logits = load(saved("norms").folder, torch.bfloat16)(ids, pixels, attention_mask=mask).logits
    assert logits.dtype == torch.bfloat16
    assert distance(logits.float()[mask.bool()], exact[mask.bool()]) < 0.05
