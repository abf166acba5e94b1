"""Tensors of other kinds as any argument of any op: honoured, or refused by name; their memory is never read as values.

A new op folder is tested here without a line added.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from harness import SPECS, backends, call, cotangent, draw, inputs_in, leaves_of, needed, run
from ops.test_calls import UNSEEDED
from torch import Tensor
from torch.distributed import HashStore, destroy_process_group, init_process_group
from torch.nn import Buffer, Parameter, UninitializedParameter
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.testing._internal.two_tensor import TwoTensor

from mmkernels import SpanMask, cross_attention
from mmkernels.nn import CrossAttention, VisualCache
from mmkernels.spec import Case, OpSpec

pytestmark = pytest.mark.filterwarnings("ignore")  # several of these kinds are prototypes, and say so


class Named(Tensor):
    """A subclass that changes nothing."""


class Unwrapping(Tensor):
    """A subclass whose results are plain tensors, as torchvision's ``TVTensor``."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class Refusing(Tensor):
    """A subclass without memory, on which no operator is defined."""

    @staticmethod
    def __new__(cls, x: Tensor) -> Refusing:
        made: Refusing = Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype, device=x.device)  # type: ignore
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return NotImplemented


def _distributed(x: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor, init_device_mesh

    return DTensor.from_local(x, init_device_mesh("cpu", (1,)))


def _two(x: Tensor) -> Tensor:
    two: Tensor = TwoTensor(x, x.clone())
    return two


HONOURED: dict[str, Callable[[Tensor], Tensor]] = {
    "a subclass": lambda x: x.as_subclass(Named),
    "a subclass that unwraps": lambda x: x.as_subclass(Unwrapping),
    "two tensors in one": _two,
    "a parameter": lambda x: Parameter(x, requires_grad=False),
    "a buffer": lambda x: Buffer(x),
}
REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "causal_lower_right": (lambda x: causal_lower_right(*_sizes(x)), r"dense.*CausalBias.*SpanMask\.causal\("),
    "causal_upper_left": (lambda x: causal_upper_left(*_sizes(x)), r"dense.*CausalBias.*SpanMask\.causal\("),
    "nested, strided": (lambda x: torch.nested.nested_tensor([x, x]), "dense tensor, got a nested one: pad it"),
    "nested, jagged": (
        lambda x: torch.nested.nested_tensor([torch.atleast_1d(x)] * 2, layout=torch.jagged),
        "dense tensor, got NestedTensor: pad it",
    ),
    "sparse": (lambda x: x.to_sparse(), "dense tensor, got one of layout torch.sparse_coo"),
    "compressed rows": (
        lambda x: torch.ones(_sizes(x), dtype=x.dtype).to_sparse_csr(),
        "dense tensor, got one of layout torch.sparse_csr",
    ),
    "mkldnn": (lambda x: torch.atleast_1d(x).float().to_mkldnn(), "dense tensor, got one of layout torch._mkldnn"),
    "quantized": (lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.quint8), "got torch.quint8"),
    "masked": (lambda x: torch.masked.masked_tensor(x, torch.ones_like(x, dtype=torch.bool)), "dense.*MaskedTensor"),
    "distributed": (_distributed, r"dense.*DTensor: .*to_local\(\).*full_tensor\(\)"),
    "without a shape": (lambda x: UninitializedParameter(), "dense.*UninitializedParameter"),
    "on which nothing is defined": (Refusing, "that operators take, got Refusing"),
}


def _sizes(x: Tensor) -> tuple[int, int]:
    rows, columns = (1, 1, *x.shape)[-2:]
    return rows, columns


def _arguments() -> list[tuple[OpSpec, Case, str]]:
    """Every tensor argument of every op, in a case that has it."""
    found: dict[tuple[str, str], tuple[OpSpec, Case, str]] = {}
    for spec in SPECS.values():
        for case in sorted(spec.cases, key=lambda case: -len(draw(case))):  # so that few cases have them all
            for name, x in inputs_in(spec, case).items():
                if isinstance(x, Tensor) and x.numel():
                    found.setdefault((spec.name, name), (spec, case, name))
    return list(found.values())


ARGUMENTS = _arguments()
CASES = list({(spec.name, case.id): (spec, case) for spec, case, _ in ARGUMENTS}.values())
each_argument = pytest.mark.parametrize(
    ("spec", "case", "name"), ARGUMENTS, ids=[f"{spec.name}-{name}" for spec, _, name in ARGUMENTS]
)


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Iterator[None]:
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    destroy_process_group()


@pytest.mark.parametrize(("spec", "case"), CASES, ids=[f"{spec.name}-{case.id}" for spec, case in CASES])
def test_tensors_of_a_kind_that_has_its_values_in_memory(spec: OpSpec, case: Case) -> None:
    """All arguments at once; by a backend of kernels, if there is one, and by the definition."""
    for backend in dict.fromkeys((backends(spec)[0], "reference")):
        inputs = inputs_in(spec, case)
        want = [x.detach() for x in call(spec, case, inputs, backend)]
        for kind, make in HONOURED.items():
            others = {name: make(x) for name, x in inputs.items() if isinstance(x, Tensor)}
            found = call(spec, case, inputs | others, backend)
            plain = [x.a if isinstance(x, TwoTensor) else x.as_subclass(Tensor) for x in found]
            torch.testing.assert_close([x.detach() for x in plain], want, equal_nan=True, msg=kind)


@pytest.mark.interpreted
@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
def test_tensors_whose_minus_sign_is_not_in_memory(spec: OpSpec) -> None:
    """The imaginary part of a conjugate: a kernel that reads the memory itself would read it with the other sign."""
    case = UNSEEDED[spec.name]

    def negated(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dtype != torch.float32:
            return x
        view = torch.complex(torch.zeros_like(x), -x).conj().imag
        assert view.is_neg()
        return view

    for backend in needed(backends(spec)):
        inputs = inputs_in(spec, case)
        want = run(spec, case, inputs, backend)
        leaves = leaves_of(case, inputs)
        outputs = call(spec, case, {name: negated(x) for name, x in leaves.items()}, backend)
        flows = [x for x in outputs if x.requires_grad]
        weights = [negated(cotangent(x).masked_fill(x.detach() == -torch.inf, 0.0)) for x in flows]
        grads = torch.autograd.grad(flows, [leaves[name] for name in case.grads], weights) if flows else ()
        torch.testing.assert_close([x.detach() for x in outputs], list(want.outputs), equal_nan=True)
        torch.testing.assert_close(list(grads), list(want.grads.values()), rtol=1e-4, atol=1e-5)


@each_argument
@pytest.mark.parametrize("autocast", [False, True])
def test_a_tensor_of_another_kind_is_refused_by_name(spec: OpSpec, case: Case, name: str, autocast: bool) -> None:
    inputs = inputs_in(spec, case)
    for make, must in REFUSED.values():
        with pytest.raises(TypeError, match=rf"^{name} must .*{must}"), torch.autocast("cpu", enabled=autocast):
            spec.function(**inputs | {name: make(inputs[name])}, backend="reference")


@each_argument
def test_functionalized(spec: OpSpec, case: Case, name: str) -> None:
    inputs, backend = inputs_in(spec, case), backends(spec)[0]
    once = lambda x: call(spec, case, inputs | {name: x}, backend)
    torch.testing.assert_close(torch.func.functionalize(once)(inputs[name]), once(inputs[name]), equal_nan=True)


def test_masks_and_modules_refuse_by_name_too() -> None:
    lengths, rows = torch.tensor([3, 2]), torch.ones(2, 3, dtype=torch.bool)
    makers: list[tuple[str, Tensor, Callable[[Any], Any]]] = [
        ("lengths", lengths, SpanMask.key_padding),
        ("start", lengths[:, None].int(), lambda x: SpanMask(x, x)),
        ("key_valid", rows, lambda x: SpanMask(lengths[:, None].int(), lengths[:, None].int(), x)),
        ("key_mask", rows, SpanMask.from_key_mask),
        ("dense", rows[None], SpanMask.from_dense),
        ("media_index", lengths[None], lambda x: SpanMask.media(x, 3)),
        ("media_offsets", lengths, lambda x: SpanMask.media(lengths[None], media_offsets=x)),
        ("key of layer 0", torch.ones(1, 2, 3, 4), lambda x: VisualCache(1).append([(x, x)], [3])),
        ("image_ids", lengths[None], VisualCache(1).mask),
        ("context", torch.randn(2, 3, 8), lambda x: CrossAttention(8, num_heads=2)(torch.randn(2, 3, 8), x)),
    ]
    for name, x, make in makers:
        for kind in ("nested, strided", "sparse", "masked", "distributed"):
            with pytest.raises(TypeError, match=rf"^{re.escape(name)} must be a dense tensor, got"):
                make(REFUSED[kind][0](x))


@pytest.mark.parametrize("lengths", [(5, 9), (9, 5), (4, 4)])
def test_the_masks_that_the_message_names(lengths: tuple[int, int]) -> None:
    query, key = (torch.randn(1, 2, n, 8) for n in lengths)
    variants = ((causal_upper_left, (lengths[0],) * 2), *[(causal_lower_right, lengths)] * (lengths[0] <= lengths[1]))
    for variant, sizes in variants:
        want = torch.nn.functional.scaled_dot_product_attention(query, key, key, attn_mask=variant(*lengths))
        torch.testing.assert_close(cross_attention(query, key, key, SpanMask.causal(*sizes)), want)
