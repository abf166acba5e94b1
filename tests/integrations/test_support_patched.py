"""Each model family before and after `mmkernels.patch`, by the check that `mmkernels support` prints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from mmkernels.integrations.patching.classes import original_method, swap
from mmkernels.integrations.patching.report import PatchReport, Replaced
from mmkernels.integrations.transformers import support_patched
from mmkernels.integrations.transformers.support import NOTHING, YES, quiet
from mmkernels.integrations.transformers.support_patched import IGNORED, check_patched, labels_for
from mmkernels.testing.families import FAMILIES

FAST = ("internvl", "clip", "t5", "bert")
"""A pixel shuffle; a loss of pairs; a loss of an encoder and a decoder; a model without a loss."""
WITHOUT_LOSS = {"bert"}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with quiet():
        yield


def families() -> list[Any]:
    marks = {name: [] if name in FAST else [pytest.mark.slow] for name in FAMILIES}
    return [pytest.param(name, marks=[pytest.mark.xdist_group(name), *marks[name]]) for name in FAMILIES]


@pytest.mark.parametrize("name", families())
def test_a_family_is_the_same_after_patch(name: str) -> None:
    row = check_patched(FAMILIES[name], ways=["greedy"])
    assert row.failures == {}
    assert row.refused or (row.forward, row.gradients) == (YES, YES)


def test_what_a_row_says() -> None:
    row = check_patched(FAMILIES["internvl"], ways=["greedy"])
    assert row.modules["merge_patches"] == 1 and row.modules["cross_attention"] > 1
    assert row.loss and row.generation == {"greedy": YES} and row.refused == ""


def wrapped(find: Callable[[Any], nn.Module], change: Callable[[Any], Any]) -> Callable[..., PatchReport]:
    """Returns a patch that changes what one module returns."""

    def forward(module: nn.Module, *args: Any, **keywords: Any) -> Any:
        return change(original_method(module, "forward")(*args, **keywords))

    def patch(model: nn.Module, verbose: bool = True) -> PatchReport:
        swap(find(model), {"forward": forward})
        return PatchReport(type(model).__name__, (Replaced("one", "Module", 1, "merge_patches", ""),))

    return patch


def scaled_loss(output: Any) -> Any:
    if output.loss is not None:
        output.loss = output.loss * 1.001
    return output


WRONG = {
    "value": (wrapped(lambda model: model.model.layers[0].mlp, lambda x: x * 1.001), {"forward", "gradients"}),
    "gradient": (
        wrapped(lambda model: model.model.layers[0].mlp, lambda x: x.detach() + 0.999 * (x - x.detach())),
        {"gradients"},
    ),
    "loss": (wrapped(lambda model: model, scaled_loss), {"forward"}),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_patch_is_noticed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patch, expected = WRONG[kind]
    monkeypatch.setattr(support_patched, "patch", patch)
    row = check_patched(FAMILIES["llama"], ways=())
    assert expected <= set(row.failures), row
    assert "error" in row.failures[min(expected)]


@pytest.mark.parametrize("error", [ValueError("nothing is ours"), RuntimeError("out of\norder")])
def test_a_patch_that_fails_is_a_row(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def patch(model: nn.Module, verbose: bool = True) -> PatchReport:
        raise error

    monkeypatch.setattr(support_patched, "patch", patch)
    row = check_patched(FAMILIES["llama"])
    if isinstance(error, ValueError):
        assert row.refused == "ValueError: nothing is ours" and row.failures == {} and row.forward == NOTHING
    else:
        assert row.failures == {"forward": "RuntimeError: out of order"}


def test_labels_leave_out_padding() -> None:
    model, inputs = FAMILIES["llama"].build()
    labels = labels_for(model, inputs)["labels"]
    shown = labels != IGNORED
    assert torch.equal(labels[shown], inputs["input_ids"][shown])
    assert not bool(shown[~inputs["attention_mask"].bool()].any()) and bool(shown.any(dim=1).all())
    clip, inputs = FAMILIES["clip"].build()
    assert labels_for(clip, inputs) == {"return_loss": True}
    assert labels_for(transformers.ViTModel(transformers.ViTConfig(**SMALL)), {"pixel_values": torch.ones(1)}) == {}


SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "image_size": 16}
