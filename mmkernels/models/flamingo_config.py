"""`FlamingoConfig`: every size of a Flamingo, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from mmkernels.models import idefics
from mmkernels.models.blocks.activations import check_activation
from mmkernels.models.blocks.checkpoint import Section
from mmkernels.models.blocks.config import check_multiple, check_numbers, check_sizes, check_token, read_config


@dataclass(frozen=True)
class FlamingoConfig:
    """Every size of a Flamingo.

    Args:
        vision_*, image_size, patch_size, channels: of the image encoder; `vision_mlp` is its feed-forward's width.
        num_latents: visual tokens an image; None: no resampler, each patch is a visual token.
        text_*: of the language model; a gated cross-attention block stands before every `cross_every`-th layer.
        qk_norm, resampler_qk_norm: norms of queries' and keys' heads in cross-attention, in the resampler.
        gate: "scalar" or "vector", as in `GatedCrossAttention`.
        image_token_id: the token that stands for an image in a prompt; None: `media_index` must be given.
        eos_token_ids: tokens that end a generated text.

    Raises:
        ValueError: a size that isn't positive, is absurdly large, or doesn't divide; an unknown activation.
    """

    vision_width: int
    vision_layers: int
    vision_heads: int
    vision_mlp: int
    image_size: int
    patch_size: int
    num_latents: int | None
    resampler_depth: int
    resampler_heads: int
    resampler_head_dim: int
    text_width: int
    text_layers: int
    text_heads: int
    text_mlp: int
    cross_every: int
    vocab_size: int
    channels: int = 3
    qk_norm: bool = False
    resampler_qk_norm: bool = False
    gate: Literal["scalar", "vector"] = "scalar"
    vision_activation: str = "gelu"
    text_activation: str = "silu"
    layer_norm_eps: float = 1e-5
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    dropout: float = 0.0
    vision_dropout: float = 0.0
    tie_embeddings: bool = False
    image_token_id: int | None = None
    pad_token_id: int = 0
    eos_token_ids: tuple[int, ...] = (2,)

    def __post_init__(self) -> None:
        check_sizes(self, optional=("num_latents",))
        check_multiple(self, "vision_width", "vision_heads")
        check_multiple(self, "text_width", "text_heads")
        check_multiple(self, "text_layers", "cross_every")
        if self.text_width // self.text_heads % 2:
            raise ValueError(f"text_width / text_heads must be even, got {self.text_width // self.text_heads}")
        if self.gate not in ("scalar", "vector"):
            raise ValueError(f'gate must be "scalar" or "vector", got {self.gate!r}')
        check_activation("vision_activation", self.vision_activation)
        check_activation("text_activation", self.text_activation)
        positive = ("layer_norm_eps", "rms_norm_eps", "rope_theta")
        check_numbers(self, positive=positive, shares=("dropout", "vision_dropout"))
        check_token(self, "pad_token_id")
        check_token(self, "image_token_id")

    @classmethod
    def from_idefics(cls, config: dict[str, Any] | Section) -> FlamingoConfig:
        """The configuration that a Hugging Face ``IdeficsConfig``, as a dict, describes."""
        return read_config(cls, idefics.config_fields, config)
