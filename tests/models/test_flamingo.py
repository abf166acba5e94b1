"""Flamingo against transformers' Idefics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from idefics_checkpoints import IMAGE, VARIANTS, Saved, greedy, image_attention_mask, prompts
from torch import Tensor

import mmkernels
from mmkernels.models import Flamingo
from mmkernels.models.flamingo import SIZES, FlamingoCache
from mmkernels.nn import VisualCache

# Both models compute in float32, in another order: measured over all cases here, at most 1.5e-6. The smallest real
# difference tried (the image encoder's norms with epsilon 1e-6 for 1e-5) gives 1.8e-5, one token's wrong image 0.2.
TOLERANCE = 5e-6
BACKENDS = ("chunked", "reference")


def distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("images", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits(saved: Callable[[str], Saved], variant: str, images: int, padding: str | None, backend: str) -> None:
    checkpoint = saved(variant)
    ours = Flamingo.from_pretrained(checkpoint.folder)
    ids, mask, pixels = prompts(images, padding)
    sees = image_attention_mask(ids, images)
    with torch.no_grad():
        theirs = checkpoint.theirs(
            input_ids=ids, attention_mask=mask, pixel_values=pixels, image_attention_mask=sees
        ).logits
        other = checkpoint.theirs(
            input_ids=ids, attention_mask=mask, pixel_values=pixels.flip(0, 3), image_attention_mask=sees
        ).logits
        with mmkernels.use_backend(backend):
            by_markers = ours(ids, pixels, attention_mask=mask).logits
            by_mask = ours(ids, pixels, attention_mask=mask, image_attention_mask=sees).logits
    valid = mask.bool()
    assert distance(by_markers[valid], theirs[valid]) < TOLERANCE
    assert torch.equal(by_markers[valid], by_mask[valid])
    assert distance(other[valid], theirs[valid]) > 0.05, "the image hardly matters: parity would prove little"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("variant", ["resampler", "patches", "decoupled"])
def test_greedy_generation(saved: Callable[[str], Saved], variant: str, padding: str | None, backend: str) -> None:
    checkpoint = saved(variant)
    ours = Flamingo.from_pretrained(checkpoint.folder)
    for images in (1, 3, 5):
        ids, mask, pixels = prompts(images, padding)
        with mmkernels.use_backend(backend):
            out = ours.generate(ids, pixels, attention_mask=mask, max_new_tokens=6, eos_token_id=())
        rows = [ids[row][mask[row].bool()].tolist() for row in range(len(ids))]
        expected = [greedy(checkpoint.theirs, text, pixels[row], 6) for row, text in enumerate(rows)]
        assert out.tokens.tolist() == expected
        if padding != "right":  # transformers' generate reads the last column's logits, padding or not
            theirs = checkpoint.theirs.generate(
                input_ids=ids,
                attention_mask=mask,
                pixel_values=pixels,
                image_attention_mask=image_attention_mask(ids, images),
                max_new_tokens=6,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            assert theirs[:, ids.shape[1] :].tolist() == expected


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


def test_rows_that_end_early(saved: Callable[[str], Saved]) -> None:
    """A row ends at its end-of-text token, the others go on; the next turn sees no padding between."""
    checkpoint = saved("resampler")
    ours = Flamingo.from_pretrained(checkpoint.folder)
    ids, mask, pixels = prompts(2, "left")
    rows = [ids[row][mask[row].bool()].tolist() for row in range(2)]
    free = [greedy(checkpoint.theirs, text, pixels[row], 6) for row, text in enumerate(rows)]
    end = next(token for token in free[0][:4] if token not in free[1])
    cut = free[0].index(end) + 1
    out = ours.generate(ids, pixels, attention_mask=mask, max_new_tokens=6, eos_token_id=end)
    assert out.tokens.tolist() == [free[0][:cut] + [0] * (6 - cut), free[1]]

    turn = torch.tensor([[7, 8], [9, 10]])
    out = ours.generate(turn, max_new_tokens=3, eos_token_id=(), kv_cache=out.kv_cache, visual_cache=out.visual_cache)
    said = [rows[0] + free[0][:cut] + [7, 8], rows[1] + free[1] + [9, 10]]
    assert out.tokens.tolist() == [greedy(checkpoint.theirs, text, pixels[row], 3) for row, text in enumerate(said)]

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
    expected, mine = dict(checkpoint.theirs.named_parameters()), dict(ours.named_parameters())
    for name, their_name in GRADIENTS.items():
        if name in mine:
            # A gradient passes twice as many operations as the logits, some of which cancel: measured at most 5.1e-6.
            assert distance(mine[name].grad.flatten(), expected[their_name].grad.flatten()) < 2e-5, name


def test_bfloat16_is_close(saved: Callable[[str], Saved]) -> None:
    folder = saved("norms").folder
    ids, mask, pixels = prompts(2, "left")
    with torch.no_grad():
        exact = Flamingo.from_pretrained(folder)(ids, pixels, attention_mask=mask).logits
        model = Flamingo.from_pretrained(folder, dtype=torch.bfloat16)
        logits = model(ids, pixels, attention_mask=mask).logits
    assert logits.dtype == torch.bfloat16
    assert distance(logits.float()[mask.bool()], exact[mask.bool()]) < 0.05


def test_last_logits_only_is_each_rows_last_token() -> None:
    model = Flamingo.from_size("tiny").eval()
    ids, mask, pixels = prompts(2, "right")
    ids[ids == IMAGE] = model.config.image_token_id
    with torch.no_grad():
        every = model(ids, pixels, attention_mask=mask).logits
        last = model(ids, pixels, attention_mask=mask, last_logits_only=True).logits
    places = mask.sum(1) - 1
    assert last.shape == (2, 1, 128)
    torch.testing.assert_close(last[:, 0], every[torch.arange(2), places])


def test_decoding_step_by_step_equals_one_pass() -> None:
    """Every split of a text into calls gives the same logits."""
    model = Flamingo.from_size("tiny").eval()
    ids, _, pixels = prompts(2, None)
    ids[ids == IMAGE] = model.config.image_token_id
    with torch.no_grad():
        whole = model(ids, pixels).logits
        # The first call has both markers, so that all images are there from the start.
        first = model(ids[:, :6], pixels)
        parts = [first.logits]
        for i in range(6, ids.shape[1]):
            caches = {"kv_cache": first.kv_cache, "visual_cache": first.visual_cache}
            parts.append(model(ids[:, i : i + 1], **caches).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)


def test_visual_budget_evicts_the_oldest_image() -> None:
    """With room for two images of three, tokens that ask for the first see nothing, the others what they did."""
    model = Flamingo.from_size("tiny").eval()
    ids, _, pixels = prompts(3, None)
    ids[ids == IMAGE] = model.config.image_token_id
    cache = VisualCache(len(model.cross_blocks), max_tokens=17)  # 8 an image
    with torch.no_grad():
        logits = model(ids, pixels, visual_cache=cache).logits
        sees = image_attention_mask(torch.where(ids == model.config.image_token_id, IMAGE, ids), 3)
        sees[..., 0] = 0
        expected = model(ids, pixels, image_attention_mask=sees).logits
    assert cache.image_ids == [1, 2]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_from_size_is_reproducible_and_sees() -> None:
    first, second, other = (Flamingo.from_size("tiny", seed=seed).eval() for seed in (0, 0, 1))
    ids, _, pixels = prompts(1, None)
    ids[ids == IMAGE] = first.config.image_token_id
    with torch.no_grad():
        a, b, c = (model(ids, pixels).logits for model in (first, second, other))
        d = first(ids, pixels.flip(3)).logits
    assert torch.equal(a, b)
    assert distance(c, a) > 0.5
    assert distance(d, a) > 0.05
    assert Flamingo.from_size("tiny", num_latents=5).resample(torch.randn(1, 2, 17, 32)).shape == (1, 2, 5, 32)
    assert next(Flamingo.from_size("tiny", dtype=torch.bfloat16).parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize(("size", "millions"), [("small", (80, 90)), ("base", (260, 330))])
def test_sizes(size: str, millions: tuple[int, int]) -> None:
    config = SIZES[size]
    with torch.device("meta"):
        model = Flamingo(config)
    assert millions[0] < sum(p.numel() for p in model.parameters()) / 1e6 < millions[1]
    if size == "small":
        assert (config.vision_width, config.vision_layers, config.image_size) == (384, 6, 224)
        assert (config.text_width, config.text_layers, config.cross_every, config.vocab_size) == (512, 8, 2, 32000)
        assert len(model.cross_blocks) == 4


def test_sampling_is_reproducible_and_differs_from_greedy() -> None:
    model = Flamingo.from_size("tiny").eval()
    ids, _, pixels = prompts(1, None)
    ids[ids == IMAGE] = model.config.image_token_id

    def tokens(**how: float) -> list[list[int]]:
        return model.generate(ids, pixels, max_new_tokens=12, eos_token_id=(), **how).tokens.tolist()

    assert tokens(temperature=1.0, seed=3) == tokens(temperature=1.0, seed=3)
    assert tokens(temperature=1.0, seed=3) != tokens(temperature=1.0, seed=4)
    assert tokens(temperature=1.0, seed=3) != tokens()
    assert tokens(temperature=1.0, top_p=1e-6, seed=3) == tokens()


def test_training_step_lowers_the_loss() -> None:
    model = Flamingo.from_size("tiny")
    ids, _, pixels = prompts(2, None)
    ids[ids == IMAGE] = model.config.image_token_id
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        optimiser.zero_grad()
        loss = model(ids, pixels, labels=ids).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[1] < losses[0]


def tiny_prompt() -> tuple[Flamingo, Tensor, Tensor]:
    model = Flamingo.from_size("tiny").eval()
    marker = model.config.image_token_id
    return model, torch.tensor([[5, marker, 6, marker, 7]]), torch.randn(1, 2, 3, 32, 32)


def test_bad_prompts() -> None:
    model, ids, pixels = tiny_prompt()
    with pytest.raises(ValueError, match="row 0 must have as many image markers as images, 1, got 2"):
        model(ids, pixels[:, :1])
    with pytest.raises(ValueError, match="as many image markers as images, 0, got 2"):
        model(ids)
    with pytest.raises(ValueError, match="2, got 1; give media_index"):
        model(ids[:, :3], pixels)
    with pytest.raises(ValueError, match=r"media_index must be from -1 \(none\) to 1, got -1 to 2"):
        model(ids, pixels, media_index=torch.tensor([[-1, 0, 0, 2, 1]]))
    with pytest.raises(ValueError, match=r"media_index must be integers \[1, 5\] as input_ids"):
        model(ids, pixels, media_index=torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"image_attention_mask must be \[1, 5, 2\], got shape \(1, 5, 3\)"):
        model(ids, pixels, image_attention_mask=torch.zeros(1, 5, 3))
    with pytest.raises(ValueError, match="media_index or image_attention_mask, not both"):
        model(ids, pixels, media_index=torch.zeros_like(ids), image_attention_mask=torch.zeros(1, 5, 2))
    with pytest.raises(ValueError, match="input_ids must be from 0 to 127, got 5 to 128"):
        model(torch.where(ids == 7, 128, ids), pixels)
    with pytest.raises(ValueError, match=r"input_ids must be integers \[B, L\], got torch.float32"):
        model(ids.float(), pixels)
    with pytest.raises(ValueError, match="input_ids must have at least one token"):
        model(ids[:, :0])
    with pytest.raises(ValueError, match=r"attention_mask must be \[1, 5\] as input_ids"):
        model(ids, pixels, attention_mask=torch.ones(1, 4))
    with pytest.raises(ValueError, match=r"labels must be \[1, 5\] as input_ids"):
        model(ids, pixels, labels=ids[:, :4])
    with pytest.raises(ValueError, match="labels need the logits of every token"):
        model(ids, pixels, labels=ids, last_logits_only=True)
    with pytest.raises(
        ValueError, match=r"pixel_values must be floating \[B, N, 3, 32, 32\], got .*\(1, 2, 3, 16, 16\)"
    ):
        model(ids, pixels[..., :16, :16])
    with pytest.raises(ValueError, match=r"pixel_values must be floating .* got torch.uint8"):
        model(ids, pixels.to(torch.uint8))
    with pytest.raises(ValueError, match="pixel_values must have batch 1 or input_ids' 1, got 2"):
        model(ids, pixels.expand(2, -1, -1, -1, -1))
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        model.generate(ids, pixels, max_new_tokens=0)
    with pytest.raises(ValueError, match="temperature must be >= 0"):
        model.generate(ids, pixels, temperature=-1.0)
    with pytest.raises(ValueError, match="top_p must be above 0"):
        model.generate(ids, pixels, top_p=0.0)
    with pytest.raises(ValueError, match="size must be one of tiny, small, base, got 'huge'"):
        Flamingo.from_size("huge")


def test_bad_caches() -> None:
    model, ids, pixels = tiny_prompt()
    out = model(ids, pixels)
    with pytest.raises(ValueError, match="input_ids must be for kv_cache's batch 1, got 2"):
        model(torch.tensor([[5], [6]]), kv_cache=out.kv_cache, visual_cache=out.visual_cache)
    with pytest.raises(ValueError, match="visual_cache must have the 2 images of kv_cache's text, got 0"):
        model(torch.tensor([[5]]), kv_cache=out.kv_cache)
    both = model.cache_images(torch.randn(2, 1, 8, 32))
    with pytest.raises(ValueError, match="visual_cache must have batch 1 or 3, got 2"):
        model(torch.full((3, 2), 5), visual_cache=both)
    with pytest.raises(ValueError, match="max_tokens must hold the largest image, of 8 tokens, got 7"):
        model(ids, pixels, visual_cache=VisualCache(2, max_tokens=7))
    # An error before the model runs leaves the caches as they were.
    length = len(out.kv_cache)
    with pytest.raises(ValueError, match="as many image markers"):
        model(ids, pixels[:, :1], kv_cache=out.kv_cache, visual_cache=out.visual_cache)
    assert (len(out.kv_cache), out.visual_cache.image_ids) == (length, [0, 1])


def test_a_model_without_an_image_token_needs_media_index() -> None:
    model, ids, pixels = tiny_prompt()
    blind = Flamingo(replace(model.config, image_token_id=None))
    blind.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="media_index must be given for a model whose config has no image_token_id"):
        blind(ids, pixels)
    with torch.no_grad():
        given = blind(ids, pixels, media_index=torch.tensor([[-1, 0, 0, 1, 1]])).logits
        torch.testing.assert_close(given, model(ids, pixels).logits)


def test_nothing_of_a_later_image_reaches_an_earlier_token() -> None:
    """NaN in the second image stays there: tokens that see the first are as they were."""
    model, ids, pixels = tiny_prompt()
    broken = pixels.clone()
    broken[:, 1] = torch.nan
    with torch.no_grad():
        good, bad = model(ids, pixels).logits, model(ids, broken).logits
    assert torch.equal(good[:, :3], bad[:, :3])
    assert bad[:, 3:].isnan().all()


def test_a_kv_cache_with_reserve_keeps_its_storage() -> None:
    model, ids, pixels = tiny_prompt()
    cache = FlamingoCache(len(model.text_blocks), reserve=16)
    with torch.no_grad():
        out = model(ids, pixels, kv_cache=cache)
        before = cache._layers[0][0].view().data_ptr()
        model(torch.tensor([[5]]), kv_cache=cache, visual_cache=out.visual_cache)
    assert cache._layers[0][0].view().data_ptr() == before
