"""`patch` and `unpatch`: the same results, the exact way back, and clear errors."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from patched_models import IDS, TEXT, close, gradients, llama, objects, pair, same
from torch import nn

import mmkernels
from mmkernels import PatchReport, patch, unpatch
from mmkernels.integrations.patching import apply, interface
from mmkernels.integrations.patching.changes import Change, Known, Left, by_class
from mmkernels.integrations.transformers import counting
from mmkernels.integrations.transformers.sweep import family_by_rule
from mmkernels.testing.any_inputs import candidates
from mmkernels.testing.models import build, seeded
from mmkernels.testing.shrink import shrink
from mmkernels.transformers_version import VersionError


def quietly(model: nn.Module) -> PatchReport:
    return patch(model, verbose=False)


def attention_calls(model: Any, **inputs: Any) -> int:
    with counting() as calls, torch.no_grad():
        model(**(inputs or TEXT))
    return calls.total


def test_the_same_results_and_gradients_and_the_exact_way_back(capsys: pytest.CaptureFixture[str]) -> None:
    theirs, ours = pair(llama())
    before = objects(ours)
    report = patch(ours)
    assert capsys.readouterr().out == f"{report}\n"
    assert report.ops["cross_attention"] == 2 == attention_calls(ours) and attention_calls(theirs) == 0
    close(gradients(ours), gradients(theirs))
    close(ours(**TEXT).logits[TEXT["attention_mask"] == 1], theirs(**TEXT).logits[TEXT["attention_mask"] == 1])
    assert unpatch(ours).replaced == report.replaced
    ours.zero_grad()
    assert same(objects(ours), before) and attention_calls(ours) == 0
    out = capsys.readouterr().out
    assert out.startswith("LlamaForCausalLM: ") and " restored\n" in out
    unpatch(ours)
    assert capsys.readouterr().out == "LlamaForCausalLM: nothing to restore\n"


def test_a_second_call_says_the_same_and_changes_nothing() -> None:
    model = llama()
    report = quietly(model)
    patched = objects(model)
    assert quietly(model) == report and same(objects(model), patched)


def test_the_report_is_a_table() -> None:
    model = build("Gemma2ForCausalLM", _small("Gemma2"))
    with pytest.raises(ValueError, match=r"got a Linear that has none"):
        quietly(nn.Linear(2, 2))
    text = str(apply.PatchReport("Model", (apply.replaced_rows([("what", "Class", "op", "effect")] * 2)), ()))
    assert text == (
        "Model: 2 modules run on mmkernels\n"
        "what  module  count  op  effect\n"
        "----  ------  -----  --  ------\n"
        "what  Class   2      op  effect"
    )
    left = [x for x in interface.look(model) if isinstance(x, Left)]
    assert {x.why for x in left} == {"mmkernels has no cap on the scores (softcap)"} and len(left) == 2


def _small(name: str) -> Any:
    return shrink(getattr(transformers, f"{name}Config")().to_dict())


def test_a_softcap_of_none_is_no_softcap() -> None:
    model = build("Gemma2ForCausalLM", _small("Gemma2") | {"attn_logit_softcapping": None})
    assert quietly(model).ops["cross_attention"] == 2


def test_each_part_has_its_own_name_again() -> None:
    model = build("CLIPModel", _small("CLIP"))
    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    names = [config._attn_implementation for config in interface.configs_of(model)]
    assert quietly(model).ops["cross_attention"] == 4
    assert all(config._attn_implementation == "mmkernels" for config in interface.configs_of(model))
    unpatch(model, verbose=False)
    assert [config._attn_implementation for config in interface.configs_of(model)] == names


def test_what_the_user_has_set_stays() -> None:
    model = llama(num_hidden_layers=1)
    quietly(model)
    model.set_attn_implementation("eager")
    unpatch(model, verbose=False)
    assert model.config._attn_implementation == "eager"
    model.set_attn_implementation("mmkernels")
    quietly(model)
    unpatch(model, verbose=False)
    assert model.config._attn_implementation == "mmkernels"
    model.config._attn_implementation = "flex_attention"
    assert [x.why for x in interface.look(model)] == ['it is set to "flex_attention"']  # type: ignore[union-attr]


def test_attention_weights_go_on() -> None:
    theirs, ours = pair(llama())
    theirs.set_attn_implementation("eager")
    quietly(ours)
    close(ours(**TEXT, output_attentions=True).attentions, theirs(**TEXT, output_attentions=True).attentions)
    theirs.config.output_attentions = True
    assert {x.why for x in interface.look(theirs)} == {"its configuration asks for attention weights"}  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["GitModel", "DeepseekV4ForCausalLM", "BigBirdPegasusModel", "BridgeTowerModel"])
def test_what_the_attention_function_refuses_runs_as_before(name: str) -> None:
    """Models that change the mask themselves, or pass none, or have other scores than their mask was made for."""
    theirs, _ = family_by_rule(name).build()
    with seeded(0):
        inputs = next(iter(candidates(theirs)))
        if name == "BridgeTowerModel":
            inputs |= {"pixel_values": torch.randn(2, 3, 32, 32)}
    ours = copy.deepcopy(theirs)
    with suppress(ValueError):  # DeepSeek-V4's is left
        quietly(ours)
    with torch.no_grad():
        found, expected = ours(**inputs), theirs(**inputs)
    for one, other in zip(found.to_tuple(), expected.to_tuple()):
        if isinstance(one, torch.Tensor):
            close(one, other, 1e-4)


@pytest.mark.parametrize("before", ["eager", "sdpa"])
def test_a_call_without_a_mask_means_what_it_meant(before: str) -> None:
    """transformers' "eager" hides nothing then, its "sdpa" the later keys, unless the module says otherwise."""
    model = llama(num_hidden_layers=1)
    model.set_attn_implementation(before)
    attention = model.model.layers[0].self_attn
    x = torch.randn(1, 5, 32)
    position = model.model.rotary_emb(x, torch.arange(5)[None])
    expected = attention(x, position, None)[0]
    quietly(model)
    close(attention(x, position, None)[0], expected)


def test_a_forward_pass_in_another_thread() -> None:
    """It is right at any moment, whether the model is patched or restored meanwhile."""
    model = llama()
    model.set_attn_implementation("sdpa")
    expected = model(**TEXT).logits
    real = TEXT["attention_mask"] == 1
    ended, errors = threading.Event(), list[BaseException]()

    def run() -> None:
        try:
            while not ended.is_set():
                with torch.no_grad():
                    close(model(**TEXT).logits[real], expected[real])
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    for _ in range(40):
        quietly(model)
        unpatch(model, verbose=False)
    ended.set()
    thread.join()
    assert not errors, errors


def test_moved_cast_copied_and_compiled() -> None:
    theirs, ours = pair(llama())
    quietly(ours)
    ours.double()
    expected = copy.deepcopy(theirs).double()(**TEXT).logits
    close(ours(**TEXT).logits[0], expected[0], 1e-9)
    for copied in (copy.deepcopy(ours), copy.copy(ours)):
        assert attention_calls(copied) == 2
        close(copied(**TEXT).logits[0], expected[0], 1e-9)
    copied = copy.deepcopy(ours)
    unpatch(ours, verbose=False)
    assert attention_calls(copied) == 2 and attention_calls(ours) == 0
    assert copied.to("meta")(IDS.to("meta")).logits.shape == (2, 7, 60)
    bits = copy.deepcopy(theirs).bfloat16()
    quietly(bits)
    close(bits(**TEXT).logits[0].double(), expected[0], 0.2)


def test_autocast() -> None:
    theirs, ours = pair(llama())
    quietly(ours)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = ours(**TEXT).logits, theirs(**TEXT).logits
    assert found.dtype == expected.dtype
    close(found[0], expected[0], 0.1)


def test_gradient_checkpointing() -> None:
    theirs, ours = pair(llama())
    for model in (theirs, ours):
        model.gradient_checkpointing_enable()
        model.train()
    quietly(ours)
    close(gradients(ours), gradients(theirs))


def test_compiled_before_and_after() -> None:
    torch._dynamo.reset()
    model = llama(num_hidden_layers=1)
    with torch.no_grad():
        expected = model(IDS).logits
        compiled = torch.compile(model, backend="eager")
        close(compiled(IDS).logits, expected)
        quietly(compiled)
        close(compiled(IDS).logits, expected)
        unpatch(model, verbose=False)
        close(compiled(IDS).logits, expected)
    torch._dynamo.reset()


def test_what_is_saved_loads_without_mmkernels(tmp_path: Path) -> None:
    model = llama(num_hidden_layers=1)
    model.set_attn_implementation("sdpa")
    model.save_pretrained(tmp_path / "before")
    torch.save(model(IDS).logits, tmp_path / "logits")
    quietly(model)
    (tmp_path / "pickled").write_bytes(pickle.dumps(model))
    torch.save(model, tmp_path / "saved")
    model.save_pretrained(tmp_path / "folder")
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        assert (tmp_path / "folder" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()
    script = f"""
import sys
sys.modules["mmkernels"] = None  # an import of it fails
import pickle, torch, transformers
for model in (
    pickle.load(open("pickled", "rb")),
    torch.load("saved", weights_only=False),
    transformers.AutoModelForCausalLM.from_pretrained("folder"),
):
    assert type(model) is transformers.LlamaForCausalLM and model.config._attn_implementation == "sdpa"
    assert type(model.lm_head) is torch.nn.Linear
    torch.testing.assert_close(model(torch.tensor({IDS.tolist()})).logits, torch.load("logits"))
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_changed_module_is_pickled_as_it_was(monkeypatch: pytest.MonkeyPatch, protocol: int) -> None:
    model = nn.ModuleList([Other(), Other()])
    monkeypatch.setattr(apply, "kinds", lambda: (by_class([_known()]),))
    quietly(model)
    loaded = pickle.loads(pickle.dumps(model, protocol))
    assert [type(x) for x in loaded] == [Other, Other] and loaded[0].training
    assert torch.equal(model[0](torch.zeros(1)), torch.ones(1)) and type(model[0]) is not Other


def test_weights_names_and_settings_stay(tmp_path: Path) -> None:
    theirs, ours = pair(llama(num_hidden_layers=1))
    quietly(ours)
    assert ours.config.to_json_string() == theirs.config.to_json_string()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert str(ours) == str(theirs) and type(ours).__name__ == "LlamaForCausalLM"
    assert json.loads(ours.generation_config.to_json_string()) == json.loads(theirs.generation_config.to_json_string())


def test_bad_models() -> None:
    with pytest.raises(TypeError, match=r"got the name 'org/name': load it first, as by AutoModel.from_pretrained"):
        quietly("org/name")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got dict$"):
        quietly({})  # type: ignore[arg-type]

    class Pipeline:
        model = nn.Linear(2, 2)

    with pytest.raises(TypeError, match=r"got Pipeline; its model is its attribute `model`"):
        unpatch(Pipeline())  # type: ignore[arg-type]
    falcon = build("FalconForCausalLM", _small("Falcon"))
    with pytest.raises(ValueError, match=r"got a FalconModel that has none \(2 x FalconAttention: it has no attention"):
        quietly(falcon.transformer)


class Other(nn.Module):
    """A class of someone else's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def ours_forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    return x + 1


def _known(path: str = f"{__name__}.Other", *arguments: str) -> Known:
    return Known(path, {"forward": ours_forward}, {"forward": arguments or ("x",)}, "sum", "add", "none")


@pytest.mark.parametrize(
    ("known", "match"),
    [
        (_known(f"{__name__}.Gone"), rf"no Gone in {__name__}"),
        (_known(f"{__name__}.Other", "x", "y"), r"Other.forward\(x\) instead of forward\(x, y\)"),
    ],
)
def test_a_class_that_is_not_as_expected(monkeypatch: pytest.MonkeyPatch, known: Known, match: str) -> None:
    """Nothing is changed: neither the modules that other kinds know, nor the attention's name."""
    model = nn.ModuleList([Other(), llama(num_hidden_layers=1)])
    monkeypatch.setattr(apply, "kinds", lambda: (by_class([_known()]), by_class([known])))
    before = objects(model)
    with pytest.raises(VersionError, match=rf"transformers .* nothing was patched: {match}"):
        quietly(model)
    assert same(objects(model), before)
    monkeypatch.setattr(apply, "kinds", lambda: (by_class([_known()]),))
    assert quietly(model).ops == {"cross_attention": 1, "add": 1}
    monkeypatch.setattr(apply, "kinds", lambda: (by_class([known]),))
    rows = unpatch(model, verbose=False).replaced
    assert [(row.what, row.module) for row in rows] == [("forward", "Other")] and same(objects(model), before)


def test_what_fails_midway_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fixed(nn.Linear):
        """Of another layout than its subclasses, so that Python keeps its class."""

        __slots__ = ("number",)

        def __init_subclass__(cls) -> None:
            raise TypeError("no subclasses")

    model = nn.ModuleList([Other(), llama(num_hidden_layers=1), Fixed(2, 2)])
    kind = lambda found: iter([Change(x, {"forward": ours_forward}, "", "", "") for x in (found[0], found[2])])
    monkeypatch.setattr(apply, "kinds", lambda: (kind,))
    before = objects(model)
    with pytest.raises(TypeError, match=r"model must be of modules whose class can be exchanged.*no subclasses"):
        quietly(model)
    assert same(objects(model), before)


def test_the_first_of_two_kinds_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.ModuleList([Other(), Other()])

    def left(found: nn.Module) -> Any:
        yield from (Left(x, "sum", "it is odd") for x in found)  # type: ignore[attr-defined]

    second = Known(f"{__name__}.Other", {"forward": lambda module, x: x}, {}, "sum", "second", "none")
    monkeypatch.setattr(apply, "kinds", lambda: (left, by_class([_known()]), by_class([second])))
    report = quietly(model)
    assert report.ops == {"add": 2} and not report.left
    assert torch.equal(model[0](torch.zeros(1)), torch.ones(1))


def test_one_import() -> None:
    assert mmkernels.patch is patch and {"patch", "unpatch", "PatchReport"} <= set(dir(mmkernels))
    with pytest.raises(AttributeError, match=r"module 'mmkernels' has no attribute 'pach'"):
        mmkernels.pach  # type: ignore[attr-defined]  # noqa: B018
