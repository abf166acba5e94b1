"""What autograd needs of an op: saved tensors, the call of its backward pass, second derivatives; all by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmkernels.runtime.arguments import Layout, leading
from mmkernels.runtime.eager import cotangents_are_batched

if TYPE_CHECKING:
    from mmkernels.runtime.dispatch import Backend, Op, Symbolic


@dataclass(frozen=True)
class Gradient:
    """How an op is differentiated.

    Its backward pass takes the record that `lay_out_backward` makes, and returns one gradient for each differentiable
    input, in their order; an empty tensor where none is wanted.

    Args:
        saves: the outputs that the backward pass reads.
        backends: of the backward pass, which is then an op of its own; none: `formula_backward` is called instead.
        formula: backward record -> the differentiable outputs by the naive formula: for second derivatives.
        formula_backward: the backward pass in PyTorch's own operators, which are differentiable again.
        zeros_for: the outputs whose ``grad_`` must be a tensor: zeros where nothing flows back.
        contiguous: gradients are contiguous; else they lie in memory as their inputs do.
        prepared: for each differentiable input the argument that says whether the forward pass has prepared its
            gradient, which else is None; (): no gradient needs that.
        linear: the inputs whose values the backward pass does not read, as the op is linear in them, and such outputs
            of `saves`: their shapes are kept for it, not their memory. Where an option decides, a function from the
            op's record to their names. Needs `contiguous`.
        passes: backward record -> the gradients that are what flowed back, by the name of the input: they are handed
            on as they are, without a copy.
    """

    saves: tuple[str, ...]
    backends: Sequence[Backend] = ()
    formula: Callable[[Any], Sequence[Tensor]] | None = None
    formula_backward: Callable[[Any], Sequence[Tensor | None]] | None = None
    zeros_for: tuple[str, ...] = ()
    contiguous: bool = False
    prepared: tuple[str, ...] = ()
    linear: tuple[str, ...] | Callable[[Any], tuple[str, ...]] = ()
    passes: Callable[[Any], Mapping[str, Tensor]] | None = None


class Link:
    """An op's forward pass tied to its backward pass, as ``torch.library.register_autograd`` takes it.

    Args:
        inputs, outputs, record: layouts of the op, and of its backward pass.
        gradient: of the op.
    """

    def __init__(self, inputs: Layout, outputs: Layout, record: Layout, gradient: Gradient) -> None:
        self.inputs, self.outputs, self.record, self.gradient = inputs, outputs, record, gradient
        self.run: Op | Symbolic | None = None  # the backward pass, where it is an op of its own
        flows = [f"grad_{name}" for name in outputs.differentiable]
        needs = [f"need_{name}" for name in inputs.differentiable]
        self._call = record.restore((*inputs.tensors, *gradient.saves, *inputs.others, *flows, *needs))
        self._saved = outputs.take(gradient.saves)
        self._constant = outputs.take([name for name in outputs.names if name not in outputs.differentiable])
        self._flows = outputs.take(outputs.differentiable)
        self._needs = inputs.take(inputs.differentiable)
        self._names = (*inputs.tensors, *gradient.saves)
        self._prepared = [inputs.others.index(name) for name in gradient.prepared]
        self._places = [inputs.names.index(name) for name in inputs.differentiable]
        self._zeros = [
            (outputs.differentiable.index(name), len(inputs.tensors) + gradient.saves.index(name))
            for name in gradient.zeros_for
        ]

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = (output,) if isinstance(output, Tensor) else output
        tensors, linear = (*self.inputs.take_tensors(inputs), *self._saved(outputs)), self.gradient.linear
        names = linear(self.inputs.record._make(inputs[:-1])) if callable(linear) else linear
        if names:
            tensors = tuple(_shape_of(x) if name in names else x for name, x in zip(self._names, tensors, strict=True))
        ctx.save_for_backward(*tensors)
        ctx.others, ctx.backend = self.inputs.take_others(inputs), inputs[-1]
        ctx.mark_non_differentiable(*self._constant(outputs))
        ctx.set_materialize_grads(False)

    def backward(self, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = [None] * (len(self.inputs.fields) + 1)
        flows = self._flows(grads)
        for flow in flows:
            if flow is not None:
                break
        else:
            return tuple(found)
        kept, others = ctx.saved_tensors, ctx.others  # read once: checkpointing gives the tensors once
        for flow, place in self._zeros:
            if flows[flow] is None:
                flows = (*flows[:flow], torch.zeros_like(kept[place]), *flows[flow + 1 :])
        needs = self._needs(ctx.needs_input_grad)
        call = self._call((*kept, *others, *flows, *needs))
        if self.gradient.passes is not None:
            passed = self.gradient.passes(call)
            for name, place, need in zip(self.inputs.differentiable, self._places, needs, strict=True):
                found[place] = passed.get(name) if need else None
            needs = tuple(need and found[place] is None for place, need in zip(self._places, needs, strict=True))
            if not any(needs):
                return tuple(found)
            call = self._call((*kept, *others, *flows, *needs))
        if not self._prepared or all(others[at] for at, need in zip(self._prepared, needs, strict=True) if need):
            given = self._run(call, ctx.backend)
        else:  # the graph was made for calls without this gradient, by a tracer or for `torch.export`
            given = formula_derivatives(self, call)
        for place, need, grad in zip(self._places, needs, given, strict=True):
            if need:
                found[place] = grad
        return tuple(found)

    def _run(self, call: Any, backend: str) -> Sequence[Tensor | None]:
        if self.run is None:
            assert self.gradient.formula_backward is not None
            return self.gradient.formula_backward(call)
        if cotangents_are_batched():
            grads = self.run.boundary(*call, backend)  # whose dispatcher takes the cotangents one by one
        else:
            grads = self.run(call, backend)
        return (grads,) if isinstance(grads, Tensor) else grads

    def fake(self, call: Any) -> Tensor | tuple[Tensor, ...]:
        """Returns gradients of the right shapes, dtypes and strides for a backward pass."""
        layout = torch.contiguous_format if self.gradient.contiguous else torch.preserve_format
        grads = tuple(
            torch.empty_like(getattr(call, name), memory_format=layout)
            if getattr(call, f"need_{name}") and getattr(call, name) is not None
            else leading(call).new_empty(0)
            for name in self.inputs.differentiable
        )
        return grads if len(grads) > 1 else grads[0]


class SecondLink(Link):
    """A backward pass tied to second derivatives, which are those of the naive formula, differentiated twice."""

    def __init__(self, first: Link) -> None:
        self.first, self.inputs = first, first.record
        self._call = self.inputs.restore((*self.inputs.tensors, *self.inputs.others))

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*self.inputs.take_tensors(inputs))
        ctx.others = self.inputs.take_others(inputs)
        ctx.set_materialize_grads(False)

    def backward(self, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        call = self._call((*ctx.saved_tensors, *ctx.others))
        assert self.first.gradient.formula is not None
        given = second_derivatives(self.first, call, self.first.gradient.formula, grads)
        return (*(given.get(name) for name in self.inputs.names), None)


def formula_derivatives(link: Link, call: Any) -> list[Tensor | None]:
    """Returns the gradients of an op's differentiable inputs by the naive formula, None where none is wanted.

    Args:
        link: of the op.
        call: the record of its backward pass.
    """
    wanted = [name for name in link.inputs.differentiable if getattr(call, f"need_{name}")]
    flows = [getattr(call, f"grad_{name}") for name in link.outputs.differentiable]
    formula, again = link.gradient.formula, torch.is_grad_enabled()
    assert formula is not None
    with torch._C._DisableAutocast(), torch.enable_grad():
        nodes = {name: _new_node(getattr(call, name)) for name in wanted}
        some = [(y, x) for y, x in zip(formula(call._replace(**nodes)), flows, strict=True) if x is not None]
        grads = torch.autograd.grad(
            [y for y, _ in some], list(nodes.values()), [x for _, x in some], create_graph=again, allow_unused=True
        )
    found = dict(zip(nodes, grads, strict=True))
    return [found.get(name) for name in link.inputs.differentiable]


def second_derivatives(
    link: Link, call: Any, formula: Callable[[Any], Sequence[Tensor]], grads: Sequence[Tensor | None]
) -> dict[str, Tensor | None]:
    """Returns what flows back through an op's backward pass, by the name of its argument.

    Args:
        link: of the op.
        call: the record of its backward pass.
        formula: that record -> the op's differentiable outputs.
        grads: what flows back to the gradient of each differentiable input; None: nothing.
    """
    inputs, flows = link.inputs.differentiable, [f"grad_{name}" for name in link.outputs.differentiable]
    given = {name: x for name in (*inputs, *flows) if (x := getattr(call, name)) is not None}
    leaves = [name for name in inputs if name in given]

    def outputs(nodes: Mapping[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Returns those outputs to which something flows back, and what."""
        results = formula(call._replace(**nodes))
        some = [(y, nodes[flow]) for y, flow in zip(results, flows, strict=True) if flow in nodes]
        return [y for y, _ in some], [flow for _, flow in some]

    back = {name: flow for name, flow in zip(inputs, grads, strict=True) if flow is not None and name in given}
    with torch._C._DisableAutocast():
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return _twice_by_transforms(outputs, given, leaves, back)
        return _twice_by_autograd(outputs, given, leaves, back)


_Outputs = Callable[[Mapping[str, Tensor]], tuple[list[Tensor], list[Tensor]]]


def _twice_by_autograd(
    outputs: _Outputs, given: dict[str, Tensor], leaves: list[str], back: dict[str, Tensor]
) -> dict[str, Tensor | None]:
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        nodes = {name: _new_node(x) for name, x in given.items()}
        results, flows = outputs(nodes)
        ends = [nodes[name] for name in leaves]
        first = torch.autograd.grad(results, ends, flows, create_graph=True, allow_unused=True)
        found = [(x, back[name]) for name, x in zip(leaves, first, strict=True) if x is not None and name in back]
        if not found:
            return {}
        second = torch.autograd.grad(
            [x for x, _ in found],
            list(nodes.values()),
            [flow for _, flow in found],
            create_graph=again,
            allow_unused=True,
        )
    return dict(zip(nodes, second, strict=True))


def _twice_by_transforms(
    outputs: _Outputs, given: dict[str, Tensor], leaves: list[str], back: dict[str, Tensor]
) -> dict[str, Tensor | None]:
    """As `_twice_by_autograd`, which ``torch.func``'s transforms do not let run within them."""

    def first(nodes: dict[str, Tensor]) -> dict[str, Tensor]:
        flows: list[Tensor] = []

        def results(some: dict[str, Tensor]) -> list[Tensor]:
            ys, flows[:] = outputs(nodes | some)
            return ys

        pull: Any = torch.func.vjp(results, {name: nodes[name] for name in leaves})[1]
        return dict(pull(list(flows))[0])

    ours: Any
    pull: Any
    ours, pull, *_ = torch.func.vjp(first, given)
    flows = {name: back[name] if name in back else torch.zeros_like(x) for name, x in ours.items()}
    return dict(pull(flows)[0])


def _shape_of(x: Tensor | None) -> Tensor | None:
    """Returns a tensor of x's shape, dtype and device that takes the memory of one row, all rows being the same.

    Kernels copy rows that are not dense before they look at their options.
    """
    return None if x is None else x.new_empty_strided(x.shape, (0,) * (x.dim() - 1) + (1,) * min(1, x.dim()))


def _new_node(x: Tensor) -> Tensor:
    """A fresh autograd node, so that gradients do not flow through a tensor that was itself computed from an input."""
    return x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
