"""An op's arguments as one record, from which everything else that would spell them follows by name.

An op declares two NamedTuples::

    class Arguments(NamedTuple):
        x: Differentiable
        weight: Differentiable | None
        index: Tensor
        scale: float

    class Results(NamedTuple):
        y: Differentiable
        state: Tensor

The schema of its boundary, which tensors autograd saves, which gradients are wanted, the record of its backward pass
and the schemas of its C++ kernels are made from these. Each backend receives the record itself: ``args.scale``.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Sequence
from operator import itemgetter
from types import NoneType
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

from torch import Tensor

__all__ = ["Differentiable", "Layout", "Sizes", "lay_out", "lay_out_backward", "leading", "result_types"]

_MARK = "differentiable"
Differentiable = Annotated[Tensor, _MARK]
"""The type of an argument or a result with a gradient."""

leading: Callable[[Any], Tensor] = itemgetter(0)
"""Returns a record's first argument, whose device and dtype are those of the call."""

Sizes = tuple[int, ...]
"""The type of an argument that is a list of sizes, which the host knows: a graph may hold them as symbols."""

_SCHEMA_TYPES = {Tensor: "Tensor", float: "float", bool: "bool", int: "int", str: "str", Sizes: "SymInt[]"}


class _Field(NamedTuple):
    name: str
    schema_type: str  # as torch.library.define takes it
    differentiable: bool

    @property
    def is_tensor(self) -> bool:
        return self.schema_type.startswith("Tensor")


class Layout:
    """What a record's fields are: their names, types in a schema, and which of them are tensors and differentiable.

    Args:
        record: a NamedTuple class.
        fields: of it, in its order.
    """

    def __init__(self, record: type[Any], fields: Sequence[_Field]) -> None:
        self.record = record
        self.fields = tuple(fields)
        self.names = tuple(field.name for field in fields)
        self.differentiable = tuple(field.name for field in fields if field.differentiable)
        self.tensors = tuple(field.name for field in fields if field.is_tensor)
        self.schema = ", ".join(f"{field.schema_type} {field.name}" for field in fields)
        self.others = tuple(field.name for field in fields if not field.is_tensor)
        self.take_tensors, self.take_others = self.take(self.tensors), self.take(self.others)

    @property
    def numbers(self) -> tuple[str, ...]:
        """The fields that are floats."""
        return tuple(field.name for field in self.fields if field.schema_type == "float")

    def with_tensors_for_numbers(self) -> Layout:
        """Returns the layout of the same record with a tensor in place of each float."""
        numbers = self.numbers
        fields = [field._replace(schema_type="Tensor") if field.name in numbers else field for field in self.fields]
        return Layout(self.record, fields)

    def take(self, names: Sequence[str]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
        """Returns a function from a record, or its values in order, to those of the fields `names`."""
        places = [self.names.index(name) for name in names]
        if len(places) < 2:
            return lambda values: tuple(values[place] for place in places)
        return itemgetter(*places)

    def restore(self, names: Sequence[str]) -> Callable[[Sequence[Any]], Any]:
        """Returns a function from values, which are those of the fields `names` in that order, to the record.

        Args:
            names: every field's, in any order.
        """
        places, make = itemgetter(*(names.index(name) for name in self.names)), self.record._make
        return lambda values: make(places(values))


def lay_out(record: type[Any]) -> Layout:
    """Returns the layout that the type hints of a NamedTuple class say.

    Raises:
        TypeError: a field has a type that no schema has.
    """
    hints = get_type_hints(record, include_extras=True)
    return Layout(record, [_field(record, name, hint) for name, hint in hints.items()])


def lay_out_backward(op: str, inputs: Layout, outputs: Layout, saved: Sequence[str]) -> Layout:
    """Returns the layout of an op's backward pass, whose record is made here.

    Its fields are the op's inputs; the outputs that are `saved`; for each differentiable output ``y`` what flows back
    to it, ``grad_y``, None where nothing does; and for each differentiable input ``x`` whether its gradient is wanted,
    ``need_x``.
    """
    fields = [
        *inputs.fields,
        *(field._replace(differentiable=False) for field in outputs.fields if field.name in saved),
        *(_Field(f"grad_{name}", "Tensor?", True) for name in outputs.differentiable),
        *(_Field(f"need_{name}", "bool", False) for name in inputs.differentiable),
    ]
    return Layout(namedtuple(f"{op}_backward", [field.name for field in fields]), fields)


def result_types(count: int) -> str:
    """Returns the results of a schema; one tensor is returned as it is."""
    return "Tensor" if count == 1 else "(" + ", ".join(["Tensor"] * count) + ")"


def _field(record: type[Any], name: str, hint: Any) -> _Field:
    kinds = [kind for kind in get_args(hint) if kind is not NoneType] if NoneType in get_args(hint) else [hint]
    (kind,) = kinds if len(kinds) == 1 else (None,)
    marked = get_origin(kind) is Annotated and _MARK in get_args(kind)
    schema_type = _SCHEMA_TYPES.get(Tensor if marked else kind)  # type: ignore[arg-type]
    if schema_type is None:
        raise TypeError(f"{record.__name__}.{name} must be of a type that a schema has, got {hint}")
    return _Field(name, schema_type + ("?" if kind is not hint else ""), marked)
