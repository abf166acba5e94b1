"""`StandIn`: the name of the attention of a patched model, which remembers the name that it stands in for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.integrations.transformers.model_mask import NAME, ModelMask

INTERNAL = "_attn_implementation_internal"
"""The attribute in which a configuration of transformers has the name of its attention."""


class StandIn(str):
    """``"mmkernels"`` in the configuration of a patched model.

    A call that the attention function would refuse runs on the attention that the name stands in for, so that a patched
    model runs wherever it ran before. Copies are the same object; a pickle has the earlier name, and loads without
    mmkernels.

    Args:
        before: the earlier name, or None, which transformers takes for "eager".

    Example:
        >>> import pickle
        >>> from mmkernels.integrations.transformers.stand_in import StandIn
        >>> name = StandIn("sdpa")
        >>> name == "mmkernels", name.before, pickle.loads(pickle.dumps(name))
        (True, 'sdpa', 'sdpa')
    """

    before: str | None

    def __new__(cls, before: str | None) -> StandIn:
        name = super().__new__(cls, NAME)
        name.before = before
        return name

    def __reduce_ex__(self, protocol: Any) -> Any:
        return (type(None), ()) if self.before is None else (str, (self.before,))

    def __copy__(self) -> StandIn:
        return self

    def __deepcopy__(self, memo: Any) -> StandIn:
        return self


def stand_in(config: Any) -> StandIn | None:
    """Returns the name in a configuration if it stands in for another, else None."""
    name = getattr(config, INTERNAL, None)
    return name if isinstance(name, StandIn) else None


def mask_dtype(config: Any, numbers: torch.dtype | None) -> torch.dtype | None:
    """Returns the dtype of the masks that a model had before it was patched; None: it is not patched.

    Args:
        numbers: the dtype of "eager"'s masks, which are added to the scores; "sdpa"'s are bool.
    """
    name = stand_in(config)
    if name is None:
        return None
    return torch.bool if name.before == "sdpa" else numbers or torch.float32


Earlier = Callable[[nn.Module, Tensor, Tensor, Tensor, Any, dict[str, Any]], tuple[Tensor, Tensor | None]]


def earlier_attention(module: nn.Module) -> Earlier | None:
    """Returns what a module of a patched model attended by before; None: the model is not patched, or it is not known.

    The function takes the arguments of `mmkernels.integrations.transformers.attention.attention`, those that may be
    left out as a dict.
    """
    name = stand_in(getattr(module, "config", None))
    if name is None:
        return None
    function = _eager(module) if name.before is None or name.before == "eager" else _registered(name.before)
    if function is None:
        return None

    def earlier(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, others: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        if isinstance(mask, ModelMask):
            mask = None if mask.omitted else mask.as_before()
        given = {key: value for key, value in others.items() if value is not None}
        out: tuple[Tensor, Tensor | None] = function(module, query, key, value, mask, **given)
        return out

    return earlier


def _eager(module: nn.Module) -> Callable[..., Any] | None:
    """Returns the function "eager" of the module in which a class is defined, or a base of it."""
    places = (sys.modules.get(base.__module__) for base in type(module).__mro__)
    return next((f for f in (getattr(place, "eager_attention_forward", None) for place in places) if f), None)


def _registered(name: str) -> Callable[..., Any] | None:
    from transformers import AttentionInterface

    found: Any = AttentionInterface._global_mapping.get(name)
    return None if found is None else found
