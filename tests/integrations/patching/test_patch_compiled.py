"""Patched models in TorchDynamo's graphs, whole and broken ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmkernels
from mmkernels.integrations.patching.classes import original_method, swap
from mmkernels.integrations.transformers.model_mask import ModelMask
from mmkernels.testing.families import FAMILIES


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Broken(nn.Module):
    """A model whose graph breaks, as transformers' SigLIP 2 does where it looks at values."""

    def forward(self, x: Tensor) -> Tensor:
        y = x + 1
        torch._dynamo.graph_break()
        return y * 2


def around(module: Any, x: Tensor) -> Tensor:
    """Ours, which calls theirs."""
    theirs: Tensor = original_method(module, "forward")(x)
    return theirs + 100


def test_a_graph_that_breaks_inside_of_their_method() -> None:
    model = Broken()
    swap(model, {"forward": around})
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(compiled(torch.zeros(2)), torch.full((2,), 102.0))


def apply_mask(visible: Tensor, scores: Tensor, before: torch.dtype) -> Tensor:
    """What SigLIP 2's head and BigBird's layers do with a mask."""
    mask: Any = ModelMask(visible, tuple(visible.shape), visible.device, before=before)
    if before == torch.bool:
        return torch.where(mask, scores, torch.full((), -1.0))
    return scores + mask


@pytest.mark.parametrize("before", [torch.bool, torch.float32])
def test_a_mask_that_the_model_applies_itself(before: torch.dtype) -> None:
    visible, scores = torch.tensor([[True, False], [True, True]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    compiled = torch.compile(apply_mask, backend="eager", fullgraph=True)
    assert torch.equal(compiled(visible, scores, before), apply_mask(visible, scores, before))


def test_a_mask_is_not_written_to_in_a_graph() -> None:
    def write(visible: Tensor) -> Tensor:
        mask: Any = ModelMask(visible, tuple(visible.shape), visible.device, before=torch.float32)
        mask[0] = 0.0
        seen: Tensor = torch.zeros(2) + mask
        return seen

    with pytest.raises((NotImplementedError, torch._dynamo.exc.TorchDynamoException)):
        torch.compile(write, backend="eager", fullgraph=True)(torch.tensor([[False, True]]))


@pytest.mark.parametrize("name", ["smolvlm", pytest.param("idefics2", marks=pytest.mark.slow)])
def test_images_whose_number_depends_on_values(name: str) -> None:
    """These models drop empty images, so that no graph knows how many their vision tower sees."""
    model, inputs = FAMILIES[name].build()
    inputs = dict(inputs)
    with torch.no_grad():
        expected = model(**inputs).logits
        mmkernels.patch(model, verbose=False)
        found = torch.compile(model, backend="eager", fullgraph=True)(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)
