"""Models on "mmkernels" under torch.func's transforms and in forward mode, against "eager" in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jvp, vmap

from mmkernels.integrations.transformers import counting, register
from mmkernels.integrations.transformers.support_compare import float64
from mmkernels.testing.families import FAMILIES

IDS = torch.randint(5, 60, (2, 8), generator=torch.Generator().manual_seed(0))
PADDED = torch.ones_like(IDS).index_fill_(1, torch.arange(6, 8), 0)
ADAPTERS = ("q_proj", ".q.")
"""Only these parameters are differentiated, so that all of their gradients are compared in a moment."""


def build(name: str) -> Any:
    register()
    return FAMILIES[name].build()[0].double()


@pytest.fixture(params=["llama", "gemma3_text", "gpt_oss", "t5"])
def model(request: pytest.FixtureRequest) -> Any:
    """A causal mask; sliding windows; attention sinks; relative positions and cross-attention."""
    return build(request.param)


@pytest.fixture(params=["llama", "gemma3_text"])
def mappable(request: pytest.FixtureRequest) -> Any:
    """Models that `vmap` can run on "eager": the others branch on values."""
    return build(request.param)


def loss(model: Any, parameters: dict[str, Tensor], ids: Tensor, mask: Tensor | None) -> Tensor:
    given = {"input_ids": ids[None], "attention_mask": None if mask is None else mask[None], "use_cache": False}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = ids[None]
    logits: Tensor = functional_call(model, parameters, (), given).logits
    return (logits[0] if mask is None else logits[0, :6]).sin().mean()


def parameters_of(model: Any) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if any(part in name for part in ADAPTERS)}


def both(model: Any, run: Callable[[Any], Any]) -> None:
    """Compares "mmkernels" with "eager". T5 is built with each: before transformers 5.20 it can't be set to one."""
    results = []
    for name in ("eager", "mmkernels"):
        config = copy.deepcopy(model.config)
        config._attn_implementation = None
        built = type(model)._from_config(config, attn_implementation=name).double().eval()
        built.load_state_dict(model.state_dict())
        with float64(), counting() as calls:
            results.append(run(built))
        assert (calls.total > 0) == (name == "mmkernels")
    torch.testing.assert_close(*results)


def test_gradients(model: Any) -> None:
    both(model, lambda model: grad(loss, 1)(model, parameters_of(model), IDS[0], PADDED[0]))


@pytest.mark.parametrize("padded", [False, True])
def test_gradients_of_every_row(mappable: Any, padded: bool) -> None:
    each = vmap(grad(loss, 1), (None, None, 0, 0 if padded else None))
    both(mappable, lambda model: each(model, parameters_of(model), IDS, PADDED if padded else None))


def test_forward_mode(model: Any) -> None:
    parameters = parameters_of(model)
    along = {name: torch.ones_like(p) for name, p in parameters.items()}
    both(model, lambda model: jvp(lambda p: loss(model, p, IDS[0], PADDED[0]), (parameters,), (along,)))

    def dual(model: Any) -> Tensor:
        with forward_ad.dual_level():
            inputs = {name: forward_ad.make_dual(p, along[name]) for name, p in parameters.items()}
            return forward_ad.unpack_dual(loss(model, inputs, IDS[0], PADDED[0])).tangent

    both(model, dual)


@pytest.mark.slow
def test_second_derivatives(model: Any) -> None:
    name, parameter = next(iter(parameters_of(model).items()))
    to_all = (0, parameter.shape[1] - 2, 0, parameter.shape[0] - 2)

    def of_corner(model: Any, change: Tensor) -> Tensor:
        return loss(model, {name: parameter + torch.nn.functional.pad(change, to_all)}, IDS[0], None)

    both(model, lambda model: hessian(partial(of_corner, model))(parameter.new_zeros(2, 2)))


def test_attention_weights(model: Any) -> None:
    name = "decoder_attentions" if model.config.is_encoder_decoder else "attentions"

    def first_weights(model: Any, parameters: dict[str, Tensor]) -> Tensor:
        more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
        out = functional_call(model, parameters, (IDS,), {"output_attentions": True, "use_cache": False, **more})
        return getattr(out, name)[0].square().sum()

    both(model, lambda model: grad(partial(first_weights, model))(parameters_of(model)))


def test_rows_without_a_gradient(mappable: Any) -> None:
    """A plain `vmap` stays on the kernels."""
    both(mappable, lambda model: vmap(loss, (None, None, 0, 0))(model, parameters_of(model), IDS, PADDED))
