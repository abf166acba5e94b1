"""What the models' configurations share: checks of their sizes, and reading them from a ``config.json``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

from mmkernels.models.blocks.activations import ACTIVATIONS
from mmkernels.models.blocks.checkpoint import CheckpointError, read_json
from mmkernels.transformers_version import import_transformers

# The largest sizes that are accepted: above any published model, but small enough to build the model on the meta
# device.
_LARGEST = {
    **dict.fromkeys(("vision_width", "text_width", "qformer_width", "embed_dim"), 2**16),
    **dict.fromkeys(("vision_layers", "resampler_depth", "text_layers", "qformer_layers", "cross_every"), 2**9),
    **dict.fromkeys(("vision_heads", "resampler_heads", "resampler_head_dim", "qformer_heads"), 2**12),
    **dict.fromkeys(("text_heads", "text_kv_heads", "text_head_dim"), 2**12),
    **dict.fromkeys(("vision_mlp", "text_mlp", "qformer_mlp", "num_latents", "num_queries"), 2**18),
    **dict.fromkeys(("image_size", "patch_size", "window"), 2**13),
    **dict.fromkeys(("merge", "patch_frames"), 2**6),
    **dict.fromkeys(("position_side", "tokens_per_second"), 2**10),
    **dict.fromkeys(("text_length", "qformer_length"), 2**22),
    **dict.fromkeys(("vocab_size", "qformer_vocab"), 2**24),
    "channels": 2**8,
    # Of encoders of sound.
    **{"audio_width": 2**16, "audio_layers": 2**9, "audio_heads": 2**12, "audio_mlp": 2**18},
    **{"audio_positions": 2**16, "mel_bins": 2**10},
    # Of a text and an image's regions, which attend to each other.
    **dict.fromkeys(("width", "feature_width", "box_width", "shared_width", "target_width"), 2**16),
    **dict.fromkeys(("heads", "shared_heads"), 2**12),
    **dict.fromkeys(("mlp", "num_objects", "num_attributes", "num_answers", "num_gqa_answers"), 2**18),
    **dict.fromkeys(("cross_layers", "token_types", "task_tokens"), 2**9),
}
_OPTIONAL = (  # may be None
    "num_latents", "qformer_vocab", "num_objects", "num_attributes", "num_answers", "task_tokens",
)  # fmt: skip
_MAY_BE_ZERO = ("window", "position_side", "tokens_per_second")
_MULTIPLES = {
    "vision_width": "vision_heads",
    "text_width": "text_heads",
    "qformer_width": "qformer_heads",
    "audio_width": "audio_heads",
    "text_heads": "text_kv_heads",
    "text_layers": "cross_every",
    "width": "heads",
    "shared_width": "shared_heads",
}
_ACTIVATIONS = ("vision_activation", "text_activation", "qformer_activation", "audio_activation", "activation")
_POSITIVE = (
    "vision_eps", "text_eps", "qformer_eps", "layer_norm_eps", "rms_norm_eps", "rope_theta", "vision_loss_weight",
)  # fmt: skip
_SHARES = (
    "vision_dropout", "text_dropout", "text_residual_dropout", "qformer_dropout", "qformer_residual_dropout", "dropout",
    "label_smoothing", "residual_dropout", "vision_residual_dropout", "fusion_dropout",
    "audio_dropout", "audio_residual_dropout", "audio_activation_dropout", "audio_layer_dropout",
    "text_activation_dropout", "text_layer_dropout",
)  # fmt: skip
_TOKENS = (
    "image_token_id", "video_token_id", "pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "enc_token_id",
    "audio_token_id", "start_token_id",
)  # fmt: skip
_FLAGS = (
    "retrieval", "generation", "decoder_attention", "freeze_vision", "freeze_text", "pretraining", "predict_features",
    "tasks",
)  # fmt: skip
Config = TypeVar("Config")


def check_config(config: Any) -> None:
    """Raises a ValueError unless every field that the tables above name, and that the configuration has, is valid."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    present = lambda names: [name for name in names if name in fields]
    for name in present(_LARGEST):
        value, least, most = fields[name], int(name not in _MAY_BE_ZERO), _LARGEST[name]
        if (type(value) is not int or not least <= value <= most) and not (name in _OPTIONAL and value is None):
            raise ValueError(f"{name} must be an integer from {least} to {most}, got {value!r}")
    if "image_size" in fields and config.patch_size > config.image_size:
        raise ValueError(f"patch_size must be at most image_size = {config.image_size}, got {config.patch_size}")
    for whole, part in _MULTIPLES.items():
        if whole == "text_width" and "text_head_dim" in fields:
            continue  # all heads together may have another width
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
    for name in present(_FLAGS):
        if not isinstance(fields[name], bool):
            raise ValueError(f"{name} must be a bool, got {fields[name]!r}")
    for name in present(_TOKENS):
        token = fields[name]
        if token is not None and (type(token) is not int or not 0 <= token < config.vocab_size):
            raise ValueError(f"{name} must be an integer below vocab_size = {config.vocab_size}, got {token!r}")
    for token in fields.get("eos_token_ids", ()):
        if type(token) is not int or token < 0:
            raise ValueError(f"eos_token_ids must be integers >= 0, got {fields['eos_token_ids']!r}")


def read_config(values: dict[str, Any], architectures: Mapping[str, str | tuple[str, ...]], where: str) -> Any:
    """Returns transformers' configuration object for a ``config.json``; transformers fills in what the file leaves out.

    Args:
        values: the JSON object.
        architectures: model type -> architecture, or several, for all that are allowed.
        where: how errors name the object: usually the path of the file.

    Raises:
        ImportError: transformers is not installed, or of another version than `mmkernels.transformers_version` has.
        CheckpointError: the model type or architecture is another one, or transformers refuses a value.
    """
    model_type, got = values.get("model_type"), values.get("architectures")
    if not isinstance(model_type, str) or model_type not in architectures:
        given = repr(model_type)[:200] if "model_type" in values else "nothing"
        raise CheckpointError(f"{where}: model_type must be one of {', '.join(architectures)}, got {given}")
    known = architectures[model_type]
    allowed = (known,) if isinstance(known, str) else known
    if got not in (None, [], *([name] for name in allowed)):
        must = " or ".join(str([name]) for name in allowed)
        raise CheckpointError(f"{where}: architectures must be {must}, got {repr(got)[:200]}")
    config_class = import_transformers("reading a checkpoint").AutoConfig
    values = _without_labels(values)
    _check_layers(values, where)
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


def token_ids(value: Any) -> tuple[Any, ...]:
    """Returns the tokens that a field such as ``eos_token_id`` names: None, one token or a list."""
    return () if value is None else tuple(value) if isinstance(value, (list, tuple)) else (value,)


def text_values(text: Any) -> dict[str, Any]:
    """Returns the fields of a configuration with a `Decoder` that transformers' configuration of its text holds inside.

    Args:
        text: transformers' configuration of the language model.
    """
    return {
        "rope_theta": text.rope_parameters["rope_theta"],
        "eos_token_ids": token_ids(getattr(text, "eos_token_id", None)),
        "pad_token_id": 0 if text.pad_token_id is None else text.pad_token_id,
    }


def with_generation(config: Config, path: Path) -> Config:
    """Returns a configuration with the end-of-text and padding tokens of a ``generation_config.json``, if there is one.

    As transformers has it, they count more than those of ``config.json``, which often names fewer.

    Args:
        config: has the fields `eos_token_ids` and `pad_token_id`.
        path: of the file, which may be missing.

    Raises:
        CheckpointError: the file is no JSON object, or a token is wrong.
    """
    if not path.is_file():
        return config
    values = read_json(path)
    ends, padding = token_ids(values.get("eos_token_id")), values.get("pad_token_id")
    changes = ({"eos_token_ids": ends} if ends else {}) | ({} if padding is None else {"pad_token_id": padding})
    try:
        return dataclasses.replace(config, **changes)  # type: ignore[type-var]
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _without_labels(values: dict[str, Any]) -> dict[str, Any]:
    """Returns `values` without classifier labels: transformers would build a table of ``num_labels`` entries."""
    labels = ("num_labels", "id2label", "label2id")
    kept = {key: value for key, value in values.items() if key not in labels}
    return {key: _without_labels(value) if isinstance(value, dict) else value for key, value in kept.items()}


def _check_layers(values: dict[str, Any], where: str) -> None:
    """Raises where a part of the configuration has too many layers: transformers would build a list of so many."""
    most = _LARGEST["text_layers"]
    for key, value in values.items():
        if isinstance(value, dict):
            _check_layers(value, f"{where}, {key}")
        elif key in ("num_hidden_layers", "depth") and isinstance(value, (int, float)) and value > most:
            raise CheckpointError(f"{where}: {key} must be at most {most}, got {repr(value)[:200]}")


def _refused_section(config: type, values: dict[str, Any]) -> str:
    """ ", text_config" if transformers refuses this part of the configuration, "" if it refuses none."""
    for key, section in getattr(config, "sub_configs", {}).items():
        given, auto = values.get(key), section.__name__ == "AutoConfig"
        if not isinstance(given, dict) or (auto and "model_type" not in given):
            continue
        try:
            (section.for_model if auto else section)(**given)
        except Exception:
            return f", {key}"
    return ""


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
