"""`CLIPConfig`: the sizes of a two-tower model, with their checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from mmkernels.models.blocks.checkpoint import CheckpointError
from mmkernels.models.blocks.config import check_config, read_config, read_fields
from mmkernels.models.clip_weights import ARCHITECTURES, FIELDS

VARIANTS = ("clip", "siglip")


@dataclass(frozen=True)
class CLIPConfig:
    """Every size of a two-tower model.

    Args:
        variant: "clip": the image tower has a class token, whose projected feature is the image's, and a norm before
            its layers. The text tower is causal; the feature of a text is that of the end-of-text token, projected
            without a bias. The loss is `info_nce`. "siglip": the image tower has no class token and no such norm, the
            projection of its patches adds a bias, and attention pools the image's feature. In the text tower each token
            sees all tokens; the feature of a text is that of the last token, projected with a bias. The loss is
            `sigmoid_contrastive`, with a `logit_bias`.
        vision_*, image_size, patch_size, channels: of the image tower; `vision_mlp` is the width of its feed-forward.
        text_*, vocab_size: of the text tower; `text_length` is the largest length of a text, in tokens.
        embed_dim: the width of the features; in a "siglip" it must be `vision_width`.
        eos_token_id: the feature of a "clip" text is that of the first token with this id; None: that of the token with
            the highest id, as in OpenAI's model.

    Raises:
        ValueError: a size is not positive, too large, or does not divide; the variant or an activation is unknown.
    """

    vision_width: int
    vision_layers: int
    vision_heads: int
    vision_mlp: int
    image_size: int
    patch_size: int
    text_width: int
    text_layers: int
    text_heads: int
    text_mlp: int
    text_length: int
    vocab_size: int
    embed_dim: int
    variant: Literal["clip", "siglip"] = "clip"
    channels: int = 3
    vision_activation: str = "quick_gelu"
    text_activation: str = "quick_gelu"
    vision_eps: float = 1e-5
    text_eps: float = 1e-5
    vision_dropout: float = 0.0
    text_dropout: float = 0.0
    eos_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {self.variant!r}")
        check_config(self)
        if self.variant == "siglip" and self.embed_dim != self.vision_width:
            raise ValueError(f"embed_dim must be vision_width = {self.vision_width} in a siglip, got {self.embed_dim}")

    @classmethod
    def from_transformers(cls, config: dict[str, Any], where: str = "config") -> CLIPConfig:
        """Returns the configuration that a Hugging Face ``CLIPConfig`` or ``SiglipConfig``, as a dict, describes.

        Args:
            config: the dict, as in ``config.json``.
            where: how errors name it.
        """
        theirs = read_config(config, ARCHITECTURES, where)
        if theirs.model_type == "siglip":
            head = getattr(theirs.vision_config, "vision_use_head", True)
            if head is not True:
                why = "without the head there is no image feature"
                raise CheckpointError(f"{where}, vision_config: vision_use_head must be true, got {head}: {why}")
            fields = {**FIELDS, "embed_dim": "text_config.projection_size"}
            return read_fields(cls, theirs, fields, where, variant="siglip")
        eos = theirs.text_config.eos_token_id
        if type(eos) is not int:
            raise CheckpointError(f"{where}, text_config: eos_token_id must be an integer, got {eos!r}")
        # Early checkpoints hold 2 by mistake; their end-of-text token has the highest id.
        eos = None if eos == 2 else eos
        return read_fields(
            cls, theirs, {**FIELDS, "embed_dim": "projection_dim"}, where, variant="clip", eos_token_id=eos
        )
