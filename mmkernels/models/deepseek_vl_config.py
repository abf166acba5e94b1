"""`DeepSeekVLConfig`: the sizes of a DeepSeek-VL, with their checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mmkernels.models import deepseek_vl_weights as weights
from mmkernels.models.blocks.activations import ACTIVATIONS
from mmkernels.models.blocks.config import check_config, read_config, read_fields, text_values
from mmkernels.models.blocks.sam_encoder import SamSizes

_LARGEST = {
    **{"sam_width": 2**16, "sam_heads": 2**12, "sam_mlp": 2**18, "sam_channels": 2**14},
    **{"sam_image_size": 2**13, "sam_patch_size": 2**13, "sam_window": 2**10},
}
_MOST_LAYERS = 2**9


@dataclass(frozen=True)
class DeepSeekVLConfig:
    """The sizes of a DeepSeek-VL.

    Args:
        vision_*: of the image encoder, SigLIP; `vision_mlp` is the width of its feed-forward.
        image_size, patch_size, channels: of an image there, and its patches, in pixels.
        text_*: of the language model; `text_length`: the most tokens of a text.
        sam_layers: of the second encoder, SAM, which sees the image at a higher resolution; 0: there is none, and the
            other fields ``sam_*`` count for nothing.
        sam_*: its sizes, as `SamSizes` names them.
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
    text_length: int = 16384
    channels: int = 3
    vision_activation: str = "gelu_pytorch_tanh"
    vision_eps: float = 1e-6
    vision_dropout: float = 0.0
    sam_layers: int = 0
    sam_width: int = 768
    sam_heads: int = 12
    sam_mlp: int = 3072
    sam_image_size: int = 1024
    sam_patch_size: int = 16
    sam_window: int = 14
    sam_global: tuple[int, ...] = (2, 5, 8, 11)
    sam_channels: int = 256
    sam_activation: str = "gelu"
    sam_eps: float = 1e-6
    sam_dropout: float = 0.0
    sam_bias: bool = True
    sam_positions: bool = True
    sam_relative: bool = True
    text_activation: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e4
    dropout: float = 0.0
    tie_embeddings: bool = False
    pad_token_id: int = 0
    eos_token_ids: tuple[int, ...] = ()
    reduce: str | None = None

    def __post_init__(self) -> None:
        check_config(self)
        if self.image_token_id is None:
            raise ValueError(f"image_token_id must be an integer below vocab_size = {self.vocab_size}, got None")
        if self.text_head_dim % 2:
            raise ValueError(f"text_head_dim must be even, got {self.text_head_dim}")
        if type(self.sam_layers) is not int or not 0 <= self.sam_layers <= _MOST_LAYERS:
            raise ValueError(f"sam_layers must be an integer from 0 to {_MOST_LAYERS}, got {self.sam_layers!r}")
        if self.sam_layers:
            self._check_sam()

    def _check_sam(self) -> None:
        """Raises unless the fields of the second encoder are valid."""
        for name, most in _LARGEST.items():
            size = getattr(self, name)
            if type(size) is not int or not 1 <= size <= most:
                raise ValueError(f"{name} must be an integer from 1 to {most}, got {size!r}")
        for whole, part in (("sam_width", "sam_heads"), ("sam_image_size", "sam_patch_size")):
            if getattr(self, whole) % getattr(self, part):
                must = f"a multiple of {part} = {getattr(self, part)}"
                raise ValueError(f"{whole} must be {must}, got {getattr(self, whole)}")
        layers = self.sam_global
        is_layer = lambda layer: type(layer) is int and layer >= 0
        if not isinstance(layers, tuple) or not all(map(is_layer, layers)) or not self.sam_tapped < self.sam_layers:
            must = f"layers, integers from 0, the first of them below sam_layers = {self.sam_layers}"
            raise ValueError(f"sam_global must be {must}, got {layers!r}")
        if not isinstance(self.sam_activation, str) or self.sam_activation not in ACTIVATIONS:
            raise ValueError(f"sam_activation must be one of {', '.join(ACTIVATIONS)}, got {self.sam_activation!r}")
        for name in ("sam_eps", "sam_dropout"):
            value, least = getattr(self, name), "above 0" if name == "sam_eps" else "from 0"
            if type(value) not in (int, float) or not 0 <= value <= 1 or (name == "sam_eps" and not value):
                raise ValueError(f"{name} must be a number {least} to 1, got {value!r}")
        for name in ("sam_bias", "sam_positions", "sam_relative"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be a bool, got {getattr(self, name)!r}")
        if self.text_width % 2:
            raise ValueError(f"text_width must be even, half of it for each encoder, got {self.text_width}")

    @property
    def image_tokens(self) -> int:
        """The tokens of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def sam_tapped(self) -> int:
        """The layer of the second encoder whose result is used beside that of the last one: its first global layer."""
        return self.sam_global[0] if self.sam_global else self.sam_layers

    @property
    def sam_sizes(self) -> SamSizes:
        """The sizes of the second encoder."""
        same = {name: getattr(self, f"sam_{name}") for name in SamSizes._fields if hasattr(self, f"sam_{name}")}
        return SamSizes(**same, global_layers=self.sam_global, in_channels=self.channels)

    @classmethod
    def from_hf(cls, config: dict[str, Any], where: str = "config") -> DeepSeekVLConfig:
        """Returns the configuration that a Hugging Face ``config.json`` of a DeepSeek-VL, as a dict, describes.

        Args:
            config: the dict.
            where: how errors name it.
        """
        theirs = read_config(config, weights.ARCHITECTURES, where)
        weights.check_fixed(theirs, where)
        text, sam = theirs.text_config, getattr(theirs, "high_res_vision_config", None)
        others, fields = text_values(text), weights.FIELDS
        if sam is not None:
            layers = sam.global_attn_indexes
            others["sam_global"] = tuple(layers) if isinstance(layers, list) else layers
            fields = fields | weights.SAM_FIELDS
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // max(1, text.num_attention_heads)
        return read_fields(cls, theirs, fields, where, text_head_dim=head_dim, **others)


_SIGLIP: dict[str, Any] = {
    "vision_width": 1024, "vision_layers": 24, "vision_heads": 16, "vision_mlp": 4096, "image_size": 384,
    "patch_size": 16, "vocab_size": 102400, "image_token_id": 100015, "eos_token_ids": (100001,),
}  # fmt: skip
_7B: dict[str, Any] = {
    "text_width": 4096, "text_layers": 30, "text_heads": 32, "text_kv_heads": 32, "text_head_dim": 128,
    "text_mlp": 11008,
}  # fmt: skip
_TINY: dict[str, Any] = {
    "vision_width": 32, "vision_layers": 2, "vision_heads": 2, "vision_mlp": 64, "image_size": 32, "patch_size": 8,
    "text_width": 64, "text_layers": 2, "text_heads": 4, "text_kv_heads": 2, "text_head_dim": 16, "text_mlp": 128,
    "vocab_size": 128, "image_token_id": 127,
}  # fmt: skip
SIZES = {
    # For tests.
    "tiny": DeepSeekVLConfig(**_TINY),
    "tiny_hybrid": DeepSeekVLConfig(
        **_TINY, sam_layers=3, sam_width=32, sam_heads=2, sam_mlp=64, sam_image_size=64, sam_patch_size=8, sam_window=3,
        sam_global=(1,), sam_channels=8,
    ),
    # The published widths (Lu et al., "DeepSeek-VL", 2024, section 3.1; the configurations of the released models).
    "deepseek_vl_1.3b": DeepSeekVLConfig(
        **_SIGLIP, text_width=2048, text_layers=24, text_heads=16, text_kv_heads=16, text_head_dim=128, text_mlp=5632,
    ),
    "deepseek_vl_7b": DeepSeekVLConfig(**_SIGLIP, **_7B, sam_layers=12),
}  # fmt: skip
"""The sizes that `DeepSeekVL.from_size` accepts. Layers can be changed: ``from_size("deepseek_vl_7b", text_layers=2)``.
"""
