"""Models of transformers whose attention does not use the attention interface: refused, or left as they are.

``from_pretrained`` and configurations take any registered name for any model. A model with an attention of its own then
fails by a ``KeyError`` where it looks the name up in its table of classes, or misreads masks.
"""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from types import ModuleType
from typing import Any

from mmkernels.integrations.transformers.model_mask import NAME, USE_ANOTHER
from mmkernels.integrations.transformers.packed_towers import pack_towers
from mmkernels.integrations.transformers.stand_in import StandIn


def check_config(config: Any) -> None:
    """Refuses the configuration of a model that has only an attention of its own, which would misread masks.

    Raises:
        NotImplementedError: with the name of the attention's class.
    """
    own = _of_package(type(config).__module__.rpartition(".")[0])
    if own:
        raise NotImplementedError(_refusal(own))


def guard(model_class: Any) -> None:
    """Lets every model that is built with "mmkernels" in its configuration ask `allowed` first. A second call is void.

    The towers of a model that is built with it or set to it pack their sequences.

    Args:
        model_class: ``PreTrainedModel``, whose constructor asks its method what implementation the model can have.
    """
    original: Callable[..., str] = model_class.get_correct_attn_implementation
    if hasattr(original, "guarded"):
        return

    @functools.wraps(original)
    def get_correct_attn_implementation(self: Any, requested_attention: str | None, is_init_check: bool = False) -> str:
        if requested_attention == NAME:
            pack_towers(type(self))
            if is_init_check and isinstance(requested_attention, StandIn):  # of a patched model's configuration
                requested_attention = requested_attention.before if _of_class(type(self)) else requested_attention
            elif is_init_check:
                requested_attention = allowed(self)
        return original(self, requested_attention, is_init_check)

    get_correct_attn_implementation.guarded = True  # type: ignore[attr-defined]
    model_class.get_correct_attn_implementation = get_correct_attn_implementation


def allowed(model: Any) -> str | None:
    """Returns the implementation for a model, or a part of one, that is built with "mmkernels" in its configuration.

    None is transformers' choice, with a warning: a part with an attention of its own keeps it, as it does under
    ``set_attn_implementation``.

    Raises:
        NotImplementedError: the whole model has an attention of its own.
    """
    own = _of_class(type(model))
    if not own:
        for table in _tables(sys.modules.get(type(model).__module__)):
            table.setdefault(NAME, table.get("sdpa", table["eager"]))  # the model's own; its other parts use ours
        return NAME
    if not _is_part(type(model.config)) and all(map(_is_own, _parts(model.config))):
        raise NotImplementedError(_refusal(own))
    warnings.warn(f"{own} has no attention interface: {type(model).__name__} keeps it as it is", stacklevel=4)
    return None


def _is_part(config_class: Any) -> bool:
    """Returns whether a configuration is written for a part of another model."""
    package = config_class.__module__.rpartition(".")[0]
    beside = [module for name, module in sys.modules.items() if name.startswith(f"{package}.configuration_")]
    wholes = (getattr(thing, "sub_configs", None) or {} for module in beside for thing in vars(module).values())
    return bool(config_class.base_config_key) or any(config_class in whole.values() for whole in wholes)


def _parts(config: Any) -> Iterator[Any]:
    """Yields the configurations of all parts of a model, and of theirs."""
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            yield part
            yield from _parts(part)


def _is_own(config: Any) -> bool:
    return bool(_of_package(type(config).__module__.rpartition(".")[0]))


def _refusal(own: str) -> str:
    return f'attn_implementation="mmkernels" is not for {own}: it has no attention interface; {USE_ANOTHER}'


def _of_class(model_class: type) -> str:
    """Returns the attention class of a model without the attention interface, else ""."""
    module = sys.modules.get(model_class.__module__)
    if model_class.__module__.startswith("transformers.models."):
        return _of_package(model_class.__module__.rpartition(".")[0])
    if module is None or hasattr(module, "ALL_ATTENTION_FUNCTIONS"):
        return ""
    return next((f"{table['eager'].__name__} of {module.__name__}" for table in _tables(module)), "")


@cache
def _of_package(package: str) -> str:
    """Returns the attention class of a package of transformers that has no attention interface, else ""."""
    if not package.startswith("transformers.models."):
        return ""
    with suppress(ImportError):
        importlib.import_module(f"{package}.modeling_{package.rpartition('.')[2]}")
    modules = [module for name, module in sys.modules.items() if name.startswith(f"{package}.modeling_")]
    if any(hasattr(module, "ALL_ATTENTION_FUNCTIONS") for module in modules):
        return ""
    attention_classes = [
        name
        for module in modules
        for name, thing in vars(module).items()
        if "Attention" in name and isinstance(thing, type) and thing.__module__ == module.__name__
    ]
    return f"{attention_classes[0]} of {package}" if attention_classes else ""  # else it only wraps other models


def _tables(module: ModuleType | None) -> Iterator[dict[str, type]]:
    """Yields a module's tables of attention classes by the name of an implementation."""
    for thing in [] if module is None else list(vars(module).values()):
        if isinstance(thing, dict) and isinstance(thing.get("eager"), type):
            yield thing
