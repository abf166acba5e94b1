"""How a module of someone else's gets other methods, and gets its own back: its class is exchanged for a subclass.

The subclass is made for it and has its name. Nothing is stored in the module, so that its state dict, its copies, and
what holds a reference to it stay as they are. A pickle of the module names the original class.
"""

from __future__ import annotations

import copy
import copyreg
import threading
from collections.abc import Callable, Mapping
from functools import partial
from types import MethodType
from typing import Any

from torch import nn

Methods = Mapping[str, Callable[..., Any]]

_ORIGINAL, _METHODS = "_mmkernels_original", "_mmkernels_methods"
_lock = threading.Lock()
_made = dict[tuple[Any, ...], type[nn.Module]]()


def swap(module: nn.Module, methods: Methods) -> bool:
    """Gives a module methods of ours, beside those that it has by an earlier call; a second call does nothing.

    A forward pass that another thread is in goes on with the methods that it has looked up already.

    Args:
        module: changed in place, by assignment to its ``__class__``.
        methods: functions that take the module first. A property is given as one. `original_method` is the way to what
            a function stands for.

    Returns:
        whether anything changed.

    Raises:
        TypeError: Python can't give the module another class, such as one of TorchScript.
    """
    wanted = {**methods_of(module), **methods}
    if wanted == methods_of(module):
        return False
    try:
        module.__class__ = _patched_class(original_class(module), wanted)
    except TypeError as error:
        name = original_class(module).__qualname__
        raise TypeError(f"model must be of modules whose class can be exchanged, got a {name}: {error}") from error
    return True


def restore(module: nn.Module) -> bool:
    """Gives a module its own class back. Returns whether it had another.

    A method of ours that something keeps in the module, as accelerate's hooks do, becomes the one that it stands for.

    Raises:
        RuntimeError: something else has exchanged the class since (FSDP2 does).
    """
    if not is_patched(module):
        return False
    check_restorable(module)
    ours = methods_of(module)
    module.__class__ = original_class(module)
    for name, kept in list(vars(module).items()):
        if isinstance(kept, MethodType) and kept.__self__ is module:
            for method, function in ours.items():
                if kept.__func__ is function:
                    vars(module)[name] = getattr(type(module), method).__get__(module)
    return True


def check_restorable(module: nn.Module) -> None:
    """Raises RuntimeError if something else has exchanged a patched module's class since."""
    if is_patched(module) and _ORIGINAL not in vars(type(module)):
        name = type(module).__qualname__
        raise RuntimeError(f"patch and unpatch must come before what made a patched module a {name}, like fully_shard")


def is_patched(module: nn.Module) -> bool:
    """Returns whether a module has methods of ours."""
    return hasattr(type(module), _ORIGINAL)


def original_class(module: nn.Module) -> type[nn.Module]:
    """Returns the class that a module had before it was patched, which is its class if it never was."""
    found: type[nn.Module] = getattr(type(module), _ORIGINAL, type(module))
    return found


def methods_of(module: nn.Module) -> Methods:
    """Returns the methods of ours that a module has."""
    found: Methods = getattr(type(module), _METHODS, {})
    return found


def original_method(module: nn.Module, name: str) -> Callable[..., Any]:
    """Returns a method of the class that a module had before it was patched, with the module as its first argument.

    It is no bound method: where a graph breaks inside of one, TorchDynamo goes on with the module's own of that name,
    which is ours.
    """
    return partial(getattr(original_class(module), name), module)


def _patched_class(original: type[nn.Module], methods: Methods) -> type[nn.Module]:
    """Returns the subclass of a class that has these methods, always the same one."""
    key = (original, *sorted(methods.items(), key=lambda item: item[0]))
    with _lock:
        if key not in _made:
            names = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
            ours = {_ORIGINAL: original, _METHODS: dict(methods)}
            pickled = {"__reduce_ex__": _reduce, "__copy__": _copy, "__deepcopy__": _deepcopy}
            _made[key] = type(original.__name__, (original,), {**names, **methods, **pickled, **ours})
        return _made[key]


def _reduce(module: nn.Module, protocol: Any) -> Any:
    """Returns what a module of the original class would be pickled as: mmkernels need not be there to load it."""
    reduced: Any = nn.Module.__reduce_ex__(module, protocol)
    function, args, *rest = reduced
    args = tuple(original_class(module) if arg is type(module) else arg for arg in args)
    if function is copyreg.__newobj__:  # type: ignore[attr-defined]  # pickle would want args[0] to be the module's class
        function, args = copyreg._reconstructor, (args[0], object, None)  # type: ignore[attr-defined]
    return (function, args, *rest)


def _copy(module: nn.Module) -> nn.Module:
    copied = type(module).__new__(type(module))
    copied.__dict__.update(module.__dict__)
    return copied


def _deepcopy(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Returns a copy that is patched too."""
    own = getattr(original_class(module), "__deepcopy__", None)
    if own is not None:
        copied: nn.Module = own(module, memo)
        copied.__class__ = type(module)
        return copied
    copied = type(module).__new__(type(module))
    memo[id(module)] = copied
    copied.__dict__.update(copy.deepcopy(module.__dict__, memo))
    return copied
