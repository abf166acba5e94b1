"""`DeepSeekVL2Config`: the sizes of a DeepSeek-VL2, with their checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mmkernels.models import deepseek_vl2_weights as weights
from mmkernels.models.blocks.config import check_config, read_fields
from mmkernels.models.blocks.latent_decoder import ExpertSizes
from mmkernels.models.deepseek_vl2_tiles import candidate_resolutions
from mmkernels.nn import LatentSizes
from mmkernels.nn.experts import ACTIVATIONS, METHODS, SCORING

_LARGEST = {"experts": 2**14, "experts_used": 2**10, "expert_mlp": 2**18, "groups": 2**10, "top_groups": 2**10}
_LATENT = {"kv_rank": 2**16, "nope_dim": 2**12, "rope_dim": 2**12, "value_dim": 2**12}
_MOST_SHARED, _MOST_TILES, _MOST_CANDIDATES = 2**8, 2**8, 2**10


@dataclass(frozen=True)
class DeepSeekVL2Config:
    """The sizes of a DeepSeek-VL2.

    Args:
        vision_*: of the image encoder, SigLIP; `vision_mlp` is the width of its feed-forward.
        image_size, patch_size, channels: of a tile, and its patches, in pixels.
        merge: the side of the windows of patches that become one token.
        projector_mlp: the width between the two layers that follow.
        candidate_resolutions: the sizes (width, height) that an image may be brought to before it is cut, in pixels.
        whole_first: whether the tokens of the image as a whole come before those of its tiles.
        text_*: of the language model; `text_length`: the most tokens of a text; `text_mlp`: of the layers without
            experts. With latent attention `text_kv_heads` counts for nothing, and `text_head_dim` is `rope_dim`.
        latent: whether the attention is latent; if not (DeepSeek-VL2-tiny), `kv_rank`, `query_rank`, `nope_dim`,
            `rope_dim` and `value_dim` count for nothing.
        kv_rank, query_rank, nope_dim, rope_dim, value_dim: as of `LatentSizes`.
        experts, experts_used, expert_mlp, shared_experts, dense_layers: as of `ExpertSizes`.
        scoring, groups, top_groups, routing, routing_scale, normalise: of the router, as of `ExpertSizes`.
        image_token_id: the token that marks a visual token in a prompt.
        eos_token_ids: the tokens that end a generated text.

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
    experts: int
    experts_used: int
    expert_mlp: int
    shared_experts: int = 2
    dense_layers: int = 1
    candidate_resolutions: tuple[tuple[int, int], ...] = candidate_resolutions()
    latent: bool = True
    kv_rank: int = 512
    query_rank: int | None = None
    nope_dim: int = 128
    rope_dim: int = 64
    value_dim: int = 128
    scoring: str = "softmax"
    groups: int = 1
    top_groups: int = 1
    routing: str = "greedy"
    routing_scale: float = 1.0
    normalise: bool = False
    text_length: int = 4096
    channels: int = 3
    vision_activation: str = "gelu_pytorch_tanh"
    vision_eps: float = 1e-6
    vision_dropout: float = 0.0
    merge: int = 2
    projector_mlp: int | None = None
    whole_first: bool = True
    text_activation: str = "silu"
    text_bias: bool = False
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e4
    dropout: float = 0.0
    tie_embeddings: bool = False
    pad_token_id: int = 0
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_config(self)
        if self.image_token_id is None:
            raise ValueError(f"image_token_id must be an integer below vocab_size = {self.vocab_size}, got None")
        self._check_sizes(_LARGEST | (_LATENT if self.latent is True else {}))
        self._check_numbers()
        self._check_options()
        self._check_resolutions()
        if self.text_head_dim % 2:
            raise ValueError(f"text_head_dim must be even, got {self.text_head_dim}")
        if self.latent and self.text_head_dim != self.rope_dim:
            raise ValueError(f"text_head_dim must be rope_dim = {self.rope_dim}, got {self.text_head_dim}")
        self._check_router()

    def _check_sizes(self, largest: dict[str, int]) -> None:
        for name, most in largest.items():
            _check_integer(name, getattr(self, name), 1, most)

    def _check_numbers(self) -> None:
        """Raises unless further sizes are in their ranges."""
        for name in ("query_rank", "projector_mlp"):
            if getattr(self, name) is not None:
                _check_integer(name, getattr(self, name), 1, 2**18)
        _check_integer("shared_experts", self.shared_experts, 0, _MOST_SHARED)
        _check_integer("dense_layers", self.dense_layers, 0, self.text_layers)
        scale = self.routing_scale
        if type(scale) not in (int, float) or not 0 < scale < float("inf"):
            raise ValueError(f"routing_scale must be a number, positive and finite, got {scale!r}")

    def _check_options(self) -> None:
        """Raises unless options are among those there are."""
        for name in ("latent", "whole_first", "normalise", "tie_embeddings", "text_bias"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be a bool, got {getattr(self, name)!r}")
        known = {"scoring": SCORING, "routing": METHODS, "text_activation": tuple(ACTIVATIONS)}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} must be one of {', '.join(values)}, got {getattr(self, name)!r}")

    def _check_resolutions(self) -> None:
        """Raises unless images may be brought to sizes of whole tiles."""
        sizes, side = self.candidate_resolutions, self.image_size
        is_side = lambda x: type(x) is int and x > 0 and x % side == 0
        fits = lambda size: isinstance(size, tuple) and len(size) == 2 and all(map(is_side, size))
        if not isinstance(sizes, tuple) or not 1 <= len(sizes) <= _MOST_CANDIDATES:
            must = f"from 1 to {_MOST_CANDIDATES} pairs (width, height)"
            raise ValueError(f"candidate_resolutions must be {must}, got {repr(sizes)[:200]}")
        for size in sizes:
            if not fits(size) or size[0] * size[1] > _MOST_TILES * side * side:
                must = f"pairs of multiples of image_size = {side}, of at most {_MOST_TILES} tiles"
                raise ValueError(f"candidate_resolutions must be {must}, got {repr(size)[:200]}")

    def _check_router(self) -> None:
        """Raises unless the router's options fit to each other: `TopKRouter` names the fields as below."""
        if self.experts % self.groups:
            raise ValueError(f"groups must divide experts = {self.experts}, got {self.groups}")
        if self.top_groups > self.groups:
            raise ValueError(f"top_groups must be at most groups = {self.groups}, got {self.top_groups}")
        size = self.experts // self.groups
        if self.routing == "greedy" and self.groups > 1:
            raise ValueError(f'groups must be 1 where routing is "greedy", which knows no groups, got {self.groups}')
        if self.routing == "noaux_tc" and size < 2:
            raise ValueError(f'groups must leave each group two experts where routing is "noaux_tc", got {self.groups}')
        if self.experts_used > self.top_groups * size:
            must = f"at most {self.top_groups * size}, the experts of {self.top_groups} group(s)"
            raise ValueError(f"experts_used must be {must}, got {self.experts_used}")

    @property
    def tile_side(self) -> int:
        """The side of a tile in tokens: of 27 patches, 14 windows of two, the last of which is filled with zeros."""
        return -(-(self.image_size // self.patch_size) // self.merge)

    @property
    def expert_sizes(self) -> ExpertSizes:
        """The sizes of the mixtures."""
        return ExpertSizes(
            experts=self.experts,
            used=self.experts_used,
            mlp=self.expert_mlp,
            shared=self.shared_experts,
            dense_layers=self.dense_layers,
            scoring=self.scoring,
            groups=self.groups,
            top_groups=self.top_groups,
            method=self.routing,
            scale=self.routing_scale,
            normalise=self.normalise,
        )

    @property
    def latent_sizes(self) -> LatentSizes | None:
        """The sizes of the latent attention, if there is one."""
        if not self.latent:
            return None
        same = {name: getattr(self, name) for name in LatentSizes._fields if name != "heads"}
        return LatentSizes(heads=self.text_heads, **same)

    @classmethod
    def from_hf(
        cls, config: dict[str, Any], where: str = "config", image_token_id: int | None = None
    ) -> DeepSeekVL2Config:
        """Returns the configuration that the ``config.json`` of a released DeepSeek-VL2, as a dict, describes.

        Args:
            config: the dict.
            where: how errors name it.
            image_token_id: of ``<image>``, which the dict has no field for.
        """
        theirs = weights.read(config, where)
        text = theirs.language_config
        others = weights.other_fields(theirs, where)
        if image_token_id is not None:
            others["image_token_id"] = image_token_id
        fields = weights.FIELDS | (weights.LATENT_FIELDS if text.use_mla else {})
        return read_fields(cls, theirs, fields, where, **others)


def _check_integer(name: str, value: object, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} must be an integer from {least} to {most}, got {value!r}")


_TINY: dict[str, Any] = {
    "vision_width": 32, "vision_layers": 2, "vision_heads": 2, "vision_mlp": 64, "image_size": 28, "patch_size": 8,
    "text_width": 64, "text_layers": 3, "text_heads": 4, "text_kv_heads": 4, "text_mlp": 96, "vocab_size": 128,
    "image_token_id": 127, "experts": 8, "experts_used": 2, "expert_mlp": 32, "kv_rank": 32, "nope_dim": 16,
    "rope_dim": 8, "value_dim": 16, "candidate_resolutions": candidate_resolutions(28, 4), "text_length": 1024,
}  # fmt: skip
_SIGLIP: dict[str, Any] = {
    "vision_width": 1152, "vision_layers": 27, "vision_heads": 16, "vision_mlp": 4304, "image_size": 384,
    "patch_size": 14,
}  # fmt: skip
SIZES = {
    # For tests: a tile has 3 x 3 patches, which are filled up to 2 x 2 tokens.
    "tiny": DeepSeekVL2Config(**_TINY, text_head_dim=8),
    "tiny_plain": DeepSeekVL2Config(**_TINY, text_head_dim=16, latent=False),
    "tiny_sigmoid": DeepSeekVL2Config(
        **_TINY, text_head_dim=8, scoring="sigmoid", routing="noaux_tc", normalise=True, routing_scale=2.0,
    ),
    # The published widths (Wu et al., "DeepSeek-VL2", 2024, table 1; the configurations of the released models).
    "deepseek_vl2_tiny": DeepSeekVL2Config(
        **_SIGLIP, text_width=1280, text_layers=12, text_heads=10, text_kv_heads=10, text_head_dim=128, text_mlp=6848,
        vocab_size=129280, image_token_id=128815, eos_token_ids=(1,), experts=64, experts_used=6, expert_mlp=896,
        latent=False,
    ),
    "deepseek_vl2_small": DeepSeekVL2Config(
        **_SIGLIP, text_width=2048, text_layers=27, text_heads=16, text_kv_heads=16, text_head_dim=64, text_mlp=10944,
        vocab_size=102400, image_token_id=100003, eos_token_ids=(100001,), experts=64, experts_used=6, expert_mlp=1408,
    ),
    "deepseek_vl2": DeepSeekVL2Config(
        **_SIGLIP, text_width=2560, text_layers=30, text_heads=32, text_kv_heads=32, text_head_dim=64, text_mlp=12288,
        vocab_size=129280, image_token_id=128815, eos_token_ids=(1,), experts=72, experts_used=6, expert_mlp=1536,
        scoring="sigmoid", routing="noaux_tc", normalise=True, routing_scale=2.0,
    ),
}  # fmt: skip
"""The sizes that `DeepSeekVL2.from_size` accepts. Layers can be changed: ``from_size("deepseek_vl2", text_layers=2)``.
"""
