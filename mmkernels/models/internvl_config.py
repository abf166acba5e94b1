"""`InternVLConfig`: the sizes of an InternVL, with their checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mmkernels.models import internvl_weights as weights
from mmkernels.models.blocks.activations import ACTIVATIONS
from mmkernels.models.blocks.checkpoint import CheckpointError
from mmkernels.models.blocks.config import check_config, read_config, read_fields, text_values

TEXT_MODELS = ("qwen2", "qwen3", "llama")
_ROPE_TYPES = ("default", "dynamic")  # "dynamic" changes nothing up to text_length, and longer texts are refused
_UNUSED = ("hidden_dropout_prob", "projection_dropout")


@dataclass(frozen=True)
class InternVLConfig:
    """The sizes of an InternVL.

    Args:
        vision_*: of the image encoder; `vision_mlp` is the width of its feed-forward.
        image_size, patch_size, channels: of a tile, and its patches, in pixels.
        vision_norm: "layer" or "rms", the norms of its layers; `vision_eps` is theirs.
        vision_bias: whether its projections of query, key and value add a bias.
        vision_qk_norm: whether query and key have an RMS norm there, over all heads.
        vision_positions: whether it has learned positions.
        vision_last_norm: whether a layer norm follows its last layer.
        feature_layer: behind which of its layers the features are taken: 1, 2, ..., or counted from the end, -1: the
            last one, with the norm behind it. No later layer is kept.
        merge: the side of the windows of patches that become one token (pixel shuffle).
        projector_activation: between the two layers that follow, a name in `ACTIVATIONS`.
        text_model: "qwen2": the projections of query, key and value add a bias. "qwen3": each head of query and key has
            a norm. "llama": neither.
        text_*: of the language model; `text_length`: the most tokens of a text.
        image_token_id: the token that marks a visual token in a prompt.
        eos_token_ids: the tokens that end a generated text.
        reduce: what leaves fewer visual tokens behind the projector, as `TokenReducer.parse` reads it, such as "pool:2"
            or "select:0.25"; None: all stay.

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
    text_kv_heads: int
    text_head_dim: int
    text_mlp: int
    vocab_size: int
    image_token_id: int
    text_length: int = 32768
    channels: int = 3
    merge: int = 2
    vision_activation: str = "gelu"
    vision_norm: str = "layer"
    vision_eps: float = 1e-6
    vision_bias: bool = True
    vision_qk_norm: bool = False
    vision_positions: bool = True
    vision_last_norm: bool = False
    vision_dropout: float = 0.0
    feature_layer: int = -1
    projector_activation: str = "gelu"
    text_model: str = "qwen2"
    text_activation: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    dropout: float = 0.0
    tie_embeddings: bool = False
    pad_token_id: int = 0
    eos_token_ids: tuple[int, ...] = ()
    reduce: str | None = None

    def __post_init__(self) -> None:
        check_config(self)
        if self.image_token_id is None:
            raise ValueError(f"image_token_id must be an integer below vocab_size = {self.vocab_size}, got None")
        for name, known in (("text_model", TEXT_MODELS), ("vision_norm", ("layer", "rms"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if not isinstance(self.projector_activation, str) or self.projector_activation not in ACTIVATIONS:
            must = f"one of {', '.join(ACTIVATIONS)}"
            raise ValueError(f"projector_activation must be {must}, got {self.projector_activation!r}")
        if self.text_head_dim % 2:
            raise ValueError(f"text_head_dim must be even, got {self.text_head_dim}")
        if self.image_size % (self.merge * self.patch_size):
            must = f"a multiple of merge * patch_size = {self.merge * self.patch_size}"
            raise ValueError(f"image_size must be {must}, got {self.image_size}")
        layer, layers = self.feature_layer, self.vision_layers
        if type(layer) is not int or not (-layers <= layer <= -1 or 1 <= layer <= layers):
            must = f"an integer from 1 to vision_layers = {layers}, or from {-layers} to -1"
            raise ValueError(f"feature_layer must be {must}, got {layer!r}")

    @property
    def feature_layers(self) -> int:
        """How many layers the features pass."""
        return self.feature_layer + (self.vision_layers + 1) * (self.feature_layer < 0)

    @property
    def feature_norm(self) -> bool:
        """Whether a norm follows these layers."""
        return self.vision_last_norm and self.feature_layer == -1

    @classmethod
    def from_hf(cls, config: dict[str, Any], where: str = "config") -> InternVLConfig:
        """Returns the configuration that a Hugging Face ``config.json`` of an InternVL, as a dict, describes.

        Args:
            config: the dict.
            where: how errors name it.
        """
        theirs = read_config(config, weights.ARCHITECTURES, where)
        text, vision = theirs.text_config, theirs.vision_config
        _check_text(text, f"{where}, text_config")
        for name in _UNUSED:
            if getattr(vision, name) != 0:
                raise CheckpointError(f"{where}, vision_config: {name} must be 0, got {getattr(vision, name)!r}")
        if vision.norm_type not in weights.NORMS:
            must = f"norm_type must be one of {', '.join(weights.NORMS)}"
            raise CheckpointError(f"{where}, vision_config: {must}, got {vision.norm_type!r}")
        if theirs.vision_feature_select_strategy != "default":
            got = theirs.vision_feature_select_strategy
            raise CheckpointError(f"{where}: vision_feature_select_strategy must be default, got {got!r}")
        return read_fields(
            cls,
            theirs,
            weights.FIELDS,
            where,
            image_size=_side(vision.image_size),
            patch_size=_side(vision.patch_size),
            merge=_merge(theirs.downsample_ratio, where),
            vision_norm=weights.NORMS[vision.norm_type],
            vision_last_norm=not vision.use_mean_pooling,
            text_model=text.model_type,
            text_head_dim=getattr(text, "head_dim", None) or text.hidden_size // max(1, text.num_attention_heads),
            **text_values(text),
        )


def _check_text(text: Any, where: str) -> None:
    """Raises unless the language model is one that `Decoder` computes."""
    if text.model_type not in TEXT_MODELS:
        raise CheckpointError(f"{where}: model_type must be one of {', '.join(TEXT_MODELS)}, got {text.model_type!r}")
    rope = text.rope_parameters.get("rope_type", "default")
    if rope not in _ROPE_TYPES:
        raise CheckpointError(f"{where}: rope_type must be one of {', '.join(_ROPE_TYPES)}, got {rope!r}")
    for name in ("use_sliding_window", "attention_bias", "mlp_bias"):
        if getattr(text, name, False):
            raise CheckpointError(f"{where}: {name} must be false, got {getattr(text, name)!r}")
    for kind in getattr(text, "layer_types", None) or ():
        if kind != "full_attention":
            raise CheckpointError(f"{where}: layer_types must be full_attention, got {kind!r}")


def _side(size: Any) -> Any:
    """Returns the side of a square that is given as (height, width); others are for `check_config` to refuse."""
    return size[0] if isinstance(size, (list, tuple)) and len(size) == 2 and size[0] == size[1] else size


def _merge(ratio: Any, where: str) -> int:
    """Returns the side of the windows that a pixel shuffle by a ratio joins."""
    merge = round(1 / ratio) if isinstance(ratio, (int, float)) and 0 < ratio <= 1 else 0
    if not merge or merge * ratio != 1:
        raise CheckpointError(f"{where}: downsample_ratio must be 1, 1/2, 1/3, ..., got {ratio!r}")
    return merge


_INTERN_VIT: dict[str, Any] = {
    "vision_width": 1024, "vision_layers": 24, "vision_heads": 16, "vision_mlp": 4096, "image_size": 448,
    "patch_size": 14, "vocab_size": 151674, "image_token_id": 151667, "eos_token_ids": (151645,),
    "pad_token_id": 151643,
}  # fmt: skip
SIZES = {
    # For tests.
    "tiny": InternVLConfig(
        vision_width=32, vision_layers=2, vision_heads=2, vision_mlp=64, image_size=32, patch_size=4,
        text_width=64, text_layers=2, text_heads=4, text_kv_heads=2, text_head_dim=16, text_mlp=128,
        vocab_size=128, image_token_id=127, text_length=16384,
    ),
    # InternVL3's published widths (Zhu et al., "InternVL3", 2025, table 1: InternViT-300M with Qwen2.5-0.5B and 1.5B).
    "internvl3_1b": InternVLConfig(
        **_INTERN_VIT, text_width=896, text_layers=24, text_heads=14, text_kv_heads=2, text_head_dim=64, text_mlp=4864,
    ),
    "internvl3_2b": InternVLConfig(
        **_INTERN_VIT, text_width=1536, text_layers=28, text_heads=12, text_kv_heads=2, text_head_dim=128,
        text_mlp=8960,
    ),
}  # fmt: skip
"""The sizes that `InternVL.from_size` accepts. Layers can be changed: ``from_size("internvl3_1b", text_layers=2)``."""
