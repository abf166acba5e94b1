"""`register`: putting the attention function and the mask function where transformers looks for them."""

from __future__ import annotations

import inspect
import threading
from typing import Any

NAME = "mmkernels"

_NEEDS = {  # what transformers calls the two functions with
    "attention": ("module", "query", "key", "value", "attention_mask", "dropout", "scaling"),
    "mask": ("batch_size", "q_length", "kv_length", "q_offset", "kv_offset", "mask_function", "attention_mask"),
}
_lock = threading.Lock()


def register() -> None:
    """Make ``attn_implementation="mmkernels"`` known to transformers, in this process. Again: nothing happens.

    From then on every model that has transformers' attention interface takes it, in ``from_pretrained(...,
    attn_implementation="mmkernels")``, in a config, by ``model.set_attn_implementation("mmkernels")``, or for a part
    of a model by ``set_attn_implementation({"vision_config": "mmkernels"})``. ``mmkernels support`` shows which
    families do.

    Raises:
        ImportError: transformers is missing, or its interface is not the one that this was written for.

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
    attention_interface, mask_interface = _interfaces()
    from mmkernels.integrations.transformers.attention import attention
    from mmkernels.integrations.transformers.masks import make_mask

    with _lock:
        for interface, function in ((attention_interface, attention), (mask_interface, make_mask)):
            there = interface._global_mapping.get(NAME, function)
            if _name(there) != _name(function):
                raise ValueError(f"{interface.__name__} already has another {NAME!r}: {_name(there)}")
            interface.register(NAME, function)


def _interfaces() -> tuple[Any, Any]:
    """transformers' two registries, once they are seen to be what this is written for."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError('this needs transformers: pip install "mmkernels[models]"') from error
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

        _takes(AttentionInterface._global_mapping["sdpa"], _NEEDS["attention"])
        _takes(AttentionMaskInterface._global_mapping["sdpa"], _NEEDS["mask"])
        _takes(sdpa_mask, _NEEDS["mask"])
        for function in (causal_mask_function, bidirectional_mask_function):
            _takes(function, ("batch_idx", "head_idx", "q_idx", "kv_idx"))
    except (ImportError, AttributeError, KeyError, TypeError) as error:
        raise ImportError(
            f"transformers {getattr(transformers, '__version__', '(unknown version)')} has another attention interface "
            f"than mmkernels knows (5.17 to 5.x): {error}"
        ) from error
    return AttentionInterface, AttentionMaskInterface


def _name(function: Any) -> str:
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', repr(function))}"


def _takes(function: Any, names: tuple[str, ...]) -> None:
    missing = [name for name in names if name not in inspect.signature(function).parameters]
    if missing:
        raise TypeError(f"{getattr(function, '__name__', function)} takes no {', '.join(missing)}")
