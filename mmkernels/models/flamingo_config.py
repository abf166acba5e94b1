"""`FlamingoConfig`: the sizes of a Flamingo, with their checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from mmkernels.models import idefics
from mmkernels.models.blocks.checkpoint import CheckpointError
from mmkernels.models.blocks.config import check_config, read_config, read_fields, token_ids


@dataclass(frozen=True)
class FlamingoConfig:
    """The sizes of a Flamingo.

    Args:
        vision_*, image_size, patch_size, channels: of the image encoder; `vision_mlp` is the width of its feed-forward.
        num_latents: the number of visual tokens of an image; None: there is no resampler, each patch is a visual token.
        text_*: of the language model; before every `cross_every`-th layer comes a gated cross-attention block.
        qk_norm, resampler_qk_norm: whether the heads of queries and keys are normalised in cross-attention, and in the
            resampler.
        gate: "scalar" or "vector", as in `GatedCrossAttention`.
        image_token_id: the token that marks an image in a prompt; None: prompts need a `media_index`.
        eos_token_ids: the tokens that end a generated text.
        reduce: what makes the visual tokens instead of a resampler, as `TokenReducer.parse` reads it, such as "pool:2";
            then num_latents is None. The class token stays; "select" ranks the patches by the attention that they
            receive from it in the image encoder's last layer, "tome" compares that layer's keys. Cross-attention counts
            each token once, however many patches it stands for. A graph that `torch.export` makes serves the number of
            images that it was traced with.

    Raises:
        ValueError: a size is not positive, too large, or does not divide; an activation is unknown.
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
    reduce: str | None = None

    def __post_init__(self) -> None:
        check_config(self)
        if self.text_width // self.text_heads % 2:
            raise ValueError(f"text_width / text_heads must be even, got {self.text_width // self.text_heads}")
        if self.gate not in ("scalar", "vector"):
            raise ValueError(f'gate must be "scalar" or "vector", got {self.gate!r}')
        if self.reduce is not None and self.num_latents is not None:
            raise ValueError(f"num_latents must be None with reduce = {self.reduce!r}, got {self.num_latents}")

    @classmethod
    def from_idefics(cls, config: dict[str, Any], where: str = "config") -> FlamingoConfig:
        """Returns the configuration that a Hugging Face ``IdeficsConfig``, as a dict, describes.

        Args:
            config: the dict, as in ``config.json``.
            where: how errors name it.
        """
        theirs = read_config(config, idefics.ARCHITECTURES, where)
        gates = {"float": "scalar", "vector": "vector"}
        rope = theirs.rope_parameters
        if theirs.alpha_type not in gates:
            raise CheckpointError(f"{where}: alpha_type must be one of {', '.join(gates)}, got {theirs.alpha_type!r}")
        if rope["rope_type"] != "default":
            raise CheckpointError(f"{where}: rope_type must be default, got {rope['rope_type']!r}")
        if theirs.additional_vocab_size < 0:
            raise CheckpointError(f"{where}: additional_vocab_size must be >= 0, got {theirs.additional_vocab_size}")
        return read_fields(
            cls,
            theirs,
            idefics.FIELDS,
            where,
            num_latents=theirs.perceiver_config.resampler_n_latents if theirs.use_resampler else None,
            gate=gates[theirs.alpha_type],
            image_size=_side(theirs.vision_config.image_size),
            patch_size=_side(theirs.vision_config.patch_size),
            rope_theta=rope["rope_theta"],
            # The additional tokens come last; a checkpoint holds their rows in tensors apart from the others.
            vocab_size=theirs.vocab_size + theirs.additional_vocab_size,
            pad_token_id=0 if theirs.pad_token_id is None else theirs.pad_token_id,
            eos_token_ids=token_ids(theirs.eos_token_id),
            image_token_id=getattr(theirs, "image_token_id", None),
        )


def _side(size: Any) -> Any:
    """Returns the side of a square that is given as one number or as two equal ones."""
    return size[0] if isinstance(size, list | tuple) and len(size) == 2 and size[0] == size[1] else size


SIZES = {
    # For tests.
    "tiny": FlamingoConfig(
        vision_width=32, vision_layers=2, vision_heads=4, vision_mlp=64, image_size=32, patch_size=8,
        num_latents=8, resampler_depth=2, resampler_heads=4, resampler_head_dim=8,
        text_width=64, text_layers=4, text_heads=4, text_mlp=128, cross_every=2,
        vocab_size=128, image_token_id=127,
    ),
    # Runs on a laptop. The vision widths are those of ViT-S/16.
    "small": FlamingoConfig(
        vision_width=384, vision_layers=6, vision_heads=6, vision_mlp=1536, image_size=224, patch_size=16,
        num_latents=64, resampler_depth=2, resampler_heads=6, resampler_head_dim=64,
        text_width=512, text_layers=8, text_heads=8, text_mlp=1376, cross_every=2,
        vocab_size=32000, image_token_id=31999,
    ),
    # CLIP ViT-B/16 (Radford et al., 2021, table 19), and a text model of the width and depth of GPT-2 and BERT base.
    "base": FlamingoConfig(
        vision_width=768, vision_layers=12, vision_heads=12, vision_mlp=3072, image_size=224, patch_size=16,
        num_latents=64, resampler_depth=6, resampler_heads=12, resampler_head_dim=64,
        text_width=768, text_layers=12, text_heads=12, text_mlp=2048, cross_every=2,
        vocab_size=32000, image_token_id=31999, vision_activation="quick_gelu",
    ),
}  # fmt: skip
"""The sizes that `Flamingo.from_size` accepts. `text_mlp` is 8/3 of `text_width` (SwiGLU), in multiples of 32."""
