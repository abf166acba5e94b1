"""Each model family on "mmkernels", by the checks that `mmkernels support` prints; and that those checks can fail.

Truth and baseline of a family are computed once; its tests share an xdist group, so that one worker runs all of them.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from mmkernels.integrations.transformers import NAME, counting, register, support
from mmkernels.integrations.transformers.support import NOTHING, YES, check, quiet
from mmkernels.integrations.transformers.support_compare import WAYS, Comparison, NotEqual
from mmkernels.integrations.transformers.support_table import support_table
from mmkernels.options import BadInput
from mmkernels.testing.families import FAMILIES, find

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
VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))
KEEPS = {"t5"} if VERSION < (5, 20) else set()
"""Their parts have copies of the configuration, which set_attn_implementation reaches from transformers 5.20 on."""
NOT_OFFERED = {"blip_2": {"assisted"}, "instructblip": {"assisted"}} | (
    {"mllama": {"static", "assisted"}} if VERSION < (5, 18) else {}  # an IndexError there, also on "eager"
)
UNPADDED = {"whisper", "perceiver"}
DENSE = {"mllama"}
REPRESENTATIVE = ("llama", "bert", "t5", "mllama", "gemma3", "qwen2_5_vl")
"""A decoder, an encoder, a bias, a dense mask, image blocks in a sliding window, windows of an image."""

Attention = Callable[..., tuple[Tensor, Tensor | None]]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet():
        yield


@pytest.fixture(scope="session")
def comparison() -> Callable[[str], Comparison]:
    """The models of a family with their truth and baseline, each computed once."""

    def compare(name: str) -> Comparison:
        plain = Comparison(FAMILIES[name])
        return plain.by_building if name in KEEPS else plain

    return functools.cache(compare)


def families(names: Sequence[str], fast: Sequence[str] | None = None) -> pytest.MarkDecorator:
    """Parametrises by family; those that are not `fast` are marked slow."""
    params = []
    for name in names:
        slow = [] if fast is None or name in fast else [pytest.mark.slow]
        params.append(pytest.param(name, marks=[pytest.mark.xdist_group(name), *slow]))
    return pytest.mark.parametrize("name", params)


@pytest.fixture
def replace_attention(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Attention], Attention]], None]:
    """Registers another function, made from the right one, as "mmkernels"."""
    register()
    mapping = transformers.AttentionInterface._global_mapping
    right = mapping[NAME]

    def replace(make: Callable[[Attention], Attention]) -> None:
        monkeypatch.setattr(support, "register", lambda: None)  # it would restore the right one
        monkeypatch.setitem(mapping, NAME, make(right))

    return replace


@pytest.mark.parametrize("every_way", [False, pytest.param(True, marks=pytest.mark.slow)])
@families(SUPPORTED)
def test_supported(comparison, name: str, every_way: bool) -> None:
    """Generates in every way, or in two ways that differ from family to family."""
    ways, place = list(WAYS), SUPPORTED.index(name)
    if not every_way and name not in REPRESENTATIVE:
        ways = [ways[(place + step) % len(ways)] for step in (0, 2)]
    row = check(FAMILIES[name], comparison(name), ways)
    assert row.failures == {} and row.refused == ""
    assert (row.forward, row.gradients, row.loading) == (YES, YES, YES)
    assert row.trace.outside == OUTSIDE.get(name, {}) and row.trace.inside.total() > 0
    assert row.built == (name in KEEPS)
    assert list(row.generation) == ([] if name in EMBED else ways)
    assert set(row.not_offered) == NOT_OFFERED.get(name, set()) & set(ways)
    assert row.equal == [way for way in row.generation if way not in row.not_offered]
    assert (row.trace.calls.dense > 0) == (name in DENSE)
    assert row.trace.calls_a_layer == 1 and row.trace.syncs_a_layer == 0


@families(list(REFUSED))
def test_refused(comparison, name: str) -> None:
    row = check(FAMILIES[name], comparison(name))
    assert REFUSED[name] in row.refused
    assert (row.forward, row.gradients, row.loading, row.generation) == (NOTHING, NOTHING, NOTHING, {})
    assert row.failures == {}
    assert row.trace.calls.total == 0 and not row.trace.inside


@families(list(FAMILIES))
def test_a_family_is_the_same_each_time_and_random_all_over(comparison, name: str) -> None:
    family = FAMILIES[name]
    state = torch.get_rng_state()
    model, inputs = family.build()
    assert torch.equal(torch.get_rng_state(), state)
    again, same = comparison(name).model, comparison(name).inputs
    assert all(torch.equal(x, same[key]) for key, x in inputs.items() if isinstance(x, Tensor))
    for (key, x), other in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(x, other) and x.requires_grad
        assert x.numel() == 1 or len(x.unique()) > 1, key
    masks = [inputs[name] for name in family.padded if name in inputs]
    assert all(0 < int((mask == 0).sum()) < mask.numel() for mask in masks)
    assert bool(masks) == (family.name not in UNPADDED)


def changed(change: Callable[[Tensor], Tensor]) -> Callable[[Attention], Attention]:
    """Returns what makes a wrong attention of the right one, by this change of its output [B, Lq, Hq, Dv]."""

    def make(right: Attention) -> Attention:
        def attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
            out, weights = right(*args, **kwargs)
            return change(out), weights

        return attention

    return make


def first_tokens_of_the_second_row(out: Tensor) -> Tensor:
    row, token = torch.arange(out.shape[0]) == 1, torch.arange(out.shape[1]) < 4
    return (row[:, None] & token)[..., None, None]


noisy = changed(lambda out: out * (1 + 1e-3 * torch.randn(out.shape, generator=torch.Generator().manual_seed(0))))
wrong_gradient = changed(lambda out: out.detach() + 0.999 * (out - out.detach()))
wrong_in_decoding = changed(lambda out: out.flip(2) if out.shape[1] == 1 else out)
wrong_in_padding = changed(lambda out: out + first_tokens_of_the_second_row(out))


def unmasked(right: Attention) -> Attention:
    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
        return right(module, query, key, value, None, **kwargs | {"is_causal": False})

    return attention


def broken(right: Attention) -> Attention:
    def attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        raise RuntimeError("out of\norder")

    return attention


@pytest.mark.parametrize("make", [noisy, unmasked], ids=["noisy", "unmasked"])
@families(SUPPORTED, fast=REPRESENTATIVE)
def test_a_wrong_attention_is_noticed(
    replace_attention, comparison, name: str, make: Callable[[Attention], Attention]
) -> None:
    replace_attention(make)
    with pytest.raises(NotEqual, match=r"error .*, allowed "):
        comparison(name).forward()
    with pytest.raises(NotEqual, match=r"gradient of .*: error .*, allowed "):
        comparison(name).gradients()


@families(["llama"])
def test_a_wrong_gradient_is_noticed(replace_attention, comparison, name: str) -> None:
    replace_attention(wrong_gradient)
    row = check(FAMILIES[name], comparison(name))
    assert set(row.failures) == {"gradients"} and row.failures["gradients"].startswith("gradient of ")


@families(["llama", "bart"])
def test_a_wrong_step_of_decoding_is_noticed(replace_attention, comparison, name: str) -> None:
    replace_attention(wrong_in_decoding)
    row = check(FAMILIES[name], comparison(name))
    assert {"greedy", "sampled", "beam", "static"} <= set(row.failures) and row.forward == YES
    assert all("logits: error" in text or "expected" in text for text in row.failures.values())


@families(["llama"])
def test_padding_is_not_compared(replace_attention, comparison, name: str) -> None:
    replace_attention(wrong_in_padding)
    row = check(FAMILIES[name], comparison(name))
    assert (row.forward, row.gradients) == (YES, YES)


def test_a_model_that_fails_is_a_row_of_the_table(replace_attention) -> None:
    replace_attention(broken)
    announced: list[str] = []
    rows = [row for row, _ in support_table(find(["llama", "blip_itm"]), announced.append)]
    assert rows[0].failures == {"forward": "RuntimeError: out of order"}
    assert rows[1].failures == {} and announced == ["llama", "blip_itm"]


def set_other_than(kept: Collection[str]) -> Callable[..., None]:
    """Returns a ``set_attn_implementation`` that leaves a model as it is if it is to be one of these."""
    right = transformers.PreTrainedModel.set_attn_implementation
    return lambda self, name: None if name in kept else right(self, name)


def test_being_called_only_where_built_with_it_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.LlamaForCausalLM, "set_attn_implementation", set_other_than([NAME]))
    assert check(FAMILIES["llama"]).failures == {
        "forward": "called where the model is built with it, but not where it is set"
    }


@pytest.mark.parametrize("make", [None, noisy], ids=["right", "noisy"])
def test_a_model_that_nothing_can_be_set_on_is_compared_as_it_is_built(
    monkeypatch: pytest.MonkeyPatch, replace_attention, make: Callable[[Attention], Attention] | None
) -> None:
    monkeypatch.setattr(
        transformers.LlamaForCausalLM, "set_attn_implementation", set_other_than([NAME, "eager", "sdpa"])
    )
    if make is not None:
        replace_attention(make)
    row = check(FAMILIES["llama"])
    assert row.built and row.refused == "" and row.trace.inside == {"LlamaAttention": 2}
    expected = set() if make is None else {"forward", "gradients", "greedy", "beam", "static", "assisted"}
    assert set(row.failures) - {"sampled"} == expected  # a sampled token may be the same by chance


def test_a_part_that_cannot_be_set_is_reached_by_loading() -> None:
    model, inputs = FAMILIES["t5"].build()
    for implementation in ("mmkernels", "eager"):
        register()
        model.set_attn_implementation(implementation)
        with counting() as set_calls:
            model(**inputs)
        config = copy.deepcopy(model.config)
        config._attn_implementation = None
        loaded = type(model)._from_config(config, attn_implementation=implementation)
        with counting() as calls:
            loaded(**inputs)
        assert calls.total == (6 if implementation == NAME else 0)
        assert set_calls.total == (0 if "t5" in KEEPS else calls.total)
        assert loaded.encoder.config._attn_implementation == implementation
        assert (model.encoder.config._attn_implementation == implementation) == ("t5" not in KEEPS)


def test_a_call_belongs_to_the_innermost_module_whatever_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Longcat's attention is called LongcatFlashMLA."""
    llama = transformers.models.llama.modeling_llama
    monkeypatch.setattr(llama, "LlamaAttention", type("LlamaMLA", (llama.LlamaAttention,), {}))
    row = check(FAMILIES["llama"], ways=())
    assert row.failures == {} and row.trace.inside == {"LlamaMLA": 2} and not row.trace.outside and not row.built


@families(SUPPORTED)
def test_in_float64_nothing_is_left_of_float32(comparison, name: str) -> None:
    """The truth is no better than its worst step, and transformers writes softmax and norms in float32."""
    ours, true = comparison(name).run_wide(NAME), comparison(name).truth
    assert torch.get_default_dtype() == torch.float32
    largest = max(float(x.abs().max()) for x in true.grads.values())
    for results, expected, size in ((ours.outputs, true.outputs, 1.0), (ours.grads, true.grads, largest)):
        assert results.keys() == expected.keys()
        for key, x in expected.items():
            assert x.dtype == torch.float64
            torch.testing.assert_close(results[key], x, rtol=1e-11, atol=1e-13 * size)


def test_find_names_the_families() -> None:
    assert find([]) == list(FAMILIES.values())
    assert [family.name for family in find(["clip", "bert"])] == ["clip", "bert"]
    with pytest.raises(BadInput, match=r"family must be one of llama, .*; got 'clap'"):
        find(["clip", "clap"])
