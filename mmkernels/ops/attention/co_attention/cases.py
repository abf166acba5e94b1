"""The correctness cases of `co_attention`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from mmkernels.masks import SpanMask
from mmkernels.ops.common.cases import normal
from mmkernels.spec import Case, Inputs


def co_inputs(
    g: Generator,
    batch: int = 2,
    heads: int = 2,
    a_len: int = 5,
    b_len: int = 7,
    dim: int = 8,
    *,
    value_a_dim: int | None = None,
    value_b_dim: int | None = None,
) -> Inputs:
    """Returns a, b, value_a and value_b."""
    return {
        "a": normal(g, batch, heads, a_len, dim),
        "b": normal(g, batch, heads, b_len, dim),
        "value_a": normal(g, batch, heads, a_len, dim if value_a_dim is None else value_a_dim),
        "value_b": normal(g, batch, heads, b_len, dim if value_b_dim is None else value_b_dim),
    }


def _valid(*lengths: int, of: int) -> Tensor:
    return torch.arange(of) < torch.tensor(lengths)[:, None]


def _with(make: Callable[[Generator], Inputs] = co_inputs, **more: object) -> Callable[[Generator], Inputs]:
    """Returns what makes the inputs with more arguments; a tuple stands for a random tensor of that shape."""

    def made(g: Generator) -> Inputs:
        return make(g) | {name: normal(g, *x) if isinstance(x, tuple) else x for name, x in more.items()}

    return made


def _odd(g: Generator) -> Inputs:
    return co_inputs(g, 1, 3, 17, 33, 5, value_a_dim=3, value_b_dim=16) | {"dropout_p": 0.3}


def _dense(g: Generator) -> Inputs:
    dense = torch.rand(2, 2, 6, 9, generator=g) < 0.4
    dense[0, 1, 2] = False
    dense[1, 0, :, 3] = False
    return co_inputs(g, 2, 2, 6, 9) | {"mask": dense, "scale": -1.0}


def _holes(g: Generator) -> Inputs:
    valid = torch.rand(3, 9, generator=g) < 0.6
    valid[2] = False
    mask = SpanMask.from_key_mask(valid) & SpanMask.causal(6, 9)
    return co_inputs(g, 3, 2, 6, 9) | {"mask": mask, "valid_a": torch.rand(3, 6, generator=g) < 0.7}


def _hiding_bias(g: Generator) -> Inputs:
    bias = normal(g, 1, 2, 5, 7)
    bias[torch.rand(bias.shape, generator=g) < 0.3] = -torch.inf
    bias[0, 1, 2] = -torch.inf
    bias[0, 0, :, 4] = -torch.inf
    return co_inputs(g) | {"bias": bias, "mask": SpanMask.key_padding([7, 4]), "valid_b": _valid(5, 7, of=7)}


def _everything(g: Generator) -> Inputs:
    inputs = co_inputs(g, 2, 2, 6, 9) | {"bias": normal(g, 2, 1, 6, 9), "dropout_p": 0.3, "clamp": 2.0}
    return inputs | {
        "mask": torch.rand(2, 1, 6, 9, generator=g) < 0.7,
        "valid_a": _valid(6, 4, of=6),
        "valid_b": _valid(5, 9, of=9),
    }


def _many_tiles(g: Generator) -> Inputs:
    """More positions of both sides than one tile holds, in every backend."""
    inputs = co_inputs(g, 1, 2, 150, 1100, 4)
    return inputs | {"mask": SpanMask.window(400, 100, 150, 1100), "valid_a": _valid(140, of=150)}


def _few_and_many(g: Generator) -> Inputs:
    """A long side and a short one, which GPU kernels split over the long one, by lists of tiles."""
    inputs = co_inputs(g, 1, 1, 330, 50, 4)
    return inputs | {"mask": torch.rand(1, 1, 330, 50, generator=g) < 0.3, "valid_a": _valid(270, of=330)}


_VALUES = ("a", "b", "value_a", "value_b")


def _case(id: str, make: Callable[[Generator], Inputs]) -> Case:
    drawn = make(torch.Generator())
    grads = (*_VALUES, "bias") if "bias" in drawn else _VALUES
    return Case(id, make, grads, seeded="dropout_p" in drawn)


CASES = (
    _case("no mask", co_inputs),
    _case("odd sizes, dropout", _odd),
    _case("no a", lambda g: co_inputs(g, a_len=0)),
    _case("padding of both", _with(valid_a=_valid(3, 0, of=5), valid_b=_valid(4, of=7))),
    _case("holes", _holes),
    _case("dense, negative scale", _dense),
    _case("bias", _with(bias=(2, 2, 5, 7))),
    _case("bias of b's positions", _with(bias=(7,), valid_b=_valid(7, 3, of=7))),
    _case("bias of a's positions", _with(bias=(2, 1, 5, 1))),
    _case("bias that hides", _hiding_bias),
    _case("everything", _everything),
    _case("few and many", _few_and_many),
    _case("many tiles", _many_tiles),
)
