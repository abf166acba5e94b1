"""Whole models whose attention is changed class by class: forward, gradients, weights and generation as before."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from test_towers import both as attention
from test_towers import patch
from torch import Tensor, nn

import mmkernels
from mmkernels.integrations.transformers import counting
from mmkernels.integrations.transformers.support_compare import float64
from mmkernels.testing.families import FAMILIES
from mmkernels.testing.models import build, randomise, seeded
from mmkernels.testing.parts import encoder, right_padded, tokens, vision

CALLS = {
    "flava": 6, "vilt": 2, "visual_bert": 2, "lxmert": 12, "perceiver": 3, "blip_itm": 6, "blip_itc": 4,
    "blip_caption": 6, "got_ocr2": 2, "idefics": 2,
}  # fmt: skip
"""How many attention calls of a forward pass run on ours."""


@pytest.fixture
def _wide() -> Iterator[None]:
    """Float64 also where a model asks for float32."""
    with float64():
        yield


in_float64 = pytest.mark.usefixtures("_wide")


def wide(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def numbers(output: Any) -> Iterator[Tensor]:
    """Yields the floating tensors of a model's output."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict | list | tuple):
        for x in output.values() if isinstance(output, dict) else output:
            yield from numbers(x)


def both(name: str) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """Returns a model as transformers has it, the same one patched, and inputs, in float64."""
    theirs, inputs = FAMILIES[name].build()
    theirs = theirs.double()
    ours = copy.deepcopy(theirs)
    assert patch(ours)
    return theirs, ours, {name: x.double() if wide(x) else x for name, x in inputs.items()}


def assert_equal(ours: Any, theirs: Any) -> None:
    ours, theirs = list(numbers(ours)), list(numbers(theirs))
    assert theirs and len(ours) == len(theirs)
    for x, expected in zip(ours, theirs, strict=True):
        assert x.shape == expected.shape and (x - expected).norm() <= 1e-10 * expected.norm()


@in_float64
@pytest.mark.parametrize("name", CALLS)
def test_forward_and_gradients(name: str) -> None:
    theirs, ours, inputs = both(name)
    with seeded(0):  # ViLT draws which patches it reads
        expected = theirs(**inputs)
    with seeded(0), counting() as calls:
        got = ours(**inputs)
    assert calls.total >= CALLS[name]
    assert_equal(got, expected)
    for output in (expected, got):
        sum(x.sin().sum() for x in numbers(output) if x.requires_grad).backward()  # type: ignore[union-attr]
    grads = [{n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (theirs, ours)]
    assert grads[0].keys() == grads[1].keys()
    for parameter, expected_grad in grads[0].items():
        error = (grads[1][parameter] - expected_grad).norm()
        assert error <= 1e-10 * (1 + expected_grad.norm()), parameter


@in_float64
@pytest.mark.parametrize("name", ["flava", "visual_bert", "lxmert", "perceiver", "blip_caption"])
def test_attentions(name: str) -> None:
    theirs, ours, inputs = both(name)
    asked = {"output_attentions": True, "output_hidden_states": True}
    assert_equal(ours(**inputs, **asked), theirs(**inputs, **asked))


def blip(model: str) -> Any:
    config = dict(encoder(encoder_hidden_size=32, is_decoder=True, sep_token_id=2))
    parts = {"text_config": config, "vision_config": vision(), "projection_dim": 16, "image_text_hidden_size": 16}
    with seeded(0):
        return randomise(build(model, parts)).double().eval()


GENERATE: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "no cache": {"use_cache": False},
}


@in_float64
@pytest.mark.parametrize("ways", GENERATE)
def test_captions(ways: str) -> None:
    theirs, inputs = blip("BlipForConditionalGeneration"), right_padded(tokens(2, 5), (5, 5))
    pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    ours = copy.deepcopy(theirs)
    patch(ours)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, **GENERATE[ways]}
    expected = theirs.generate(pixel_values=pixels, input_ids=inputs["input_ids"], **options)
    with counting() as calls:
        got = ours.generate(pixel_values=pixels, input_ids=inputs["input_ids"], **options)
    assert torch.equal(got, expected) and got.shape[1] > 6
    assert calls.total > 10


@in_float64
def test_answers() -> None:
    """An encoder reads the question and the image, a decoder reads the encoder."""
    theirs, inputs = blip("BlipForQuestionAnswering"), right_padded(tokens(2, 5), (5, 3))
    ours = copy.deepcopy(theirs)
    patch(ours)
    pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    results = [model.generate(pixel_values=pixels, **inputs, max_new_tokens=6) for model in (theirs, ours)]
    assert torch.equal(*results)
    labels = tokens(2, 4)
    assert_equal(*(model(pixel_values=pixels, **inputs, labels=labels) for model in (ours, theirs)))


@in_float64
def test_trocr() -> None:
    """A decoder with a cache for its own keys and one for the image's."""
    small = {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64, "max_position_embeddings": 40}
    text = transformers.TrOCRConfig(
        vocab_size=100, d_model=32, cross_attention_hidden_size=32, is_decoder=True, **small
    )
    with seeded(0):
        image = transformers.ViTModel(transformers.ViTConfig(**vision()))
        theirs = transformers.VisionEncoderDecoderModel(encoder=image, decoder=transformers.TrOCRForCausalLM(text))
        theirs = randomise(theirs).double().eval()
    ours = copy.deepcopy(theirs)
    assert patch(ours) == ["TrOCRAttention"] * 4
    pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    options: dict[str, Any] = {"max_new_tokens": 6, "decoder_start_token_id": 1, "eos_token_id": None}
    for beams in (1, 2):
        results = [model.generate(pixels, num_beams=beams, **options) for model in (theirs, ours)]
        assert torch.equal(*results) and results[0].shape[1] == 7
    ids = tokens(2, 5)
    assert_equal(*(m(pixel_values=pixels, decoder_input_ids=ids, output_attentions=True) for m in (ours, theirs)))


def test_checkpointing_and_autocast() -> None:
    theirs, ours, inputs = both("blip_caption")
    models = [model.float().train() for model in (theirs, ours)]
    ours.gradient_checkpointing_enable()  # type: ignore[operator]
    inputs = {name: x.float() if x.is_floating_point() else x for name, x in inputs.items()}
    results = []
    for model in models:
        for layer in model.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.0
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(**inputs).logits
        logits.float().sin().sum().backward()
        results.append([logits.float(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for x, expected in zip(*results, strict=True):
        assert (x - expected).norm() <= 0.1 * (1 + expected.norm())


@pytest.mark.parametrize("name", ["BlipAttention", "GotOcr2VisionAttention", "ViltSelfAttention"])
def test_compiled(name: str) -> None:
    """In one graph."""
    theirs, ours, arguments = attention(name)
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    expected = theirs(**arguments)[0]
    assert (compiled(**arguments)[0] - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("name", ["blip_caption", "idefics"])
def test_there_and_back(name: str) -> None:
    """`patch` finds these modules beside those that transformers has a slot for, and `unpatch` forgets none."""
    model, inputs = FAMILIES[name].build()
    names = [type(module) for module in model.modules()]
    expected = model(**inputs).logits
    report = mmkernels.patch(model, verbose=False)
    ours = {"BlipAttention", "BlipTextSelfAttention", "IdeficsPerceiverAttention"}
    assert sum(row.count for row in report.replaced if row.module in ours) == CALLS[name]
    assert not [row for row in report.left if row.what == "attention"]
    assert (model(**inputs).logits - expected).norm() <= 1e-5 * expected.norm()
    mmkernels.unpatch(model, verbose=False)
    assert [type(module) for module in model.modules()] == names
    assert torch.equal(model(**inputs).logits, expected)
