"""`ViLBERTConfig`: the sizes of a ViLBERT, with their checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mmkernels.models import vilbert_weights as weights
from mmkernels.models.blocks.checkpoint import CheckpointError
from mmkernels.models.blocks.config import check_config
from mmkernels.models.blocks.two_streams import StreamSizes

REGION_TARGETS = ("classes", "features", "contrast")
"""By the number that the authors' code calls ``visual_target``."""
FUSIONS = ("mul", "sum")


@dataclass(frozen=True)
class ViLBERTConfig:
    """The sizes of a ViLBERT, and which of its heads it has.

    Args:
        text_*, vision_*: of both transformers; `text_mlp` and `vision_mlp` are the widths of their feed-forwards.
        shared_width, shared_heads: all heads together, and the number of them, where one modality attends to the other.
        cross_text, cross_vision: for each layer in which they do, how many layers of the text's and of the regions'
            transformer precede it.
        vocab_size, text_length, token_types: the numbers of different tokens, of positions, and of token types.
        feature_width: of a region's features.
        target_width: of what is predicted of a region.
        region_target: what that is: "classes", their probabilities; "features"; or "contrast", features that are told
            from those of other regions, for which there is no loss here.
        fusion: what joins the pooled text and the pooled image: "mul" or "sum".
        fusion_dropout: the probability that an element of the result is dropped in training mode.
        task_tokens: how many tasks have a token of their own, behind a text's first token; None: there is none.
        tasks: whether there are the heads of downstream tasks.
        num_answers, num_gqa_answers: the answers of two of them, VQA and GQA.

    Raises:
        ValueError: a size is not positive, too large, or does not divide; an option is unknown; dropout differs between
            the modalities, which attend to each other in one call.
    """

    text_width: int
    text_layers: int
    text_heads: int
    text_mlp: int
    vision_width: int
    vision_layers: int
    vision_heads: int
    vision_mlp: int
    shared_width: int
    shared_heads: int
    cross_text: tuple[int, ...]
    cross_vision: tuple[int, ...]
    vocab_size: int
    feature_width: int
    target_width: int
    text_length: int = 512
    token_types: int = 2
    text_activation: str = "gelu"
    vision_activation: str = "gelu"
    text_dropout: float = 0.0
    vision_dropout: float = 0.0
    text_residual_dropout: float = 0.0
    vision_residual_dropout: float = 0.0
    region_target: str = "classes"
    fusion: str = "mul"
    fusion_dropout: float = 0.0
    task_tokens: int | None = None
    tasks: bool = False
    num_answers: int = 3129
    num_gqa_answers: int = 1533

    def __post_init__(self) -> None:
        check_config(self)
        for name, choices in (("region_target", REGION_TARGETS), ("fusion", FUSIONS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.vision_dropout != self.text_dropout:
            must = f"text_dropout = {self.text_dropout}, as both directions run in one call"
            raise ValueError(f"vision_dropout must be {must}, got {self.vision_dropout}")
        for name, layers in (("cross_text", self.text_layers), ("cross_vision", self.vision_layers)):
            places = getattr(self, name)
            whole = isinstance(places, tuple) and all(type(place) is int for place in places)
            if not whole or list(places) != sorted(places) or not all(0 <= place < layers for place in places):
                raise ValueError(f"{name} must be integers from 0 to {layers - 1}, in rising order, got {places!r}")
        if len(self.cross_vision) != len(self.cross_text) or not self.cross_text:
            counts = len(self.cross_text), len(self.cross_vision)
            raise ValueError(f"cross_text and cross_vision must have one length, at least 1, got {counts}")

    def stream(self, name: str) -> StreamSizes:
        """The sizes of a layer of a transformer, "text" or "vision"."""
        names = ("width", "heads", "mlp", "activation", "dropout", "residual_dropout")
        return StreamSizes(*(getattr(self, f"{name}_{size}") for size in names))

    @classmethod
    def from_release(cls, config: dict[str, Any], where: str = "config") -> ViLBERTConfig:
        """Returns the configuration that a JSON file of the authors' code, as a dict, describes.

        The file does not say which class has the weights: ``architectures`` must be added to it, with
        ``BertForMultiModalPreTraining`` or ``VILBertForVLTasks``; and ``task_specific_tokens``, if the model was
        trained with this option; and `num_answers` and `num_gqa_answers`, if they are not VQA's 3,129 and GQA's 1,533.
        What the file leaves out is as in the code.

        Args:
            config: the dict.
            where: how errors name it.
        """
        values = weights.DEFAULTS | config
        architectures, model_type = config.get("architectures"), config.get("model_type", "vilbert")
        if model_type != "vilbert" or "v_hidden_size" not in config:
            got = repr(model_type)[:200] if model_type != "vilbert" else "none of its fields, such as v_hidden_size"
            raise CheckpointError(f"{where}: must be the configuration of a ViLBERT, got {got}")
        if architectures not in (known := [[name] for name in weights.ARCHITECTURES]):
            raise CheckpointError(
                f"{where}: architectures must be {known[0]} or {known[1]}, got {repr(architectures)[:200]}"
            )
        for name, value in weights.ONLY.items():
            if values[name] != value:
                raise CheckpointError(f"{where}: {name} must be {value!r}, got {repr(values[name])[:200]}")
        try:
            return cls(**{ours: _read(values, theirs) for ours, theirs in weights.FIELDS.items()}, **_others(values))
        except (ValueError, TypeError) as error:
            ours = str(error).partition(" ")[0]
            theirs = weights.FIELDS.get(ours, ours)
            raise CheckpointError(f"{where}{'' if theirs == ours else f', {theirs}'}: {error}") from error


def _read(values: dict[str, Any], name: str) -> Any:
    """Returns a field: lists as tuples, activations by our names."""
    value = values[name]
    return tuple(value) if isinstance(value, list) else "silu" if value == "swish" else value


def _others(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields that the file has in another form."""
    target = values["visual_target"]
    if type(target) is not int or not 0 <= target < len(REGION_TARGETS):
        raise ValueError(f"visual_target must be 0, 1 or 2, got {target!r}")
    return {
        "region_target": REGION_TARGETS[target],
        "fusion_dropout": weights.FUSION_DROPOUT,
        "task_tokens": weights.TASKS if values["task_specific_tokens"] else None,
        "tasks": values["architectures"] == ["VILBertForVLTasks"],
    }


_BERT: dict[str, Any] = {
    "text_width": 768, "text_layers": 12, "text_heads": 12, "text_mlp": 3072, "vocab_size": 30522,
    "vision_width": 1024, "vision_layers": 6, "vision_heads": 8, "vision_mlp": 1024, "shared_width": 1024,
    "shared_heads": 8, "cross_text": (6, 7, 8, 9, 10, 11), "cross_vision": (0, 1, 2, 3, 4, 5), "feature_width": 2048,
    "target_width": 1601, **dict.fromkeys(("text_dropout", "vision_dropout", "fusion_dropout"), 0.1),
    "text_residual_dropout": 0.1, "vision_residual_dropout": 0.1,
}  # fmt: skip
SIZES = {
    # For tests.
    "tiny": ViLBERTConfig(
        text_width=32, text_layers=3, text_heads=4, text_mlp=64, vision_width=24, vision_layers=2, vision_heads=2,
        vision_mlp=40, shared_width=16, shared_heads=2, cross_text=(1, 2), cross_vision=(0, 1), vocab_size=128,
        text_length=32, feature_width=20, target_width=11, tasks=True, num_answers=13, num_gqa_answers=7,
    ),
    # bert_base_2layer_2conect.json of the authors' code.
    "small": ViLBERTConfig(**_BERT | {"vision_layers": 2, "cross_text": (10, 11), "cross_vision": (0, 1)}),
    # bert_base_6layer_6conect.json, of Lu et al., 2019, section 3.1.
    "base": ViLBERTConfig(**_BERT),
    # Lu et al., "12-in-1: Multi-Task Vision and Language Representation Learning", 2020.
    "base_12_in_1": ViLBERTConfig(**_BERT, tasks=True, task_tokens=20),
}  # fmt: skip
"""The sizes that `ViLBERT.from_size` accepts."""
