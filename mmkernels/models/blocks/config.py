"""What the models' configurations share: checks of their sizes, and reading them from a ``config.json``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any, TypeVar

from mmkernels.models.blocks.activations import ACTIVATIONS
from mmkernels.models.blocks.checkpoint import CheckpointError
from mmkernels.transformers_version import import_transformers

# The largest sizes that are accepted: above any published model, but small enough to build the model on the meta
# device.
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
_OPTIONAL = ("num_latents",)  # may be None
_MULTIPLES = {"vision_width": "vision_heads", "text_width": "text_heads", "text_layers": "cross_every"}
_ACTIVATIONS = ("vision_activation", "text_activation")
_POSITIVE = ("vision_eps", "text_eps", "layer_norm_eps", "rms_norm_eps", "rope_theta")
_SHARES = ("vision_dropout", "text_dropout", "dropout")
_TOKENS = ("image_token_id", "pad_token_id", "eos_token_id")
Config = TypeVar("Config")


def check_config(config: Any) -> None:
    """Raises a ValueError unless every field that the tables above name, and that the configuration has, is valid."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    present = lambda names: [name for name in names if name in fields]
    for name in present(_LARGEST):
        value, most = fields[name], _LARGEST[name]
        if (type(value) is not int or not 1 <= value <= most) and not (name in _OPTIONAL and value is None):
            raise ValueError(f"{name} must be an integer from 1 to {most}, got {value!r}")
    if config.patch_size > config.image_size:
        raise ValueError(f"patch_size must be at most image_size = {config.image_size}, got {config.patch_size}")
    for whole, part in _MULTIPLES.items():
        if part in fields and fields[whole] % fields[part]:
            raise ValueError(f"{whole} must be a multiple of {part} = {fields[part]}, got {fields[whole]}")
    for name in present(_ACTIVATIONS):
        if not isinstance(fields[name], str) or fields[name] not in ACTIVATIONS:
            raise ValueError(f"{name} must be one of {', '.join(ACTIVATIONS)}, got {fields[name]!r}")
    for name in present(_POSITIVE):
        if not _is_number(fields[name]) or not 0 < fields[name] < float("inf"):
            raise ValueError(f"{name} must be a number, positive and finite, got {fields[name]!r}")
    for name in present(_SHARES):
        if not _is_number(fields[name]) or not 0 <= fields[name] <= 1:
            raise ValueError(f"{name} must be a number between 0 and 1, got {fields[name]!r}")
    for name in present(_TOKENS):
        token = fields[name]
        if token is not None and (type(token) is not int or not 0 <= token < config.vocab_size):
            raise ValueError(f"{name} must be an integer below vocab_size = {config.vocab_size}, got {token!r}")


def read_config(values: dict[str, Any], architectures: Mapping[str, str], where: str) -> Any:
    """Returns transformers' configuration object for a ``config.json``; transformers fills in what the file leaves out.

    Args:
        values: the JSON object.
        architectures: model type -> architecture, for all that are allowed.
        where: how errors name the object: usually the path of the file.

    Raises:
        ImportError: transformers is not installed, or of another version than `mmkernels.transformers_version` has.
        CheckpointError: the model type or architecture is another one, or transformers refuses a value.
    """
    model_type, got = values.get("model_type"), values.get("architectures")
    if not isinstance(model_type, str) or model_type not in architectures:
        given = repr(model_type)[:200] if "model_type" in values else "nothing"
        raise CheckpointError(f"{where}: model_type must be one of {', '.join(architectures)}, got {given}")
    if got not in (None, [], [architectures[model_type]]):
        raise CheckpointError(f"{where}: architectures must be {[architectures[model_type]]}, got {repr(got)[:200]}")
    config_class = import_transformers("reading a checkpoint").AutoConfig
    values = _without_labels(values)
    try:
        return config_class.for_model(**values)
    except Exception as error:  # transformers raises errors of many kinds
        section = _refused_section(type(config_class.for_model(model_type)), values)
        raise CheckpointError(f"{where}{section}: {' '.join(str(error).split())[:500]}") from error


def read_fields(
    make: Callable[..., Config], config: Any, fields: Mapping[str, str], where: str, **others: Any
) -> Config:
    """Returns a model's configuration, made from the fields of transformers' configuration.

    Args:
        make: the class of the model's configuration.
        config: transformers' configuration.
        fields: field of the model's configuration -> field of transformers', such as ``text_config.hidden_size``.
        where: how errors name the configuration.
        others: the values of further fields.

    Raises:
        CheckpointError: a value is wrong; the message names the file and both fields.
    """
    try:
        return make(**{ours: attrgetter(theirs)(config) for ours, theirs in fields.items()}, **others)
    except Exception as error:  # from our checks, or from transformers if a field differs between layers
        ours = str(error).partition(" ")[0]
        theirs = fields.get(ours, ours)
        raise CheckpointError(f"{where}{'' if theirs == ours else f', {theirs}'}: {error}") from error


def _without_labels(values: dict[str, Any]) -> dict[str, Any]:
    """Returns `values` without classifier labels: transformers would build a table of ``num_labels`` entries."""
    labels = ("num_labels", "id2label", "label2id")
    kept = {key: value for key, value in values.items() if key not in labels}
    return {key: _without_labels(value) if isinstance(value, dict) else value for key, value in kept.items()}


def _refused_section(config: type, values: dict[str, Any]) -> str:
    """ ", text_config" if transformers refuses this part of the configuration, "" if it refuses none."""
    for key, section in getattr(config, "sub_configs", {}).items():
        if not isinstance(values.get(key), dict):
            continue
        try:
            section(**values[key])
        except Exception:
            return f", {key}"
    return ""


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
