"""`patch` of models in which the user, or another package, has changed methods too."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers
from patched_models import TEXT, close, llama, objects, same
from torch import nn
from transformers.models.blip import modeling_blip
from transformers.models.got_ocr2 import modeling_got_ocr2

from mmkernels import patch, unpatch
from mmkernels.integrations.patching import apply, grounding_dino
from mmkernels.integrations.patching.changes import Change, Known, Left, by_class
from mmkernels.integrations.transformers import counting
from mmkernels.testing.models import build, randomise
from mmkernels.transformers_version import VersionError

VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip


def pixels() -> torch.Tensor:
    return torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def blip(layers: int = 1) -> Any:
    return randomise(build("BlipVisionModel", VISION | {"num_hidden_layers": layers}), std=0.3).eval()


def doubled(module: Any, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
    """Of the signature that mmkernels is written for."""
    return 2 * module.projection(hidden_states), None


def test_a_method_that_the_user_has_put_into_a_class_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_blip.BlipAttention, "forward", doubled)
    model = blip()
    expected = model(pixels())[0]
    with pytest.raises(ValueError, match=rf"\(1 x BlipAttention: BlipAttention.forward is that of {__name__}\)$"):
        patch(model, verbose=False)
    close(model(pixels())[0], expected)


def test_what_the_user_has_put_around_a_method_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    own = modeling_blip.BlipAttention.forward

    @functools.wraps(own)
    def forward(self: Any, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        return 2 * own(self, hidden_states, **kwargs)[0], None

    monkeypatch.setattr(modeling_blip.BlipAttention, "forward", forward)
    with pytest.raises(ValueError, match=r"BlipAttention.forward is that of"):
        patch(blip(), verbose=False)


def test_another_signature_of_the_users_is_said_to_be_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_blip.BlipAttention, "forward", lambda self, x: (x, None))
    with pytest.raises(VersionError, match=rf"BlipAttention.forward\(x\) \(which is that of {__name__}\) instead of"):
        patch(blip(), verbose=False)


def test_a_method_of_one_module_goes_on() -> None:
    model = blip(layers=2)
    first = model.encoder.layers[0].self_attn
    first.forward = functools.partial(doubled, first)
    expected = model(pixels())[0]
    report = patch(model, verbose=False)
    assert report.ops == {"cross_attention": 1}
    assert [x.why for x in report.left] == ["its forward was set on the module, as accelerate's hooks do"]
    close(model(pixels())[0], expected)


def test_a_subclass_with_a_step_of_its_own_is_left() -> None:
    class Own(modeling_got_ocr2.GotOcr2VisionAttention):
        def get_decomposed_rel_pos(self, *args: Any) -> torch.Tensor:
            return torch.zeros(())

    config = transformers.GotOcr2VisionConfig(hidden_size=24, num_attention_heads=3, image_size=32, patch_size=8)
    with pytest.raises(ValueError, match="Own has a get_decomposed_rel_pos of its own"):
        patch(nn.ModuleList([Own(config, 0)]), verbose=False)


def test_a_method_that_something_keeps_is_theirs_again() -> None:
    """As accelerate's hooks keep it: the module's ``forward`` calls its ``_old_forward``."""
    model = blip()
    attention = model.encoder.layers[0].self_attn
    patch(model, verbose=False)
    attention._old_forward = attention.forward
    attention.forward = lambda *args, **kwargs: attention._old_forward(*args, **kwargs)
    unpatch(model, verbose=False)
    with counting() as calls:
        model(pixels())
    assert calls.total == 0 and attention._old_forward.__func__ is modeling_blip.BlipAttention.forward


@pytest.mark.parametrize(
    "build_another", [transformers.LlamaForCausalLM, transformers.AutoModelForCausalLM.from_config]
)
def test_a_model_that_is_built_of_a_patched_ones_configuration(build_another: Any) -> None:
    """It is patched by name, and both can go back."""
    model = llama(num_hidden_layers=1)
    before = objects(model)
    name = model.config._attn_implementation
    patch(model, verbose=False)
    another = build_another(model.config)
    with counting() as calls:
        another(**TEXT)
    assert calls.total == 1
    unpatch(another, verbose=False)
    assert another.config._attn_implementation == name
    unpatch(model, verbose=False)
    assert same(objects(model), before) and model.config._attn_implementation == name


class Inner(nn.Module):
    """A class of someone else's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Outer(Inner):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()


def test_what_is_left_is_said_though_a_part_of_it_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Known(f"{__name__}.Inner", {"forward": lambda module, x: x + 1}, {}, "sum", "add", "none")
    of_outer = Known(f"{__name__}.Outer", {"forward": lambda module, x: x}, {}, "pooling", "pool", "none")
    left = lambda model: (Left(x.module, x.what, "it is odd") for x in by_class([of_outer])(model))
    monkeypatch.setattr(apply, "kinds", lambda: (left, by_class([ours])))
    model = nn.ModuleList([Outer()])
    model[0].forward = lambda x: x
    report = patch(model, verbose=False)
    assert report.ops == {"add": 1} and "it is odd" in {x.why for x in report.left}


def test_grounding_dinos_attention_is_left_where_its_encoder_is() -> None:
    config = transformers.GroundingDinoConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=32, num_queries=4
    )
    from transformers.models.grounding_dino.modeling_grounding_dino import GroundingDinoEncoder

    encoder = GroundingDinoEncoder(config)
    found = list(grounding_dino.find(encoder))
    assert len(found) == 2 and all(isinstance(x, Change) for x in found)
    encoder.forward = encoder.forward  # type: ignore[method-assign]
    assert [type(x) for x in grounding_dino.find(encoder)] == [Left, Left]
