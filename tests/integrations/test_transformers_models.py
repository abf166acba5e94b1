"""Whole models against sdpa in float64, called in every way that leads to another kind of mask or cache.

In float64 any error of the integration is visible; `test_support.py` checks the kernels in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from threads import in_threads
from torch import Tensor

from mmkernels.integrations.transformers import counting, register
from mmkernels.integrations.transformers.support_compare import float64
from mmkernels.testing import models
from mmkernels.testing.families import FAMILIES
from mmkernels.testing.parts import encoder

MODELS = ("llama", "mistral_sliding", "gemma3_text", "gpt_oss")
# Ways to generate beside those of `mmkernels support`, and "static", which has unused keys in each kind of mask.
GENERATION = {
    "static": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "chunked prefill": {"prefill_chunk_size": 4},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}
IDS = torch.randint(5, 60, (2, 10), generator=torch.Generator().manual_seed(0))
LEFT = torch.ones_like(IDS).index_fill_(1, torch.arange(3), 0)
LEFT[1] = 1
RIGHT = LEFT.flip(1)


@pytest.fixture(autouse=True, scope="module")
def _registered() -> None:
    register()
    transformers.logging.set_verbosity_error()


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return build(request.param)


def build(name: str) -> Any:
    return FAMILIES[name].build()[0].double()


def other(model: Any) -> str:
    return "eager" if isinstance(model, transformers.GptOssForCausalLM) else "sdpa"  # sdpa has no sinks


def both(model: Any, run: Callable[[Any], Any], against: str = "") -> tuple[Any, Any, Any]:
    """Returns the results on "mmkernels" and on transformers' own attention, and the attention calls of the former."""
    model.set_attn_implementation(against or other(model))
    theirs = run(model)
    model.set_attn_implementation("mmkernels")
    with counting() as calls:
        ours = run(model)
    assert calls.dense == calls.bias == 0 and not calls.reasons and calls.total
    return ours, theirs, calls


@pytest.mark.parametrize("padded", [LEFT, RIGHT, None])
def test_forward_and_gradients(model: Any, padded: Tensor | None) -> None:
    def run(model: Any) -> list[Tensor]:
        model.zero_grad()
        logits = model(IDS, attention_mask=padded).logits
        valid = logits if padded is None else logits[padded.bool()]
        valid.sin().sum().backward()
        return [valid.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    ours, theirs, calls = both(model, run)
    torch.testing.assert_close(ours, theirs)
    kinds = len(set(getattr(model.config, "layer_types", None) or ["full_attention"]))
    assert calls.conversions == kinds < calls.spans + 1, "one conversion a kind of mask, not one a layer"


@pytest.mark.parametrize("mode", GENERATION)
def test_generation(model: Any, mode: str) -> None:
    def run(model: Any) -> Tensor:
        torch.manual_seed(1)
        mask = {"attention_mask": LEFT} if mode != "prompt lookup" else {}
        ids = IDS if mode != "prompt lookup" else IDS[:1]
        return model.generate(ids, **mask, max_new_tokens=12, min_new_tokens=12, **GENERATION[mode])

    ours, theirs, _ = both(model, run)
    assert torch.equal(ours, theirs) and ours.shape[1] == 22


def test_packed_sequences(model: Any) -> None:
    """Several sequences in one row, separated by their positions: each gives the same as in a row of its own."""
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    run = lambda model: model(IDS[:1], position_ids=positions, use_cache=False).logits.detach()
    ours, theirs, _ = both(model, run)
    torch.testing.assert_close(ours, theirs)
    if not isinstance(model, transformers.GptOssForCausalLM):  # transformers does not separate them in this model
        torch.testing.assert_close(ours[:, 4:], model(IDS[:1, 4:]).logits.detach())


def test_attention_weights_of_a_forward_pass(model: Any) -> None:
    run = lambda model: model(IDS, attention_mask=RIGHT, output_attentions=True).attentions
    with float64():  # else eager attention computes its softmax in float32
        ours, theirs, _ = both(model, run, "eager")
    assert len(ours) == 2
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want)


def test_attention_weights_while_generating(model: Any) -> None:
    """In float32: transformers' eager attention returns NaN if a float64 mask hides everything."""
    model.float()

    def run(model: Any) -> Any:
        record = {"output_attentions": True, "return_dict_in_generate": True}
        return model.generate(IDS, attention_mask=LEFT, max_new_tokens=3, min_new_tokens=3, **record)

    ours, theirs, _ = both(model, run, "eager")
    assert torch.equal(ours.sequences, theirs.sequences)
    assert len(ours.attentions) == len(theirs.attentions) == 3
    for step in range(3):
        valid = slice(3 if step == 0 else 0, None)  # the first three positions of the prompt are padding
        for got, want in zip(ours.attentions[step], theirs.attentions[step], strict=True):
            torch.testing.assert_close(got[:, :, valid], want[:, :, valid])


def test_continued_from_a_cache(model: Any) -> None:
    """Several new tokens after cached ones, and a prompt that is longer than the window."""

    def run(model: Any) -> Tensor:
        first = model(IDS[:, :4], attention_mask=LEFT[:, :4], use_cache=True)
        return model(IDS[:, 4:], attention_mask=LEFT, past_key_values=first.past_key_values).logits.detach()

    ours, theirs, _ = both(model, run)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model = build("gemma3_text").train()
    model.enable_input_require_grads()

    def run(model: Any) -> list[Tensor]:
        model.zero_grad()
        model(IDS, attention_mask=RIGHT, labels=IDS).loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    plain = both(model, run)[1]
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    ours, _, calls = both(model, run)
    torch.testing.assert_close(ours, plain)
    assert calls.spans == 4 and calls.conversions == 2, "the layers run again, the masks are not made again"


def test_dropout_in_training() -> None:
    model = build("llama").train()
    model.set_attn_implementation("mmkernels")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5

    def run() -> Tensor:
        torch.manual_seed(1)
        return model(IDS).logits.detach()

    dropped = run()
    assert torch.equal(dropped, run())
    assert not torch.allclose(dropped, model.eval()(IDS).logits)


def test_autocast() -> None:
    """Both in bfloat16: our error against float64 is at most twice that of sdpa."""
    model = build("llama").float()

    def run(model: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(IDS, attention_mask=RIGHT).logits.detach()[RIGHT.bool()].float()

    ours, theirs, _ = both(model, run)
    truth = model.double()(IDS, attention_mask=RIGHT).logits.detach()[RIGHT.bool()]
    assert (ours - truth).norm() <= 2 * (theirs - truth).norm()


def check_compiled(model: Any, run: Callable[[Any], Any]) -> None:
    """Compares one graph on "mmkernels" with sdpa."""
    model.set_attn_implementation("sdpa")
    theirs = run(model)
    model.set_attn_implementation("mmkernels")
    torch._dynamo.reset()
    torch.testing.assert_close(run(torch.compile(model, backend="aot_eager", fullgraph=True)), theirs)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "mistral_sliding")]


@pytest.mark.parametrize("name", ["gemma3_text", *SLOW])  # the first has the masks of both others
def test_compiled_as_one_graph(name: str) -> None:
    model = build(name)

    def run(call: Callable[..., Any]) -> list[Tensor]:
        model.zero_grad()
        logits = call(IDS, attention_mask=RIGHT, use_cache=False).logits[RIGHT.bool()]
        logits.sin().sum().backward()
        return [logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    check_compiled(model, run)


def test_decoding_compiled_over_a_static_cache() -> None:
    model = build("llama")

    def run(decode: Callable[..., Any]) -> Tensor:
        cache = transformers.StaticCache(config=model.config, max_cache_len=24)
        mask, steps = LEFT, []
        with torch.no_grad():
            out = model(IDS, attention_mask=mask, past_key_values=cache, use_cache=True)
            for _ in range(3):
                mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
                new = out.logits[:, -1:].argmax(-1)
                out = decode(new, attention_mask=mask, past_key_values=cache, use_cache=True)
                steps.append(out.logits)
        return torch.cat(steps, 1)

    check_compiled(model, run)


def test_from_pretrained_and_a_part_of_a_model(tmp_path: Path) -> None:
    model, inputs = FAMILIES["llava"].build()
    model.double().save_pretrained(tmp_path)
    del inputs["attention_mask"]
    inputs["pixel_values"] = inputs["pixel_values"].double()
    load = lambda implementation: transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path, attn_implementation=implementation
    ).eval()
    want = load("sdpa")(**inputs).logits
    for implementation, attention_calls in (
        ("mmkernels", 4),
        ({"vision_config": "mmkernels", "text_config": "sdpa"}, 2),
        ({"text_config": "mmkernels"}, 2),
    ):
        model = load(implementation)
        with counting() as calls:
            torch.testing.assert_close(model(**inputs).logits, want)
        assert calls.total == attention_calls, implementation


@pytest.mark.parametrize("name", ["bloom", "visual_bert", "roformer", "falcon"])
def test_a_model_without_the_interface_is_refused_and_not_misread(name: str, tmp_path: Path) -> None:
    """transformers accepts any registered name; these models would add bools to their scores, or raise a `KeyError`."""
    class_name = {"bloom": "BloomModel", "visual_bert": "VisualBertModel", "roformer": "RoFormerModel"}.get(name)
    class_name = class_name or "FalconForCausalLM"
    config = {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64} if name == "bloom" else encoder()
    model = models.build(class_name, config)
    model.save_pretrained(tmp_path)
    refused = pytest.raises(
        NotImplementedError, match=rf"is not for .* of transformers.models.{name}: .*use attn_imple"
    )
    with refused:
        type(model).from_pretrained(tmp_path, attn_implementation="mmkernels")
    with refused:
        type(model)._from_config(model.config, attn_implementation="mmkernels")
    model.config._attn_implementation_internal = "mmkernels"  # past every check
    with refused:
        model(IDS, attention_mask=LEFT)


@pytest.mark.parametrize("name", ["got_ocr2", "deepseek_vl_hybrid"])
def test_a_part_with_an_attention_of_its_own_keeps_it(name: str, tmp_path: Path) -> None:
    """The line that users write does what `set_attn_implementation` does, and warns or not as the part has its name."""
    model, inputs = FAMILIES[name].build()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="mmkernels")
    model.set_attn_implementation("mmkernels")
    with counting() as expected_calls:
        expected = model(**inputs).logits
    with counting() as calls:
        torch.testing.assert_close(loaded(**inputs).logits, expected)
    assert calls.total == expected_calls.total > 0


def test_on_the_meta_device() -> None:
    model = build("gemma3_text").to("meta")
    model.set_attn_implementation("mmkernels")
    out = model(IDS.to("meta"), attention_mask=LEFT.to("meta"))
    assert out.logits.shape == (2, 10, 128) and out.logits.is_meta


def test_two_threads_and_one_model() -> None:
    model = build("gemma3_text")
    model.set_attn_implementation("mmkernels")
    masks = [LEFT, RIGHT]
    with torch.no_grad():
        truth = [model(IDS, attention_mask=mask).logits for mask in masks]
    same: list[bool] = []

    @torch.no_grad()
    def work(number: int) -> None:
        for _ in range(10):
            same.append(torch.equal(model(IDS, attention_mask=masks[number]).logits, truth[number]))

    in_threads(2, work)
    assert same == [True] * 20


def test_a_custom_mask_function_that_is_no_span() -> None:
    """The result is right, and the reason why it is slower is counted."""
    from transformers.masking_utils import create_causal_mask

    model = build("llama")
    embeds = torch.randn(2, 10, 64, dtype=torch.float64)
    every_other = lambda batch, head, query, key: (query + key) % 2 == 0
    results = []
    for implementation in ("sdpa", "mmkernels"):
        model.set_attn_implementation(implementation)
        with counting() as calls:
            mask = create_causal_mask(model.config, embeds, None, None, and_mask_function=every_other)
            results.append(model(inputs_embeds=embeds, attention_mask=mask).logits.detach())
    torch.testing.assert_close(*results)
    assert calls.dense == calls.total == 2
    assert calls.reasons == {
        "the mask function combines a query's and a key's index by add": 1,
        "the model's matrix shows a query more than one run of keys": 1,
    }
