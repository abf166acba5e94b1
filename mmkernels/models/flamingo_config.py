"""`FlamingoConfig`: every size of a Flamingo, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from mmkernels.models import idefics
from mmkernels.models.blocks.activations import check_activation
from mmkernels.models.blocks.checkpoint import CheckpointError, Section


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
        for name, most in _LARGEST.items():
            value = getattr(self, name)
            if (type(value) is not int or not 1 <= value <= most) and not (name == "num_latents" and value is None):
                raise ValueError(f"{name} must be an integer from 1 to {most}, got {value!r}")
        if self.patch_size > self.image_size:
            raise ValueError(f"patch_size must be at most image_size = {self.image_size}, got {self.patch_size}")
        for whole, part in _MULTIPLES:
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(
                    f"{whole} must be a multiple of {part} = {getattr(self, part)}, got {getattr(self, whole)}"
                )
        if self.text_width // self.text_heads % 2:
            raise ValueError(f"text_width / text_heads must be even, got {self.text_width // self.text_heads}")
        if self.gate not in ("scalar", "vector"):
            raise ValueError(f'gate must be "scalar" or "vector", got {self.gate!r}')
        check_activation("vision_activation", self.vision_activation)
        check_activation("text_activation", self.text_activation)
        for name in ("layer_norm_eps", "rms_norm_eps", "rope_theta"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        for name in ("dropout", "vision_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"pad_token_id must be below vocab_size = {self.vocab_size}, got {self.pad_token_id}")
        if self.image_token_id is not None and not 0 <= self.image_token_id < self.vocab_size:
            raise ValueError(f"image_token_id must be below vocab_size = {self.vocab_size}, got {self.image_token_id}")

    @classmethod
    def from_idefics(cls, config: dict[str, Any] | Section) -> FlamingoConfig:
        """The configuration that a Hugging Face ``IdeficsConfig``, as a dict, describes."""
        config = Section(config, "config") if isinstance(config, dict) else config
        try:
            return cls(**idefics.config_fields(config))
        except CheckpointError:
            raise
        except ValueError as error:
            raise CheckpointError(f"{config.where}: {error}") from error


# Largest sizes taken: above any published model, below what would exhaust memory before a checkpoint can be compared.
_LARGEST = {
    **dict.fromkeys(("vision_width", "text_width"), 2**16),
    **dict.fromkeys(("vision_layers", "resampler_depth", "text_layers", "cross_every"), 2**9),
    **dict.fromkeys(("vision_heads", "resampler_heads", "resampler_head_dim", "text_heads"), 2**12),
    **dict.fromkeys(("vision_mlp", "text_mlp", "num_latents"), 2**18),
    **dict.fromkeys(("image_size", "patch_size"), 2**13),
    "vocab_size": 2**24,
    "channels": 2**8,
}
_MULTIPLES = (
    ("vision_width", "vision_heads"),
    ("text_width", "text_heads"),
    ("text_layers", "cross_every"),
)
