"""`QwenVLConfig`: the sizes of a Qwen-VL, with their checks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from mmkernels.models import qwen_vl_weights as weights
from mmkernels.models.blocks.checkpoint import CheckpointError
from mmkernels.models.blocks.config import check_config, read_config, read_fields, text_values

VARIANTS = ("qwen2", "qwen2_5", "qwen3")


@dataclass(frozen=True)
class QwenVLConfig:
    """The sizes of a Qwen-VL.

    Args:
        variant: "qwen2": LayerNorms and a feed-forward in the image encoder. "qwen2_5": RMS norms and a SwiGLU there,
            and attention within windows; a video's positions follow its seconds. "qwen3": learned positions, features
            of several layers (DeepStack), interleaved M-RoPE; a video's steps are marked one by one.
        vision_*: of the image encoder; `vision_mlp` is the width of its feed-forward.
        patch_size, patch_frames, channels: of a patch: its side in pixels, its frames of a video, its channels.
        merge: the side of the windows of patches that become one token.
        window: the side of the windows of attention, in pixels ("qwen2_5").
        full_layers: the layers that attend to whole images ("qwen2_5").
        deep_layers: the layers behind which features are taken for the language model's first layers ("qwen3").
        position_side: the side of the grid of learned positions ("qwen3").
        tokens_per_second: temporal positions of a second of video ("qwen2_5").
        text_*: of the language model; `text_length`: the most tokens of a text.
        rope_sections: how many rotary frequencies follow the positions t, h and w.
        image_token_id, video_token_id: the tokens that mark a visual token in a prompt.
        eos_token_ids: the tokens that end a generated text.
        reduce: what leaves fewer visual tokens behind the merger, as `TokenReducer.parse` reads it, such as "pool:2" or
            "select:0.25"; None: all stay.

    Raises:
        ValueError: a size is not positive, too large, or does not divide; an option is unknown.

    Example:
        >>> from mmkernels.models import QwenVL
        >>> QwenVL.sizes["qwen2_5_3b"].full_layers
        (7, 15, 23, 31)
    """

    variant: str
    vision_width: int
    vision_layers: int
    vision_heads: int
    vision_mlp: int
    patch_size: int
    text_width: int
    text_layers: int
    text_heads: int
    text_kv_heads: int
    text_head_dim: int
    text_mlp: int
    vocab_size: int
    rope_sections: tuple[int, int, int]
    image_token_id: int
    video_token_id: int
    text_length: int = 32768
    patch_frames: int = 2
    channels: int = 3
    merge: int = 2
    window: int = 0
    full_layers: tuple[int, ...] = ()
    deep_layers: tuple[int, ...] = ()
    position_side: int = 0
    tokens_per_second: int = 0
    vision_activation: str = "quick_gelu"
    text_activation: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    dropout: float = 0.0
    tie_embeddings: bool = False
    pad_token_id: int = 0
    eos_token_ids: tuple[int, ...] = ()
    reduce: str | None = None

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {self.variant!r}")
        check_config(self)
        if self.vision_width // self.vision_heads % 4:
            got = self.vision_width // self.vision_heads
            raise ValueError(f"vision_width / vision_heads must be a multiple of 4, got {got}")
        sections = self.rope_sections
        numbers = isinstance(sections, tuple) and all(type(size) is int and size >= 0 for size in sections)
        if not numbers or len(sections) != 3:
            raise ValueError(f"rope_sections must be three integers >= 0, got {repr(sections)[:200]}")
        half = self.text_head_dim / 2
        if sum(sections) != half:
            raise ValueError(f"rope_sections must add up to text_head_dim / 2 = {half}, got {sections}")
        if self.variant != "qwen3" and self.text_heads * self.text_head_dim != self.text_width:
            must = f"text_width / text_heads = {self.text_width / self.text_heads}"
            raise ValueError(f"text_head_dim must be {must} in a {self.variant}, got {self.text_head_dim}")
        if self.window % (self.merge * self.patch_size):
            raise ValueError(
                f"window must be a multiple of merge * patch_size = {self.merge * self.patch_size}, got {self.window}"
            )
        if bool(self.window) != (self.variant == "qwen2_5") or bool(self.position_side) != (self.variant == "qwen3"):
            both = f"window = {self.window}, position_side = {self.position_side}"
            raise ValueError(f'window is for "qwen2_5" and position_side for "qwen3"; got {both} for {self.variant!r}')
        for name, rule in (("full_layers", ""), ("deep_layers", ", ascending")):
            layers, most = getattr(self, name), self.vision_layers
            numbers = isinstance(layers, tuple) and all(type(layer) is int and 0 <= layer < most for layer in layers)
            if not numbers or (rule and list(layers) != sorted(set(layers))):
                raise ValueError(f"{name} must be layers below vision_layers = {most}{rule}, got {repr(layers)[:200]}")
        if len(self.deep_layers) > self.text_layers:
            raise ValueError(f"deep_layers must be at most text_layers = {self.text_layers}, got {self.deep_layers}")
        if self.image_token_id == self.video_token_id:
            raise ValueError(f"video_token_id must differ from image_token_id, got {self.video_token_id} for both")

    @classmethod
    def from_hf(cls, config: dict[str, Any], where: str = "config") -> QwenVLConfig:
        """Returns the configuration that a Hugging Face ``config.json`` of a Qwen-VL, as a dict, describes.

        Args:
            config: the dict.
            where: how errors name it.
        """
        theirs = read_config(config, weights.ARCHITECTURES, where)
        variant = weights.VARIANT_OF[theirs.model_type]
        try:
            weights.check_fixed(variant, theirs)
            computed = weights.computed_fields(variant, theirs)
        except Exception as error:  # transformers checks few values: a list may be a number, a divisor 0
            raise CheckpointError(f"{where}: {' '.join(str(error).split())[:500]}") from error
        text = theirs.text_config
        return read_fields(
            cls,
            theirs,
            weights.FIELDS | weights.FIELDS_OF[variant],
            where,
            variant=variant,
            **text_values(text),
            **computed,
        )


_TINY = partial(
    QwenVLConfig, vision_width=32, vision_layers=2, vision_heads=2, vision_mlp=64, patch_size=4,
    text_width=64, text_layers=2, text_heads=4, text_kv_heads=2, text_head_dim=16, text_mlp=128,
    vocab_size=128, rope_sections=(2, 3, 3), image_token_id=127, video_token_id=126, text_length=16384,
)  # fmt: skip
SIZES = {
    # For tests.
    "tiny_qwen2": _TINY(variant="qwen2"),
    "tiny": _TINY(variant="qwen2_5", window=16, full_layers=(1,), tokens_per_second=2, vision_activation="silu"),
    "tiny_qwen3": _TINY(
        variant="qwen3", position_side=8, deep_layers=(0, 1), vision_activation="gelu_pytorch_tanh"
    ),
    # Qwen2-VL-2B's published widths (its config.json).
    "qwen2_2b": QwenVLConfig(
        variant="qwen2", vision_width=1280, vision_layers=32, vision_heads=16, vision_mlp=5120, patch_size=14,
        text_width=1536, text_layers=28, text_heads=12, text_kv_heads=2, text_head_dim=128, text_mlp=8960,
        vocab_size=151936, rope_sections=(16, 24, 24), image_token_id=151655, video_token_id=151656,
        text_length=32768, tie_embeddings=True, eos_token_ids=(151645,), pad_token_id=151643,
    ),
    # Qwen2.5-VL-3B's published widths (Bai et al., "Qwen2.5-VL Technical Report", 2025, table 1).
    "qwen2_5_3b": QwenVLConfig(
        variant="qwen2_5", vision_width=1280, vision_layers=32, vision_heads=16, vision_mlp=3420, patch_size=14,
        window=112, full_layers=(7, 15, 23, 31), tokens_per_second=2, vision_activation="silu",
        text_width=2048, text_layers=36, text_heads=16, text_kv_heads=2, text_head_dim=128, text_mlp=11008,
        vocab_size=151936, rope_sections=(16, 24, 24), image_token_id=151655, video_token_id=151656,
        text_length=128000, tie_embeddings=True, eos_token_ids=(151645,), pad_token_id=151643,
    ),
    # Qwen3-VL-2B's published widths (its config.json).
    "qwen3_2b": QwenVLConfig(
        variant="qwen3", vision_width=1024, vision_layers=24, vision_heads=16, vision_mlp=4096, patch_size=16,
        deep_layers=(5, 11, 17), position_side=48, vision_activation="gelu_pytorch_tanh",
        text_width=2048, text_layers=28, text_heads=16, text_kv_heads=8, text_head_dim=128, text_mlp=6144,
        vocab_size=151936, rope_sections=(24, 20, 20), rope_theta=5e6, image_token_id=151655, video_token_id=151656,
        text_length=262144, tie_embeddings=True, eos_token_ids=(151645,), pad_token_id=151643,
    ),
}  # fmt: skip
"""The sizes that `QwenVL.from_size` accepts. Layers may differ: ``from_size("qwen2_5_3b", vision_layers=2, ...)``."""
