"""What a kind of patch finds in a model: modules to change, and modules to leave, each with the reason."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

from torch import nn

from mmkernels.integrations.patching.classes import Methods, original_class
from mmkernels.transformers_version import VersionError


@dataclass(frozen=True, eq=False)
class Change:
    """A module that gets methods of ours.

    Args:
        module: to be changed.
        methods: see `mmkernels.integrations.patching.classes.swap`.
        what: what they compute, such as "language-model loss": a line of the report.
        op: the op that computes it, such as "linear_cross_entropy".
        effect: what to expect, in a few words.
    """

    module: nn.Module
    methods: Methods
    what: str
    op: str
    effect: str


@dataclass(frozen=True, eq=False)
class Left:
    """A module that stays as it is.

    Args:
        module: of someone else's.
        what: what it computes.
        why: why it is left, as the end of a sentence: "its weight is quantised".
    """

    module: nn.Module
    what: str
    why: str


Signature = Sequence[str]
"""The names of a method's arguments but for self, in order."""

Kind = Callable[[nn.Module], Iterator[Change | Left]]
"""Goes through a model and yields what it finds, changing nothing; a patched module is asked as if it were not."""


@dataclass(frozen=True, eq=False)
class Known:
    """A class of someone else's of which mmkernels has methods.

    Args:
        path: the class, as "package.module.Class".
        methods: ours, by name.
        arguments: of each method of theirs that is replaced, the names of its arguments but for self, in order: what
            ours is written for; or several such signatures, of which it may have any. Another one is an error.
        what, op, effect: see `Change`.
        attributes: what a module must have, as dotted names: "query.weight".
        why_not: returns why a module is left, or "".
    """

    path: str
    methods: Methods
    arguments: Mapping[str, Signature | Sequence[Signature]]
    what: str
    op: str
    effect: str
    attributes: Sequence[str] = ()
    why_not: Callable[[Any], str] = field(default=lambda module: "")

    @property
    def module_name(self) -> str:
        return self.path.rpartition(".")[0]

    @property
    def class_name(self) -> str:
        return self.path.rpartition(".")[2]


def by_class(table: Sequence[Known]) -> Kind:
    """Returns the kind of patch that changes every module of a table's classes.

    The kind raises `VersionError` where a model is of a package that the table knows and a class is not there, or has
    another signature or other attributes: what has moved or changed is said, and nothing is replaced by guess. Of a
    class and a base of it that the table both knows, the class counts. A method that the user has exchanged, in the
    class or in a module of it, goes on: the module is left.
    """

    def find(model: nn.Module) -> Iterator[Change | Left]:
        modules = list(model.modules())
        there = {_package(base.__module__) for module in modules for base in type(module).__mro__}
        classes = [(_class_of(known), known) for known in table if _package(known.module_name) in there]
        for module in modules:
            line = original_class(module).__mro__
            nearest = next((base for base in line if any(base is theirs for theirs, _ in classes)), None)
            for theirs, known in classes:
                if theirs is nearest:
                    yield _found(module, theirs, known)

    return find


def _class_of(known: Known) -> type[nn.Module]:
    """Returns a known class, after a check that it is as expected."""
    try:
        theirs = getattr(importlib.import_module(known.module_name), known.class_name, None)
    except ImportError as error:
        raise VersionError(_unexpected(known, f"no {known.module_name}")) from error
    if not isinstance(theirs, type) or not issubclass(theirs, nn.Module):
        raise VersionError(_unexpected(known, f"no {known.class_name} in {known.module_name}"))
    for name, expected in known.arguments.items():
        method = getattr(theirs, name, None)
        if method is None:
            raise VersionError(_unexpected(known, f"{known.class_name} without {name}"))
        got = list(inspect.signature(method).parameters)
        got = got[1:] if got[:1] == ["self"] or isinstance(inspect.getattr_static(theirs, name), FunctionType) else got
        signatures = _signatures(expected)
        if got not in signatures:
            expects = " or ".join(f"{name}({', '.join(signature)})" for signature in signatures)
            by = _intruder(known, method)
            whose = f" (which is that of {by})" if by else ""
            said = f"{known.class_name}.{name}({', '.join(got)}){whose} instead of {expects}"
            raise VersionError(_unexpected(known, said))
    return theirs


def _signatures(expected: Signature | Sequence[Signature]) -> list[list[str]]:
    """Returns one signature or several as a list of them."""
    single = all(isinstance(each, str) for each in expected)
    return [list(each) for each in ([expected] if single else expected)]  # type: ignore[arg-type]


def _package(module_name: str) -> str:
    return module_name.rpartition(".")[0]


def _found(module: nn.Module, theirs: type[nn.Module], known: Known) -> Change | Left:
    changed = _changed(module, theirs, known)
    if changed:
        return Left(module, known.what, changed)
    for path in known.attributes:
        if not _has(module, path):
            raise VersionError(_unexpected(known, f"{known.class_name} without {path}"))
    why = known.why_not(module)
    return Left(module, known.what, why) if why else Change(module, known.methods, known.what, known.op, known.effect)


def _changed(module: nn.Module, theirs: type[nn.Module], known: Known) -> str:
    """Returns why a method of a module, or one that it calls, is not that of the known class; "": it is."""
    own = original_class(module)
    for name in known.methods:
        method = getattr(theirs, name, None)
        if name in vars(module):
            return f"its {name} was set on the module, as accelerate's hooks do"
        if getattr(own, name, None) is not method:
            return f"{own.__name__} has a {name} of its own"
        # A method of ours that goes around theirs calls it.
        goes_around = callable(method) and inspect.unwrap(known.methods[name]) is inspect.unwrap(method)
        for called in (name, *(() if goes_around else _called(theirs, method))):
            intruder = _intruder(known, getattr(theirs, called, None))
            if intruder:
                return f"{theirs.__name__}.{called} is that of {intruder}"
            if called in vars(module) or getattr(own, called) is not getattr(theirs, called):
                return f"{own.__name__} has a {called} of its own"
    return ""


def _called(theirs: type[nn.Module], method: Any) -> Iterator[str]:
    """Yields the methods of a class that a method of it calls, by the names in its code; not those of all modules."""
    function = inspect.unwrap(method) if callable(method) else None
    for name in function.__code__.co_names if isinstance(function, FunctionType) else ():
        if isinstance(getattr(theirs, name, None), FunctionType) and not hasattr(nn.Module, name):
            yield name


def _intruder(known: Known, method: Any) -> str:
    """Returns the module whose function someone has put into a known class or around its method; "": there is none."""
    root = known.path.partition(".")[0]
    while isinstance(method, FunctionType):
        place = str(method.__globals__.get("__name__", ""))
        if place.partition(".")[0] not in (root, "transformers", "torch"):
            return place
        method = getattr(method, "__wrapped__", None)
    return ""


def _has(thing: Any, path: str) -> bool:
    for name in path.split("."):
        if not hasattr(thing, name):
            return False
        thing = getattr(thing, name)
    return True


def _unexpected(known: Known, got: str) -> str:
    import transformers

    return (
        f"transformers {transformers.__version__} is not what mmkernels is written for, so nothing was patched: {got}"
    )
