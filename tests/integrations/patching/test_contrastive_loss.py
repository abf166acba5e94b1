"""The contrastive loss of patched models: transformers' own loss, gradients and logits."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from patched import assert_same, loss_and_gradients, no_logits, patched
from torch import Tensor

from mmkernels.integrations.patching.changes import Change
from mmkernels.integrations.patching.contrastive_loss import COMPARED, contrastive_loss
from mmkernels.integrations.patching.deferred import DeferredLogits
from mmkernels.meters import memory_why_not, peak_memory
from mmkernels.testing.families import FAMILIES
from mmkernels.testing.models import Config, Family
from mmkernels.testing.parts import encoder, right_padded, tokens, vision
from mmkernels.transformers_version import VersionError

SIDES: Config = {"projection_dim": 24, "text_config": encoder(), "vision_config": vision()}


def pairs() -> dict[str, Any]:
    return right_padded(tokens(3, 9), (9, 7, 4)) | {"pixel_values": torch.randn(3, 3, 32, 32)}


def sounds() -> dict[str, Any]:
    return right_padded(tokens(3, 9), (9, 7, 4)) | {
        "input_features": torch.randn(3, 1, 64, 32),
        "is_longer": torch.zeros(3, 1, dtype=torch.bool),
    }


def family(model: str, config: Config, inputs: Any = pairs) -> Family:
    return Family(model, model, config, inputs)


SWIN_SOUND: Config = {
    "num_mel_bins": 32, "spec_size": 64, "patch_size": 4, "patch_stride": [4, 4], "window_size": 4, "hidden_size": 32,
    "depths": [1, 1], "num_attention_heads": [2, 2], "enable_fusion": False, "patch_embeds_hidden_size": 16,
    "num_hidden_layers": 2,
}  # fmt: skip
MODELS = {
    "clip": FAMILIES["clip"],
    "siglip": FAMILIES["siglip"],
    "siglip2": FAMILIES["siglip2"],
    "altclip": family("AltCLIPModel", SIDES | {"text_config": encoder(project_dim=32)}),
    "chinese_clip": family("ChineseCLIPModel", SIDES),
    "metaclip_2": family("MetaClip2Model", SIDES),
    "clipseg": family("CLIPSegModel", SIDES),
    "vision_text_dual_encoder": family(
        "VisionTextDualEncoderModel",
        {
            "projection_dim": 24,
            "text_config": encoder(model_type="bert"),
            "vision_config": vision(model_type="vit"),
        },
    ),
    "blip": family("BlipModel", SIDES),
    "clap": family(
        "ClapModel",
        {"projection_dim": 24, "text_config": encoder(projection_dim=24), "audio_config": SWIN_SOUND},
        sounds,
    ),
}


def case(name: str) -> tuple[Any, dict[str, Any]]:
    """Returns a model in float64, and inputs with as many texts as images."""
    model, inputs = MODELS[name].build()
    model = model.double()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.startswith("logit_scale"):
                parameter.fill_(1.3)
    n = min(x.shape[0] for x in inputs.values() if isinstance(x, Tensor))
    inputs = {key: x[:n] if isinstance(x, Tensor) else x for key, x in inputs.items()}
    inputs = {key: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for key, x in inputs.items()}
    return model, inputs | {"return_loss": True}


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients(name: str) -> None:
    model, inputs = case(name)
    ours = patched(model, contrastive_loss)
    with no_logits():
        found = loss_and_gradients(ours, **inputs)
    expected = loss_and_gradients(model, **inputs)
    assert_same(found, expected, 1e-10)
    assert found[0].keys() == expected[0].keys()
    logits = [key for key in expected[0] if key.startswith("logits_per")]
    assert len(logits) == 2
    for key in logits:
        assert isinstance(found[0][key], DeferredLogits)
        torch.testing.assert_close(found[0][key].detach().clone(), expected[0][key].detach())


def test_without_a_loss_or_as_a_tuple() -> None:
    model, inputs = case("clip")
    ours = patched(model, contrastive_loss)
    plain = {key: x for key, x in inputs.items() if key != "return_loss"}
    outputs = ours(**plain)
    assert outputs.loss is None and type(outputs.logits_per_text) is Tensor
    torch.testing.assert_close(outputs.logits_per_text, model(**plain).logits_per_text)
    for more in ({"return_dict": False}, {"output_hidden_states": True}):
        found, expected = ours(**inputs, **more), model(**inputs, **more)
        torch.testing.assert_close(found[0], expected[0])
        assert len(found) == len(expected) and type(found) is type(expected)
    assert inspect.signature(ours.forward) == inspect.signature(model.forward)


def test_gradient_through_the_logits_and_other_sizes() -> None:
    model, inputs = case("clip")

    def gradient(m: Any) -> Tensor:
        m.zero_grad()
        outputs = m(**inputs)
        (outputs.loss + outputs.logits_per_image.square().mean()).backward()
        return m.visual_projection.weight.grad  # type: ignore[no-any-return]

    ours = patched(model, contrastive_loss)
    torch.testing.assert_close(gradient(ours), gradient(model))
    inputs["pixel_values"] = inputs["pixel_values"][:1].expand(inputs["input_ids"].shape[0] + 1, -1, -1, -1)
    messages = set[str]()
    for m in (ours, model):
        with pytest.raises((IndexError, ValueError, RuntimeError)) as error:
            m(**inputs)
        messages.add(str(error.value))
    assert len(messages) == 1


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_autocast_and_bfloat16(name: str) -> None:
    model, inputs = case(name)
    model = model.float()
    inputs["pixel_values"] = inputs["pixel_values"].float()
    ours = patched(model, contrastive_loss)
    for enabled in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            found, expected = loss_and_gradients(ours, **inputs)[0], loss_and_gradients(model, **inputs)[0]
        assert found.loss.dtype == expected.loss.dtype
        torch.testing.assert_close(found.loss, expected.loss, rtol=2e-2 if enabled else 1e-5, atol=1e-5)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    found, expected = (loss_and_gradients(m.bfloat16(), **inputs)[0].loss for m in (ours, copy.deepcopy(model)))
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=3e-2, atol=1e-2)


def test_compiled_models_run_their_own_code() -> None:
    model, inputs = case("clip")
    torch._dynamo.reset()
    compiled = torch.compile(patched(model, contrastive_loss), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs).loss, model(**inputs).loss)


@pytest.mark.parametrize("compared", COMPARED, ids=lambda each: each.path.rpartition(".")[2])
def test_every_class_of_the_table_exists(compared: Any) -> None:
    import importlib

    module, _, name = f"transformers.models.{compared.path}".rpartition(".")
    theirs = getattr(importlib.import_module(module), name)
    assert "return_loss" in inspect.signature(theirs.forward).parameters


def test_a_class_without_the_argument_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmkernels.integrations.patching import contrastive_loss as module

    model, _ = case("clip")
    module._known.cache_clear()
    (found,) = contrastive_loss(model)
    assert isinstance(found, Change) and found.op == "info_nce"
    module._known.cache_clear()
    theirs = type(model)
    monkeypatch.setattr(theirs, "forward", lambda self, input_ids, with_loss: None)
    with pytest.raises(VersionError, match="with_loss"):
        list(contrastive_loss(model))
    module._known.cache_clear()


@pytest.mark.alone
@pytest.mark.skipif(memory_why_not() is not None, reason=str(memory_why_not()))
def test_memory_is_linear_in_the_batch() -> None:
    """A step on embeddings of 3,000 pairs keeps no matrix of 3,000 x 3,000 numbers."""
    model, _ = case("clip")
    model = model.float()
    ours = patched(model, contrastive_loss)
    n = 3000
    embeddings = [torch.randn(n, 24, requires_grad=True) for _ in range(2)]

    def memory(m: Any) -> int:
        from transformers.modeling_outputs import BaseModelOutputWithPooling as Output

        def features(index: int) -> Any:
            return lambda **kwargs: Output(pooler_output=embeddings[index] * 1.0)

        m.get_image_features, m.get_text_features = features(0), features(1)

        def step() -> None:
            m(input_ids=None, pixel_values=None, return_loss=True).loss.backward()

        step()
        return peak_memory(step) or 0

    assert memory(ours) < 4 * n * n < memory(model)
