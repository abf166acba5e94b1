"""`BLIPConfig`: the sizes of a BLIP, with their checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mmkernels.models import blip_weights as weights
from mmkernels.models.blocks.bert import BertSizes
from mmkernels.models.blocks.checkpoint import CheckpointError
from mmkernels.models.blocks.config import check_config, read_config, read_fields


@dataclass(frozen=True)
class BLIPConfig:
    """The sizes of a BLIP, and which of its heads it has.

    Args:
        vision_*: of the image encoder; `vision_mlp` is the width of its feed-forward.
        image_size, patch_size, channels: of an image, and its patches, in pixels.
        text_*: of the text model; `text_length`: the most tokens of a text.
        embed_dim: the width of the contrastive features.
        retrieval: whether there are the contrastive and the matching head.
        generation: whether there is the language model's head.
        decoder_attention: whether generation has a self-attention of its own (the paper's choice for pre-training);
            False: all heads share it. A model with one kind of head has one self-attention.
        bos_token_id: the first token of a text that is generated ([DEC] in the paper).
        enc_token_id: the first token of a text that is matched ([ENC]); None: the text stays as it is.
        sep_token_id: ends a text.
        pad_token_id: follows the end of a text.
        label_smoothing: of the language model's loss.

    Raises:
        ValueError: a size is not positive, too large, or does not divide; an option is unknown.
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
    vocab_size: int
    embed_dim: int
    bos_token_id: int
    sep_token_id: int
    text_length: int = 512
    channels: int = 3
    vision_activation: str = "gelu"
    text_activation: str = "gelu"
    vision_eps: float = 1e-5
    text_eps: float = 1e-12
    vision_dropout: float = 0.0
    text_dropout: float = 0.0
    text_residual_dropout: float = 0.0
    label_smoothing: float = 0.0
    retrieval: bool = True
    generation: bool = True
    decoder_attention: bool = True
    enc_token_id: int | None = None
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        check_config(self)
        for name in ("bos_token_id", "sep_token_id", "pad_token_id"):
            if getattr(self, name) is None:
                raise ValueError(f"{name} must be an integer below vocab_size = {self.vocab_size}, got None")
        if not (self.retrieval or self.generation):
            raise ValueError("retrieval or generation must be True, got False for both")

    @property
    def bert(self) -> BertSizes:
        """The sizes of the text model."""
        return BertSizes(
            width=self.text_width,
            layers=self.text_layers,
            heads=self.text_heads,
            mlp=self.text_mlp,
            vocab=self.vocab_size,
            length=self.text_length,
            context=self.vision_width,
            activation=self.text_activation,
            eps=self.text_eps,
            dropout=self.text_dropout,
            residual_dropout=self.text_residual_dropout,
        )

    @property
    def separate_attention(self) -> bool:
        """Whether causal texts have a self-attention of their own."""
        return self.decoder_attention and self.retrieval and self.generation

    @classmethod
    def from_hf(cls, config: dict[str, Any], where: str = "config") -> BLIPConfig:
        """Returns the configuration that a Hugging Face ``config.json`` of a BLIP, as a dict, describes.

        Args:
            config: the dict.
            where: how errors name it.
        """
        theirs = read_config(config, weights.ARCHITECTURES, where)
        architectures = config.get("architectures")
        if not architectures:
            known = " or ".join(weights.HEADS)
            raise CheckpointError(f"{where}: architectures must name {known}, got {architectures!r}")
        if not theirs.text_config.is_decoder:
            raise CheckpointError(f"{where}, text_config: is_decoder must be true, got false: no layer sees the image")
        generation = weights.HEADS[architectures[0]]
        return read_fields(cls, theirs, weights.FIELDS, where, retrieval=not generation, generation=generation)


# BERT's vocabulary with two tokens more; the loss as in Li et al., 2022, section 3.2.
_BERT: dict[str, Any] = {
    "vocab_size": 30524, "bos_token_id": 30522, "enc_token_id": 30523, "sep_token_id": 102, "label_smoothing": 0.1,
}  # fmt: skip
SIZES = {
    # For tests.
    "tiny": BLIPConfig(
        vision_width=32, vision_layers=2, vision_heads=4, vision_mlp=64, image_size=32, patch_size=8,
        text_width=48, text_layers=2, text_heads=4, text_mlp=96, text_length=32, vocab_size=128, embed_dim=24,
        bos_token_id=1, enc_token_id=2, sep_token_id=3,
    ),
    # ViT-S/16 (Touvron et al., "Training data-efficient image transformers", 2021, table 1), text model of equal width.
    "small": BLIPConfig(
        vision_width=384, vision_layers=12, vision_heads=6, vision_mlp=1536, image_size=224, patch_size=16,
        text_width=384, text_layers=6, text_heads=6, text_mlp=1536, embed_dim=256, **_BERT,
    ),
    # BLIP with ViT-B/16 (Li et al., 2022, section 4.1; BERT base).
    "base": BLIPConfig(
        vision_width=768, vision_layers=12, vision_heads=12, vision_mlp=3072, image_size=224, patch_size=16,
        text_width=768, text_layers=12, text_heads=12, text_mlp=3072, embed_dim=256, **_BERT,
    ),
}  # fmt: skip
"""The sizes that `BLIP.from_size` accepts."""
