"""DeepSeek-VL: transformers' processors, conversations, inputs with errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from checkpoints import distance
from deepseek_vl_checkpoints import HYBRID, LARGE, MARKER, PLAIN, SIDE, TOKENS, inputs, pixels, prompt
from PIL import Image

from mmkernels.models import ContextPolicy, DeepSeekVL

BOTH = pytest.mark.parametrize("variant", [PLAIN, HYBRID])
Ours = Callable[..., DeepSeekVL]

# transformers' processors.


def processor(variant: str) -> Any:
    """Of images of SIDE, and of LARGE, pixels; it knows the words w5 to w89."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = {"<pad>": 0, "<unk>": 1, "<eos>": 2, "<image>": MARKER}
    words = {f"w{number}": number for number in range(5, 90)}
    tokenizer = Tokenizer(models.WordLevel(special | words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<eos>"}
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, padding_side="left", extra_special_tokens={"image_token": "<image>"}, **ends
    )
    name = "DeepseekVLHybrid" if variant == HYBRID else "DeepseekVL"
    sizes = {"size": {"height": SIDE, "width": SIDE}}
    sizes |= {"high_res_size": {"height": LARGE, "width": LARGE}} if variant == HYBRID else {}
    images = getattr(transformers, f"{name}ImageProcessorPil")(**sizes)
    return getattr(transformers, f"{name}Processor")(images, fast, num_image_tokens=TOKENS)


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(256, (height, width, 3), generator=generator, dtype=torch.uint8).numpy())


@pytest.mark.parametrize(
    "photos", [[[(64, 32)]], [[(32, 32), (33, 97)], [(10, 10)]], [[(1, 2000)], [(2000, 1)]], [[], [(32, 32)]]]
)
@BOTH
def test_the_processor_makes_the_inputs(
    ours: Ours, theirs: Any, variant: str, photos: list[list[tuple[int, int]]]
) -> None:
    texts = [f"w{5 + row} " + "<image> w7 " * len(sizes) + "w8 w9 " * (row + 1) for row, sizes in enumerate(photos)]
    images = [photo(*size, seed) for seed, size in enumerate(size for sizes in photos for size in sizes)]
    given = processor(variant)(images=images, text=texts, return_tensors="pt", padding=True)
    assert given["pixel_values"].shape == (len(images), 3, SIDE, SIDE)
    assert ("high_res_pixel_values" in given) == (variant == HYBRID)
    model, valid = ours(variant), given["attention_mask"].bool()
    with torch.no_grad():
        assert distance(model(**given).logits[valid], theirs(variant)(**given).logits[valid]) < 5e-6
        expected = theirs(variant).generate(**given, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert model.generate(**given, max_new_tokens=4, eos_token_id=()).tokens.tolist() == expected[:, -4:].tolist()


# Conversations.


@BOTH
def test_a_second_turn_encodes_nothing(ours: Ours, theirs: Any, variant: str) -> None:
    model, calls = ours(variant), []
    hook = model.vision.register_forward_hook(lambda *_: calls.append(1))
    ids, images = prompt([2])[0], pixels(theirs(variant), 2)
    more = torch.tensor([[8, 9, 10]])
    try:
        first = model.generate(ids, **images, max_new_tokens=3, eos_token_id=())
        second = model.generate(more, kv_cache=first.kv_cache, max_new_tokens=3, eos_token_id=())
        assert calls == [1]
        visual = model.encode(**images)
        for _ in range(2):
            again = model.generate(ids, images=visual, max_new_tokens=3, eos_token_id=())
            assert torch.equal(again.tokens, first.tokens)
        assert calls == [1, 1]
    finally:
        hook.remove()
    whole = torch.cat([ids, first.tokens, more], 1)
    expected = theirs(variant).generate(
        input_ids=whole, attention_mask=torch.ones_like(whole), **images, max_new_tokens=3, do_sample=False,
        eos_token_id=None,
    )  # fmt: skip
    assert second.tokens.tolist() == expected[:, -3:].tolist()


def test_a_policy_forgets_an_image(ours: Ours, theirs: Any) -> None:
    model, policy = ours(PLAIN), ContextPolicy(max_visual_tokens=2 * TOKENS)
    first = model.generate(prompt([2])[0], **pixels(theirs(PLAIN), 2), max_new_tokens=2, policy=policy)
    assert first.kv_cache.visual_tokens().tolist() == [2 * TOKENS]
    out = model(prompt([1])[0], **pixels(theirs(PLAIN), 1), kv_cache=first.kv_cache, policy=policy)
    assert out.kv_cache.visual_tokens().tolist() == [2 * TOKENS]


def test_a_reducer_of_the_configuration() -> None:
    model = DeepSeekVL.from_size("tiny", reduce="pool:2")
    assert model.encode(torch.rand(2, 3, 32, 32)).lengths == (4, 4)
    with pytest.raises(ValueError, match="reduce must be a reducer without weights"):
        DeepSeekVL.from_size("tiny", reduce="shuffle:2")


# Inputs with errors.

SMALL, HIGH = torch.rand(3, 3, SIDE, SIDE), torch.rand(3, 3, LARGE, LARGE)


@pytest.mark.parametrize(
    ("variant", "change", "match"),
    [
        (PLAIN, {"pixel_values": SMALL[:2]}, r"input_ids must have 32 tokens 99 \(image\) for 2 images .*got 48"),
        (PLAIN, {"pixel_values": None}, r"input_ids must have 0 tokens 99 \(image\) for 0 images, got 48"),
        (PLAIN, {"pixel_values": torch.rand(3, 3, 1, 10_000)}, r"pixel_values must be \[B, 3, 32, 32\], got shape"),
        (PLAIN, {"pixel_values": SMALL[:, :1]}, r"pixel_values must be \[B, 3, 32, 32\], got shape \(3, 1, 32, 32\)"),
        (PLAIN, {"pixel_values": SMALL.byte()}, "pixel_values must be a floating tensor"),
        (PLAIN, {"pixel_values": [1.0]}, "pixel_values must be a floating tensor, got list"),
        (
            PLAIN,
            {"high_res_pixel_values": HIGH},
            "high_res_pixel_values must be None for a model without SAM, got them",
        ),
        (PLAIN, {"image_sizes": None}, "image_sizes"),
        (HYBRID, {"high_res_pixel_values": None}, "high_res_pixel_values must be the same images for SAM, got None"),
        (HYBRID, {"high_res_pixel_values": HIGH[:2]}, "high_res_pixel_values must have as many images .* 3, got 2"),
        (
            HYBRID,
            {"high_res_pixel_values": SMALL},
            r"high_res_pixel_values must be \[B, 3, 64, 64\], got shape \(3, 3, 32",
        ),
        (HYBRID, {"high_res_pixel_values": HIGH.int()}, "high_res_pixel_values must be a floating tensor"),
        (HYBRID, {"pixel_values": None}, "high_res_pixel_values must be None without pixel_values, got them"),
    ],
)
def test_bad_inputs(ours: Ours, theirs: Any, variant: str, change: dict[str, Any], match: str) -> None:
    model, given = ours(variant), inputs(theirs(variant))
    calls: list[int] = []
    hook = model.vision.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises((TypeError, ValueError), match=match):
        model(**(given | change))
    hook.remove()
    assert not calls  # found before anything is encoded


def test_an_image_in_two_rows(ours: Ours, theirs: Any) -> None:
    given = inputs(theirs(PLAIN))
    given["input_ids"][0, -1] = MARKER
    given["input_ids"][1, (given["input_ids"][1] == MARKER).nonzero()[0]] = 5
    with pytest.raises(ValueError, match="input_ids must have the 16 tokens of image 2 in one row, got them in rows 0"):
        ours(PLAIN)(**given)


def test_two_hundred_images(ours: Ours) -> None:
    ids, _ = prompt([200])
    with pytest.raises(ValueError, match=r"input_ids must have at most 512 tokens \(text_length\)"):
        ours(PLAIN)(ids, torch.zeros(1, 3, SIDE, SIDE).expand(200, -1, -1, -1))


def test_images_of_another_model(ours: Ours, theirs: Any) -> None:
    given = inputs(theirs(PLAIN))
    ids, small = given["input_ids"], given["pixel_values"]
    visual = DeepSeekVL.from_size("tiny").encode(torch.rand(3, 3, 32, 32))
    with pytest.raises(ValueError, match=r"images must be \[tokens, 48\], as encode returns, got"):
        ours(PLAIN)(ids, images=visual)
    with pytest.raises(TypeError, match="images must be what encode returns, got Tensor"):
        ours(PLAIN)(ids, images=visual.tokens)
    with pytest.raises(ValueError, match="pixel_values must be None with images, got both"):
        ours(PLAIN)(ids, small, images=visual)
