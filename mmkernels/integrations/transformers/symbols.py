"""Reads a mask function without evaluating it for every pair of a query and a key.

The problem. transformers describes a mask by a Python function ``(batch, head, query, key) -> bool``. Its own attention
evaluates the function for all Lq x Lk pairs; a `SpanMask` needs two numbers for each query.

The method. `read` calls the function once, with symbols as arguments.

1. Each argument is an `Index`: a vector with a number for every query, every key or every batch entry.
2. Arithmetic with whole numbers and look-ups ``table[batch, index]`` act on that vector and give another `Index` of the
   same axis. ``key - query`` has no vector; it is a `Distance`, which can only be compared with a number.
3. A comparison gives a `Visible`: a conjunction of conditions. A condition is a bool for each query, a bool for each
   key, or a `Relation`: the key's number compared with the query's number.
4. ``&`` joins the conditions of both sides. ``|`` is no conjunction: both sides are solved and their spans are joined.
5. `Visible.spans` solves the conditions (solving.py). Where the numbers of the keys ascend, a binary search for the
   query's number gives the start or the end of its span. An equality gives the run of keys with that number; these
   numbers need not ascend, so they are sorted, and the run must have no gap. All of it takes O(L log L).

| mask | in the function | condition | span of a query |
|---|---|---|---|
| causal | ``key <= query`` | relation ``le`` | from 0 to the last key that is not greater |
| sliding window | ``key > query - 3`` | relation ``gt`` | from the first key that is greater to the end |
| packed sequences | ``sequence[b, query] == sequence[b, key]`` | relation ``eq`` | the run of its sequence |
| padding | ``valid[b, key]`` | a bool for each key | stays `SpanMask.key_valid` |
| image blocks | ``causal | (block[b, query] == block[b, key])`` | two solutions | their union; they must touch |

What is guaranteed. A wrong reading would be a wrong mask, so nothing is guessed from names or closures, and each
operation without a rule here raises `UnreadableError`: a branch, an unknown attribute, an unknown function of torch, a
comparison of two conditions, anything that differs by head. What depends on values (whether keys ascend, whether a run
has a gap) is returned in `Spans.exact`, which the caller must check. In both cases the caller (masks.py) uses
transformers' own dense mask, which is right for any function, and counts the reason.

To extend it. A new operator: `_ARITHMETIC` and a method of `Index`. A new function of torch:
`_Symbol.__torch_function__`. A new kind of condition: a field of `Visible` and its solution in `solving.solve`. Each
needs a row in `FUNCTIONS` of tests/integrations/test_mask_functions.py, which compares every mask with transformers'
evaluation of all pairs.

docs/adr/0007-reading-mask-functions.md explains why masks are read like this, and what it costs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmkernels.integrations.transformers.solving import Numbers, Relation, Spans, UnreadableError, solve, union

_FLIP = {"le": "ge", "lt": "gt", "ge": "le", "gt": "lt", "eq": "eq"}
_ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
}


class _Symbol:
    """Base of indices and conditions: maps torch's functions to Python's operators and refuses everything else."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if kwargs:
            raise UnreadableError(f"the mask function calls torch's {function.__name__} with {', '.join(kwargs)}")
        name = function.__name__.strip("_").removeprefix("logical_").removeprefix("bitwise_")
        if name == "getitem":
            return _look_up(args[0], args[1])
        if name == "abs":
            return abs(args[0])
        if len(args) == 2:
            if name in _ARITHMETIC:
                return _arithmetic(name, *args)
            if name.startswith("r") and name[1:] in _ARITHMETIC:
                return _arithmetic(name[1:], args[1], args[0])
            if name in _FLIP:
                return _compare(args[0], name, args[1])
            if name in ("and", "or"):
                one, other = _visible(args[0]), _visible(args[1])
                return one & other if name == "and" else one | other
        raise UnreadableError(f"the mask function calls torch's {function.__name__}")

    def __bool__(self) -> bool:
        raise UnreadableError("the mask function branches on a comparison")

    def __eq__(self, other: object) -> Any:  # Python's default compares identities and returns False
        raise UnreadableError("the mask function tests whether conditions or distances are equal")

    def __ne__(self, other: object) -> Any:
        raise UnreadableError("the mask function tests whether two things differ")

    __hash__ = None  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        raise UnreadableError(f"the mask function uses .{name}")

    def to(self, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(x, torch.dtype) for x in (*args, *kwargs.values())):
            raise UnreadableError("the mask function changes dtypes")
        return self


def _operator(name: str) -> Callable[[Any, Any], Any]:
    return lambda self, other: _arithmetic(name, self, other)


def _reflected(name: str) -> Callable[[Any, Any], Any]:
    return lambda self, other: _arithmetic(name, other, self)


def _comparison(compare: str) -> Callable[[Any, Any], Any]:
    return lambda self, other: _compare(self, compare, other)


class Index(_Symbol):
    """A number for every query, key or batch entry: an argument of the mask function, or computed from one.

    Args:
        axis: "batch", "head", "query" or "key"; arithmetic with "batch" keeps the axis of the other operand.
        values: int64 ``[B or 1, L or 1]``.
        ascending: the values never fall along the axis, by construction.
    """

    def __init__(self, axis: str, values: Tensor, ascending: bool = False) -> None:
        self.axis = axis
        self.values = values
        self.ascending = ascending

    @property
    def numbers(self) -> Numbers:
        return Numbers(self.values, self.ascending)

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    def new_ones(self, size: Any, *, dtype: torch.dtype | None = None, **kwargs: Any) -> Visible:
        return _constant(True, size, dtype)

    def new_zeros(self, size: Any, *, dtype: torch.dtype | None = None, **kwargs: Any) -> Visible:
        return _constant(False, size, dtype)

    __add__, __radd__ = _operator("add"), _reflected("add")
    __sub__, __rsub__ = _operator("sub"), _reflected("sub")
    __mul__, __rmul__ = _operator("mul"), _reflected("mul")
    __floordiv__, __mod__ = _operator("floordiv"), _operator("mod")
    __le__, __lt__, __ge__, __gt__ = map(_comparison, ("le", "lt", "ge", "gt"))
    __eq__ = _comparison("eq")
    __hash__ = None


class Distance(_Symbol):
    """``sign * (key - query)`` for every pair, or its absolute value; it can be compared with a number."""

    def __init__(self, key: Index, query: Index, sign: int = 1, absolute: bool = False) -> None:
        self.key, self.query, self.sign, self.absolute = key, query, sign, absolute

    def __abs__(self) -> Distance:
        return Distance(self.key, self.query, absolute=True)

    def against(self, compare: str, limit: Any) -> Visible:
        """Returns the condition ``distance <compare> limit``."""
        if not isinstance(limit, int) or compare == "eq":
            raise UnreadableError("the mask function compares a distance with something else than a whole number")
        if self.absolute:
            if compare not in ("le", "lt"):
                raise UnreadableError("the mask function hides what is near")
            near = Distance(self.key, self.query)
            return near.against(compare, limit) & near.against(_FLIP[compare], -limit)
        if self.sign < 0:
            return Distance(self.key, self.query).against(_FLIP[compare], -limit)
        return _compare(self.key, compare, self.query + limit)

    __le__, __lt__, __ge__, __gt__ = map(_comparison, ("le", "lt", "ge", "gt"))


@dataclass(frozen=True, eq=False)
class Visible(_Symbol):
    """The result of a mask function: a query sees the keys for which all of these conditions hold.

    Args:
        relations: between a key and a query.
        queries: bool ``[B or 1, Lq or 1]`` each; where it is False, the query sees nothing.
        keys: bool ``[B or 1, Lk]`` each; where it is False, the key is hidden from all queries.
        solved: spans, from a union.
        nothing: no query sees any key.
    """

    relations: tuple[Relation, ...] = ()
    queries: tuple[Tensor, ...] = ()
    keys: tuple[Tensor, ...] = ()
    solved: tuple[Spans, ...] = ()
    nothing: bool = False

    @property
    def device(self) -> None:
        """None: conditions combine on any device."""
        return None

    @property
    def everything(self) -> bool:
        return not (self.relations or self.queries or self.keys or self.solved or self.nothing)

    def __and__(self, other: Any) -> Visible:
        other = _visible(other)
        return Visible(
            self.relations + other.relations,
            self.queries + other.queries,
            self.keys + other.keys,
            self.solved + other.solved,
            self.nothing or other.nothing,
        )

    def __or__(self, other: Any) -> Visible:
        other = _visible(other)
        if self.everything or other.nothing:
            return self
        if other.everything or self.nothing:
            return other
        return Visible(solved=(union(self.spans(), other.spans()),))

    __rand__ = __and__
    __ror__ = __or__

    def spans(self) -> Spans:
        """Solves the conditions. The caller must check `Spans.exact`."""
        if self.nothing:
            nothing = torch.zeros(1, 1, dtype=torch.int64)
            return Spans(nothing, nothing)
        return solve(self.relations, self.queries, self.keys, self.solved)


def read(function: Callable[..., Any], batch: Tensor, query: Tensor, key: Tensor) -> Visible:
    """Calls a mask function once, with symbols for indices.

    Args:
        batch: ``[B]``, query: ``[Lq]``, key: ``[Lk]``: the indices that the function would be evaluated at.

    Raises:
        UnreadableError: the function does something that has no rule here.
    """
    try:
        return _visible(
            function(
                Index("batch", batch[:, None]),
                Index("head", batch[:1, None]),
                Index("query", query[None], ascending=True),
                Index("key", key[None], ascending=True),
            )
        )
    except UnreadableError:
        raise
    except Exception as error:  # the function works on tensors only, whatever the error is
        raise UnreadableError(f"the mask function needs tensors ({type(error).__name__}: {error})") from error


# Python's operators as conditions.


def _constant(value: bool, size: Any, dtype: torch.dtype | None) -> Visible:
    if dtype is not torch.bool or tuple(size) != ():
        raise UnreadableError("the mask function creates a tensor")
    return Visible(nothing=not value)


def _visible(x: Any) -> Visible:
    """Returns the result of a mask function, or of a part of it, as a condition."""
    if isinstance(x, Visible):
        return x
    if isinstance(x, Tensor) and not isinstance(x, _Symbol) and x.dtype == torch.bool and x.numel() == 1:
        return Visible(nothing=not bool(x))
    if isinstance(x, bool):
        return Visible(nothing=not x)
    raise UnreadableError(f"the mask function returns {type(x).__name__}")


def _number(x: Any) -> int | None:
    """Returns a whole number, also from a tensor of one element; None for anything else."""
    if isinstance(x, Tensor) and x.numel() == 1 and not x.is_floating_point():
        return int(x)
    return x if isinstance(x, int) else None


def _arithmetic(name: str, a: Any, b: Any) -> Any:
    indices = [x for x in (a, b) if isinstance(x, Index)]
    axes = [x.axis for x in indices]
    if "head" in axes:
        raise UnreadableError("the mask differs by head")
    if {"key", "query"} <= set(axes):
        if name != "sub":
            raise UnreadableError(f"the mask function combines a query's and a key's index by {name}")
        return Distance(a, b) if a.axis == "key" else Distance(b, a, sign=-1)
    numbers = [x.values if isinstance(x, Index) else _number(x) for x in (a, b)]
    for x, number in zip((a, b), numbers):
        if number is None:
            raise UnreadableError(f"the mask function combines an index with {type(x).__name__}")
    if len(indices) == 2:
        axis = a.axis if b.axis == "batch" else b.axis
        ascending = name in ("add", "sub") and b.axis == "batch" and a.ascending
    else:
        (index,) = indices
        axis = index.axis
        positive = name in ("mul", "floordiv") and (_number(b) or 0) > 0
        ascending = index.ascending and (name == "add" or (index is a and (name == "sub" or positive)))
    return Index(axis, _ARITHMETIC[name](*numbers), ascending)


def _compare(a: Any, compare: str, b: Any) -> Visible:
    if isinstance(a, Distance):
        return a.against(compare, _number(b))
    if isinstance(b, Distance):
        return b.against(_FLIP[compare], _number(a))
    if not isinstance(a, Index):
        return _compare(b, _FLIP[compare], a)
    if a.axis == "head" or (isinstance(b, Index) and b.axis == "head"):
        raise UnreadableError("the mask differs by head")
    if isinstance(b, Index):
        if a.axis == "key" and b.axis != "key":
            return Visible(relations=(Relation(a.numbers, compare, b.numbers),))
        if b.axis == "key" and a.axis != "key":
            return Visible(relations=(Relation(b.numbers, _FLIP[compare], a.numbers),))
        return _condition("key" if a.axis == "key" else "query", getattr(torch, compare)(a.values, b.values))
    number = _number(b)
    if number is None:
        raise UnreadableError(f"the mask function compares an index with {type(b).__name__}")
    return _condition(a.axis, getattr(torch, compare)(a.values, number))


def _condition(axis: str, values: Tensor) -> Visible:
    return Visible(keys=(values,)) if axis == "key" else Visible(queries=(values,))


def _look_up(table: Any, where: Any) -> Index | Visible:
    """Returns ``table[batch]`` or ``table[batch, index]``, ``[B, L]``: a number or a condition for each index."""
    where = where if isinstance(where, tuple) else (where,)
    if not isinstance(table, Tensor) or len(where) != table.dim() or not all(isinstance(x, Index) for x in where):
        raise UnreadableError("the mask function looks something up by other than its indices")
    axes = [x.axis for x in where]
    if axes not in (["batch"], ["batch", "query"], ["batch", "key"], ["query"], ["key"]):
        raise UnreadableError(f"the mask function looks something up by {', '.join(axes)}")
    values = table[tuple(x.values for x in where)]  # [B or 1, L or 1]
    if values.dtype == torch.bool:
        return _condition(axes[-1], values)
    if values.is_floating_point():
        raise UnreadableError("the mask function looks up fractions")
    return Index(axes[-1], values.long())
