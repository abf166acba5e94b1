"""InternVL: images, cut into square tiles, become tokens of the text that a language model continues.

Source: Chen et al., "How Far Are We to GPT-4V?" (InternVL 1.5), 2024, figure 3; Chen et al., "Expanding Performance
Boundaries of Open-Source Multimodal Models" (InternVL 2.5), 2024; Zhu et al., "InternVL3", 2025.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mmkernels.models import internvl_weights
from mmkernels.models.blocks.activations import ACTIVATIONS
from mmkernels.models.blocks.checkpoint import Names
from mmkernels.models.blocks.config import with_generation
from mmkernels.models.blocks.decoder import Decoder, decoder_sizes
from mmkernels.models.blocks.encoder import Heads
from mmkernels.models.blocks.reduction import class_attention
from mmkernels.models.blocks.tile_encoder import TileBlock, TileEncoder, TileSizes
from mmkernels.models.blocks.vision_language import Encode, VisionLanguageModel
from mmkernels.models.blocks.visual import Media, Visual
from mmkernels.models.blocks.visual_reduction import VisualReducer
from mmkernels.models.internvl_config import SIZES, InternVLConfig
from mmkernels.nn import PixelShuffleProjector
from mmkernels.nn.checks import described
from mmkernels.ops.tokens.pool_tokens import pool_tokens

MOST_PATCHES = 2**24
"""Of one call: more are refused before memory is taken."""
FIRST_SCALE = 0.1
"""Of the encoder's branches, where training starts: InternVL's ``layer_scale_init_value``."""


class InternVL(VisionLanguageModel):
    """Predicts the next token from images and text.

    Inputs are those of transformers' processor: ``model(**processor(text=..., images=..., return_tensors="pt"))``. It
    cuts an image into tiles, and marks each frame of a video as an image of one tile. The stages can be called one by
    one: `encode`, then `forward` with ``images=``, any number of times.

    `from_pretrained` reads the folder of a Hugging Face ``InternVLForConditionalGeneration`` (InternVL 2.5, 3 and 3.5
    with the language models Qwen2, Qwen3 and Llama).

    Args:
        config: the sizes. Models are usually made by `from_size` or `from_pretrained`.

    Example:
        >>> import torch
        >>> from mmkernels.models import InternVL
        >>> model = InternVL.from_size("tiny").eval()
        >>> marker, tiles = model.config.image_token_id, torch.rand(2, 3, 32, 32)  # an image of two tiles
        >>> prompt = torch.tensor([[5, *[marker] * 2 * 16, 7]])  # a tile has 8 x 8 patches, of which 2 x 2 are a token
        >>> first = model.generate(prompt, tiles, max_new_tokens=3)
        >>> more = torch.tensor([[8, 9]])  # a second question: nothing is encoded again
        >>> model.generate(more, kv_cache=first.kv_cache, max_new_tokens=2).tokens.shape
        torch.Size([1, 2])
    """

    sizes = SIZES
    config: InternVLConfig

    def __init__(self, config: InternVLConfig) -> None:
        super().__init__(config)
        c = config
        self.vision = TileEncoder(TileSizes.of(c, layers=c.feature_layers, last_norm=c.feature_norm))
        activation = ACTIVATIONS[c.projector_activation]
        self.projector = PixelShuffleProjector(c.vision_width, c.text_width, c.merge, activation=activation)
        sizes = decoder_sizes(
            c,
            vocab=c.vocab_size,
            eps=c.rms_norm_eps,
            rope_theta=c.rope_theta,
            bias=c.text_model == "qwen2",
            qk_norm=c.text_model == "qwen3",
            dropout=c.dropout,
        )
        self._make_decoder(Decoder(sizes), c.tie_embeddings)
        self.set_reducer(c.reduce)

    def _set_constants(self) -> None:
        """Sets the scales of the encoder's branches to where training starts."""
        for block in self.vision.blocks:
            assert isinstance(block, TileBlock)
            nn.init.constant_(block.attention_scale, FIRST_SCALE)
            nn.init.constant_(block.mlp_scale, FIRST_SCALE)

    @classmethod
    def _read_config(cls, values: dict[str, Any], path: Path) -> InternVLConfig:
        config = InternVLConfig.from_hf(values, str(path))
        return with_generation(config, path.with_name("generation_config.json"))

    @classmethod
    def _names(cls, config: InternVLConfig) -> Names:
        unused_layers = range(config.feature_layers, config.vision_layers)
        unused_norm = config.vision_last_norm and not config.feature_norm
        return internvl_weights.names(config.vision_qk_norm, unused_layers, unused_norm)

    # The stages.

    def encode(self, pixel_values: Tensor, tiles: Sequence[int] | None = None) -> Visual:
        """Returns images as tokens: what `forward` takes as `images`.

        Args:
            pixel_values: tiles ``[T, channels, S, S]``, floating, image after image. S may be any multiple of
                ``merge * patch_size``; a tile of another size than `config.image_size` has another number of tokens,
                ``(S / patch_size / merge)^2``.
            tiles: how many tiles each image has, which add up to T; None: each tile counts as an image, of which a
                `ContextPolicy` may forget one and keep another.
        """
        self._check_pixels(pixel_values, tiles)
        return self._encode(pixel_values, tiles)

    def _encode(self, pixel_values: Tensor, tiles: Sequence[int] | None) -> Visual:
        # Numbers in a traced graph too, where shapes are tensors.
        count, side = int(pixel_values.shape[0]), int(pixel_values.shape[-1]) // self.config.patch_size
        if not count:
            return self._nothing()
        features, heads = self.vision(pixel_values)
        merged, _ = self.projector(features[:, 1:], (1, side, side))  # [T, tokens, text_width]; no class token
        each = (side // self.config.merge) ** 2
        visual = Visual(merged.flatten(0, 1), (each,) * count, (each,) * count)
        if self.reducer is not None:
            visual = self._reduced(self.reducer, visual, heads, side)
        return visual if tiles is None else _joined(visual, tiles)

    def _reduced(self, reducer: VisualReducer, visual: Visual, heads: Heads, side: int) -> Visual:
        """Returns what a reducer leaves of each tile.

        Scores are the class token's attention in the last layer, the mean of a token's patches.
        """
        m = self.config.merge
        of_patches = lambda x: pool_tokens(x, (1, side, side), (1, m, m))[0].flatten(0, 1)
        scores = of_patches(class_attention(heads)[:, 1:, None])[:, 0] if reducer.needs_scores else None
        sizes = [(1, side // m, side // m)] * len(visual.lengths)
        return reducer.reduce(visual, sizes, scores)

    # Inputs of `forward`.

    def _media(  # type: ignore[override]
        self,
        input_ids: Tensor,
        *,
        pixel_values: Tensor | None = None,
        tiles: Sequence[int] | None = None,
        images: Visual | None = None,
    ) -> tuple[list[Media], Encode]:
        """Checks the visual inputs of `forward`.

        Args:
            pixel_values, tiles: new images, as in `encode`; or
            images: what `encode` returned for them.
        """
        if pixel_values is None:
            if tiles is not None:
                raise ValueError(f"tiles must be None without pixel_values, got {tiles}")
            visual = self._nothing() if images is None else images
            self._check_encoded("images", visual)
            return [self._marked(visual.marked)], lambda: [visual]
        if images is not None:
            raise ValueError("pixel_values must be None with images, got both")
        each = self._check_pixels(pixel_values, tiles)
        marked = tuple(each * count for count in ([1] * int(pixel_values.shape[0]) if tiles is None else tiles))
        return [self._marked(marked)], lambda: [self._encode(pixel_values, tiles)]

    def _marked(self, marked: tuple[int, ...]) -> Media:
        return Media("image", self.config.image_token_id, marked)

    def _check_pixels(self, pixel_values: Tensor, tiles: Sequence[int] | None) -> int:
        """Returns the number of tokens of a tile."""
        c = self.config
        if not isinstance(pixel_values, Tensor) or not pixel_values.is_floating_point():
            raise TypeError(f"pixel_values must be a floating tensor, got {described(pixel_values)}")
        shape, step = tuple(map(int, pixel_values.shape)), c.merge * c.patch_size
        if len(shape) != 4 or shape[1] != c.channels or shape[2] != shape[3] or not shape[2] or shape[2] % step:
            must = f"square tiles [T, {c.channels}, S, S], S a multiple of {step}"
            raise ValueError(f"pixel_values must be {must}, got shape {shape}")
        side = shape[2] // c.patch_size
        patches = shape[0] * side * side
        if patches > MOST_PATCHES:
            raise ValueError(f"pixel_values must have at most {MOST_PATCHES} patches in all, got {patches}")
        if tiles is not None and not _add_up(tiles, shape[0]):
            must = f"positive integers that add up to the {shape[0]} tiles of pixel_values"
            raise ValueError(f"tiles must be {must}, got {tiles!r}")
        return (side // c.merge) ** 2


def _add_up(tiles: object, count: int) -> bool:
    """Whether tiles are positive integers that add up to so many."""
    return isinstance(tiles, list | tuple) and all(type(n) is int and n > 0 for n in tiles) and sum(tiles) == count


def _joined(visual: Visual, tiles: Sequence[int]) -> Visual:
    """Returns images of several tiles, of a `Visual` of tiles."""
    ends = list(accumulate(tiles))
    of_images = lambda counts: tuple(sum(counts[end - n : end]) for end, n in zip(ends, tiles, strict=True))
    return visual._replace(lengths=of_images(visual.lengths), marked=of_images(visual.marked))
