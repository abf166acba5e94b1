"""Flamingo against transformers' Idefics."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache

import pytest
import torch
from checkpoints import Saved, distance
from idefics_checkpoints import IMAGE, VARIANTS, greedy, image_attention_mask, prompts
from pairs import parametrize
from torch import Tensor

import mmkernels
from mmkernels.models import Flamingo

# Both models compute in float32, in another order: measured over all cases here, at most 1.5e-6. The smallest real
# difference tried (the image encoder's norms with epsilon 1e-6 for 1e-5) gives 1.8e-5, one token's wrong image 0.2.
TOLERANCE = 5e-6
BACKENDS = ("chunked", "reference")
NEW = 6  # tokens that are generated


PADDINGS = (None, "left", "right")


@pytest.fixture(scope="module")
def ours(saved: Callable[[str], Saved]) -> Callable[[str], Flamingo]:
    """variant -> our model, which is loaded once."""
    return cache(lambda variant: Flamingo.from_pretrained(saved(variant).folder))


@pytest.fixture(scope="module")
def theirs(saved: Callable[[str], Saved]) -> Callable[..., tuple[Tensor, Tensor]]:
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
    ours: Callable[[str], Flamingo],
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
def their_tokens(saved: Callable[[str], Saved]) -> Callable[..., list[list[int]]]:
    """variant, images, padding -> the next tokens of each row by transformers' model, which are computed once."""

    @cache
    def get(variant: str, images: int, padding: str | None) -> list[list[int]]:
        model = saved(variant).theirs
        ids, mask, pixels = prompts(images, padding)
        rows = [ids[row][mask[row].bool()].tolist() for row in range(len(ids))]
        expected = [greedy(model, text, pixels[row], NEW) for row, text in enumerate(rows)]
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
    ours: Callable[[str], Flamingo],
    their_tokens: Callable[..., list[list[int]]],
    variant: str,
    images: int,
    padding: str | None,
    backend: str,
) -> None:
    ids, mask, pixels = prompts(images, padding)
    given = {"attention_mask": mask, "max_new_tokens": NEW, "eos_token_id": ()}
    sees = image_attention_mask(ids, images) * mask[..., None]  # here padding sees nothing
    with mmkernels.use_backend(backend):
        by_markers = ours(variant).generate(ids, pixels, **given)
        by_mask = ours(variant).generate(ids, pixels, image_attention_mask=sees, **given)
    assert by_markers.tokens.tolist() == by_mask.tokens.tolist() == their_tokens(variant, images, padding)


def count_images(model: Flamingo) -> list[int]:
    """Counts the images that pass through the encoder, from now on."""
    seen: list[int] = []
    model.vision.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    return seen


@pytest.mark.parametrize("variant", ["resampler", "patches"])
def test_turns(saved: Callable[[str], Saved], variant: str) -> None:
    """Three turns of two conversations, padded on either side; the second encodes nothing, the third one new image."""
    checkpoint = saved(variant)
    ours = Flamingo.from_pretrained(checkpoint.folder)
    encoded = count_images(ours)
    ids, mask, pixels = prompts(2, "left")
    second, second_mask = torch.tensor([[7, 8, 9], [11, 12, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    third = torch.tensor([[21, IMAGE, 22], [23, 24, IMAGE]])
    new_pixels = torch.randn(2, 1, 3, 32, 32)

    said = [ids[row][mask[row].bool()].tolist() for row in range(2)]

    def check(out: Tensor, images: Tensor) -> None:
        for row, tokens in enumerate(out.tolist()):
            assert tokens == greedy(checkpoint.theirs, said[row], images[row], out.shape[1])
            said[row] += tokens

    out = ours.generate(ids, pixels, attention_mask=mask, max_new_tokens=4, eos_token_id=())
    check(out.tokens, pixels)
    assert encoded == [4]

    for row in range(2):
        said[row] += second[row][second_mask[row].bool()].tolist()
    out = ours.generate(
        second,
        attention_mask=second_mask,
        max_new_tokens=3,
        eos_token_id=(),
        kv_cache=out.kv_cache,
        visual_cache=out.visual_cache,
    )
    check(out.tokens, pixels)
    assert encoded == [4], "a turn without new images must encode nothing"

    for row in range(2):
        said[row] += third[row].tolist()
    out = ours.generate(
        third, new_pixels, max_new_tokens=3, eos_token_id=(), kv_cache=out.kv_cache, visual_cache=out.visual_cache
    )
    check(out.tokens, torch.cat([pixels, new_pixels], dim=1))
    assert encoded == [4, 2]
    assert out.visual_cache.image_ids == [0, 1, 2]


@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_rows_that_end_early(saved: Callable[[str], Saved], padding: str | None) -> None:
    """A row ends at its end-of-text token, the others go on; the next turn sees no padding between."""
    checkpoint = saved("resampler")
    ours = Flamingo.from_pretrained(checkpoint.folder)
    ids, mask, pixels = prompts(2, padding)
    rows = [ids[row][mask[row].bool()].tolist() for row in range(2)]
    free = [greedy(checkpoint.theirs, text, pixels[row], 6) for row, text in enumerate(rows)]
    end = next(token for token in free[0][:4] if token not in free[1])
    cut = free[0].index(end) + 1
    out = ours.generate(ids, pixels, attention_mask=mask, max_new_tokens=6, eos_token_id=end)
    assert out.tokens.tolist() == [free[0][:cut] + [0] * (6 - cut), free[1]]

    turn = torch.tensor([[7, 8], [9, 10]])
    with torch.no_grad():
        logits = ours(turn, kv_cache=out.kv_cache, visual_cache=out.visual_cache).logits
    said = [rows[0] + free[0][:cut] + [7, 8], rows[1] + free[1] + [9, 10]]
    for row, text in enumerate(said):
        sees = image_attention_mask(torch.tensor([text]), 2)
        with torch.no_grad():
            theirs = checkpoint.theirs(
                input_ids=torch.tensor([text]), pixel_values=pixels[row : row + 1], image_attention_mask=sees
            ).logits
        assert distance(logits[row], theirs[0, -2:]) < TOLERANCE

    alone = ours.generate(ids[:1], pixels[:1], attention_mask=mask[:1], max_new_tokens=6, eos_token_id=[end])
    assert alone.tokens.tolist() == [free[0][:cut]]


def test_many_questions_on_one_image(saved: Callable[[str], Saved]) -> None:
    checkpoint = saved("resampler")
    ours = Flamingo.from_pretrained(checkpoint.folder)
    ids, mask, pixels = prompts(1, "right", rows=3)
    cache = ours.cache_images(ours.resample(ours.encode_images(pixels[:1])))
    assert cache.batch_size == 1
    encoded = count_images(ours)
    with torch.no_grad():
        logits = ours(ids, attention_mask=mask, visual_cache=cache).logits
        theirs = checkpoint.theirs(
            input_ids=ids,
            attention_mask=mask,
            pixel_values=pixels[:1].expand(3, -1, -1, -1, -1),
            image_attention_mask=image_attention_mask(ids, 1),
        ).logits
    assert distance(logits[mask.bool()], theirs[mask.bool()]) < TOLERANCE
    out = ours.generate(ids, attention_mask=mask, visual_cache=cache, max_new_tokens=3, eos_token_id=())
    rows = [ids[row][mask[row].bool()].tolist() for row in range(3)]
    assert out.tokens.tolist() == [greedy(checkpoint.theirs, text, pixels[0], 3) for text in rows]
    assert encoded == []
    assert cache.batch_size == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hole", [False, True])
def test_tokens_that_see_several_images(saved: Callable[[str], Saved], hole: bool, backend: str) -> None:
    """A run of images is a span, a hole that not all share needs a dense mask. New tokens see what the last one did."""
    checkpoint = saved("resampler")
    ours = Flamingo.from_pretrained(checkpoint.folder)
    ids, _, pixels = prompts(3, None)
    sees = torch.zeros(2, ids.shape[1], 3, dtype=torch.long)
    sees[:, 3:6, :2] = 1
    sees[:, 6:, 1] = 1
    sees[0, 8:] = torch.tensor([1, 0, 1]) if hole else torch.tensor([1, 1, 1])
    with torch.no_grad(), mmkernels.use_backend(backend):
        theirs = checkpoint.theirs(input_ids=ids, pixel_values=pixels, image_attention_mask=sees).logits
        logits = ours(ids, pixels, image_attention_mask=sees).logits
        out = ours.generate(ids, pixels, image_attention_mask=sees, max_new_tokens=4, eos_token_id=())
    assert distance(logits, theirs) < TOLERANCE
    expected = [greedy(checkpoint.theirs, ids[r].tolist(), pixels[r], 4, sees[r : r + 1]) for r in range(2)]
    assert out.tokens.tolist() == expected

    # The next turn's markers stand for new images; tokens before them still see several.
    turn, more = torch.tensor([[9, IMAGE, 10], [9, 11, IMAGE]]), torch.randn(2, 1, 3, 32, 32)
    with mmkernels.use_backend(backend):
        caches = {"kv_cache": out.kv_cache, "visual_cache": out.visual_cache}
        again = ours.generate(turn, more, max_new_tokens=2, eos_token_id=(), **caches)
    for row in range(2):
        text = ids[row].tolist() + expected[row] + turn[row].tolist()
        all_sees = torch.zeros(1, len(text), 4, dtype=torch.long)
        all_sees[0, : ids.shape[1], :3] = sees[row]
        all_sees[0, ids.shape[1] :, :3] = sees[row, -1]
        marker = text.index(IMAGE, ids.shape[1])
        all_sees[0, marker:] = torch.tensor([0, 0, 0, 1])
        images = torch.cat([pixels[row], more[row]])
        assert again.tokens[row].tolist() == greedy(checkpoint.theirs, text, images, 2, all_sees)


def test_text_without_images(saved: Callable[[str], Saved]) -> None:
    checkpoint = saved("resampler")
    ours = Flamingo.from_pretrained(checkpoint.folder)
    ids = torch.randint(5, IMAGE, (2, 7))
    with torch.no_grad():
        nothing = {"pixel_values": torch.zeros(2, 1, 3, 32, 32), "image_attention_mask": torch.zeros(2, 7, 1)}
        theirs = checkpoint.theirs(input_ids=ids, **nothing).logits
        assert distance(ours(ids).logits, theirs) < TOLERANCE
        assert distance(ours(ids, **nothing).logits, theirs) < TOLERANCE
    assert ours.generate(ids[:1], max_new_tokens=3, eos_token_id=()).tokens.tolist() == [
        greedy(checkpoint.theirs, ids[0].tolist(), torch.zeros(1, 3, 32, 32), 3)
    ]


GRADIENTS = {
    "vision.patch.weight": "model.vision_model.embeddings.patch_embedding.weight",
    "vision.blocks.1.attention.k_proj.weight": "model.vision_model.encoder.layers.1.self_attn.k_proj.weight",
    "resampler.latents": "model.perceiver_resampler.latents",
    "resampler.blocks.0.attention.v_proj.weight": "model.perceiver_resampler.blocks.0.0.v_proj.weight",
    "cross_blocks.0.attention_gate": "model.gated_cross_attn_layers.0.alpha_cross_attn",
    "cross_blocks.1.feed_forward_gate": "model.gated_cross_attn_layers.1.alpha_dense",
    "cross_blocks.1.attention.q_proj.weight": "model.gated_cross_attn_layers.1.cross_attn.q_proj.weight",
    "text_blocks.0.attention.q_proj.weight": "model.layers.0.self_attn.q_proj.weight",
    "text_blocks.3.mlp.down_proj.weight": "model.layers.3.mlp.down_proj.weight",
    "embed.weight": "model.embed_tokens.weight",
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", ["resampler", "patches", "norms"])
def test_loss_and_gradients(saved: Callable[[str], Saved], variant: str, backend: str) -> None:
    checkpoint = saved(variant)
    ours = Flamingo.from_pretrained(checkpoint.folder)
    ids, mask, pixels = prompts(3, "right")
    labels = ids.masked_fill(mask == 0, -100).masked_fill(ids == IMAGE, -100)
    checkpoint.theirs.zero_grad()
    theirs = checkpoint.theirs(
        input_ids=ids,
        attention_mask=mask,
        pixel_values=pixels,
        image_attention_mask=image_attention_mask(ids, 3),
        labels=labels,
    )
    theirs.loss.backward()
    with mmkernels.use_backend(backend):
        out = ours(ids, pixels, attention_mask=mask, labels=labels)
    out.loss.backward()
    assert out.kv_cache is None
    assert distance(out.loss.detach(), theirs.loss.detach()) < TOLERANCE
    expected, actual = dict(checkpoint.theirs.named_parameters()), dict(ours.named_parameters())
    for name, their_name in GRADIENTS.items():
        if name in actual:
            # A gradient passes twice as many operations as the logits, some of which cancel: measured at most 5.1e-6.
            assert distance(actual[name].grad.flatten(), expected[their_name].grad.flatten()) < 2e-5, name


def test_bfloat16_is_close(saved: Callable[[str], Saved]) -> None:
    folder = saved("norms").folder
    ids, mask, pixels = prompts(2, "left")
    with torch.no_grad():
        exact = Flamingo.from_pretrained(folder)(ids, pixels, attention_mask=mask).logits
        model = Flamingo.from_pretrained(folder, dtype=torch.bfloat16)
        logits = model(ids, pixels, attention_mask=mask).logits
    assert logits.dtype == torch.bfloat16
    assert distance(logits.float()[mask.bool()], exact[mask.bool()]) < 0.05
