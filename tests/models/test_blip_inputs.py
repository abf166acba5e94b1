"""BLIP: transformers' processor, inputs with errors, devices without values, graphs, other dtypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from blip_checkpoints import BOS, LENGTH, SEP, VOCAB
from checkpoints import Saved, distance
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from mmkernels.models import BLIP
from mmkernels.models.blip_text import BLIPCache, Texts
from mmkernels.models.blocks.kv_cache import KVCache

CAPTION, RETRIEVAL = "blip_caption", "blip_retrieval"
TOLERANCE = 5e-6
Checkpoints = Callable[[str], Saved]
Ours = Callable[..., BLIP]


def processor() -> Any:
    """BLIP's, of images of 32 pixels; the tokenizer knows the words w5 to w99, and writes [CLS] and [SEP]."""
    special = {"[PAD]": 0, "[CLS]": 4, "[UNK]": 2, "[SEP]": SEP}
    tokenizer = Tokenizer(models.WordLevel(special | {f"w{n}": n for n in range(5, VOCAB)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [("[CLS]", 4), ("[SEP]", SEP)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    images = getattr(transformers, "BlipImageProcessorPil", transformers.BlipImageProcessor)
    return transformers.BlipProcessor(images(size={"height": 32, "width": 32}), fast)


def photos() -> list[Image.Image]:
    draw = np.random.default_rng(0)
    return [Image.fromarray(draw.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in ((40, 30), (20, 70))]


def test_the_processor_makes_the_inputs(ours: Ours, saved: Checkpoints) -> None:
    """What it returns goes into our model as into transformers'; a batch of prompts gives what each gives alone."""
    make, texts = processor(), ["w7 w8 w9", "w10"]
    both = make(images=photos(), text=texts, return_tensors="pt", padding=True)
    assert both["input_ids"].tolist() == [[4, 7, 8, 9, SEP], [4, 10, SEP, 0, 0]]
    with torch.no_grad():
        expected = saved(RETRIEVAL).theirs(**both).itm_score
        assert distance(ours(RETRIEVAL).match(**both), expected) < TOLERANCE
    found = ours(CAPTION).generate(**both, max_new_tokens=2).tokens
    for row, (photo, text) in enumerate(zip(photos(), texts, strict=True)):
        given = make(images=photo, text=text, return_tensors="pt")
        alone = saved(CAPTION).theirs.generate(**given, max_new_tokens=2, do_sample=False)
        new = alone[0, given["input_ids"].shape[1] - 1 :].tolist()
        assert found[row, : len(new)].tolist() == new


def tiny(**changes: Any) -> BLIP:
    return BLIP.from_size("tiny", vision_layers=1, text_layers=1, **changes).eval()


IDS, PIXELS = torch.tensor([[5, 6, 7], [8, 9, 3]]), torch.zeros(2, 3, 32, 32)
NEITHER = "pixel_values or vision must be given, got neither"


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"input_ids": IDS[:, :0]}, "input_ids must have 1 to 32 tokens, got 0"),
        ({"attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}, "show a token of each row, got none in row 1"),
        ({"pixel_values": None}, NEITHER),
        ({"pixel_values": None, "input_ids": None}, NEITHER),
        ({"pixel_values": [1.0], "input_ids": None}, "pixel_values or vision must be a tensor, got list"),
        ({"vision": torch.zeros(2, 17, 32)}, "pixel_values or vision must be given, got both"),
        ({"input_ids": IDS.repeat(1, 11)}, "input_ids must have 1 to 32 tokens, got 33"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a positive integer, got 0"),
        ({"temperature": -1.0}, "temperature must be >= 0 and finite, got -1.0"),
        ({"pixel_values": torch.zeros(3, 3, 32, 32)}, "pixel_values must have batch 1 or input_ids' 2, got 3"),
        ({"pixel_values": PIXELS[:, :, :16]}, r"pixel_values must be \[B, 3, 32, 32\], got shape \(2, 3, 16, 32\)"),
        ({"pixel_values": PIXELS.long()}, "pixel_values must be float16, .* got torch.int64"),
        ({"pixel_values": [1.0]}, "pixel_values must be a tensor, got list"),
        ({"pixel_values": None, "vision": torch.zeros(2, 17, 48)}, r"vision must be \[B, P, 32\], got shape"),
        ({"pixel_values": None, "vision": torch.zeros(2, 32)}, r"vision must be \[B, P, 32\], got shape"),
        ({"input_ids": IDS.float()}, r"input_ids must be integers \[B, L\], got torch.float32"),
        ({"input_ids": IDS + 120}, "input_ids must be from 0 to 127, got 123 to 129"),
        ({"attention_mask": torch.ones(2, 4)}, r"attention_mask must be \[2, 3\] as input_ids, got shape \(2, 4\)"),
        ({"input_ids": None, "attention_mask": IDS}, "attention_mask must be None without input_ids"),
        ({"kv_cache": KVCache(1)}, "kv_cache must be a BLIPCache or None, got KVCache"),
        ({"kv_cache": BLIPCache(2)}, "kv_cache must have 1 layers, got 2"),
    ],
)
def test_bad_generation(given: dict[str, Any], match: str) -> None:
    model = tiny()
    with pytest.raises((TypeError, ValueError), match=match):
        model.generate(**{"input_ids": IDS, "pixel_values": PIXELS} | given)


def test_bad_continuation() -> None:
    model = tiny(text_length=6)
    cache = model.generate(IDS[:1, :2], PIXELS[:1], max_new_tokens=1, eos_token_id=()).kv_cache  # 2, and 1 pending
    for given, match in (
        ({"input_ids": IDS[:1], "pixel_values": PIXELS[:1]}, "pixel_values must be None with a kv_cache that has"),
        ({"input_ids": None}, "input_ids must be given with a kv_cache that has tokens, got None"),
        ({"input_ids": IDS}, "input_ids must be for kv_cache's batch 1, got 2"),
        ({"input_ids": IDS[:1].repeat(1, 2)}, "input_ids must have 0 to 3 tokens behind 3 in kv_cache, got 6"),
    ):
        with pytest.raises(ValueError, match=match):
            model.generate(**given, kv_cache=cache)
    assert model.generate(IDS[:1], kv_cache=cache, max_new_tokens=9).tokens.shape == (1, 1)  # the text is full
    with pytest.raises(ValueError, match="kv_cache must have fewer tokens than text_length = 6, got 7"):
        model.generate(IDS[:1, :0], kv_cache=cache)


def test_a_text_ends_at_the_maximum_length() -> None:
    model = tiny(text_length=5)
    tokens = model.generate(IDS[:1], PIXELS[:1], max_new_tokens=9, eos_token_id=()).tokens
    assert tokens.shape == (1, 3)  # the last one has all five before it


def test_heads_that_a_model_does_not_have() -> None:
    writes, compares = tiny(retrieval=False), tiny(generation=False)
    for call in (
        lambda: writes.match(IDS, PIXELS),
        lambda: writes.encode_text(IDS),
        lambda: writes.encode_image(PIXELS),
        lambda: compares(IDS, PIXELS),
        lambda: compares.generate(IDS, PIXELS),
    ):
        with pytest.raises(ValueError, match=r"made with (retrieval|generation)=True, got False"):
            call()
    with pytest.raises(ValueError, match="last_logits_only must be False"):
        tiny()(IDS, PIXELS, labels=IDS, last_logits_only=True)


def test_nothing_waits_for_a_device() -> None:
    """On a device that has no values, which the use of one would show."""
    config = tiny().config
    with torch.device("meta"):
        model = BLIP(config)
        ids, mask, pixels = torch.zeros(2, 6, dtype=torch.long), torch.ones(2, 6), torch.rand(2, 3, 32, 32)
        losses = model.losses(ids, pixels, mask, ids=torch.arange(2))
        assert losses.total.shape == () and losses.total.is_meta
        with torch.no_grad():
            texts = model._texts(ids, mask).opening(BOS, SEP)
            assert model(texts.ids, pixels, attention_mask=texts.valid).logits.shape == (2, 6, 128)


def test_compiled_code_is_one_graph() -> None:
    model = tiny()
    losses = lambda ids, pixels, mask: (
        model.match(ids, pixels, mask), model(ids, pixels, attention_mask=mask, labels=ids).loss
    )  # fmt: skip
    torch.compiler.reset()
    compiled = torch.compile(losses, fullgraph=True, backend="eager")
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    with torch.no_grad():
        for found, expected in zip(compiled(IDS, PIXELS, mask), losses(IDS, PIXELS, mask), strict=True):
            assert distance(found, expected) < TOLERANCE


@pytest.mark.slow
def test_bfloat16() -> None:
    """Under autocast, and of weights in bfloat16; of two pairs each has one negative, which is always the one drawn."""
    model, pixels = tiny(), torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    whole = model.losses(IDS, pixels)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model.losses(IDS, pixels)
    autocast.total.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    low = model.bfloat16().losses(IDS, pixels)
    for found in (autocast, low):
        for ours, exact in zip(found, whole, strict=True):
            assert ours is not None and exact is not None and ours.dtype == torch.float32
            assert distance(ours, exact) < 0.05


def test_padding_is_not_seen(ours: Ours) -> None:
    """Whatever its tokens are; in a row without any text nothing becomes NaN."""
    model, mask = ours(CAPTION), torch.tensor([[1, 1, 0], [0, 0, 0]])
    with torch.no_grad():
        x = model(IDS, PIXELS, attention_mask=mask, last_logits_only=True).logits
        y = model(IDS.masked_fill(mask == 0, 11), PIXELS, attention_mask=mask, last_logits_only=True).logits
    assert torch.equal(x[0], y[0]) and bool(x.isfinite().all())
    assert model.config.text_length == LENGTH


def test_texts() -> None:
    """Their first tokens, what is predicted of them, and prompts of them."""
    ids = torch.tensor([[4, 7, 8, 3], [0, 0, 4, 3], [4, 3, 0, 0], [3, 0, 0, 0]])
    valid = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    texts = Texts(ids, valid, True)
    assert texts.begun(1).ids.tolist() == [[1, 7, 8, 3], [0, 0, 1, 3], [1, 3, 0, 0], [1, 0, 0, 0]]
    assert texts.labels.tolist() == [[-100, 7, 8, 3], [-100, -100, -100, 3], [-100, 3, -100, -100], [-100] * 4]
    assert texts.of_first(ids[..., None]).flatten().tolist() == [4, 4, 4, 3]
    opening = texts.opening(1, 3)
    assert opening.ids.tolist() == [[1, 7, 8], [0, 0, 1], [1, 3, 0], [1, 0, 0]] and opening.padded
    assert opening.valid.int().tolist() == [[1, 1, 1], [0, 0, 1], [1, 0, 0], [1, 0, 0]]
    alone = Texts(ids[:1], valid[:1], False).opening(1, 3)
    assert alone.ids.tolist() == [[1, 7, 8]] and not alone.padded


@pytest.mark.slow
def test_a_row_that_ended_before_the_others() -> None:
    """The padding behind it is not seen in the next turn, which gives what the row gives alone."""
    model, pixels = tiny(), torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])  # no row has padding before the turn
    whole = model.generate(ids, pixels, max_new_tokens=2, eos_token_id=()).tokens
    end = int(whole[0, 0])
    assert end != int(whole[1, 0])
    caches = [model.generate(ids[:n], pixels[:n], max_new_tokens=2, eos_token_id=end).kv_cache for n in (2, 1)]
    with torch.no_grad():
        both, one = (model(ids[:n, 1:], kv_cache=cache).logits for n, cache in zip((2, 1), caches, strict=True))
    assert distance(both[0], one[0]) < TOLERANCE
