"""Models that are built with "mmkernels" and have an attention of their own: refused, or left as they are."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers

from mmkernels.integrations.transformers import NAME, counting, register
from mmkernels.integrations.transformers.masks import make_mask
from mmkernels.integrations.transformers.own_attention import guard
from mmkernels.integrations.transformers.support import YES, check, quiet
from mmkernels.testing.families import FAMILIES
from mmkernels.testing.models import build
from mmkernels.testing.shrink import shrink


@pytest.fixture(autouse=True)
def _registered() -> None:
    register()


def small(name: str) -> Any:
    return build(name, shrink(getattr(transformers, name).config_class().to_dict()))


def with_it(model: Any) -> Any:
    config = copy.deepcopy(model.config)
    config._attn_implementation = None
    return type(model)._from_config(config, attn_implementation=NAME)


@pytest.mark.parametrize("name", ["FalconForCausalLM", "MptForCausalLM", "BlipForConditionalGeneration"])
def test_a_model_of_its_own_attention_is_refused_when_it_is_built(name: str) -> None:
    """Falcon looks the name up in a table; MPT has a part that is no model; all parts of BLIP have their own."""
    model = small(name)
    with pytest.raises(NotImplementedError, match=r'has no attention interface; use attn_implementation="eager"'):
        with_it(model)


def test_a_part_of_its_own_attention_keeps_it_with_a_warning() -> None:
    model = small("GraniteSpeechForConditionalGeneration")
    with pytest.warns(
        UserWarning, match="GraniteSpeechConformerAttention of .* has no attention interface: .* keeps it"
    ):
        built = with_it(model)
    assert built.config.text_config._attn_implementation == NAME
    chosen = {
        type(part).__name__: part.config._attn_implementation for part in built.modules() if hasattr(part, "config")
    }
    assert chosen["GraniteSpeechCTCEncoder"] != NAME == chosen["GraniteModel"]


@pytest.mark.parametrize("name", ["SamVisionModel", "GitModel"])
def test_a_table_of_attention_classes_has_the_name(name: str) -> None:
    """The model looks the name up, and keeps its own class; if that adds the mask to its scores, it is refused then."""
    built = with_it(small(name)).eval()
    if name == "GitModel":
        with pytest.raises(NotImplementedError, match="applies the attention mask itself"):
            built(torch.ones(1, 4, dtype=torch.long))
    else:
        built(torch.zeros(1, 3, *[built.config.image_size] * 2))


def test_a_model_of_the_hub_with_a_table_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("modeling_of_the_hub")

    class Attention(torch.nn.Module):
        pass

    class Model(transformers.PreTrainedModel):
        config_class = transformers.LlamaConfig

    Model.__module__ = module.__name__
    module.__dict__.update(CLASSES={"eager": Attention}, Model=Model)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with pytest.raises(NotImplementedError, match="Attention of modeling_of_the_hub"):
        Model._from_config(transformers.LlamaConfig(), attn_implementation=NAME)


def test_the_constructor_is_wrapped_once() -> None:
    wrapped = transformers.PreTrainedModel.get_correct_attn_implementation
    guard(transformers.PreTrainedModel)
    assert transformers.PreTrainedModel.get_correct_attn_implementation is wrapped
    assert build("LlamaModel", FAMILIES["llama"].config).config._attn_implementation == "sdpa"


def test_support_notices_a_model_that_is_loaded_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    right = transformers.PreTrainedModel.get_correct_attn_implementation

    def forgets(self: Any, requested_attention: str | None, is_init_check: bool = False) -> str:
        return right(self, None if is_init_check else requested_attention, is_init_check)

    forgets.guarded = True  # type: ignore[attr-defined]

    monkeypatch.setattr(transformers.PreTrainedModel, "get_correct_attn_implementation", forgets)
    row = check(FAMILIES["llama"], ways=())
    assert (row.forward, row.gradients) == (YES, YES)
    assert row.loading == "no: _from_config(attn_implementation='mmkernels') makes 0 attention calls, " + (
        "set_attn_implementation 2"
    )


def test_an_encoder_without_padding_compiles_as_one_graph() -> None:
    """Its mask hides nothing, and is an object all the same."""
    with quiet():
        model, inputs = FAMILIES["bert"].build()
        ids = inputs["input_ids"]
        model.set_attn_implementation("eager")
        expected = model(ids).last_hidden_state
        model.set_attn_implementation(NAME)
        torch._dynamo.reset()
        out = torch.compile(model, backend="aot_eager", fullgraph=True)(ids).last_hidden_state
    torch.testing.assert_close(out, expected)


def test_a_mask_is_pickled(tmp_path: Path) -> None:
    mask = make_mask(2, 3, 4)
    again = pickle.loads(pickle.dumps(mask))
    assert again.shape == mask.shape and torch.equal(again.dense(), mask.dense())
    with counting() as calls:
        copy.deepcopy(mask)
    assert not calls.reasons
