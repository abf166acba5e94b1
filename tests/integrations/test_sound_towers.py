"""Qwen-Omni's audio towers over five minutes of sound: windows in one call a layer, as transformers' loop has them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from mmkernels.integrations.transformers import NAME, counting, register
from mmkernels.integrations.transformers.support import quiet
from mmkernels.integrations.transformers.support_trace import trace
from mmkernels.testing.packed_towers import packed_tower

FRAMES = torch.tensor([30_000, 731])
"""Of 10 ms each: five minutes, and a recording whose last window is a part of one."""

PUBLISHED = {
    "qwen2_5_omni audio": ({"n_window": 100}, 150 + 4),  # windows of 2 s
    "qwen3_omni_moe audio": ({"n_window": 50, "n_window_infer": 800}, 38 + 1),  # of 8 s
}
"""The towers' published sizes of windows, and how many windows the two recordings have."""
LAYERS = 2


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    register()
    with quiet():
        yield


def tower(name: str) -> tuple[Any, Tensor]:
    """Returns transformers' tower, small but for its windows, and features of both recordings ``[bands, frames]``."""
    found = packed_tower(name)
    if found is None:
        pytest.skip(f"transformers {transformers.__version__} has no packed {name}")
    sizes = found.config | PUBLISHED[name][0] | {"max_source_positions": 1500, "encoder_layers": LAYERS}
    model, inputs = replace(found, config=sizes).build()
    bands = inputs["input_features"].shape[0]
    return model, torch.randn(bands, int(FRAMES.sum()), generator=torch.Generator().manual_seed(1))


def run(model: Any, features: Tensor, implementation: str) -> tuple[Tensor, Tensor]:
    """Returns the tower's output and the gradient of its input."""
    model.set_attn_implementation(implementation)
    features = features.detach().requires_grad_()
    out = model(input_features=features, feature_lens=FRAMES).last_hidden_state
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    return out.detach(), torch.autograd.grad((out * weight).sum(), features)[0]


@pytest.mark.parametrize("name", PUBLISHED)
def test_five_minutes_in_one_call_a_layer(name: str) -> None:
    model, features = tower(name)
    with counting() as calls:
        out, gradient = run(model, features, NAME)
    assert calls.total == calls.spans == LAYERS
    seen = trace(model, {"input_features": features, "feature_lens": FRAMES})
    assert seen.calls_a_layer == 1 and seen.syncs_a_layer == 0
    expected, expected_gradient = run(model, features, "sdpa")
    assert (out - expected).norm() < 1e-5 * expected.norm()
    assert (gradient - expected_gradient).norm() < 1e-5 * expected_gradient.norm()


@pytest.mark.parametrize("name", PUBLISHED)
def test_no_window_sees_another(name: str) -> None:
    """A louder last second of five minutes changes the tokens of its window by more than 5 %, and no others."""
    model, features = tower(name)
    model.set_attn_implementation(NAME)
    louder = features.clone()
    louder[:, 29_900:30_000] *= 3
    with torch.no_grad():
        plain, changed = (model(input_features=x, feature_lens=FRAMES).last_hidden_state for x in (features, louder))
    moved = (changed - plain).norm(dim=1) > 0.05 * plain.norm(dim=1)
    same = (changed == plain).all(dim=1)
    assert int(moved.sum()) > 10 and bool(same[~moved].all())


@pytest.mark.parametrize("name", PUBLISHED)
def test_windows_of_transformers_are_as_many(name: str) -> None:
    """What this file's five minutes are made of: transformers' loop makes a call for each window."""
    model, features = tower(name)
    model.set_attn_implementation("sdpa")
    calls: list[int] = []
    call = torch.nn.functional.scaled_dot_product_attention
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(
            torch.nn.functional,
            "scaled_dot_product_attention",
            lambda *args, **options: (calls.append(args[0].shape[2]), call(*args, **options))[1],
        )
        model(input_features=features, feature_lens=FRAMES)
    assert len(calls) == LAYERS * PUBLISHED[name][1], (len(calls), calls[:3])
