"""Flamingo by itself: sizes, caches, sampling, training, and prompts that aren't what they must be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from checkpoints import distance
from idefics_checkpoints import IMAGE, image_attention_mask, prompts
from torch import Tensor

from mmkernels.models import Flamingo
from mmkernels.models.flamingo import SIZES, FlamingoCache
from mmkernels.nn import VisualCache


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
    for bad in (0, 2.5):
        with pytest.raises(ValueError, match=rf"max_new_tokens must be a positive integer, got {bad}"):
            model.generate(ids, pixels, max_new_tokens=bad)
    with pytest.raises(ValueError, match=r"labels must be integers, got torch\.float32"):
        model(ids, pixels, labels=ids.float())
    with pytest.raises(ValueError, match="labels other than -100 must be from 0 to"):
        model(ids, pixels, labels=torch.full_like(ids, 10**6))
    with pytest.raises(ValueError, match=r"visual_cache must have \d+ layers, got 7"):
        model(ids, pixels, visual_cache=VisualCache(7))
    with pytest.raises(ValueError, match="temperature must be >= 0"):
        model.generate(ids, pixels, temperature=-1.0)
    with pytest.raises(ValueError, match="top_p must be above 0"):
        model.generate(ids, pixels, top_p=0.0)
    with pytest.raises(ValueError, match=r"size must be one of tiny, small, base, got \['tiny'\]"):
        Flamingo.from_size(["tiny"])  # type: ignore[arg-type]
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
