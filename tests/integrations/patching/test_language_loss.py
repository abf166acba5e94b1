"""The language-model loss of patched models: transformers' own loss, gradients, logits and generation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from patched import assert_same, loss_and_gradients, no_logits, patched
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from mmkernels.integrations.patching.changes import Change, Left
from mmkernels.integrations.patching.classes import restore
from mmkernels.integrations.patching.deferred import DeferredLogits
from mmkernels.integrations.patching.language_loss import language_loss
from mmkernels.meters import memory_why_not, peak_memory
from mmkernels.testing.families import FAMILIES
from mmkernels.testing.models import Family, randomise, seeded
from mmkernels.testing.parts import decoder, encoder, right_padded, tokens

MORE = {
    "bert_masked": Family("bert_masked", "BertForMaskedLM", encoder(), lambda: right_padded(tokens(3, 11), (11, 7, 4))),
    "granite": Family(
        "granite", "GraniteForCausalLM", decoder(logits_scaling=3.0), lambda: {"input_ids": tokens(2, 13)}
    ),
    "cohere": Family("cohere", "CohereForCausalLM", decoder(logit_scale=0.3), lambda: {"input_ids": tokens(2, 13)}),
    "mixtral": Family(
        "mixtral",
        "MixtralForCausalLM",
        decoder(num_local_experts=4, num_experts_per_tok=2, output_router_logits=True, experts_implementation="eager"),
        lambda: {"input_ids": tokens(2, 13)},
    ),
}
NAMES = [
    "llama", "gemma2", "gemma3", "bert_decoder", "bart", "t5", "whisper", "blip_caption", "blip_2", "internvl",
    "qwen2_5_vl", "llava", "mllama", *MORE,
]  # fmt: skip


def case(name: str) -> tuple[Any, dict[str, Any]]:
    """Returns a model in float64, and inputs with labels."""
    family = MORE.get(name) or FAMILIES[name]
    model, inputs = family.build()
    model = model.double()
    inputs = {key: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for key, x in inputs.items()}
    ids = inputs.pop("decoder_input_ids", None)
    inputs.pop("decoder_attention_mask", None)
    ids = inputs["input_ids"] if ids is None else ids
    labels = ids.clone()
    labels[:, ::3] = -100
    if name == "gemma2":
        del inputs["attention_mask"]  # what padding predicts is NaN
    return model, inputs | {"labels": labels}


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients(name: str) -> None:
    model, inputs = case(name)
    ours = patched(model, language_loss)
    with no_logits():
        found = loss_and_gradients(ours, **inputs)
    expected = loss_and_gradients(model, **inputs)
    assert_same(found, expected, 1e-7)
    assert isinstance(found[0].logits, DeferredLogits) and not isinstance(expected[0].logits, DeferredLogits)
    torch.testing.assert_close(found[0].logits.detach().clone(), expected[0].logits.detach(), rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def llama() -> Any:
    return FAMILIES["llama"].build()


def with_labels(inputs: dict[str, Any]) -> dict[str, Any]:
    return inputs | {"labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


@pytest.mark.parametrize("more", [{"num_items_in_batch": 7}, {"num_items_in_batch": torch.tensor(7)}, {}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_options_of_the_loss(llama: Any, dtype: torch.dtype, more: dict[str, Any]) -> None:
    model, inputs = llama
    model = copy.deepcopy(model).to(dtype)
    found = loss_and_gradients(patched(model, language_loss), **with_labels(inputs), **more)
    expected = loss_and_gradients(model, **with_labels(inputs), **more)
    assert_same(found, expected, 1e-6 if dtype == torch.float32 else 2e-3)


def test_label_smoothing_and_sums_of_blip() -> None:
    model, inputs = case("blip_caption")
    for part in (model, model.text_decoder):
        part.label_smoothing = 0.1
    ours = patched(model, language_loss)
    assert_same(loss_and_gradients(ours, **inputs), loss_and_gradients(model, **inputs), 1e-7)
    text = {"input_ids": inputs["input_ids"], "labels": inputs["labels"], "reduction": "none"}
    with torch.no_grad(), no_logits():
        found = ours.text_decoder(**text).loss
    torch.testing.assert_close(found, model.text_decoder(**text).loss.detach())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_autocast_checkpointing_and_tied_weights(tied: bool, checkpointing: bool) -> None:
    with seeded(0):
        model = randomise(LlamaForCausalLM(LlamaForCausalLM.config_class(**decoder(tie_word_embeddings=tied)))).train()
    inputs = {"input_ids": (ids := FAMILIES["llama"].build()[1]["input_ids"]), "labels": ids, "use_cache": False}
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ours = patched(model, language_loss)
    with torch.autocast("cpu", dtype=torch.bfloat16), no_logits():
        found = loss_and_gradients(ours, **inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = loss_and_gradients(model, **inputs)
    assert_same(found, expected, 2e-3)


def test_frozen_head_and_gradient_of_the_logits(llama: Any) -> None:
    model, inputs = llama
    model = copy.deepcopy(model)
    model.lm_head.requires_grad_(False)
    ours = patched(model, language_loss)
    assert_same(*(loss_and_gradients(m, **with_labels(inputs)) for m in (ours, model)), 1e-6)

    def distilled(m: nn.Module) -> Tensor:
        m.zero_grad()
        outputs = m(**with_labels(inputs))
        (outputs.loss + F.kl_div(outputs.logits.log_softmax(-1), torch.full_like(outputs.logits, 0.01))).backward()
        return m.model.embed_tokens.weight.grad  # type: ignore[no-any-return, union-attr]

    torch.testing.assert_close(distilled(ours), distilled(model), rtol=1e-4, atol=1e-6)


GENERATION: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "processors": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "do_sample": True, "top_k": 5},
    "outputs": {"output_logits": True, "output_scores": True, "return_dict_in_generate": True},
    "lookup": {"prompt_lookup_num_tokens": 2},
}


@pytest.mark.parametrize("name", GENERATION)
def test_generation(llama: Any, name: str) -> None:
    model, inputs = llama
    inputs = inputs if name != "lookup" else {"input_ids": inputs["input_ids"][:1]}
    found = []
    for m in (patched(model, language_loss), model):
        with seeded(1):
            found.append(m.generate(**inputs, max_new_tokens=6, pad_token_id=0, **GENERATION[name]))
    if name == "outputs":
        assert all(type(x) is Tensor for x in (*found[0].logits, *found[0].scores))
        torch.testing.assert_close(found[0].logits, found[1].logits)
        found = [x.sequences for x in found]
    assert torch.equal(*found)


def test_assisted_generation(llama: Any) -> None:
    model, inputs = llama
    ids = inputs["input_ids"][:1]
    helper = patched(model, language_loss)
    found = [m.generate(ids, assistant_model=helper, max_new_tokens=6, pad_token_id=0) for m in (helper, model)]
    assert torch.equal(*found)


def test_evaluation_without_gradients(llama: Any) -> None:
    model, inputs = llama
    ours = patched(model, language_loss).eval()
    with torch.no_grad(), no_logits():
        outputs = ours(**with_labels(inputs))
        best = outputs.logits.argmax(-1)
    with torch.inference_mode():
        expected = model(**with_labels(inputs))
        torch.testing.assert_close(ours(**with_labels(inputs)).loss, expected.loss)
    torch.testing.assert_close(outputs.loss, expected.loss)
    assert torch.equal(best, expected.logits.argmax(-1))


def test_compiled_models_return_logits(llama: Any) -> None:
    model, inputs = llama
    ours = patched(model, language_loss)
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    found, expected = compiled(**with_labels(inputs)), model(**with_labels(inputs))
    torch.testing.assert_close(found.loss, expected.loss)
    assert type(found.logits) is Tensor


class Odd(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_what_is_left(llama: Any) -> None:
    model, _ = llama

    def why(change: Any) -> str:
        other = copy.deepcopy(model)
        change(other)
        (found,) = language_loss(other)
        assert isinstance(found, Left) and found.module is other.get_output_embeddings()
        return found.why

    def set_head(head: nn.Module) -> Any:
        return lambda m: m.set_output_embeddings(head)

    assert why(set_head(nn.Conv1d(8, 8, 1))) == "its output layer is a Conv1d, not torch's linear layer"
    assert why(set_head(Odd(32, 100))) == "its output layer is a Odd, whose forward is its own"
    assert "accelerate" in why(lambda m: setattr(m.lm_head, "forward", m.lm_head.forward))
    quantised = torch.ao.nn.quantized.dynamic.Linear(8, 8)
    assert (
        why(set_head(quantised))
        == "its output layer is a torch.ao.nn.quantized.dynamic.modules.linear.Linear, not torch's linear layer"
    )
    assert list(language_loss(model.model)) == []
    (found,) = language_loss(nn.ModuleList([model, model]))
    assert isinstance(found, Change) and found.module is model.lm_head


def test_restored_head_is_a_linear_layer(llama: Any) -> None:
    model, inputs = llama
    ours = patched(model, language_loss)
    assert restore(ours.lm_head) and type(ours.lm_head) is nn.Linear
    assert type(ours(**inputs).logits) is Tensor


@pytest.mark.alone
@pytest.mark.skipif(memory_why_not() is not None, reason=str(memory_why_not()))
def test_memory_of_a_step_with_few_supervised_tokens() -> None:
    """With a tenth of the tokens supervised, a step needs less than a third of the memory: no logits are kept."""
    config = decoder(vocabulary=24_000, tie_word_embeddings=True)
    with seeded(0):
        model = LlamaForCausalLM(LlamaForCausalLM.config_class(**config))
        ids = torch.randint(5, 24_000, (1, 500))
    labels = ids.masked_fill(torch.arange(500) < 450, -100)
    ours = patched(model, language_loss)
    for m in (model, ours):
        for parameter in m.parameters():
            parameter.grad = torch.zeros_like(parameter)

    def memory(m: nn.Module) -> int:
        def step() -> None:
            m(input_ids=ids, labels=labels, use_cache=False).loss.backward()

        step()
        return peak_memory(step) or 0

    assert 3 * memory(ours) < memory(model)
