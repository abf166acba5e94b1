"""Flamingo without transformers: caches, sampling, training, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checkpoints import distance
from idefics_checkpoints import IMAGE, image_attention_mask, prompts
from torch import Tensor, nn

from mmkernels.models import Flamingo
from mmkernels.models.flamingo import FlamingoCache
from mmkernels.nn import VisualCache


def prompted(images: int, padding: str | None = None) -> tuple[Flamingo, Tensor, Tensor, Tensor]:
    """Returns the smallest model, with tokens, attention mask and pixel values of two rows."""
    model = Flamingo.from_size("tiny", image_token_id=IMAGE).eval()
    return model, *prompts(images, padding)


def test_last_logits_only_is_each_rows_last_token() -> None:
    model, ids, mask, pixels = prompted(2, "right")
    with torch.no_grad():
        every = model(ids, pixels, attention_mask=mask).logits
        last = model(ids, pixels, attention_mask=mask, last_logits_only=True).logits
    places = mask.sum(1) - 1
    assert last.shape == (2, 1, 128)
    torch.testing.assert_close(last[:, 0], every[torch.arange(2), places])


def test_decoding_step_by_step_equals_one_pass() -> None:
    """Every split of a text into calls gives the same logits."""
    model, ids, _, pixels = prompted(2)
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
    """With room for two images of three, tokens of the first image see nothing, the others see their image."""
    model, ids, _, pixels = prompted(3)
    cache = VisualCache(len(model.cross_blocks), max_tokens=17)  # 8 an image
    with torch.no_grad():
        logits = model(ids, pixels, visual_cache=cache).logits
        sees = image_attention_mask(ids, 3)
        sees[..., 0] = 0
        expected = model(ids, pixels, image_attention_mask=sees).logits
    assert cache.image_ids == [1, 2]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_the_image_matters() -> None:
    model, ids, _, pixels = prompted(1)
    with torch.no_grad():
        assert distance(model(ids, pixels.flip(3)).logits, model(ids, pixels).logits) > 0.05


def test_sampling_is_reproducible_and_differs_from_greedy() -> None:
    model, ids, _, pixels = prompted(1)

    def tokens(**how: float) -> list[list[int]]:
        return model.generate(ids, pixels, max_new_tokens=4, eos_token_id=(), **how).tokens.tolist()

    assert tokens(temperature=1.0, seed=3) == tokens(temperature=1.0, seed=3)
    assert tokens(temperature=1.0, seed=3) != tokens(temperature=1.0, seed=4)
    assert tokens(temperature=1.0, seed=3) != tokens()
    assert tokens(temperature=1.0, top_p=1e-6, seed=3) == tokens()


def test_training_step_lowers_the_loss() -> None:
    model, ids, _, pixels = prompted(2)
    model.train()
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


class Scaled(nn.Module):
    """Stands for LoRA's layer: its result is not that of its weight alone."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.head, self.weight, self.bias = head, head.weight, head.bias

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.head(x)


class ScaledLinear(nn.Linear):
    """The same, as loralib has it: it inherits from Linear."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__(head.in_features, head.out_features, head.bias is not None)
        self.weight, self.bias = head.weight, head.bias

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize("wrapped", [None, Scaled, ScaledLinear])
def test_the_loss_is_that_of_the_logits(wrapped: type[nn.Module] | None) -> None:
    """Value and gradients, with labels that are ignored."""
    model, ids, _, pixels = prompted(2)
    if wrapped is not None:
        model.head = wrapped(model.head)
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.5, -100).int()
    found = []
    for out in (model(ids, pixels, labels=labels, return_logits=True), model(ids, pixels)):
        logits = out.logits[:, :-1].flatten(0, 1)
        loss = F.cross_entropy(logits, labels[:, 1:].flatten().long()) if out.loss is None else out.loss
        found.append((loss, *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_logits_are_built_only_where_they_are_wanted() -> None:
    model, ids, _, pixels = prompted(2)
    calls: list[int] = []
    model.head.register_forward_hook(lambda *args: calls.append(1))
    loss = model(ids, pixels, labels=ids)
    assert loss.logits is None and loss.loss is not None and not calls
    assert model(ids, pixels, return_logits=False).logits is None and not calls
    both = model(ids, pixels, labels=ids, return_logits=True)
    assert torch.equal(both.logits, model(ids, pixels).logits) and torch.equal(both.loss, loss.loss)
    nothing = model(ids, pixels, labels=torch.full_like(ids, -100))
    assert nothing.loss.isnan()


PIXELS = torch.randn(1, 2, 3, 32, 32)
IDS = torch.tensor([[5, IMAGE, 6, IMAGE, 7]])


@pytest.fixture
def model() -> Flamingo:
    return prompted(1)[0]


SEES = r"image_attention_mask must be \[1, 5, 2\], got shape \(1, 5, 3\)"
FLOATING = r"pixel_values must be floating \[B, N, 3, 32, 32\], got "


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"pixel_values": PIXELS[:, :1]}, "row 0 must have as many image markers as images, 1, got 2"),
        ({"pixel_values": None}, "as many image markers as images, 0, got 2"),
        ({"input_ids": IDS[:, :3]}, "2, got 1; give media_index"),
        ({"media_index": torch.tensor([[-1, 0, 0, 2, 1]])}, r"media_index must be from -1 \(none\) to 1, got -1 to 2"),
        ({"media_index": IDS[:, :4]}, r"media_index must be integers \[1, 5\] as input_ids"),
        ({"image_attention_mask": torch.zeros(1, 5, 3)}, SEES),
        ({"media_index": IDS, "image_attention_mask": IDS}, "media_index or image_attention_mask, not both"),
        ({"input_ids": torch.where(IDS == 7, 128, IDS)}, "input_ids must be from 0 to 127, got 5 to 128"),
        ({"input_ids": IDS.float()}, r"input_ids must be integers \[B, L\], got torch.float32"),
        ({"input_ids": IDS[:, :0], "pixel_values": None}, "input_ids must have at least one token"),
        ({"attention_mask": torch.ones(1, 4)}, r"attention_mask must be \[1, 5\] as input_ids"),
        ({"labels": IDS[:, :4]}, r"labels must be \[1, 5\] as input_ids"),
        ({"labels": IDS, "last_logits_only": True}, "labels need the logits of every token"),
        ({"labels": IDS.float()}, r"labels must be integers, got torch\.float32"),
        ({"labels": torch.full_like(IDS, 10**6)}, "labels other than -100 must be from 0 to"),
        ({"pixel_values": PIXELS[..., :16, :16]}, FLOATING + r".*\(1, 2, 3, 16, 16\)"),
        ({"pixel_values": PIXELS.to(torch.uint8)}, FLOATING + "torch.uint8"),
        ({"pixel_values": PIXELS.expand(2, -1, -1, -1, -1)}, "pixel_values must have batch 1 or input_ids' 1, got 2"),
        ({"visual_cache": VisualCache(7)}, r"visual_cache must have \d+ layers, got 7"),
        ({"visual_cache": VisualCache(2, max_tokens=7)}, "max_tokens must hold the largest image, of 8 tokens, got 7"),
    ],
)
def test_bad_prompts(model: Flamingo, given: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        model(**{"input_ids": IDS, "pixel_values": PIXELS, **given})


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be a positive integer, got 0"),
        ({"max_new_tokens": 2.5}, r"max_new_tokens must be a positive integer, got 2\.5"),
        ({"temperature": -1.0}, "temperature must be >= 0"),
        ({"top_p": 0.0}, "top_p must be above 0"),
    ],
)
def test_bad_ways_to_generate(model: Flamingo, given: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        model.generate(IDS, PIXELS, **given)


def test_bad_caches(model: Flamingo) -> None:
    out = model(IDS, PIXELS)
    both = {"kv_cache": out.kv_cache, "visual_cache": out.visual_cache}
    two_rows = model.cache_images(torch.randn(2, 1, 8, 32))
    length = len(out.kv_cache)
    for ids, given, match in (
        ([[5], [6]], both, "input_ids must be for kv_cache's batch 1, got 2"),
        ([[5]], {"kv_cache": out.kv_cache}, "visual_cache must have the 2 images of kv_cache's text, got 0"),
        ([[5, 5]] * 3, {"visual_cache": two_rows}, "visual_cache must have batch 1 or 3, got 2"),
        (IDS.tolist(), both | {"pixel_values": PIXELS[:, :1]}, "as many image markers"),
    ):
        with pytest.raises(ValueError, match=match):
            model(torch.tensor(ids), **given)
    # An error before the model runs leaves the caches as they were.
    assert (len(out.kv_cache), out.visual_cache.image_ids) == (length, [0, 1])


def test_a_model_without_an_image_token_needs_media_index(model: Flamingo) -> None:
    without = Flamingo(replace(model.config, image_token_id=None))
    without.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="media_index must be given for a model whose config has no image_token_id"):
        without(IDS, PIXELS)
    with torch.no_grad():
        given = without(IDS, PIXELS, media_index=torch.tensor([[-1, 0, 0, 1, 1]])).logits
        torch.testing.assert_close(given, model(IDS, PIXELS).logits)


def test_nothing_of_a_later_image_reaches_an_earlier_token(model: Flamingo) -> None:
    """NaN in the second image does not change the tokens that see the first image."""
    broken = PIXELS.clone()
    broken[:, 1] = torch.nan
    with torch.no_grad():
        good, bad = model(IDS, PIXELS).logits, model(IDS, broken).logits
    assert torch.equal(good[:, :3], bad[:, :3])
    assert bad[:, 3:].isnan().all()


def test_a_kv_cache_with_reserve_keeps_its_storage(model: Flamingo) -> None:
    cache = FlamingoCache(len(model.text_blocks), reserve=16)
    with torch.no_grad():
        out = model(IDS, PIXELS, kv_cache=cache)
        before = cache._layers[0][0].view().data_ptr()
        model(torch.tensor([[5]]), kv_cache=cache, visual_cache=out.visual_cache)
    assert cache._layers[0][0].view().data_ptr() == before
