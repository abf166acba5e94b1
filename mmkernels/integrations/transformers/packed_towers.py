"""Lets towers that pack images, windows or recordings into one row attend to all of them in one call a layer.

Transformers' towers of this kind have two ways: one call with ``cu_seq_lens_q``, or one call for each image or window,
whose lengths wait for the device. They take the first one where ``is_flash_attention_requested`` is true, which it is
for names that contain "flash". Another name than "mmkernels" would not do: transformers imports flash attention for it
when a model is built. So the question is answered anew, in those functions alone that pass ``cu_seq_lens_q`` by it.
The configuration keeps the name "mmkernels", for which transformers does not wait to learn the longest sequence.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Iterator
from functools import cache
from types import CodeType, FunctionType, ModuleType
from typing import Any

from mmkernels.integrations.transformers.model_mask import NAME

_QUESTION = "is_flash_attention_requested"
_ANSWER = "_mmkernels_takes_packed_sequences"
_ARGUMENT = "cu_seq_lens_q"

_lock = threading.Lock()
_changed = set[str]()  # modules


def pack_towers(model_class: type) -> None:
    """Changes the towers of a model class's module, and of those of its base classes. A second call is void.

    What a model does under another implementation stays as it is.
    """
    with _lock:
        for name in {base.__module__ for base in model_class.__mro__} - _changed:
            module = sys.modules.get(name)
            for function in packing_functions(module) if module and hasattr(module, _QUESTION) else ():
                _answer(function)
            _changed.add(name)


def packing_functions(module: ModuleType) -> Iterator[FunctionType]:
    """Yields the methods of a module's classes that pack sequences if flash attention is requested."""
    for thing in list(vars(module).values()):
        if isinstance(thing, type) and thing.__module__ == module.__name__:
            for method in list(vars(thing).values()):
                function = inspect.unwrap(method) if callable(method) else None
                if isinstance(function, FunctionType) and _asks_to_pack(function.__code__):
                    yield function


def _asks_to_pack(code: CodeType) -> bool:
    names = {_QUESTION, _ANSWER} & set(code.co_names)
    return bool(names) and any(x == _ARGUMENT or (isinstance(x, tuple) and _ARGUMENT in x) for x in code.co_consts)


def _answer(function: FunctionType) -> None:
    """Lets a function call `_ANSWER`, a global of its module, where it calls `_QUESTION`."""
    namespace = function.__globals__
    if _ANSWER not in namespace:
        namespace[_ANSWER] = _takes_packed_sequences(namespace[_QUESTION])
    names = tuple(_ANSWER if name == _QUESTION else name for name in function.__code__.co_names)
    function.__code__ = function.__code__.replace(co_names=names)


@cache
def _takes_packed_sequences(question: Any) -> Any:
    def takes_packed_sequences(config: Any) -> bool:
        return config._attn_implementation == NAME or question(config)

    return takes_packed_sequences
