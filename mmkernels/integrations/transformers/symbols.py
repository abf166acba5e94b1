"""Reading a mask function without evaluating it at Lq x Lk places.

transformers describes a mask by a function ``(batch, head, query, key) -> bool`` that its own implementations evaluate
for every pair. Here it is called once, with an `Index` in each place: what it compares comes back as a `Visible`, a
conjunction of conditions, and `Visible.spans` solves them for the run of keys that each query sees, in O(L log L).
Whatever the function is made of, nothing is assumed about its name or its closure: what can't be read raises
`UnreadableError`, and so does a mask that is no run of keys.
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
    """What the indices and the conditions share: torch's functions come back to Python's operators."""

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

    def __eq__(self, other: object) -> Any:  # Python's own would compare identities, and answer
        raise UnreadableError("the mask function asks whether conditions or distances are equal")

    def __ne__(self, other: object) -> Any:
        raise UnreadableError("the mask function asks whether two things differ")

    __hash__ = None  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        raise UnreadableError(f"the mask function uses .{name}")

    def to(self, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(x, torch.dtype) for x in (*args, *kwargs.values())):
            raise UnreadableError("the mask function changes dtypes")
        return self


class Index(_Symbol):
    """A number for every query, key or batch entry: an index that the mask function is called with, or made from one.

    Args:
        axis: "batch", "head", "query" or "key"; arithmetic with "batch" keeps the other's.
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

    def __add__(self, other: Any) -> Any:
        return _arithmetic("add", self, other)

    def __radd__(self, other: Any) -> Any:
        return _arithmetic("add", other, self)

    def __sub__(self, other: Any) -> Any:
        return _arithmetic("sub", self, other)

    def __rsub__(self, other: Any) -> Any:
        return _arithmetic("sub", other, self)

    def __mul__(self, other: Any) -> Any:
        return _arithmetic("mul", self, other)

    def __rmul__(self, other: Any) -> Any:
        return _arithmetic("mul", other, self)

    def __floordiv__(self, other: Any) -> Any:
        return _arithmetic("floordiv", self, other)

    def __mod__(self, other: Any) -> Any:
        return _arithmetic("mod", self, other)

    def __le__(self, other: Any) -> Visible:
        return _compare(self, "le", other)

    def __lt__(self, other: Any) -> Visible:
        return _compare(self, "lt", other)

    def __ge__(self, other: Any) -> Visible:
        return _compare(self, "ge", other)

    def __gt__(self, other: Any) -> Visible:
        return _compare(self, "gt", other)

    def __eq__(self, other: object) -> Visible:  # type: ignore[override]
        return _compare(self, "eq", other)

    __hash__ = None


class Distance(_Symbol):
    """``key - query`` for every pair, or its absolute value; it can be compared with a number."""

    def __init__(self, key: Index, query: Index, sign: int = 1, absolute: bool = False) -> None:
        self.key, self.query, self.sign, self.absolute = key, query, sign, absolute

    def __abs__(self) -> Distance:
        return Distance(self.key, self.query, absolute=True)

    def _against(self, compare: str, limit: Any) -> Visible:
        if not isinstance(limit, int) or compare == "eq":
            raise UnreadableError("the mask function compares a distance with something else than a whole number")
        if self.absolute:
            if compare not in ("le", "lt"):
                raise UnreadableError("the mask function hides what is near")
            near = Distance(self.key, self.query)
            return near._against(compare, limit) & near._against(_FLIP[compare], -limit)
        if self.sign < 0:
            return Distance(self.key, self.query)._against(_FLIP[compare], -limit)
        return _compare(self.key, compare, self.query + limit)

    def __le__(self, limit: Any) -> Visible:
        return self._against("le", limit)

    def __lt__(self, limit: Any) -> Visible:
        return self._against("lt", limit)

    def __ge__(self, limit: Any) -> Visible:
        return self._against("ge", limit)

    def __gt__(self, limit: Any) -> Visible:
        return self._against("gt", limit)


@dataclass(frozen=True, eq=False)
class Visible(_Symbol):
    """What a mask function returns: all of these conditions at once.

    Args:
        relations: between a key and a query.
        queries: bool ``[B or 1, Lq or 1]`` each: False sees nothing.
        keys: bool ``[B or 1, Lk]`` each: False is seen by nobody.
        solved: runs of keys, from a union.
    """

    relations: tuple[Relation, ...] = ()
    queries: tuple[Tensor, ...] = ()
    keys: tuple[Tensor, ...] = ()
    solved: tuple[Spans, ...] = ()
    nothing: bool = False

    @property
    def device(self) -> None:
        """Nowhere: conditions of one mask combine wherever its indices lie."""
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
        """Solve the conditions. `Spans.exact` is still to be looked at."""
        if self.nothing:
            nothing = torch.zeros(1, 1, dtype=torch.int64)
            return Spans(nothing, nothing)
        return solve(self.relations, self.queries, self.keys, self.solved)


def read(function: Callable[..., Any], batch: Tensor, query: Tensor, key: Tensor) -> Visible:
    """Call a mask function once, with symbols for indices.

    Args:
        batch: ``[B]``, query: ``[Lq]``, key: ``[Lk]``: the indices that the function would be evaluated at.

    Raises:
        UnreadableError: the function does something that has no reading here.
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
    except Exception as error:  # made for tensors alone: whatever it trips over says no more than that
        raise UnreadableError(f"the mask function needs tensors ({type(error).__name__}: {error})") from error


# From Python's operators to conditions.


def _constant(value: bool, size: Any, dtype: torch.dtype | None) -> Visible:
    if dtype is not torch.bool or tuple(size) != ():
        raise UnreadableError("the mask function makes a tensor of its own")
    return Visible(nothing=not value)


def _visible(x: Any) -> Visible:
    """A condition from what a mask function may return."""
    if isinstance(x, Visible):
        return x
    if isinstance(x, Tensor) and not isinstance(x, _Symbol) and x.dtype == torch.bool and x.numel() == 1:
        return Visible(nothing=not bool(x))
    if isinstance(x, bool):
        return Visible(nothing=not x)
    raise UnreadableError(f"the mask function returns {type(x).__name__}")


def _number(x: Any) -> int | None:
    """A whole number, also as a tensor that holds just that; None for anything else."""
    if isinstance(x, Tensor) and x.numel() == 1 and not x.is_floating_point():
        return int(x)
    return x if isinstance(x, int) else None


def _arithmetic(name: str, a: Any, b: Any) -> Any:
    apply = _ARITHMETIC[name]
    for x in (a, b):
        if isinstance(x, Index) and x.axis == "head":
            raise UnreadableError("the mask differs by head")
    if isinstance(a, Index) and isinstance(b, Index):
        if {a.axis, b.axis} == {"key", "query"}:
            if name != "sub":
                raise UnreadableError(f"the mask function combines a query's and a key's index by {name}")
            return Distance(a, b) if a.axis == "key" else Distance(b, a, sign=-1)
        axis = a.axis if b.axis == "batch" else b.axis
        kept = name in ("add", "sub") and b.axis == "batch" and a.ascending
        return Index(axis, apply(a.values, b.values), kept)
    if isinstance(a, Index):
        number = _number(b)
        if number is None:
            raise UnreadableError(f"the mask function combines an index with {type(b).__name__}")
        kept = a.ascending and (name in ("add", "sub") or (name in ("mul", "floordiv") and number > 0))
        return Index(a.axis, apply(a.values, number), kept)
    number = _number(a)
    if number is None:
        raise UnreadableError(f"the mask function combines an index with {type(a).__name__}")
    return Index(b.axis, apply(number, b.values), b.ascending and name == "add")


def _compare(a: Any, compare: str, b: Any) -> Visible:
    if isinstance(a, Distance):
        return a._against(compare, _number(b))
    if isinstance(b, Distance):
        return b._against(_FLIP[compare], _number(a))
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
    """``table[batch]`` or ``table[batch, place]``, ``[B, L]``: a number or a condition for each place."""
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
