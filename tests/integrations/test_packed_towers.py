"""Towers of transformers that pack images, windows or recordings into one row: one call a layer, and no wait."""

from __future__ import annotations

import copy
import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import vision_utils

from mmkernels.integrations.transformers import NAME, counting, register
from mmkernels.integrations.transformers.attention import attention
from mmkernels.integrations.transformers.packed_towers import packing_functions
from mmkernels.integrations.transformers.support import YES, check, quiet
from mmkernels.integrations.transformers.support_compare import Comparison
from mmkernels.integrations.transformers.support_trace import Waits, trace
from mmkernels.masks import SpanMask
from mmkernels.testing.models import Family
from mmkernels.testing.packed_towers import TOWERS, packed_tower

FAST = ("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni audio", "qwen3_vl", "glm4v", "pixtral", "radio")
"""Images; windows; sound; three sizes of patches; a class that patches its own mask; an optional row."""


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    register()
    with quiet():
        yield


def family(name: str) -> Family:
    found = packed_tower(name)
    if found is None:
        pytest.skip(f"transformers {transformers.__version__} has no packed {name}")
    return found


@pytest.mark.parametrize("name", [pytest.param(x, marks=[] if x in FAST else pytest.mark.slow) for x in TOWERS])
def test_one_call_a_layer_and_no_wait(name: str) -> None:
    """Outputs, gradients and loading as `mmkernels support` compares them: against eager, which takes parts in turn."""
    row = check(family(name), ways=())
    assert row.failures == {} and row.refused == ""
    assert (row.forward, row.gradients, row.loading) == (YES, YES, YES)
    assert row.trace.calls_a_layer == 1 and row.trace.syncs_a_layer == 0
    assert row.trace.calls.spans == row.trace.calls.total == row.trace.inside.total() and not row.trace.outside


def test_every_tower_of_transformers_that_packs_is_in_the_table() -> None:
    folders = {name.partition(" ")[0] for name in TOWERS}
    for package in pkgutil.iter_modules(transformers.models.__path__):
        file = Path(transformers.models.__path__[0], package.name, f"modeling_{package.name}.py")
        if file.is_file() and "cu_seq_lens_q=" in file.read_text():
            module = importlib.import_module(f"transformers.models.{package.name}.modeling_{package.name}")
            if list(packing_functions(module)):
                assert package.name in folders, f"{package.name} packs, and testing/packed_towers.py lacks it"


@pytest.fixture(scope="module")
def windows() -> Comparison:
    return Comparison(family("qwen2_5_vl"))


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_another_implementation_goes_on_as_before(windows: Comparison, name: str) -> None:
    before = copy.deepcopy(windows.model)
    before.set_attn_implementation(name)
    expected = before(**windows.inputs).last_hidden_state
    windows.model.set_attn_implementation(NAME)
    packed = windows.model(**windows.inputs).last_hidden_state
    windows.model.set_attn_implementation(name)
    with counting() as calls:
        assert torch.equal(windows.model(**windows.inputs).last_hidden_state, expected)
    assert calls.total == 0
    torch.testing.assert_close(packed, expected)
    assert trace(before, windows.inputs).syncs > trace(on_ours(windows.model), windows.inputs).syncs


def on_ours(model: Any) -> Any:
    model.set_attn_implementation(NAME)
    return model


def test_a_part_of_a_model_keeps_the_name_that_it_was_given() -> None:
    from mmkernels.testing.families import FAMILIES

    model, inputs = FAMILIES["qwen2_5_vl"].build()
    for names in (NAME, {"vision_config": NAME, "text_config": "eager"}):
        model.set_attn_implementation("sdpa")
        model.set_attn_implementation(names)
        assert model.config.vision_config._attn_implementation == NAME
        seen = trace(model, inputs)
        assert seen.calls_a_layer == 1 and seen.syncs_a_layer == 0
        assert seen.inside["Qwen2_5_VLVisionAttention"] == 2
        assert (seen.inside["Qwen2_5_VLAttention"] > 0) == (names == NAME)


def test_windows_read_for_another_grid_are_read_anew(windows: Comparison) -> None:
    model = on_ours(windows.model)
    with torch.no_grad():
        together = model(**windows.inputs).pooler_output
        first = windows.inputs["grid_thw"][:1]
        patches = windows.inputs["hidden_states"][: int(first.prod())]
        alone = model(hidden_states=patches, grid_thw=first).pooler_output
    torch.testing.assert_close(together[: alone.shape[0]], alone)


def test_a_compiled_tower_packs_in_one_graph(windows: Comparison) -> None:
    """What depends on the grid is computed before, as transformers' exporters do it."""
    torch._dynamo.reset()
    model, inputs = on_ours(windows.model), dict(windows.inputs)
    config = model.config
    size = {"spatial_merge_size": config.spatial_merge_size, "patch_size": config.patch_size}
    index, window_ends = vision_utils.get_vision_window_index(
        inputs["grid_thw"], window_size=config.window_size, **size
    )
    inputs |= {
        "cu_seqlens": vision_utils.get_vision_cu_seqlens(inputs["grid_thw"]),
        "position_ids": vision_utils.get_vision_position_ids(inputs["grid_thw"], config.spatial_merge_size),
        "window_index": index,
        "cu_window_seqlens": window_ends,
    }
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)(**inputs).pooler_output
        torch.testing.assert_close(compiled, model(**windows.inputs).pooler_output)


# What `mmkernels support` counts.


def test_waits_are_reads_of_values_by_code_that_is_not_ours() -> None:
    x, flags = torch.arange(4), torch.tensor([True, False, True, False])
    reads = [
        lambda: x.tolist(),
        lambda: x[0].item(),
        lambda: int(x[0]),
        lambda: bool(flags.any()),
        lambda: x[flags],
        lambda: flags.nonzero(),
        lambda: torch.nonzero(flags),
        lambda: torch.repeat_interleave(x, x),
        lambda: x.repeat_interleave(x),
        lambda: torch.where(flags),
        lambda: x.cpu(),
    ]
    for number, read in enumerate(reads):
        with Waits() as waits:
            read()
        assert waits.count == 1, number
    with Waits() as waits:
        torch.where(flags, x, 0).sum().add(x[1]).reshape(-1).cumsum(0)
        x.repeat_interleave(2), x[1:3], x[x], x.shape, torch.repeat_interleave(x, x, output_size=6)
        SpanMask.key_padding([1, 2]).to_dense(4)
        SpanMask.key_padding(torch.tensor([1, 2]))  # looks at its values, on a CPU alone
    assert waits.count == 0


def test_calls_and_waits_belong_to_the_layer_that_makes_them() -> None:
    class Attention(torch.nn.Module):
        is_causal = False

        def forward(self, x: torch.Tensor, calls: int) -> torch.Tensor:
            for _call in range(calls):
                x.tolist()
                attention(self, x, x, x, None)
            return x

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList([Attention(), Attention()])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x.tolist()
            for layer, calls in zip(self.layers, (1, 3), strict=True):
                x = layer(x, calls)
            return x

    seen = trace(Model(), {"x": torch.randn(1, 2, 4, 8)})
    assert (seen.calls.total, seen.calls_a_layer, seen.syncs_a_layer, seen.syncs) == (4, 3, 3, 5)
