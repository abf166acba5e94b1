"""What the models' configurations share: their sizes are checked, and read from a checkpoint's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from mmkernels.models.blocks.checkpoint import CheckpointError, Section

# Largest sizes taken: above any published model, below what would exhaust memory before a checkpoint can be compared.
_LARGEST = {
    **dict.fromkeys(("vision_width", "text_width", "embed_dim"), 2**16),
    **dict.fromkeys(("vision_layers", "resampler_depth", "text_layers", "cross_every"), 2**9),
    **dict.fromkeys(("vision_heads", "resampler_heads", "resampler_head_dim", "text_heads"), 2**12),
    **dict.fromkeys(("vision_mlp", "text_mlp", "num_latents"), 2**18),
    **dict.fromkeys(("image_size", "patch_size"), 2**13),
    "text_length": 2**16,
    "vocab_size": 2**24,
    "channels": 2**8,
}
Config = TypeVar("Config")


def check_sizes(config: Any, *, optional: Sequence[str] = ()) -> None:
    """Raise unless every size that a configuration has is an integer from 1 on and not absurdly large.

    Args:
        optional: sizes that may be None.
    """
    for name, most in _LARGEST.items():
        if not hasattr(config, name):
            continue
        value = getattr(config, name)
        if (type(value) is not int or not 1 <= value <= most) and not (name in optional and value is None):
            raise ValueError(f"{name} must be an integer from 1 to {most}, got {value!r}")
    if config.patch_size > config.image_size:
        raise ValueError(f"patch_size must be at most image_size = {config.image_size}, got {config.patch_size}")


def check_multiple(config: Any, whole: str, part: str) -> None:
    """Raise unless one size is a multiple of the other."""
    most, least = getattr(config, whole), getattr(config, part)
    if most % least:
        raise ValueError(f"{whole} must be a multiple of {part} = {least}, got {most}")


def check_numbers(config: Any, *, positive: Sequence[str], shares: Sequence[str]) -> None:
    """Raise unless all are numbers, the former positive and finite, the latter between 0 and 1."""
    for name in positive:
        value = getattr(config, name)
        if not _is_number(value) or not 0 < value < float("inf"):
            raise ValueError(f"{name} must be a number, positive and finite, got {value!r}")
    for name in shares:
        value = getattr(config, name)
        if not _is_number(value) or not 0 <= value <= 1:
            raise ValueError(f"{name} must be a number between 0 and 1, got {value!r}")


def check_token(config: Any, name: str) -> None:
    """Raise unless a token's id, where it is given, is in the vocabulary."""
    token = getattr(config, name)
    if token is not None and (type(token) is not int or not 0 <= token < config.vocab_size):
        raise ValueError(f"{name} must be an integer below vocab_size = {config.vocab_size}, got {token!r}")


def read_config(
    make: Callable[..., Config], fields: Callable[[Section], dict[str, Any]], config: dict[str, Any] | Section
) -> Config:
    """A configuration of the fields that are found in a checkpoint's.

    Raises:
        CheckpointError: a value is missing or not what it must be; the message names the file.
    """
    config = Section(config, "config") if isinstance(config, dict) else config
    try:
        return make(**fields(config))
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{config.where}: {error}") from error


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
