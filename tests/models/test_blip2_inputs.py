"""BLIP-2 and InstructBLIP: transformers' processors, features that are cached, inputs with errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from blip2_checkpoints import (
    MARKER,
    QUERIES,
    image_processor,
    inputs,
    instructions,
    labels_of,
    photos,
    pixels,
    prompt,
    tokenizer,
)
from checkpoints import Saved, distance
from torch import Tensor

from mmkernels.models import BLIP2, ContextPolicy
from mmkernels.models.embeddings import EmbeddingCache

PLAIN, INSTRUCT = "blip2_opt", "instruct_llama"
Checkpoints = Callable[[str], Saved]
Ours = Callable[..., BLIP2]


@contextmanager
def encoded(model: Any) -> Iterator[list[int]]:
    """Yields a list that gets the number of images of each call of the image encoder."""
    calls: list[int] = []
    hook = model.vision.register_forward_hook(lambda _, __, out: calls.append(out.shape[0]))
    try:
        yield calls
    finally:
        hook.remove()


# transformers' processors.


def processor(instruct: bool) -> Any:
    images, text = image_processor(), tokenizer("</s>", MARKER, "left")
    if instruct:
        return transformers.InstructBlipProcessor(images, text, tokenizer("<s>", 90, "right"), QUERIES)
    return transformers.Blip2Processor(images, text, QUERIES)


@pytest.mark.parametrize("variant", [pytest.param(PLAIN, marks=pytest.mark.slow), INSTRUCT])
def test_the_processor_makes_the_inputs(ours: Ours, saved: Checkpoints, variant: str) -> None:
    """Its padding stands between the markers of an image and the text."""
    texts = ["w5 w6 w7 w8 w9", "w10 w11"]
    given = dict(processor(variant == INSTRUCT)(photos(2), texts, return_tensors="pt", padding=True))
    assert given["input_ids"][1].tolist() == [MARKER] * QUERIES + [0, 0, 0, 2, 10, 11]
    assert given["attention_mask"][1].tolist() == [1] * QUERIES + [0, 0, 0, 1, 1, 1]
    expected = saved(variant).theirs.generate(**given, max_new_tokens=3, do_sample=False, eos_token_id=None)
    tokens = ours(variant).generate(**given, max_new_tokens=3, eos_token_id=()).tokens
    assert tokens.tolist() == expected[:, -3:].tolist()


# Features that are encoded once.


def test_a_second_epoch_encodes_nothing(ours: Ours, tmp_path: Path) -> None:
    """And learns the same, exactly where features are stored as they are."""
    model, given = ours(PLAIN), inputs(PLAIN)
    images, labels = list(given.pop("pixel_values")), labels_of(given)
    cache = model.feature_cache(tmp_path / "exact", dtype=torch.float32)
    with encoded(model) as calls:
        features = model.cached_features(cache, images, torch.stack, batch_size=2)
        assert calls == [2, 1]
        reopened = model.feature_cache(tmp_path / "exact", dtype=torch.float32)
        again = model.cached_features(reopened, reversed(images), torch.stack)
        assert calls == [2, 1]
        assert torch.equal(again.flip(0), features) and features.shape == (3, 5, 32)
        losses, gradients = [], []
        for visual in ({"pixel_values": torch.stack(images)}, {"image_features": features}):
            model.zero_grad()
            loss = model(**given, **visual, labels=labels).loss
            loss.backward()
            losses.append(loss)
            gradients.append(model.projection.weight.grad.clone())
        assert calls == [2, 1, 3]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)
    assert all(parameter.grad is None for part in model._frozen for parameter in part.parameters())
    model.zero_grad()


def test_features_in_bfloat16(ours: Ours, tmp_path: Path) -> None:
    model, images = ours(PLAIN), list(pixels(2))
    cache = model.feature_cache(tmp_path)
    stored = model.cached_features(cache, images, torch.stack)
    assert cache.dtype == torch.bfloat16 and not cache.normalize and stored.dtype == torch.float32
    assert torch.equal(stored, model.encode_vision(torch.stack(images)).bfloat16().float())


def test_a_cache_that_does_not_fit(ours: Ours, tmp_path: Path) -> None:
    model, images = ours(PLAIN), list(pixels(1))
    with pytest.raises(ValueError, match="cache must have normalize=False, as feature_cache makes it, got True"):
        model.cached_features(EmbeddingCache(tmp_path / "a", "x"), images, torch.stack)
    with pytest.raises(TypeError, match="cache must be an EmbeddingCache, got dict"):
        model.cached_features({}, images, torch.stack)  # type: ignore[arg-type]
    trained = BLIP2.from_size("tiny", freeze_vision=False)
    for call in (lambda: trained.feature_cache(tmp_path / "b"), lambda: trained.cached_features(None, [], torch.stack)):
        with pytest.raises(ValueError, match="freeze_vision must be True where features are cached, got False"):
            call()
    model.cached_features(model.feature_cache(tmp_path / "c"), images, torch.stack)
    with pytest.raises(ValueError, match="model"):
        BLIP2.from_size("tiny").feature_cache(tmp_path / "c")


# Inputs with errors.


@pytest.mark.parametrize(
    ("variant", "change", "match"),
    [
        (PLAIN, {"pixel_values": None}, r"input_ids must have 0 tokens 99 \(image\) for 0 images, got 12"),
        (PLAIN, {"pixel_values": pixels(2)}, r"input_ids must have 8 tokens 99 \(image\) for 2 images .*, got 12"),
        (PLAIN, {"pixel_values": pixels(3)[0]}, r"pixel_values must be \[B, 3, 16, 16\], got shape \(3, 16, 16\)"),
        (PLAIN, {"pixel_values": pixels(3)[..., :8]}, r"pixel_values must be \[B, 3, 16, 16\], got shape"),
        (PLAIN, {"pixel_values": pixels(3).byte()}, "pixel_values must be a floating tensor, got torch.uint8"),
        (PLAIN, {"pixel_values": [1.0]}, "pixel_values must be a floating tensor, got list"),
        (PLAIN, {"image_features": torch.rand(3, 5, 32)}, "pixel_values must be None with image_features, got both"),
        (
            PLAIN,
            {"pixel_values": None, "image_features": torch.rand(3, 5, 48)},
            r"image_features must be \[N, P, 32\], as encode_vision returns them, got shape \(3, 5, 48\)",
        ),
        (PLAIN, {"pixel_values": None, "image_features": [1]}, "image_features must be a tensor, got list"),
        (PLAIN, instructions(3), "qformer_input_ids must be None: this Q-Former was made without vocab_size"),
        (INSTRUCT, {"qformer_input_ids": None}, "qformer_input_ids must be the instruction about each image"),
        (INSTRUCT, instructions(2), "qformer_input_ids must be for 3 images, got shape"),
        (INSTRUCT, instructions(3, 33), "qformer_input_ids must be .*, L from 1 to 32, got shape"),
        (INSTRUCT, {"qformer_input_ids": torch.full((3, 5), 96)}, "qformer_input_ids must be .*96"),
        (INSTRUCT, {"pixel_values": None}, "qformer_input_ids must be None without pixel_values and image_features"),
        (PLAIN, {"images": torch.rand(3, 5)}, "pixel_values and image_features must be None with images, got both"),
        (PLAIN, {"pixel_values": None, "images": torch.rand(3)}, "images must be what encode returns, got Tensor"),
        (PLAIN, {"image_sizes": None}, "inputs of BLIP2 beside the text must be of pixel_values, .*; got image_sizes"),
        (PLAIN, {"attention_mask": torch.ones(2, 3)}, "attention_mask must be .* as input_ids, got shape"),
    ],
)  # fmt: skip
def test_bad_inputs(ours: Ours, variant: str, change: dict[str, Any], match: str) -> None:
    """They are found before anything is encoded."""
    model = ours(variant)
    with encoded(model) as calls, pytest.raises((TypeError, ValueError), match=match):
        model(**(inputs(variant) | change))
    assert not calls


def test_bad_generation(ours: Ours) -> None:
    """Of an empty prompt, without an image, past the largest length."""
    model, (ids, mask) = ours(PLAIN), prompt([1])
    with encoded(model) as calls:
        for given, match in (
            ({"input_ids": ids[:, :0]}, "input_ids must have at least one token, got none"),
            ({"input_ids": ids[:, :0], "pixel_values": pixels(1)}, r"input_ids must have 4 tokens 99 .*, got 0"),
            ({"input_ids": ids}, r"input_ids must have 0 tokens 99 \(image\) for 0 images, got 4"),
            ({}, "input_ids must have at least one token where there are no images, got None"),
            ({"pixel_values": pixels(0)}, "input_ids must have at least one token where there are no images, got None"),
            ({"attention_mask": mask}, "attention_mask must be None without input_ids, got both"),
            ({"pixel_values": pixels(1), "colour": 1}, "got colour"),
            ({"input_ids": torch.ones(1, 65).long()}, r"input_ids must have at most 64 tokens \(text_length\)"),
            ({"input_ids": ids, "pixel_values": pixels(1), "max_new_tokens": 0}, "max_new_tokens must be a positive"),
        ):
            with pytest.raises((TypeError, ValueError), match=match):
                model.generate(**given)
        assert not calls
    text = torch.full((1, 62), 7)
    out = model.generate(text, max_new_tokens=9, eos_token_id=())
    assert out.tokens.shape == (1, 3) and out.kv_cache.num_tokens == 64
    with pytest.raises(ValueError, match="input_ids must be given with kv_cache, got None"):
        model.generate(pixel_values=pixels(1), kv_cache=out.kv_cache)


def test_positions_of_dropped_images_stay_taken(ours: Ours) -> None:
    """OPT has one for each of `text_length` tokens."""
    model, policy = ours(PLAIN), ContextPolicy(max_visual_tokens=QUERIES)
    (ids, _), images = prompt([1]), pixels(1)
    text = torch.full((1, 64 - ids.shape[1] - 4), 7)
    with torch.no_grad():
        cache = model(torch.cat([ids, text], 1), images, policy=policy).kv_cache
        assert cache.num_tokens == 60
        with pytest.raises(ValueError, match=r"one of the 64 positions .*, got 6 tokens behind position 60"):
            model(ids[:, 2:8], images, kv_cache=cache, policy=policy)


def test_fewer_tokens_are_fewer_queries() -> None:
    with pytest.raises(ValueError, match="reduce must be None in BLIP-2, whose num_queries are its visual tokens"):
        BLIP2.from_size("tiny").set_reducer("pool:2")
    model = BLIP2.from_size("tiny", num_queries=7, vision_layers=1, qformer_layers=1)
    model.set_reducer(None)
    assert model.encode(torch.rand(2, 3, 32, 32)).lengths == (7, 7)


def test_nothing_waits_for_a_device() -> None:
    """On a device that has no values, which the use of one would show."""
    with torch.device("meta"), torch.no_grad():
        model = BLIP2(BLIP2.sizes["tiny_instruct"]).eval()
        ids, images, asked = torch.zeros(1, 20).long(), torch.rand(2, 3, 32, 32), torch.zeros(2, 5).long()
        out = model(ids, images, qformer_input_ids=asked, qformer_attention_mask=torch.ones_like(asked), labels=ids)
        assert out.loss.shape == ()


@pytest.mark.slow
def test_autocast(ours: Ours) -> None:
    given = inputs(PLAIN)
    with torch.no_grad():
        whole = ours(PLAIN)(**given, last_logits_only=True).logits
        with torch.autocast("cpu", torch.bfloat16):
            out = ours(PLAIN)(**given, last_logits_only=True).logits
    assert distance(out.float(), whole) < 0.05


@pytest.mark.slow
def test_compiled_code_is_one_graph() -> None:
    model = BLIP2.from_size("tiny_instruct", qformer_layers=1, vision_layers=1, text_layers=1).eval()
    ids, images, asked = torch.tensor([[*[127] * 8, 5, 6]]), torch.rand(2, 3, 32, 32), torch.ones(2, 3).long()

    def logits(ids: Tensor, images: Tensor, asked: Tensor) -> Tensor:
        return model(ids, images, qformer_input_ids=asked).logits

    torch.compiler.reset()
    compiled = torch.compile(logits, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert distance(compiled(ids, images, asked), logits(ids, images, asked)) < 5e-6
