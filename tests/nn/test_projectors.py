"""PatchMerger and PixelShuffleProjector beside transformers' own classes, compiled, in 16 bit, and on bad input."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from module_checks import equal_to, refused
from torch import Tensor, nn

import mmkernels
from mmkernels.nn import PatchMerger, PixelShuffleProjector
from mmkernels.testing.models import randomise

F64 = torch.float64
GRID = [(1, 2, 4), (2, 4, 6), (1, 2, 2)]
TOKENS = 60


def _qwen2() -> nn.Module:
    from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchMerger as Theirs

    return Theirs(10, 6)


def _qwen2_5() -> nn.Module:
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLPatchMerger

    return Qwen2_5_VLPatchMerger(10, 6)


def _qwen3(deep: bool) -> nn.Module:
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionPatchMerger

    config: Any = SimpleNamespace(hidden_size=6, spatial_merge_size=2, out_hidden_size=10)
    return Qwen3VLVisionPatchMerger(config, use_postshuffle_norm=deep)


QWEN3 = {"norm.": "norm.", "mlp.0.": "linear_fc1.", "mlp.2.": "linear_fc2."}
MERGERS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], dict[str, str]]] = {
    "Qwen2-VL": (_qwen2, {}, {"norm.": "ln_q.", "mlp.": "mlp."}),
    "Qwen2.5-VL": (_qwen2_5, {"norm": "rms"}, {"norm.": "ln_q.", "mlp.": "mlp."}),
    "Qwen3-VL": (lambda: _qwen3(False), {}, QWEN3),
    "Qwen3-VL's DeepStack": (lambda: _qwen3(True), {"norm_first": False}, QWEN3),
}


@pytest.mark.parametrize("model", MERGERS)
def test_equals_the_merger_of(model: str) -> None:
    make, options, names = MERGERS[model]
    ours, theirs = PatchMerger(6, 10, **options), randomise(make(), std=0.5)
    rounding = 1e-5 if model == "Qwen2.5-VL" else 1e-10  # its norm is in float32
    x = torch.randn(TOKENS, 6, dtype=F64)
    equal_to(ours, theirs, names, lambda m, x: m(x, GRID)[0], lambda m, x: m(x), x, rounding)


def test_equals_the_projector_of_internvl() -> None:
    """With its pixel shuffle, which is a method of the model."""
    from transformers.models.internvl.modeling_internvl import InternVLModel, InternVLMultiModalProjector

    config: Any = SimpleNamespace(
        vision_config=SimpleNamespace(hidden_size=6),
        text_config=SimpleNamespace(hidden_size=10),
        downsample_ratio=0.5,
        projector_hidden_act="gelu",
    )
    nothing: Any = None

    def their_call(module: nn.Module, x: Tensor) -> Tensor:
        return module(InternVLModel.pixel_shuffle(nothing, x.view(3, 4, 4, 6), 0.5).flatten(1, 2))

    equal_to(
        PixelShuffleProjector(6, 10),
        randomise(InternVLMultiModalProjector(config), std=0.5),
        {"norm.": "layer_norm.", "mlp.0.": "linear_1.", "mlp.2.": "linear_2."},
        lambda m, x: m(x, (1, 4, 4))[0],
        their_call,
        torch.randn(3, 16, 6, dtype=F64),
    )


@pytest.mark.parametrize("factor", [2, 3])
def test_equals_the_connector_of_idefics3(factor: int) -> None:
    from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

    config: Any = SimpleNamespace(
        scale_factor=factor, vision_config=SimpleNamespace(hidden_size=6), text_config=SimpleNamespace(hidden_size=10)
    )
    equal_to(
        PixelShuffleProjector(6, 10, factor, norm=None, layers=1, bias=False),
        randomise(Idefics3Connector(config), std=0.5),
        {"mlp.0.": "modality_projection.proj."},
        lambda m, x: m(x, (1, 6, 6))[0],
        lambda m, x: m(x),
        torch.randn(2, 36, 6, dtype=F64),
    )


def test_padding_adds_zeros_at_the_ends() -> None:
    module = PixelShuffleProjector(4, 6, (2, 3, 2), pad=True).double()
    x = torch.randn(30, 4, dtype=F64)
    padded = torch.zeros(4, 3, 4, 4, dtype=F64)
    padded[:3, :2, :3] = x[:18].view(3, 2, 3, 4)
    alone = torch.zeros(2, 6, 2, 4, dtype=F64)
    alone[:2, :6, :1] = x[18:].view(2, 6, 1, 4)
    y, grid = module(x, [(3, 2, 3), (2, 6, 1)])
    z, _ = module(torch.cat([padded.flatten(0, 2), alone.flatten(0, 2)]), [(4, 3, 4), (2, 6, 2)])
    assert grid == ((2, 1, 2), (1, 2, 1))
    torch.testing.assert_close(y, z)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "merger": lambda: PatchMerger(6, 10, norm="rms", hidden=7),
    "projector": lambda: PixelShuffleProjector(6, 10, activation=nn.SiLU),
}


@pytest.mark.parametrize("name", MODULES)
def test_compiles_whole(name: str) -> None:
    torch._dynamo.reset()
    module = MODULES[name]()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    for grid, tokens in (([(1, 4, 4)], 16), ([(1, 4, 4), (2, 2, 6)], 40), ([(1, 2, 4), (2, 4, 6)], 56)):
        x = torch.randn(tokens, 6, requires_grad=True)
        (y, new), (z, same) = module(x, grid), compiled(x, grid)
        assert new == same
        torch.testing.assert_close(y, z)
        gradients = [torch.autograd.grad(out.square().sum(), [x, *module.parameters()]) for out in (y, z)]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODULES)
def test_sixteen_bit_and_autocast(name: str, dtype: torch.dtype) -> None:
    module, x = MODULES[name](), torch.randn(40, 6)
    want, _ = module(x, [(1, 4, 4), (2, 2, 6)])
    with torch.autocast("cpu", dtype):
        mixed, _ = module(x, [(1, 4, 4), (2, 2, 6)])
        narrow, _ = module(x.to(dtype), [(1, 4, 4), (2, 2, 6)])
    assert mixed.dtype == narrow.dtype == dtype
    y, _ = module.to(dtype)(x.to(dtype), [(1, 4, 4), (2, 2, 6)])
    assert y.dtype == dtype
    for found in (mixed, narrow, y):
        torch.testing.assert_close(found.float(), want, rtol=0.05, atol=0.05)


def test_grids_as_they_were_given() -> None:
    module, x = PixelShuffleProjector(6, 10), torch.randn(2, 24, 6)
    assert module(x, (1, 4, 6))[1] == (1, 2, 3)
    assert module(x.flatten(0, 1), [(1, 4, 6), (1, 4, 6)])[1] == ((1, 2, 3), (1, 2, 3))
    assert torch.equal(module(x, torch.tensor([[1, 4, 6], [1, 6, 4]]))[1], torch.tensor([[1, 2, 3], [1, 3, 2]]))
    y, grid = module(x[:0].flatten(0, 1), [])
    assert (y.shape, grid) == ((0, 10), ())


def test_bad_input() -> None:
    merger, projector, x = PatchMerger(6, 10), PixelShuffleProjector(6, 10), torch.randn(16, 6)
    refused(
        [
            (lambda: PatchMerger(0, 10), ValueError, "dim must be a positive integer, got 0"),
            (lambda: PatchMerger(6, 1.5), ValueError, "out_dim must be a positive integer, got 1.5"),
            (lambda: PatchMerger(6, True), ValueError, "out_dim must be a positive integer, got True"),
            (lambda: PatchMerger(6, 10, eps=-1.0), ValueError, "eps must be a number from 0 on, got -1.0"),
            (lambda: PatchMerger(6, 10, norm_first="no"), TypeError, "norm_first must be a bool, got str"),
            (lambda: PixelShuffleProjector(6, 10, pad="no"), TypeError, "pad must be a bool, got str"),
            (lambda: PatchMerger(6, 10, hidden=0), ValueError, "hidden must be a positive integer, got 0"),
            (lambda: PatchMerger(6, 10, (2, 2)), ValueError, r"window must be \(t, h, w\), got 2 numbers"),
            (lambda: PatchMerger(6, 10, (1, 0, 2)), ValueError, "window must be 1 or more, got 0"),
            (lambda: PatchMerger(6, 10, order="rows"), ValueError, "order must be one of spatial, .*, got 'rows'"),
            (lambda: PatchMerger(6, 10, norm="batch"), ValueError, "norm must be one of None, layer, rms, got 'batch'"),
            (lambda: PixelShuffleProjector(6, 10, 0), ValueError, "factor must be a positive integer, got 0"),
            (lambda: PixelShuffleProjector(6, 10, layers=3), ValueError, "layers must be one of 1, 2, got 3"),
            (lambda: merger(x[:, :4], [(1, 4, 4)]), ValueError, r"x must be \[tokens, 6\] or .*, got shape \(16, 4\)"),
            (lambda: merger([1.0], [(1, 4, 4)]), TypeError, "x must be a tensor, got list"),
            (lambda: merger(x, [(1, 4, 5)]), ValueError, "grid must match x's 16 tokens, got 20 in 1 images"),
            (lambda: projector(x[:15], [(1, 3, 5)]), ValueError, r"grid must be divisible by window \(1, 2, 2\)"),
            (lambda: projector(x.double(), [(1, 4, 4)]), TypeError, "weight must have x's dtype torch.float64"),
        ]
    )


def test_the_naive_formula_gives_the_same() -> None:
    for make in MODULES.values():
        module, x = make(), torch.randn(40, 6)
        want = module(x, [(1, 4, 4), (2, 2, 6)])[0]
        with mmkernels.use_backend("reference"):
            torch.testing.assert_close(module(x, [(1, 4, 4), (2, 2, 6)])[0], want)
