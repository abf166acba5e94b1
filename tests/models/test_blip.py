"""BLIP against transformers' models, and its generation."""

from __future__ import annotations

import copy as copies
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from blip_checkpoints import VOCAB, inputs, labels_of
from checkpoints import Saved, check_gradients, distance, their_gradients
from torch import Tensor

from mmkernels.models import BLIP

EXACT, TOLERANCE = 1e-12, 5e-6
CAPTION, UNTIED = "blip_caption", "blip_caption_shards"
RETRIEVAL, SHARDS = "blip_retrieval", "blip_retrieval_shards"
Checkpoints = Callable[[str], Saved]
Ours = Callable[..., BLIP]


def in_dtype(theirs: Any, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """Returns a copy of transformers' model in another dtype, and inputs."""
    given = inputs(theirs)
    given["pixel_values"] = given["pixel_values"].to(dtype)
    return copies.deepcopy(theirs).to(dtype), given


def caption_loss(logits: Tensor, given: dict[str, Tensor], smoothing: float) -> Tensor:
    """Returns transformers' loss, which it computes in this way, in the logits' dtype."""
    targets = labels_of(given)[:, 1:].flatten()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, label_smoothing=smoothing)


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [(CAPTION, torch.float64), (UNTIED, torch.float64), (CAPTION, torch.float32)],
    ids=str,
)
def test_captions(ours: Ours, saved: Checkpoints, variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Logits, loss and the gradient of every parameter, of texts with padding."""
    theirs, given = in_dtype(saved(variant).theirs, dtype)
    exact = dtype == torch.float64
    model = ours(variant, dtype)
    model.zero_grad()
    out = model(**given, labels=labels_of(given), return_logits=True)
    expected = theirs(**given, labels=labels_of(given))
    valid, tolerance = given["attention_mask"].bool(), EXACT if exact else TOLERANCE
    assert distance(out.logits[valid], expected.logits[valid]) < tolerance
    assert distance(out.loss, expected.loss) < tolerance
    assert out.logits.dtype == out.loss.dtype == dtype and out.kv_cache is None
    out.loss.backward()
    expected.loss.backward()
    gradients = their_gradients(Saved(variant, saved(variant).folder, theirs), tmp_path / "gradients", dtype)
    check_gradients(model, gradients, tolerance if exact else 2e-5)


@pytest.mark.parametrize(("variant", "dtype"), [(RETRIEVAL, torch.float64), (SHARDS, torch.float32)], ids=str)
def test_retrieval(ours: Ours, saved: Checkpoints, variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """What both heads say, and gradients of every parameter."""
    theirs, given = in_dtype(saved(variant).theirs, dtype)
    exact = dtype == torch.float64
    model = ours(variant, dtype)
    model.zero_grad()
    texts = given["input_ids"], given["attention_mask"]
    vision = model.encode_vision(given["pixel_values"])
    match = model.match(texts[0], attention_mask=texts[1], vision=vision)
    image, text = model.encode_image(vision=vision), model.encode_text(*texts)
    compared = image @ text.T
    expected = theirs(**given), theirs(**given, use_itm_head=False)
    tolerance = EXACT if exact else TOLERANCE
    assert distance(match, expected[0].itm_score) < tolerance
    assert distance(compared, expected[1].itm_score) < tolerance
    assert torch.allclose(torch.cat([image, text]).norm(dim=1), torch.ones(4, dtype=dtype))

    weights = torch.tensor([[1.0, -2.0], [3.0, 0.5]], dtype=dtype)
    loss = lambda match, compared: (match * weights).sum() + (compared * weights).sum()
    loss(match, compared).backward()
    loss(*(out.itm_score for out in expected)).backward()
    gradients = their_gradients(Saved(variant, saved(variant).folder, theirs), tmp_path / "gradients", dtype)
    assert model.logit_scale is not None and model.logit_scale.grad is None  # transformers' class has none
    model.logit_scale.grad = gradients["logit_scale"]
    check_gradients(model, gradients, tolerance if exact else 2e-5)


def test_padding_on_the_left(ours: Ours, saved: Checkpoints) -> None:
    """A text gives what it gives alone; transformers takes padding for its first token."""
    given, model = inputs(saved(RETRIEVAL).theirs), ours(RETRIEVAL)
    left = {name: given[name].roll(2, 1) for name in ("input_ids", "attention_mask")}
    left["input_ids"][0, :2] = left["attention_mask"][0, :2] = 0  # the other row ends with two
    alone = given["input_ids"][1:, :6], given["pixel_values"][1:]
    with torch.no_grad():
        assert distance(model.encode_text(**left)[1], model.encode_text(alone[0])[0]) < TOLERANCE
        assert distance(model.match(pixel_values=given["pixel_values"], **left)[1], model.match(*alone)[0]) < TOLERANCE


def without_padding(rows: Tensor) -> list[list[int]]:
    return [[token for token in row if token != 0] for row in rows.tolist()]


def test_generation(ours: Ours, saved: Checkpoints) -> None:
    """Prompts of a batch with padding, on either side, are continued as transformers continues each alone."""
    theirs, model = saved(CAPTION).theirs, ours(CAPTION)
    given = inputs(theirs)
    ids, mask, pixels = given.values()
    prompts = [ids[:1], ids[1:, :6]]
    expected = [
        theirs.generate(image, prompt.clone(), torch.ones_like(prompt), max_new_tokens=3, do_sample=False)
        for image, prompt in zip(pixels.split(1), prompts, strict=True)
    ]
    new = [found[0, prompt.shape[1] - 1 :].tolist() for found, prompt in zip(expected, prompts, strict=True)]
    first = model.generate(**given, max_new_tokens=3)
    assert without_padding(first.tokens) == new
    assert first.tokens[:, :3].tolist() == new  # no row has ended, so that the next turn has something to compare
    left = given | {"input_ids": ids.clone(), "attention_mask": mask.clone()}
    left["input_ids"][1], left["attention_mask"][1] = ids[1].roll(2), mask[1].roll(2)
    assert torch.equal(model.generate(**left, max_new_tokens=3).tokens, first.tokens)

    more = torch.tensor([[7, 8]] * 2)
    cache = copies.deepcopy(first.kv_cache)
    again = model.generate(more, kv_cache=first.kv_cache, max_new_tokens=1, eos_token_id=())
    whole = torch.cat([ids[1:, :5], first.tokens[1:], more[1:]], dim=1)
    once = model.generate(whole, pixels[1:], max_new_tokens=1, eos_token_id=())
    assert torch.equal(again.tokens[1:], once.tokens)
    with torch.no_grad():
        logits = model(more, kv_cache=cache).logits
    assert logits.shape == (2, 2, VOCAB)
    assert torch.equal(logits[:, -1].argmax(1, keepdim=True), again.tokens)


def test_generation_without_a_prompt(ours: Ours, saved: Checkpoints) -> None:
    """The images are encoded and projected once, alone or from their features, and change what is written."""
    theirs, model = saved(CAPTION).theirs, ours(CAPTION)
    pixels, calls = inputs(theirs)["pixel_values"], []
    expected = theirs.generate(pixels, max_new_tokens=4, do_sample=False)[:, 1:]
    hooks = [part.register_forward_hook(lambda *_: calls.append(1)) for part in (model.vision.patch, key_layer(model))]
    found = model.generate(pixel_values=pixels, max_new_tokens=4).tokens
    for hook in hooks:
        hook.remove()
    assert without_padding(found) == without_padding(expected) and len(calls) == 2
    model = copies.copy(model)
    model.config = replace(model.config, sep_token_id=int(found[0, 1]))  # what ends a text
    short = model.generate(vision=model.encode_vision(pixels), max_new_tokens=3).tokens
    assert short[0].tolist() == [*found[0, :2].tolist(), 0]


def key_layer(model: Any) -> Any:
    return model.text.blocks[0].cross.attention.k_proj


def test_images_matter(ours: Ours, saved: Checkpoints) -> None:
    """If they changed little, parity would prove little."""
    for variant in (CAPTION, RETRIEVAL):
        given, model = inputs(saved(variant).theirs), ours(variant)
        ids, mask, pixels = given.values()
        both = torch.cat([pixels[:1], pixels[:1].flip(3), pixels[1:]])
        texts, masks = ids[:1].expand(3, -1), mask[:1].expand(3, -1)
        with torch.no_grad():
            if variant == CAPTION:
                x = model(texts, both, attention_mask=masks, last_logits_only=True).logits
            else:
                x = model.match(texts, both, masks)
                images = model.encode_image(both)
                assert min(distance(images[i], images[0]) for i in (1, 2)) > 0.05
        assert min(distance(x[i], x[0]) for i in (1, 2)) > 0.05


def test_one_image_for_many_texts(ours: Ours, saved: Checkpoints) -> None:
    given = inputs(saved(RETRIEVAL).theirs)
    ids, mask, pixels = given.values()
    with torch.no_grad():
        shared = ours(RETRIEVAL).match(ids, pixels[:1], mask)
        assert distance(shared, ours(RETRIEVAL).match(ids, pixels[:1].expand(2, -1, -1, -1), mask)) < TOLERANCE


def test_the_tied_head(ours: Ours) -> None:
    for variant, tied in ((CAPTION, True), (UNTIED, False)):
        head = ours(variant).head
        assert head is not None and (head.last.weight is ours(variant).text.embed.weight) == tied
    assert ours(RETRIEVAL).head is None and ours(CAPTION).matching_head is None
    made = BLIP.from_size("tiny")
    assert made.head is not None and made.head.last.weight is made.text.embed.weight


def test_the_first_token_says_what_is_done() -> None:
    """[ENC] in place of the first token where the configuration has it: in `match` alone."""
    model = BLIP.from_size("tiny", vision_layers=1, text_layers=1).eval()
    assert model.config.enc_token_id == 2
    ids = torch.tensor([[9, 8, 7], [2, 8, 7], [5, 8, 7], [9, 8, 6]])
    with torch.no_grad():
        seen = model.match(ids, torch.rand(1, 3, 32, 32))
    assert distance(seen[1:3], seen[:1].expand(2, -1)) < TOLERANCE < 0.01 < distance(seen[3], seen[0])
