"""`JanusConfig`: the sizes of a Janus, with their checks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmkernels.models import janus_weights as weights
from mmkernels.models.blocks.activations import ACTIVATIONS
from mmkernels.models.blocks.checkpoint import CheckpointError, read_json
from mmkernels.models.blocks.config import check_config, read_config, read_fields, text_values, with_generation
from mmkernels.models.janus_vq import GROUPS, VQSizes

_LARGEST = {
    **{"aligner_layers": 2**6, "image_aligner_layers": 2**6, "vq_codes": 2**20, "vq_code_width": 2**12},
    **{"vq_latent": 2**14, "vq_width": 2**12, "vq_blocks": 2**6},
}
_MOST_LEVELS, _LARGEST_MULTIPLIER = 8, 64
_LARGEST_SIDE = 2**12  # of a generated image, in pixels


@dataclass(frozen=True)
class JanusConfig:
    """The sizes of a Janus.

    Args:
        vision_*: of the encoder of images that are read; `vision_mlp` is the width of its feed-forward.
        image_size, patch_size, channels: of an image that is read, and its patches, in pixels. A generated image has as
            many tokens as one that is read.
        aligner_layers, aligner_activation: the linear layers between the encoder and the language model, and what
            stands between two of them.
        text_*: of the language model; `text_length`: the most tokens of a text.
        vq_codes, vq_code_width, vq_latent, vq_width, vq_multipliers, vq_blocks: of the tokenizer of generated images,
            as `VQSizes` names them.
        vq_directions: whether images become the tokens of the codes nearest in direction; False: in distance, as in
            transformers.
        image_aligner_layers, image_activation: of the layers between the embeddings of image tokens and the language
            model; the activation also stands in the head that predicts image tokens.
        image_token_id: the token that marks a visual token in a prompt.
        image_start_token_id: the token behind which an image is generated.
        bos_token_id: the first token of a prompt. With `image_start_token_id` it is what stays of a prompt without a
            condition.
        eos_token_ids: the tokens that end a generated text.
        reduce: what leaves fewer visual tokens behind the aligner, as `TokenReducer.parse` reads it, such as "pool:2"
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
    vq_codes: int
    vq_code_width: int
    vq_latent: int
    vq_width: int
    vq_multipliers: tuple[int, ...]
    vq_blocks: int
    text_length: int = 16384
    channels: int = 3
    vision_activation: str = "gelu"
    vision_eps: float = 1e-6
    vision_dropout: float = 0.0
    aligner_layers: int = 2
    aligner_activation: str = "gelu"
    text_activation: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e4
    dropout: float = 0.0
    tie_embeddings: bool = False
    vq_directions: bool = False
    image_aligner_layers: int = 2
    image_activation: str = "gelu"
    image_start_token_id: int | None = None
    bos_token_id: int | None = None
    pad_token_id: int = 0
    eos_token_ids: tuple[int, ...] = ()
    reduce: str | None = None

    def __post_init__(self) -> None:
        check_config(self)
        if self.image_token_id is None:
            raise ValueError(f"image_token_id must be an integer below vocab_size = {self.vocab_size}, got None")
        token = self.image_start_token_id
        if token is not None and (type(token) is not int or not 0 <= token < self.vocab_size):
            must = f"an integer below vocab_size = {self.vocab_size}"
            raise ValueError(f"image_start_token_id must be {must}, got {token!r}")
        if not isinstance(self.vq_directions, bool):
            raise ValueError(f"vq_directions must be a bool, got {self.vq_directions!r}")
        if self.text_head_dim % 2:
            raise ValueError(f"text_head_dim must be even, got {self.text_head_dim}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size must be a multiple of patch_size = {self.patch_size}, got {self.image_size}")
        for name, most in _LARGEST.items():
            size = getattr(self, name)
            if type(size) is not int or not 1 <= size <= most:
                raise ValueError(f"{name} must be an integer from 1 to {most}, got {size!r}")
        for name in ("aligner_activation", "image_activation"):
            activation = getattr(self, name)
            if not isinstance(activation, str) or activation not in ACTIVATIONS:
                raise ValueError(f"{name} must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        self._check_vq()

    def _check_vq(self) -> None:
        """Raises unless the tokenizer's resolutions are possible."""
        given = self.vq_multipliers
        number = lambda m: type(m) is int and 1 <= m <= _LARGEST_MULTIPLIER
        if not isinstance(given, tuple) or not 1 <= len(given) <= _MOST_LEVELS or not all(map(number, given)):
            must = f"1 to {_MOST_LEVELS} integers from 1 to {_LARGEST_MULTIPLIER}"
            raise ValueError(f"vq_multipliers must be {must}, got {given!r}")
        if self.vq_width % GROUPS:
            raise ValueError(f"vq_width must be a multiple of {GROUPS}, the groups of its norms, got {self.vq_width}")
        if self.vq_sizes.image_side > _LARGEST_SIDE:
            must = f"so few that a generated image has a side of at most {_LARGEST_SIDE} pixels"
            raise ValueError(f"vq_multipliers must be {must}, got {given!r}: {self.vq_sizes.image_side}")

    @property
    def image_tokens(self) -> int:
        """The tokens of an image, of one that is read and of one that is generated."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def vq_sizes(self) -> VQSizes:
        """The sizes of the tokenizer of generated images."""
        return VQSizes(
            codes=self.vq_codes,
            code_width=self.vq_code_width,
            latent=self.vq_latent,
            width=self.vq_width,
            multipliers=self.vq_multipliers,
            blocks=self.vq_blocks,
            side=self.image_size // self.patch_size,
            channels=self.channels,
            directions=self.vq_directions,
        )

    @classmethod
    def from_hf(cls, config: dict[str, Any], where: str = "config") -> JanusConfig:
        """Returns the configuration that a Hugging Face ``config.json`` of a Janus, as a dict, describes.

        Args:
            config: the dict.
            where: how errors name it.
        """
        theirs = read_config(config, weights.ARCHITECTURES, where)
        weights.check_fixed(theirs, where)
        text, vision, vq = theirs.text_config, theirs.vision_config, theirs.vq_config
        mlp = vision.hidden_size * vision.mlp_ratio
        multipliers = vq.channel_multiplier
        return read_fields(
            cls,
            theirs,
            weights.FIELDS,
            where,
            vision_mlp=int(mlp) if mlp < 2**31 else mlp,  # transformers rounds down
            text_head_dim=getattr(text, "head_dim", None) or text.hidden_size // max(1, text.num_attention_heads),
            vq_multipliers=tuple(multipliers) if isinstance(multipliers, list) else multipliers,
            bos_token_id=getattr(text, "bos_token_id", None),
            **text_values(text),
        )


def with_image_tokens(config: JanusConfig, path: Path) -> JanusConfig:
    """Returns a configuration with the tokens of a ``generation_config.json``, if there is one.

    Args:
        config: what ``config.json`` says.
        path: of the file, which may be missing.

    Raises:
        CheckpointError: the file is no JSON object, or a token is wrong.
    """
    config = with_generation(config, path)
    if not path.is_file():
        return config
    values = read_json(path)
    more = values.get("generation_kwargs")
    start = more.get("boi_token_id") if isinstance(more, dict) else None
    found = {"bos_token_id": values.get("bos_token_id"), "image_start_token_id": start}
    try:
        return dataclasses.replace(config, **{name: token for name, token in found.items() if token is not None})
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


_PUBLISHED: dict[str, Any] = {
    "vision_width": 1024, "vision_layers": 24, "vision_heads": 16, "vision_mlp": 4096, "image_size": 384,
    "patch_size": 16, "vocab_size": 102400, "image_token_id": 100581, "image_start_token_id": 100016,
    "bos_token_id": 100000, "eos_token_ids": (100001,), "pad_token_id": 100002, "vq_codes": 16384, "vq_code_width": 8,
    "vq_latent": 256, "vq_width": 128, "vq_multipliers": (1, 1, 2, 2, 4), "vq_blocks": 2,
}  # fmt: skip
SIZES = {
    # For tests.
    "tiny": JanusConfig(
        vision_width=32, vision_layers=2, vision_heads=2, vision_mlp=64, image_size=32, patch_size=8,
        text_width=64, text_layers=2, text_heads=4, text_kv_heads=2, text_head_dim=16, text_mlp=128,
        vocab_size=128, image_token_id=127, image_start_token_id=126, bos_token_id=1, text_length=16384,
        vq_codes=32, vq_code_width=8, vq_latent=8, vq_width=32, vq_multipliers=(1, 2), vq_blocks=1,
    ),
    # Janus-Pro's published widths (Chen et al., "Janus-Pro", 2025, table 1); Janus (1.3B) has those of the smaller one.
    "janus_pro_1b": JanusConfig(
        **_PUBLISHED, text_width=2048, text_layers=24, text_heads=16, text_kv_heads=16, text_head_dim=128,
        text_mlp=5632,
    ),
    "janus_pro_7b": JanusConfig(
        **_PUBLISHED, text_width=4096, text_layers=30, text_heads=32, text_kv_heads=32, text_head_dim=128,
        text_mlp=11008,
    ),
}  # fmt: skip
"""The sizes that `Janus.from_size` accepts. Layers can be changed: ``from_size("janus_pro_1b", text_layers=2)``."""
