"""Attention of diffusers models: processors for its `Attention` modules, and a backend for its attention dispatcher.

Text-to-image models attend from the image's tokens to the prompt's. Where prompts are padded, or where each query has
keys of its own, diffusers' fast backends refuse the mask, and its masked ``F.scaled_dot_product_attention`` computes
what the mask hides. Here masked tiles are skipped, for masks of any shape.

diffusers need not be installed to use the processors: they are called with its modules.
"""

from __future__ import annotations

from collections import Counter
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.integrations.dense_mask import read_mask
from mmkernels.masks import SpanMask
from mmkernels.ops.attention.cross_attention import cross_attention

__all__ = ["NAME", "AttnProcessor", "JointAttnProcessor", "attention", "register", "set_attention"]

NAME = "mmkernels"
"""The name of the backend."""

_OWN = ("to_q", "to_k", "to_v", "norm_q", "norm_k")
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k")
"""The layers and norms of `Attention` for its first input, and for the prompt in joint attention."""


class AttnProcessor:
    """The attention of diffusers' `Attention` modules, self- and cross-attention, as its ``AttnProcessor2_0`` computes.

    ``unet.set_attn_processor(AttnProcessor())`` gives it to all modules of a model whose attention is of that kind, and
    `set_attention` to those modules of any model. Gradients flow through it, and `torch.compile` sees one operator.

    A mask that is per sample, per query or per head is honoured. A query all of whose keys have a bias of -inf gets 0,
    where PyTorch's is NaN.

    Args:
        backend: as in `mmkernels.cross_attention`.

    Example:
        >>> from mmkernels.integrations.diffusers import AttnProcessor
        >>> # from diffusers import UNet2DConditionModel
        >>> # unet = UNet2DConditionModel.from_pretrained(...)
        >>> # unet.set_attn_processor(AttnProcessor())
        >>> AttnProcessor()
        AttnProcessor()
    """

    def __init__(self, backend: str | None = None) -> None:
        self.backend = backend

    def __repr__(self) -> str:
        return f"{type(self).__name__}({'' if self.backend is None else repr(self.backend)})"

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Returns the module's output, of hidden_states' shape.

        Args:
            attn: diffusers' `Attention`.
            hidden_states: ``[B, Lq, C]`` or ``[B, C, height, width]``.
            encoder_hidden_states: ``[B, Lk, Ck]``, such as a prompt's; None: self-attention.
            attention_mask: ``[B, Lq or 1, Lk]`` or ``[B H, Lq or 1, Lk]``: see `read_mask`.
            temb: for modules with a spatial norm.
            kwargs: must be None; another argument is an error.

        Raises:
            TypeError: an argument that this processor does not know.
        """
        _refuse(self, kwargs)
        residual, picture = hidden_states, None
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        if hidden_states.dim() == 4:
            picture = hidden_states.shape[2:]
            hidden_states = hidden_states.flatten(2).transpose(1, 2)  # [B, height width, C]
        k_len = (hidden_states if encoder_hidden_states is None else encoder_hidden_states).shape[1]
        mask = _of_heads(attn, attention_mask, hidden_states.shape[0], k_len)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        if encoder_hidden_states is None:
            context = hidden_states
        elif attn.norm_cross:
            context = attn.norm_encoder_hidden_states(encoder_hidden_states)
        else:
            context = encoder_hidden_states
        query, key, value = _projected(attn, hidden_states, context, _OWN)
        out = _attend(query, key, value, mask, _scale(attn), self.backend)
        out = attn.to_out[1](attn.to_out[0](out))
        if picture is not None:
            out = out.transpose(1, 2).unflatten(2, picture)
        if attn.residual_connection:
            out = out + residual
        rescaled: Tensor = out / attn.rescale_output_factor
        return rescaled


class JointAttnProcessor(AttnProcessor):
    """Joint attention, of Stable Diffusion 3's `Attention` modules, as diffusers' ``JointAttnProcessor2_0`` computes.

    The tokens of the picture and those of the prompt attend to all of both. Unlike diffusers', it takes a mask.
    """

    def __call__(  # type: ignore[override]  # the prompt's tokens are returned too
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Returns the picture's tokens ``[B, Lp, C]``, and the prompt's ``[B, Lt, C]`` if they were given.

        Args:
            attn: diffusers' `Attention`, with projections of the prompt.
            hidden_states: ``[B, Lp, C]``. encoder_hidden_states: ``[B, Lt, C]`` or None.
            attention_mask: ``[B or 1, Lp + Lt or 1, Lp + Lt]``, the picture's tokens first, or with a dim of heads
                after the first: see `read_mask`.
            kwargs: must be None; another argument is an error.

        Raises:
            TypeError: an argument that this processor does not know.
        """
        _refuse(self, kwargs)
        query, key, value = _projected(attn, hidden_states, hidden_states, _OWN)
        if encoder_hidden_states is not None:
            added = _projected(attn, encoder_hidden_states, encoder_hidden_states, _ADDED)
            query, key, value = (torch.cat(pair, 2) for pair in zip((query, key, value), added))
        if attention_mask is not None and attention_mask.dim() == 3:
            attention_mask = attention_mask[:, None]
        out = _attend(query, key, value, attention_mask, _scale(attn), self.backend)
        if encoder_hidden_states is None:
            alone: Tensor = attn.to_out[1](attn.to_out[0](out))
            return alone
        picture, prompt = out.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], 1)
        if not attn.context_pre_only:
            prompt = attn.to_add_out(prompt)
        return attn.to_out[1](attn.to_out[0](picture)), prompt


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention as diffusers' dispatcher calls its backends.

    Args:
        query: ``[B, Lq, H, D]``. key, value: ``[B, Lk, Hkv, D]``.
        attn_mask: ``[B, Lk]`` or broadcastable to ``[B, H, Lq, Lk]``: see `read_mask`.
        dropout_p, scale: as in `mmkernels.cross_attention`.
        is_causal: query i sees the keys 0 to i.
        enable_gqa: whether key and value may have fewer heads than query; they may in any case.
        return_lse: also return the log-sum-exp of each query's scores, float32 ``[B, Lq, H]``.
        _parallel_config: must be None: context parallelism needs one of diffusers' own backends.

    Returns:
        ``[B, Lq, H, D]``.

    Raises:
        ValueError: a mask beside `is_causal`, or context parallelism.

    Example:
        >>> import torch
        >>> from mmkernels.integrations.diffusers import attention
        >>> image, text = torch.randn(2, 64, 4, 32), torch.randn(2, 77, 4, 32)
        >>> padding = torch.arange(77) < torch.tensor([[12], [30]])
        >>> attention(image, text, text, attn_mask=padding).shape
        torch.Size([2, 64, 4, 32])
    """
    if _parallel_config is not None:
        raise ValueError(
            f"the attention backend {NAME!r} must be used without context parallelism, got {_parallel_config!r}"
        )
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    mask: SpanMask | Tensor | None
    bias: Tensor | None = None
    if is_causal:
        if attn_mask is not None:
            raise ValueError("attn_mask must be None where is_causal is True, got both")
        mask = SpanMask.causal(query.shape[2], query.shape[2], query.device)
    else:
        if attn_mask is not None and attn_mask.dim() == 2 and attn_mask.shape == (query.shape[0], key.shape[2]):
            attn_mask = attn_mask[:, None, None]
        elif attn_mask is not None and attn_mask.dim() < 4:
            attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
        mask, bias = read_mask(attn_mask, query.dtype)
    if not return_lse:
        out = cross_attention(query, key, value, mask, bias=bias, scale=scale, dropout_p=dropout_p)
        return out.transpose(1, 2)
    out, lse = cross_attention(query, key, value, mask, bias=bias, scale=scale, dropout_p=dropout_p, return_lse=True)
    return out.transpose(1, 2), lse.transpose(1, 2)


def register() -> None:
    """Adds the backend ``"mmkernels"`` to diffusers' attention dispatcher in this process; a second call does nothing.

    Then ``transformer.set_attention_backend("mmkernels")``, ``with attention_backend("mmkernels")`` and
    ``DIFFUSERS_ATTN_BACKEND`` set after this call work as with diffusers' own names. Of the dispatcher only its list of
    names is closed: it gets one more.

    Raises:
        ImportError: diffusers can't be imported, or its dispatcher is not as this is written for.
    """
    try:
        from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
    except ImportError as error:
        raise ImportError(f"the attention backend {NAME!r} needs diffusers 0.36 or later: {error}") from error
    names: Any = AttentionBackendName
    if NAME not in {x.value for x in names.__members__.values()}:
        _add_member(names, NAME)
        _AttentionBackendRegistry.register(names(NAME))(attention)
    expected = _AttentionBackendRegistry._backends.get(names(NAME))
    if expected is not attention or names(NAME) not in _AttentionBackendRegistry.list_backends():
        import diffusers

        raise ImportError(f"diffusers {diffusers.__version__} has another attention dispatcher than mmkernels knows")


def set_attention(model: nn.Module, backend: str | None = None) -> dict[str, int]:
    """Gives our attention to each attention module of a diffusers model that this module has one for.

    Args:
        model: such as ``pipeline.unet`` or ``pipeline.transformer``; changed in place. To undo it,
            keep ``model.attn_processors`` and give it to ``model.set_attn_processor``; ``reset_attention_backend``
            undoes the part that goes through the dispatcher.
        backend: of the processors, as in `mmkernels.cross_attention`.

    Returns:
        how many modules now have which processor, by its name; one that is left has its own, and one that goes through
        diffusers' dispatcher is named ``"<its processor> through mmkernels"``.

    Raises:
        ImportError: diffusers' dispatcher is needed and is not as this is written for: see `register`.
        ValueError: the model has no attention module with a processor.
    """
    found = Counter[str]()
    for module in model.modules():
        processor, give = getattr(module, "processor", None), getattr(module, "set_processor", None)
        if processor is None or not callable(give):
            continue
        name = type(processor).__name__
        if name in _OURS and type(processor).__module__ in _MODULES:
            ours = _OURS[name](backend)
            give(ours)
            found[type(ours).__name__] += 1
        elif hasattr(processor, "_attention_backend"):
            register()
            processor._attention_backend = _member()
            found[f"{name} through {NAME}"] += 1
        else:
            found[name] += 1
    if not found:
        raise ValueError(f"model must have attention modules with processors, got {type(model).__name__}")
    return dict(found)


_OURS: dict[str, type[AttnProcessor]] = {
    "AttnProcessor2_0": AttnProcessor,
    "AttnProcessor": AttnProcessor,
    "JointAttnProcessor2_0": JointAttnProcessor,
    "JointAttnProcessor": JointAttnProcessor,
}
"""Of each of diffusers' processors, ours; and of ours, itself."""
_MODULES = ("diffusers.models.attention_processor", __name__)
"""Where these classes are; another class may bear the same name."""


def _refuse(processor: AttnProcessor, kwargs: dict[str, Any]) -> None:
    for name, value in kwargs.items():
        if value is not None:
            raise TypeError(f"{name} must be left out: {type(processor).__name__} does not know it")


def _scale(attn: Any) -> float | None:
    """Returns what scores are multiplied by: in diffusers ``1 / sqrt(D)``, or 1 where queries are not scaled."""
    return None if attn.scale_qk else 1.0


def _heads(attn: Any, x: Tensor) -> Tensor:
    """Returns ``[B, L, H D]`` as ``[B, H, L, D]``."""
    return x.unflatten(2, (attn.heads, -1)).transpose(1, 2)


def _projected(attn: Any, x: Tensor, context: Tensor, parts: tuple[str, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns query, key and value of the module's layers of these names, and norms, which may be None."""
    to_q, to_k, to_v, norm_q, norm_k = (getattr(attn, name) for name in parts)
    query, key, value = _heads(attn, to_q(x)), _heads(attn, to_k(context)), _heads(attn, to_v(context))
    return query if norm_q is None else norm_q(query), key if norm_k is None else norm_k(key), value


def _of_heads(attn: Any, mask: Tensor | None, batch: int, k_len: int) -> Tensor | None:
    """Returns a mask of `Attention` as ``[B or 1, H or 1, Lq or 1, Lk]``."""
    if mask is None:
        return None
    if mask.shape[-1] != k_len or mask.dim() != 3:  # what diffusers makes of it
        prepared: Tensor = attn.prepare_attention_mask(mask, k_len, batch)
        return prepared.view(batch, attn.heads, -1, prepared.shape[-1])
    if mask.shape[0] == batch * attn.heads and attn.heads > 1:
        return mask.unflatten(0, (batch, attn.heads))
    return mask[:, None]


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, backend: str | None
) -> Tensor:
    """Returns the heads' outputs side by side, ``[B, Lq, H D]``."""
    visible = read_mask(mask, query.dtype)
    out = cross_attention(query, key, value, visible.mask, bias=visible.bias, scale=scale, backend=backend)
    return out.transpose(1, 2).flatten(2)


def _member() -> Any:
    """Returns our name as diffusers' dispatcher has it, after `register`."""
    from diffusers.models.attention_dispatch import AttentionBackendName

    return AttentionBackendName(NAME)


def _add_member(names: Any, name: str) -> None:
    """Adds a member to an enumeration of strings, which can't be derived from."""
    member = str.__new__(names, name)
    member._name_, member._value_ = name.upper(), name
    assert issubclass(names, Enum)
    names._member_map_[member._name_] = member
    names._value2member_map_[name] = member
    names._member_names_.append(member._name_)
