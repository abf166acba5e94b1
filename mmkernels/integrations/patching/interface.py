"""The part of `patch` that transformers has a slot for: attention by name, as ``set_attn_implementation`` sets it."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from types import FunctionType
from typing import Any

from torch import nn

from mmkernels.integrations.patching.changes import Left
from mmkernels.integrations.patching.classes import original_class

WHAT, OP, EFFECT = "attention", "cross_attention", "no score matrix; hidden tiles are skipped"

NO_SLOT = "it has no attention interface"
"""Why an attention is left that mmkernels does not know by its class either."""

_INTERNAL = "_attn_implementation_internal"
_TABLE = "ALL_ATTENTION_FUNCTIONS"
_GENERAL = ("torch.nn.modules.module", "transformers.modeling_utils", "builtins")
"""Modules with classes that are bases of all, and attend to nothing."""

_RETURNED = {"BridgeTowerSelfAttention", "BridgeTowerCrossAttention"}
"""Attention whose weights are among the model's outputs, asked for or not."""

_BEFORE = (None, "eager", "sdpa")
"""What is replaced: any other attention has been chosen by the user."""


@dataclass(frozen=True, eq=False)
class Setting:
    """A configuration that names "mmkernels" for the attention of some modules, or is to.

    Args:
        config: the configuration.
        callers: the modules that attend by it.
        models: the models that have it.
    """

    config: Any
    callers: tuple[nn.Module, ...]
    models: tuple[nn.Module, ...]


@dataclass(eq=False)
class _Users:
    """Who has a configuration: models, and modules inside of them, outside of others that have one of their own."""

    config: Any
    models: list[nn.Module] = field(default_factory=list)
    modules: list[nn.Module] = field(default_factory=list)

    @property
    def callers(self) -> list[nn.Module]:
        return [module for module in self.modules if calls_interface(_class(module))]


def look(model: nn.Module) -> Iterator[Setting | Left]:
    """Yields the configurations in a model to set, as if none were, and the attention to leave, changing nothing."""
    if "transformers" not in sys.modules:
        return
    all_users = _all_users(model)
    all_callers = [caller for users in all_users for caller in users.callers]
    left = dict[int, str]()  # by caller
    chosen = list[Setting]()
    for users in all_users:
        callers = users.callers
        why = _why_not(users, callers)
        if why:
            left.update((id(caller), why) for caller in callers)
        elif callers:
            chosen.append(Setting(users.config, tuple(callers), tuple(users.models)))
        for module in callers if why else ():
            yield Left(module, WHAT, why)
        for module in _own_attention(users, all_callers):
            yield Left(module, WHAT, NO_SLOT)
    yield from chosen
    inner = {id(caller) for setting in chosen for caller in setting.callers}
    for users in all_users:  # that make the masks for the parts inside
        inside = {id(module) for part in users.models for module in part.modules()}
        if not users.callers and inside & inner and not inside & left.keys():
            if not _why_not(users, []) and not any(_own_attention(users, all_callers)):
                yield Setting(users.config, (), tuple(users.models))


def set_name(setting: Setting) -> None:
    """Sets the name in a configuration. What it stands in for is remembered there."""
    from mmkernels.integrations.transformers.packed_towers import pack_towers
    from mmkernels.integrations.transformers.registration import NAME, register
    from mmkernels.integrations.transformers.stand_in import StandIn

    register()
    for part in (*setting.models, *setting.callers):
        pack_towers(_class(part))
    if getattr(setting.config, _INTERNAL) != NAME:
        setattr(setting.config, _INTERNAL, StandIn(getattr(setting.config, _INTERNAL)))


def is_set(config: Any) -> bool:
    """Returns whether `set_name` has set the name in a configuration."""
    return hasattr(getattr(config, _INTERNAL), "before")


def reset_name(config: Any) -> None:
    """Sets the name in a configuration to what it was before `set_name`, if nothing else has been set since."""
    if is_set(config):
        setattr(config, _INTERNAL, getattr(config, _INTERNAL).before)


def configs_of(model: nn.Module) -> list[Any]:
    """Returns the configurations of a model's parts that name an attention, each once."""
    found = dict[int, Any]()
    waiting: list[Any] = [module.config for module in model.modules() if _has_config(module)]
    while waiting:
        config = waiting.pop()
        if id(config) not in found and hasattr(config, _INTERNAL):
            found[id(config)] = config
            waiting += [getattr(config, name, None) for name in getattr(config, "sub_configs", ())]
    return list(found.values())


@lru_cache(maxsize=4096)
def calls_interface(model_class: Any) -> bool:
    """Returns whether a class of modules looks its attention up by a configuration's name."""
    return any(_TABLE in function.__code__.co_names for function in _functions(model_class))


def _class(module: nn.Module) -> Any:
    return original_class(module)


def _has_config(module: nn.Module) -> bool:
    return hasattr(getattr(module, "config", None), _INTERNAL)


def _functions(model_class: type) -> Iterator[FunctionType]:
    """Yields the methods of a class and of its bases, without what wraps them."""
    for base in model_class.__mro__:
        for method in vars(base).values() if base.__module__ not in _GENERAL else ():
            function = inspect.unwrap(method) if callable(method) else None
            if isinstance(function, FunctionType):
                yield function


def _all_users(model: nn.Module) -> list[_Users]:
    from transformers import PreTrainedModel

    found = dict[int, _Users]()
    seen = set[int]()

    def walk(module: nn.Module, config: Any) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        config = module.config if _has_config(module) else config
        if config is not None:
            users = found.setdefault(id(config), _Users(config))
            users.modules.append(module)
            if isinstance(module, PreTrainedModel):
                users.models.append(module)
        for child in module.children():
            walk(child, config)

    walk(model, None)
    return list(found.values())


def _why_not(users: _Users, callers: list[nn.Module]) -> str:
    """Returns why a configuration is left, or ""."""
    name = getattr(users.config, _INTERNAL)
    name = name.before if is_set(users.config) else name
    if name not in (*_BEFORE, "mmkernels"):
        return f'it is set to "{name}"'
    if getattr(users.config, "output_attentions", False):
        return "its configuration asks for attention weights"
    for part in users.models:
        if not part._can_set_attn_implementation():  # type: ignore[operator]
            return f"transformers lets no attention be set for {_class(part).__name__}"
    for caller in callers:
        for keyword, lacks in _refused().items():
            if _passes(caller, keyword):
                return f"mmkernels has no {lacks} ({keyword})"
        if _class(caller).__name__ in _RETURNED:
            return "its weights are among the model's outputs"
        if _asks_for_tensors(_class(caller)):
            return "it changes masks that are tensors"
    return ""


@lru_cache(maxsize=4096)
def _asks_for_tensors(model_class: Any) -> bool:
    """Returns whether an attention does something where its mask is a tensor, which ours is not: DeepSeek-V4's."""
    for function in _functions(model_class):
        if {_TABLE, "isinstance", "Tensor"} <= set(function.__code__.co_names):
            try:
                return re.search(r"isinstance\(\s*\w*mask\w*,", inspect.getsource(function)) is not None
            except (OSError, TypeError):
                return True
    return False


def _refused() -> dict[str, str]:
    from mmkernels.integrations.transformers.keywords import REFUSED

    return REFUSED


def _passes(module: nn.Module, keyword: str) -> bool:
    """Returns whether an attention passes a keyword to the attention function that is not None."""
    for function in _functions(_class(module)):
        calls = [names for names in function.__code__.co_consts if isinstance(names, tuple) and "scaling" in names]
        if _TABLE in function.__code__.co_names and any(keyword in names for names in calls):
            return not _is_none(module, function, keyword)
    return False


def _is_none(module: nn.Module, function: FunctionType, keyword: str) -> bool:
    """Returns whether a keyword is an attribute of the module that is None, as its source says."""
    try:
        said = re.search(rf"\b{keyword}\s*=\s*self\.([\w.]+)\s*[,)]", inspect.getsource(function))
    except (OSError, TypeError):
        return False
    value: Any = module
    for name in said[1].split(".") if said else ():
        value = getattr(value, name, None)
    return said is not None and value is None


def _own_attention(users: _Users, callers: list[nn.Module]) -> Iterator[nn.Module]:
    """Yields the outermost modules named an attention; not callers of the interface, nor what is around or in one."""
    inside = {id(part) for caller in callers for part in caller.modules()}
    taken = set[int]()
    for module in users.modules:
        parts = {id(part) for part in module.modules()}
        is_named = "Attention" in _class(module).__name__
        if is_named and id(module) not in inside | taken and not any(id(caller) in parts for caller in callers):
            taken |= parts
            yield module
