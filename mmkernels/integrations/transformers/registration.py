"""`register`: adds the attention function and the mask function to transformers' registries."""

from __future__ import annotations

import inspect
import threading
from typing import Any

from mmkernels.integrations.transformers.model_mask import NAME
from mmkernels.integrations.transformers.own_attention import guard
from mmkernels.transformers_version import RANGE, VersionError, import_transformers

__all__ = ["NAME", "register"]

_NEEDS = {  # the arguments that transformers passes to the two functions
    "attention": ("module", "query", "key", "value", "attention_mask", "dropout", "scaling"),
    "mask": ("batch_size", "q_length", "kv_length", "q_offset", "kv_offset", "mask_function", "attention_mask"),
    "guard": ("requested_attention", "is_init_check"),
}
_lock = threading.Lock()


def register() -> None:
    """Registers ``attn_implementation="mmkernels"`` with transformers in this process. A second call does nothing.

    Afterwards every model that uses transformers' attention interface accepts it: in ``from_pretrained(...,
    attn_implementation="mmkernels")``, in a configuration, by ``model.set_attn_implementation("mmkernels")``, or for a
    part of a model by ``set_attn_implementation({"vision_config": "mmkernels"})``. ``mmkernels support`` shows which
    families use it. Towers that pack images or recordings into one row attend to all of them in one call a layer. A
    model that has only an attention of its own is refused with `NotImplementedError` when it is built; a part of a
    model that has one keeps it, with a warning.

    Raises:
        ImportError: transformers is missing, is older than 5.17 or not below 6, or has another interface than this
            module is written for.
        ValueError: another function is registered by this name.

    Example:
        >>> import torch, transformers
        >>> from mmkernels.integrations.transformers import register
        >>> register()
        >>> config = transformers.CLIPVisionConfig(
        ...     hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32,
        ...     patch_size=8, attn_implementation="mmkernels")
        >>> model = transformers.CLIPVisionModel(config)
        >>> model(torch.randn(1, 3, 32, 32)).last_hidden_state.shape
        torch.Size([1, 17, 32])
    """
    attention_interface, mask_interface, model_class = _interfaces()
    from mmkernels.integrations.transformers.attention import attention
    from mmkernels.integrations.transformers.masks import make_mask

    with _lock:
        for interface, function in ((attention_interface, attention), (mask_interface, make_mask)):
            registered = interface._global_mapping.get(NAME, function)
            if _name(registered) != _name(function):
                raise ValueError(f"{interface.__name__} already has another {NAME!r}: {_name(registered)}")
            interface.register(NAME, function)
        guard(model_class)


def _interfaces() -> tuple[Any, Any, Any]:
    """Returns transformers' two registries and its base class, after a check that they are as this module expects."""
    transformers = import_transformers('attn_implementation="mmkernels"')
    try:
        from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
        from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

        _check_arguments(AttentionInterface._global_mapping["sdpa"], _NEEDS["attention"])
        _check_arguments(AttentionMaskInterface._global_mapping["sdpa"], _NEEDS["mask"])
        _check_arguments(sdpa_mask, _NEEDS["mask"])
        _check_arguments(PreTrainedModel.get_correct_attn_implementation, _NEEDS["guard"])
        for function in (causal_mask_function, bidirectional_mask_function):
            _check_arguments(function, ("batch_idx", "head_idx", "q_idx", "kv_idx"))
    except (ImportError, AttributeError, KeyError, TypeError) as error:
        raise VersionError(
            f"transformers {transformers.__version__} has another attention interface than mmkernels is written for "
            f"({RANGE}): {error}"
        ) from error
    return AttentionInterface, AttentionMaskInterface, PreTrainedModel


def _name(function: Any) -> str:
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', repr(function))}"


def _check_arguments(function: Any, names: tuple[str, ...]) -> None:
    missing = [name for name in names if name not in inspect.signature(function).parameters]
    if missing:
        raise TypeError(f"{getattr(function, '__name__', function)} takes no {', '.join(missing)}")
