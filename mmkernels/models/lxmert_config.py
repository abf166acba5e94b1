"""`LXMERTConfig`: the sizes of an LXMERT, with their checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mmkernels.models import lxmert_weights as weights
from mmkernels.models.blocks.checkpoint import CheckpointError
from mmkernels.models.blocks.config import check_config, read_config, read_fields
from mmkernels.models.blocks.two_streams import StreamSizes


@dataclass(frozen=True)
class LXMERTConfig:
    """The sizes of an LXMERT, and which of its heads it has.

    Args:
        width, heads, mlp: of all layers; `mlp` is the width of the feed-forwards.
        text_layers, vision_layers, cross_layers: those of the text alone, of the regions alone, and those in which each
            attends to the other (9, 5 and 5 in the paper).
        vocab_size, text_length, token_types: the numbers of different tokens, of positions, and of token types.
        feature_width, box_width: of a region's features, and of what says where it is.
        pretraining: whether there are the heads of masked words and of matching.
        num_objects, num_attributes: the classes of a region that a head predicts; None: there is no such head.
        predict_features: whether a head predicts a region's features.
        num_answers: the answers of questions; None: there is no such head.
        vision_loss_weight: what the losses of regions are multiplied by.

    Raises:
        ValueError: a size is not positive, too large, or does not divide; an option is unknown.
    """

    width: int
    heads: int
    mlp: int
    text_layers: int
    vision_layers: int
    cross_layers: int
    vocab_size: int
    feature_width: int
    box_width: int = 4
    text_length: int = 512
    token_types: int = 2
    activation: str = "gelu"
    dropout: float = 0.0
    residual_dropout: float = 0.0
    pretraining: bool = True
    num_objects: int | None = None
    num_attributes: int | None = None
    predict_features: bool = False
    num_answers: int | None = None
    vision_loss_weight: float = 6.67

    def __post_init__(self) -> None:
        check_config(self)

    @property
    def stream(self) -> StreamSizes:
        """The sizes of a layer."""
        return StreamSizes(self.width, self.heads, self.mlp, self.activation, self.dropout, self.residual_dropout)

    @property
    def region_heads(self) -> dict[str, int]:
        """What is predicted of a region, by the names of Hugging Face's labels -> the number of outputs."""
        features = self.feature_width if self.predict_features else None
        sizes = {"obj": self.num_objects, "attr": self.num_attributes, "feat": features}
        return {name: size for name, size in sizes.items() if size is not None}

    @classmethod
    def from_hf(cls, config: dict[str, Any], where: str = "config") -> LXMERTConfig:
        """Returns the configuration that a Hugging Face ``config.json`` of an LXMERT, as a dict, describes.

        Its `task_mask_lm` and `task_matched` count for nothing: the labels that are given say which losses there are.

        Args:
            config: the dict.
            where: how errors name it.
        """
        theirs = read_config(config, weights.ARCHITECTURES, where)
        architectures = config.get("architectures")
        if not architectures:
            known = " or ".join(weights.ARCHITECTURES["lxmert"])
            raise CheckpointError(f"{where}: architectures must name {known}, got {architectures!r}")
        heads = _heads(theirs, architectures[0])
        return read_fields(cls, theirs, weights.FIELDS, where, **heads)


def _heads(theirs: Any, architecture: str) -> dict[str, Any]:
    """Returns the fields that say which heads a checkpoint of this class has."""
    pretraining = architecture == "LxmertForPreTraining"
    regions = pretraining and theirs.task_obj_predict
    answers = architecture == "LxmertForQuestionAnswering" or (pretraining and theirs.task_qa)
    return {
        "pretraining": pretraining,
        "num_objects": theirs.num_object_labels if regions and theirs.visual_obj_loss else None,
        "num_attributes": theirs.num_attr_labels if regions and theirs.visual_attr_loss else None,
        "predict_features": bool(regions and theirs.visual_feat_loss),
        "num_answers": theirs.num_qa_labels if answers else None,
    }


SIZES = {
    # For tests.
    "tiny": LXMERTConfig(
        width=32, heads=4, mlp=64, text_layers=2, vision_layers=1, cross_layers=2, vocab_size=128, text_length=32,
        feature_width=24, num_objects=11, num_attributes=7, predict_features=True, num_answers=13,
    ),
    # Half of the width, and half of the layers, of the next one.
    "small": LXMERTConfig(
        width=384, heads=6, mlp=1536, text_layers=4, vision_layers=2, cross_layers=3, vocab_size=30522,
        feature_width=2048, num_objects=1600, num_attributes=400, predict_features=True, num_answers=9500,
        dropout=0.1, residual_dropout=0.1,
    ),
    # Tan and Bansal, 2019, section 4.1; BERT base's vocabulary; classes of Visual Genome's regions.
    "base": LXMERTConfig(
        width=768, heads=12, mlp=3072, text_layers=9, vision_layers=5, cross_layers=5, vocab_size=30522,
        feature_width=2048, num_objects=1600, num_attributes=400, predict_features=True, num_answers=9500,
        dropout=0.1, residual_dropout=0.1,
    ),
}  # fmt: skip
"""The sizes that `LXMERT.from_size` accepts."""
