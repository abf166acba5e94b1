"""Pixel shuffles and patch mergers of transformers by `merge_patches`: the same layout, values and gradients."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from patching_helpers import apply, compared
from torch import Tensor, nn

from mmkernels.integrations.patching import mergers
from mmkernels.integrations.patching.changes import Change, Known, Left
from mmkernels.integrations.patching.classes import is_patched, restore
from mmkernels.ops.tokens.merge_patches import merge_patches
from mmkernels.testing.models import randomise, seeded

WIDTH = 6
TABLE = {known.class_name: known for known in mergers.TABLE}
THERE = [name for name, known in TABLE.items() if importlib.util.find_spec(known.module_name.rpartition(".")[0])]
"""The oldest transformers that is allowed has fewer of them."""

Call = tuple[str, tuple[Any, ...], dict[str, Any]]


def bare(name: str, **attributes: Any) -> Any:
    """Returns a module of a class without the parts that its constructor would make."""
    known = TABLE[name]
    model_class = getattr(importlib.import_module(known.module_name), name)
    module = model_class.__new__(model_class)
    nn.Module.__init__(module)
    for key, value in attributes.items():
        setattr(module, key, value)
    return module


def built(name: str, *args: Any, **options: Any) -> Any:
    known = TABLE[name]
    return randomise(getattr(importlib.import_module(known.module_name), name)(*args, **options)).double()


def linear(into: int) -> nn.Module:
    return nn.Linear(into, 4).double()


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, WIDTH, dtype=torch.float64)


CONFIG = SimpleNamespace(
    spatial_merge_size=2,
    merger_times=2,
    merge_kernel_size=(2, 2),
    vision_config=SimpleNamespace(hidden_size=WIDTH, patch_size=7, spatial_merge_size=2),
    text_config=SimpleNamespace(hidden_size=4),
)
PIXELS = [(28, 42), (14, 28)]  # 4 x 6 and 2 x 4 patches
GRID = torch.tensor([[1, 4, 6], [2, 2, 4]])


def by_scale(name: str) -> tuple[Any, Call]:
    return bare(name), ("pixel_shuffle", (tokens(2, 4, 6),), {"scale_factor": 0.5})


def of_tokens(name: str) -> tuple[Any, Call]:
    return bare(name), ("pixel_shuffle", (tokens(2, 36), 3), {})


def to_rows(name: str) -> tuple[Any, Call]:
    return bare(name, downsample_factor=2), ("pixel_shuffle", (tokens(2, 16),), {})


def by_sizes(name: str) -> tuple[Any, Call]:
    return built(name, CONFIG), ("forward", (tokens(24 + 8), PIXELS), {})


def minicpm(name: str) -> tuple[Any, Call]:
    sizes = torch.tensor([[4, 8], [8, 4]])
    return built(name, CONFIG), ("forward", (tokens(1, 64), sizes), {})


def grouped(name: str) -> tuple[Any, Call]:
    return built(name, dim=4, context_dim=WIDTH), ("forward", (tokens(12),), {})


CASES: dict[str, Callable[[str], tuple[Any, Call]]] = {
    "InternVLModel": by_scale,
    "QianfanOCRModel": by_scale,
    "NemotronH_Omni_Reasoning_V3": by_scale,
    "Idefics3Connector": of_tokens,
    "SmolVLMConnector": of_tokens,
    "GraniteDoclingConnectorPath": of_tokens,
    "ModernVBertConnector": of_tokens,
    "AyaVisionMultiModalProjector": to_rows,
    "Cohere2VisionMultiModalProjector": to_rows,
    "Lfm2VlMultiModalProjector": lambda name: (bare(name, factor=2), ("pixel_unshuffle", (tokens(2, 4, 6),), {})),
    "Llama4VisionPixelShuffleMLP": lambda name: (
        bare(name, pixel_shuffle_ratio=0.5, mlp=linear(4 * WIDTH)),
        ("forward", (tokens(2, 16),), {}),
    ),
    "MuseGlimmerVisionModel": lambda name: (
        bare(name, merge_size=2),
        ("pixel_shuffle", (tokens(40), GRID), {}),
    ),
    "Mistral3PatchMerger": by_sizes,
    "LightOnOcrPatchMerger": by_sizes,
    "PaddleOCRProjector": lambda name: (built(name, CONFIG), ("forward", (tokens(40), GRID), {})),
    "MiniCPMV4_6Merger": minicpm,
    "MiniCPMV4_7Merger": minicpm,
    "MiniCPMOcrMerger": minicpm,
    "Qwen2_5_VLPatchMerger": grouped,
    "Qwen2_5OmniPatchMerger": grouped,
    "Exaone4_5_PatchMerger": grouped,
}


@pytest.fixture(params=THERE)
def case(request: pytest.FixtureRequest) -> tuple[Any, Call]:
    with seeded(0):
        return CASES[request.param](request.param)


def test_the_same_values_and_gradients(case: tuple[Any, Call], monkeypatch: pytest.MonkeyPatch) -> None:
    module, (method, args, keywords) = case
    expected = compared(module, method, *args, **keywords)
    changes = apply(mergers.find, module)
    assert [change.module for change in changes] == [module] and is_patched(module)
    runs: list[Any] = []
    monkeypatch.setattr(mergers, "merge_patches", lambda *a, **k: runs.append(a) or merge_patches(*a, **k))
    ours = compared(module, method, *args, **keywords)
    assert runs and ours.keys() == expected.keys()
    rounding = 1e-6 if "RMSNorm" in str(module) else 1e-12  # theirs normalizes in float32
    for key, x in expected.items():
        assert ours[key].shape == x.shape
        torch.testing.assert_close(ours[key], x, rtol=rounding, atol=rounding * float(x.abs().max()))
    assert restore(module) and type(module).__name__ in CASES and not is_patched(module)


def test_strided_tokens_are_read_in_place() -> None:
    module = bare("InternVLModel")
    x = tokens(2, 1 + 16)[:, 1:].reshape(2, 4, 4, WIDTH)
    expected = module.pixel_shuffle(x)
    apply(mergers.find, module)
    assert torch.equal(module.pixel_shuffle(x), expected)


def test_a_scale_that_is_no_whole_number_goes_their_way() -> None:
    module = bare("Llama4VisionPixelShuffleMLP", pixel_shuffle_ratio=0.75, mlp=nn.Identity())
    x = torch.randn(1, 64, 9)
    expected = module(x)
    apply(mergers.find, module)
    assert torch.equal(module(x), expected)


def test_rows_that_are_left_over_are_dropped_as_theirs() -> None:
    module = built("Mistral3PatchMerger", CONFIG)
    x, sizes = tokens(3 * 5), torch.tensor([[21, 35]])
    expected = module(x, sizes)
    apply(mergers.find, module)
    assert torch.equal(module(x, sizes), expected) and expected.shape == (2, WIDTH)


def test_a_norm_with_a_hook_is_called() -> None:
    module = built("Qwen2_5_VLPatchMerger", dim=4, context_dim=WIDTH)
    seen: list[Tensor] = []
    apply(mergers.find, module)
    module.ln_q.register_forward_hook(lambda norm, args, out: seen.append(out))
    module(tokens(8))
    assert len(seen) == 1


def test_a_shuffle_of_a_subclass_is_left() -> None:
    base = importlib.import_module(TABLE["SmolVLMConnector"].module_name).SmolVLMConnector
    other = type("Other", (base,), {"pixel_shuffle": lambda self, x, scale_factor=2: x})
    module = other.__new__(other)
    nn.Module.__init__(module)
    (found,) = mergers.find(module)
    assert isinstance(found, Left) and found.why == "Other has a pixel_shuffle of its own"


@pytest.mark.parametrize("known", [TABLE[name] for name in THERE], ids=lambda known: known.class_name)
def test_every_class_of_the_table_is_there(known: Known) -> None:
    assert known.class_name in CASES
    with seeded(0):
        module, _ = CASES[known.class_name](known.class_name)
    (found,) = mergers.find(module)
    assert isinstance(found, Change) and found.op == "merge_patches"


def test_a_shuffle_compiles_in_one_graph() -> None:
    module = bare("Idefics3Connector")
    x = tokens(2, 16)
    expected = module.pixel_shuffle(x, 2)
    apply(mergers.find, module)
    assert torch.equal(torch.compile(module.pixel_shuffle, backend="eager", fullgraph=True)(x, 2), expected)
