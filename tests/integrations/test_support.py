"""Each model family on "mmkernels", by the checks that `mmkernels support` prints; and that those checks can fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from mmkernels.integrations.transformers import NAME, register, support
from mmkernels.integrations.transformers.support import NOTHING, YES, check, quiet
from mmkernels.integrations.transformers.support_compare import WAYS, Comparison, NotEqual
from mmkernels.integrations.transformers.support_table import support_table
from mmkernels.options import BadInput
from mmkernels.testing.families import FAMILIES, find
from mmkernels.testing.models import Family

OWN_ATTENTION = "transformers keeps its own attention"
REFUSED = {
    "gemma2": "no cap on the scores (softcap)",
    "flava": OWN_ATTENTION,
    "vilt": OWN_ATTENTION,
    "visual_bert": OWN_ATTENTION,
    "lxmert": OWN_ATTENTION,
    "perceiver": OWN_ATTENTION,
    "blip_itm": OWN_ATTENTION,
    "blip_itc": OWN_ATTENTION,
    "blip_caption": OWN_ATTENTION,
}
SUPPORTED = [name for name in FAMILIES if name not in REFUSED]
OUTSIDE = {
    "siglip": {"MultiheadAttention": 1},
    "siglip2": {"MultiheadAttention": 1},
    "deepseek_vl": {"MultiheadAttention": 1},
    "deepseek_vl_hybrid": {"MultiheadAttention": 1, "SamVisionSdpaAttention": 2},
    "got_ocr2": {"GotOcr2VisionAttention": 2},
    "idefics": {"IdeficsPerceiverAttention": 2},
}
EMBED = {"bert", "clip", "siglip", "siglip2", "blip_2_itm", "blip_2_itc"}
NEVER_ASSISTED = {"blip_2", "instructblip"}
UNPADDED = {"whisper", "perceiver"}
DENSE = {"mllama"}

Attention = Callable[..., tuple[Tensor, Tensor | None]]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet():
        yield


@pytest.fixture
def replace_attention(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Attention], Attention]], None]:
    """Puts another function, made from the right one, where transformers finds "mmkernels"."""
    register()
    mapping = transformers.AttentionInterface._global_mapping
    right = mapping[NAME]

    def replace(make: Callable[[Attention], Attention]) -> None:
        monkeypatch.setattr(support, "register", lambda: None)  # which would put the right one back
        monkeypatch.setitem(mapping, NAME, make(right))

    return replace


@pytest.mark.parametrize("name", SUPPORTED)
def test_supported(name: str) -> None:
    found = check(FAMILIES[name])
    assert found.failures == {} and found.refused == ""
    assert (found.forward, found.gradients) == (YES, YES)
    assert found.outside == OUTSIDE.get(name, {}) and found.inside.total() > 0
    assert found.generation.keys() == (set() if name in EMBED else WAYS.keys())
    assert found.not_offered.keys() == ({"assisted"} if name in NEVER_ASSISTED else set())
    assert found.equal == [way for way in found.generation if way not in found.not_offered]
    assert (found.calls.dense > 0) == (name in DENSE)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    found = check(FAMILIES[name])
    assert REFUSED[name] in found.refused
    assert (found.forward, found.gradients, found.generation, found.failures) == (NOTHING, NOTHING, {}, {})
    assert found.calls.total == 0 and not found.inside


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_family_is_the_same_each_time_and_random_all_over(family: Family) -> None:
    state = torch.get_rng_state()
    (model, inputs), (again, same) = family.build(), family.build()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, same[key]) for key, x in inputs.items() if isinstance(x, Tensor))
    for (name, x), other in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(x, other) and x.requires_grad
        assert x.numel() == 1 or len(x.unique()) > 1, name
    masks = [inputs[name] for name in family.padded if name in inputs]
    assert all(0 < int((mask == 0).sum()) < mask.numel() for mask in masks)
    assert bool(masks) == (family.name not in UNPADDED)


def noisy(right: Attention) -> Attention:
    def attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        out, weights = right(*args, **kwargs)
        noise = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
        return out * (1 + 1e-3 * noise), weights

    return attention


def unmasked(right: Attention) -> Attention:
    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
        return right(module, query, key, value, None, **kwargs | {"is_causal": False})

    return attention


def wrong_gradient(right: Attention) -> Attention:
    def attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        out, weights = right(*args, **kwargs)
        return out.detach() + 0.999 * (out - out.detach()), weights

    return attention


def wrong_one_by_one(right: Attention) -> Attention:
    def attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        out, weights = right(*args, **kwargs)
        return (out.flip(2) if out.shape[1] == 1 else out), weights

    return attention


def wrong_in_padding(right: Attention) -> Attention:
    def attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        out, weights = right(*args, **kwargs)
        out = out.clone()
        out[1, :4] += 1.0
        return out, weights

    return attention


def broken(right: Attention) -> Attention:
    def attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        raise RuntimeError("out of\norder")

    return attention


@pytest.mark.parametrize("make", [noisy, unmasked])
@pytest.mark.parametrize("name", SUPPORTED)
def test_a_wrong_attention_is_noticed(replace_attention, name: str, make: Callable[[Attention], Attention]) -> None:
    replace_attention(make)
    compare = Comparison(FAMILIES[name])
    with pytest.raises(NotEqual, match=r"error .*, allowed "):
        compare.forward()
    with pytest.raises(NotEqual, match=r"gradient of .*: error .*, allowed "):
        compare.gradients()


def test_a_wrong_gradient_is_noticed(replace_attention) -> None:
    replace_attention(wrong_gradient)
    found = check(FAMILIES["llama"])
    assert set(found.failures) == {"gradients"} and found.failures["gradients"].startswith("gradient of ")


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_a_wrong_step_of_decoding_is_noticed(replace_attention, name: str) -> None:
    replace_attention(wrong_one_by_one)
    found = check(FAMILIES[name])
    assert {"greedy", "sampled", "beam", "static"} <= set(found.failures) and found.forward == YES
    assert all("logits: error" in text or "expected" in text for text in found.failures.values())


def test_padding_is_not_compared(replace_attention) -> None:
    replace_attention(wrong_in_padding)
    found = check(FAMILIES["llama"])
    assert (found.forward, found.gradients) == (YES, YES)


def test_a_model_that_fails_is_a_row_of_the_table(replace_attention) -> None:
    replace_attention(broken)
    told: list[str] = []
    rows = support_table(find(["llama", "blip_itm"]), told.append)
    assert rows[0].failures == {"forward": "RuntimeError: out of order"}
    assert rows[1].failures == {} and told == ["llama", "blip_itm"]


def test_being_called_only_where_built_with_it_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.LlamaForCausalLM, "set_attn_implementation", lambda self, name: None)
    assert check(FAMILIES["llama"]).failures == {
        "forward": "called where the model is built with it, but not where it is set"
    }


@pytest.mark.parametrize("name", SUPPORTED)
def test_in_float64_nothing_is_left_of_float32(name: str) -> None:
    """The truth is no better than its worst step, and transformers writes softmax and norms in float32."""
    compare = Comparison(FAMILIES[name])
    ours, true = compare.run_wide(NAME), compare.truth
    assert torch.get_default_dtype() == torch.float32
    largest = max(float(x.abs().max()) for x in true.grads.values())
    for found, expected, size in ((ours.outputs, true.outputs, 1.0), (ours.grads, true.grads, largest)):
        assert found.keys() == expected.keys()
        for key, x in expected.items():
            assert x.dtype == torch.float64
            torch.testing.assert_close(found[key], x, rtol=1e-11, atol=1e-13 * size)


def test_find_names_the_families() -> None:
    assert find([]) == list(FAMILIES.values())
    assert [family.name for family in find(["clip", "bert"])] == ["clip", "bert"]
    with pytest.raises(BadInput, match=r"family must be one of llama, .*; got 'clap'"):
        find(["clip", "clap"])
