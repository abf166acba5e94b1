"""`linear`: what oneDNN computes, and what it must not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mmkernels.nn import linear_layer
from mmkernels.nn.linear_layer import linear

WIDTH, OUT = 512, 544


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Notes each look at whether a call is served: the answers."""
    answers: list[Any] = []
    ask = linear_layer._is_served

    def noted(layer: nn.Module, x: Tensor) -> bool:
        answers.append(ask(layer, x))
        return bool(answers[-1])

    monkeypatch.setattr(linear_layer, "_is_served", noted)
    return answers


def made(**options: Any) -> tuple[nn.Linear, Tensor]:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(WIDTH, OUT, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(generator=generator)
    return layer, torch.randn(2, 3, WIDTH, generator=generator)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x,
        lambda x: x[:, :1],
        lambda x: x[0, 0],
        lambda x: x.transpose(0, 1),
        lambda x: x[:, ::2],
        lambda x: x[:1],
        lambda x: x.repeat(50, 1, 1),
    ],
    ids=["whole", "one each", "one", "transposed", "strided", "a part", "many"],
)
def test_equals_the_layer(served: list[Any], bias: bool, change: Callable[[Tensor], Tensor]) -> None:
    layer, x = made(bias=bias)
    x = change(x)
    with torch.no_grad():
        truth = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
        y, usual = linear(layer, x), layer(x)
    assert served == [linear_layer._HAS_ONEDNN]
    assert y.shape == usual.shape and y.dtype == usual.dtype and y.is_contiguous()
    limit = 4 * float((usual - truth).abs().max())
    assert float((y - truth).abs().max()) < max(limit, 1e-4)


@pytest.mark.parametrize(
    "bias",
    [torch.randn(2 * OUT)[::2], torch.randn(1).expand(OUT), torch.randn(1)],
    ids=["strided", "expanded", "of one number"],
)
def test_another_bias_is_left_to_the_layer(bias: Tensor) -> None:
    layer, x = made()
    layer.bias = nn.Parameter(bias)
    with torch.no_grad():
        assert torch.equal(linear(layer, x), layer(x))


def test_what_is_left_to_the_layer(served: list[Any]) -> None:
    """Other dtypes, small layers, no rows, layers that are more than a product."""
    layer, x = made()
    hooked, in_place = made()[0], made()[0]
    seen: list[int] = []
    hooked.register_forward_hook(lambda *_: seen.append(1))
    in_place.forward = lambda x: seen.append(2) or x  # type: ignore[method-assign,func-returns-value]

    class Adapted(nn.Linear):
        pass

    small = nn.Linear(64, 64)
    with torch.no_grad():
        for each, given in (
            (layer.double(), x.double()),
            (made()[0].bfloat16(), x.bfloat16()),
            (made()[0], x[:0]),
            (small, torch.zeros(1, 64)),
            (hooked, x),
            (in_place, x),
            (Adapted(WIDTH, OUT), x),
            (nn.Sequential(made()[0]), x),
            (nn.Identity(), x),
        ):
            assert torch.equal(linear(each, given), each(given))
    assert served == [False] * 9
    assert seen == [1, 1, 2, 2]


def test_transforms_modes_and_graphs(served: list[Any]) -> None:
    layer, x = made()
    y = linear(layer, x)  # with a gradient
    y.sum().backward()
    assert layer.weight.grad is not None and not served
    with torch.no_grad():
        expected = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(layer, x).dtype == torch.bfloat16
        with FlopCounterMode(display=False) as counter:
            linear(layer, x)
        assert counter.get_total_flops() == 2 * 6 * WIDTH * OUT
        mapped = torch.vmap(lambda row: linear(layer, row))(x)
        torch.testing.assert_close(mapped, expected, rtol=1e-4, atol=1e-4)
        handle = nn.modules.module.register_module_forward_hook(lambda *_: calls.append(1))
        calls: list[int] = []
        linear(layer, x)
        handle.remove()
        assert calls == [1]
        graph = torch.compile(lambda x: linear(layer, x), fullgraph=True, backend="eager")
        assert torch.equal(graph(x), expected)
        assert linear(layer.to("meta"), x.to("meta")).shape == (2, 3, OUT)


def test_wrong_widths_are_the_layer_s_errors() -> None:
    layer, x = made()
    with torch.no_grad(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(layer, x[..., 1:])
