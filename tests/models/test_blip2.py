"""BLIP-2 and InstructBLIP against transformers' models: the language model's side, stage 2."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from blip2_checkpoints import QUERIES, VARIANTS, inputs, instructions, labels_of, pixels, prompt
from checkpoints import Saved, distance, their_gradients
from torch import Tensor

from mmkernels.models import BLIP2
from mmkernels.nn import cross_attention

# Both models compute in another order: measured over all cases here.
EXACT, TOLERANCE = 1e-12, 5e-6
PLAIN, INSTRUCT = "blip2_opt", "instruct_llama"


def each(*usual: str) -> list[Any]:
    """Every variant, of which `make test` takes some: the others vary them."""
    return [pytest.param(name, marks=[] if name in usual else pytest.mark.slow) for name in VARIANTS]


Checkpoints = Callable[[str], Saved]
Ours = Callable[..., BLIP2]


@pytest.fixture(scope="module")
def trained(ours: Ours) -> Callable[..., Any]:
    """variant, dtype -> our model, of which every parameter gets a gradient."""

    def thawed(variant: str, dtype: torch.dtype = torch.float32) -> BLIP2:
        frozen = ours(variant, dtype)
        model = BLIP2(replace(frozen.config, freeze_vision=False, freeze_text=False)).to(dtype)
        model.load_state_dict(frozen.state_dict())
        return model.eval()

    return cache(thawed)


def run(theirs: Any, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns logits and loss of transformers' model; it would compute the loss in float32.

    Padding does not count in the positions: angles of others differ by float32's rounding.
    """
    opt = theirs.config.text_config.model_type == "opt"
    places = {} if opt else {"position_ids": (given["attention_mask"].cumsum(1) - 1).clamp(min=0)}
    logits = theirs(**given, **places).logits
    return logits, F.cross_entropy(logits[:, :-1].flatten(0, 1), labels_of(given)[:, 1:].flatten())


@pytest.mark.parametrize("variant", each(PLAIN, INSTRUCT))
def test_logits_loss_and_gradients(
    trained: Ours, saved: Checkpoints, theirs: Any, variant: str, tmp_path: Path
) -> None:
    """In float64, of two prompts with padding, one of two images and one of one; of every parameter."""
    given, model, reference = inputs(variant), trained(variant, torch.float64), theirs(variant, torch.float64)
    given["pixel_values"] = given["pixel_values"].double()
    out = model(**given, labels=labels_of(given), return_logits=True)
    logits, loss = run(reference, given)
    valid = given["attention_mask"].bool()
    assert distance(out.logits[valid], logits[valid]) < EXACT and distance(out.loss, loss) < EXACT
    assert out.logits.dtype == out.loss.dtype == torch.float64

    out.loss.backward()
    loss.backward()
    expected = their_gradients(Saved(variant, saved(variant).folder, reference), tmp_path / "gradients", torch.float64)
    largest = max(float(x.norm()) for x in expected.values())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        shifts = name.endswith("k_proj.bias")  # all scores of a query shift alike
        unread = name.startswith(f"qformer.blocks.{model.config.qformer_layers - 1}.text_mlp")  # the last layer's
        if shifts or unread:
            assert float(parameter.grad.norm()) < EXACT * largest and float(expected[name].norm()) < EXACT * largest
        else:
            assert distance(parameter.grad, expected[name]) < EXACT, name


@pytest.mark.parametrize("variant", each(PLAIN, INSTRUCT))
def test_logits_in_float32(ours: Ours, theirs: Any, variant: str) -> None:
    given = inputs(variant)
    with torch.no_grad():
        logits, _ = run(theirs(variant), given)
        out = ours(variant)(**given)
    valid = given["attention_mask"].bool()
    assert distance(out.logits[valid], logits[valid]) < TOLERANCE


@pytest.mark.parametrize("variant", each(PLAIN))
def test_generation(ours: Ours, theirs: Any, variant: str) -> None:
    """Greedy, in a batch with padding on the left and two images in a prompt."""
    given = inputs(variant)
    expected = theirs(variant).generate(**given, max_new_tokens=4, do_sample=False, eos_token_id=None)
    tokens = ours(variant).generate(**given, max_new_tokens=4, eos_token_id=()).tokens
    assert tokens.tolist() == expected[:, -4:].tolist()


def test_generation_without_a_prompt(ours: Ours, theirs: Any) -> None:
    """Of two images: their markers and the first token of a text."""
    images = pixels(2)
    expected = theirs(PLAIN).generate(images, max_new_tokens=3, do_sample=False, eos_token_id=None)
    model = ours(PLAIN)
    assert model.generate(pixel_values=images, max_new_tokens=3, eos_token_id=()).tokens.tolist() == (
        expected[:, -3:].tolist()
    )


def test_a_second_turn_is_one_prompt(ours: Ours, theirs: Any) -> None:
    """With a second image, which is all that is encoded then."""
    model, (ids, _), (more, _) = ours(PLAIN), prompt([1]), prompt([1], start=60)
    images = pixels(2)
    first = model.generate(ids, images[:1], max_new_tokens=2, eos_token_id=())
    second = model.generate(more, images[1:], kv_cache=first.kv_cache, max_new_tokens=3, eos_token_id=())
    whole = torch.cat([ids, first.tokens, more], 1)
    expected = theirs(PLAIN).generate(images, whole, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert second.tokens.tolist() == expected[:, -3:].tolist()


@pytest.mark.parametrize("variant", each(INSTRUCT))
def test_images_and_instructions_matter(ours: Ours, variant: str) -> None:
    """If they changed little, parity would prove little."""
    given, model = inputs(variant, images=(1, 1)), ours(variant)
    with torch.no_grad():
        whole = model(**given, last_logits_only=True).logits
        other = given | {"pixel_values": given["pixel_values"].flip(0)}
        assert distance(model(**other, last_logits_only=True).logits, whole) > 0.05
        if model.config.instruct:
            other = given | {"qformer_input_ids": given["qformer_input_ids"].flip(0) + 1}
            assert distance(model(**other, last_logits_only=True).logits, whole) > 0.05


def test_one_image_with_several_instructions(ours: Ours, monkeypatch: pytest.MonkeyPatch) -> None:
    """The image is encoded once, and so are its keys and values: attention gets one image, several queries."""
    model, asked = ours(INSTRUCT), instructions(3)
    calls: list[tuple[int, ...]] = []
    call = cross_attention.cross_attention

    def counted(query: Tensor, key: Tensor, *args: Any, **options: Any) -> Tensor:
        calls.append((query.shape[0], key.shape[0], query.shape[2], key.shape[2]))
        return call(query, key, *args, **options)

    with torch.no_grad():
        thrice = model.encode(pixels(1).expand(3, -1, -1, -1), **asked)
        monkeypatch.setattr(cross_attention, "cross_attention", counted)
        visual = model.encode(pixels(1), **asked)
    torch.testing.assert_close(visual.tokens, thrice.tokens)
    assert visual.lengths == (QUERIES,) * 3
    patches, tokens = 5, QUERIES + 5
    shared, looks = (3, 3, tokens, tokens), (3, 1, QUERIES, patches)
    assert calls == [(1, 1, patches, patches), shared, looks, shared]


def test_hidden_states_are_what_the_head_reads(ours: Ours) -> None:
    model, (ids, _) = ours(PLAIN), prompt([1])
    with torch.no_grad():
        out = model(ids, pixels(1), return_hidden=True)
        assert torch.equal(model.head(out.hidden), out.logits)


def test_parts_that_are_frozen() -> None:
    """They get no gradient and drop nothing, whatever mode is set; the others do."""
    model = BLIP2.from_size("tiny", vision_dropout=0.5, text_dropout=0.5, qformer_dropout=0.5)
    frozen = [model.vision, model.vision_norm, model.decoder, model.head]
    for mode in (True, False):
        model.train(mode)
        assert not any(part.training for whole in frozen for part in whole.modules())
        assert model.qformer.training == model.projection.training == mode
    names = {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert names == {"qformer", "projection"}
    images = torch.rand(1, 3, 32, 32, requires_grad=True)
    assert not model.encode_vision(images).requires_grad
    model.vision.blocks[1].requires_grad_(True)  # by hand, as LoRA does with what it adds
    assert model.encode_vision(images).requires_grad
    whole = BLIP2.from_size("tiny", freeze_vision=False, freeze_text=False)
    assert whole.vision.training and whole.decoder.training and all(p.requires_grad for p in whole.parameters())
