"""DeepSeek-VL2: images, cut into tiles, become tokens of the text that a mixture of experts continues.

Source: Wu et al., "DeepSeek-VL2: Mixture-of-Experts Vision-Language Models for Advanced Multimodal Understanding",
2024, section 3 and figures 2 and 3; DeepSeek-AI, "DeepSeek-V2", 2024, for the language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.models import deepseek_vl2_weights
from mmkernels.models.blocks.checkpoint import CheckpointError, Names
from mmkernels.models.blocks.config import with_generation
from mmkernels.models.blocks.decoder import decoder_sizes
from mmkernels.models.blocks.encoder import Sizes
from mmkernels.models.blocks.latent_decoder import LatentDecoder
from mmkernels.models.blocks.vision import VisionTransformer
from mmkernels.models.blocks.vision_language import Encode, VisionLanguageModel
from mmkernels.models.blocks.visual import Media, Visual
from mmkernels.models.deepseek_vl2_config import SIZES, DeepSeekVL2Config
from mmkernels.models.deepseek_vl2_tiles import Layout, Tiles, is_tiles, layout, num_tokens
from mmkernels.models.idefics import image_token_id
from mmkernels.nn import PixelShuffleProjector
from mmkernels.ops.tokens.ranking import on_device
from mmkernels.ops.tokens.scatter_tokens import scatter_tokens

MOST_TILES = 2**12
"""Of one call: more are refused before memory is taken."""


class DeepSeekVL2(VisionLanguageModel):
    """Predicts the next token from images and text.

    `mmkernels.models.cut_images` makes the inputs of images, and `num_image_tokens` tells how many markers a prompt has
    for each. The stages can be called one by one: `encode`, then `forward` with ``images=``, any number of times.

    `from_pretrained` reads the folders of the released DeepSeek-VL2-tiny, DeepSeek-VL2-small and DeepSeek-VL2.

    Args:
        config: the sizes. Models are usually made by `from_size` or `from_pretrained`.

    Example:
        >>> import torch
        >>> from mmkernels.models import DeepSeekVL2
        >>> model = DeepSeekVL2.from_size("tiny").eval()
        >>> tiles = [(2, 1)]  # an image of two tiles side by side, behind one that shows all of it
        >>> markers = [model.config.image_token_id] * model.num_image_tokens(tiles[0])
        >>> prompt = torch.tensor([[5, *markers, 7]])
        >>> first = model.generate(prompt, torch.rand(3, 3, 28, 28), tiles=tiles, max_new_tokens=3)
        >>> more = torch.tensor([[8, 9]])  # a second question: nothing is encoded again
        >>> model.generate(more, kv_cache=first.kv_cache, max_new_tokens=2).tokens.shape
        torch.Size([1, 2])
    """

    sizes = SIZES
    config: DeepSeekVL2Config

    def __init__(self, config: DeepSeekVL2Config) -> None:
        super().__init__(config)
        c = config
        self.vision = VisionTransformer.of(c, Sizes.of(c, "vision"), class_token=False)
        self.vision_norm = nn.LayerNorm(c.vision_width, eps=c.vision_eps)
        self.projector = PixelShuffleProjector(
            c.vision_width, c.text_width, c.merge, norm=None, order="channel", pad=True
        )
        if c.projector_mlp not in (None, c.text_width):
            merged = c.vision_width * c.merge**2
            layers = nn.Linear(merged, c.projector_mlp), nn.GELU(), nn.Linear(c.projector_mlp, c.text_width)
            self.projector.mlp = nn.Sequential(*layers)
        self.newline = nn.Parameter(torch.randn(c.text_width) * c.text_width**-0.5)
        self.separator = nn.Parameter(torch.randn(c.text_width) * c.text_width**-0.5)
        sizes = decoder_sizes(
            c, vocab=c.vocab_size, eps=c.rms_norm_eps, rope_theta=c.rope_theta, bias=c.text_bias, dropout=c.dropout
        )
        self._make_decoder(LatentDecoder(sizes, c.expert_sizes, c.latent_sizes), c.tie_embeddings)
        self.set_reducer(None)

    def _set_constants(self) -> None:
        """Starts with a choice of experts by their scores alone."""
        for name, buffer in self.named_buffers():
            if name.endswith("correction_bias"):
                nn.init.zeros_(buffer)

    def set_reducer(self, text: str | None) -> None:
        """Raises a ValueError unless `text` is None: a reducer would leave rows of tiles that no newline ends."""
        if text is not None:
            raise ValueError(f"text must be None for a model with a newline behind each row of tokens, got {text!r}")
        super().set_reducer(None)

    @classmethod
    def _read_config(cls, values: dict[str, Any], path: Path) -> DeepSeekVL2Config:
        vocab = deepseek_vl2_weights.read(values, str(path)).language_config.vocab_size
        token = values.get("image_token_id")
        if token is None and type(vocab) is int:
            token = image_token_id(path.parent, vocab)
            token = _MARKERS.get(vocab) if token is None else token
            if token is None:
                must = "the folder's tokenizer.json must name <image>, or config.json image_token_id"
                raise CheckpointError(f"{path}: {must}, got neither")
        config = DeepSeekVL2Config.from_hf(values, str(path), token)
        return with_generation(config, path.with_name("generation_config.json"))

    @classmethod
    def _names(cls, config: DeepSeekVL2Config) -> Names:
        return deepseek_vl2_weights.names(config.latent)

    # The stages.

    def num_image_tokens(self, tiles: Tiles) -> int:
        """Returns how many tokens an image has, and so how many markers a prompt has for it.

        Args:
            tiles: how many lie side by side, and how many below each other, (columns, rows).

        Raises:
            ValueError: these are no positive integers.
        """
        return num_tokens(tiles, self.config.tile_side)

    def encode(self, pixel_values: Tensor, tiles: Sequence[Tiles] | None = None) -> Visual:
        """Returns images as tokens: what `forward` takes as `images`.

        Args:
            pixel_values: ``[T, channels, image_size, image_size]``, floating: of each image the whole of it, then its
                tiles, row by row.
            tiles: of each image how many lie side by side, and how many below each other: T is the sum of all
                ``1 + columns * rows``. None: each image has one, so that T is twice their number.

        The tokens of an image are those of the whole and of the tiles' rows, each row with a newline behind it, and a
        separator between the two.
        """
        return self._encode(pixel_values, self._check_pixels(pixel_values, tiles))

    def _encode(self, pixel_values: Tensor, tiles: tuple[Tiles, ...]) -> Visual:
        if not tiles:
            return self._nothing()
        features = self.vision_norm(self.vision(pixel_values))  # [T, patches, vision_width]
        tokens, _ = self.projector(features, self.vision.grid)  # [T, tile_side^2, text_width]
        found = layout(tiles, self.config.tile_side, self.config.whole_first)
        return Visual(self._assembled(tokens.flatten(0, 1), found), found.lengths, found.lengths)

    def _assembled(self, tokens: Tensor, found: Layout) -> Tensor:
        """Returns all tokens of images, ``[V, text_width]``, of those of the tiles."""
        separators = self.separator.to(tokens.dtype).expand(len(found.lengths), -1)
        newlines = self.newline.to(tokens.dtype).expand(sum(found.lengths), -1)
        return scatter_tokens(newlines, torch.cat([tokens, separators]), on_device(found.places, tokens.device))

    # Inputs of `forward`.

    def _media(  # type: ignore[override]
        self,
        input_ids: Tensor,
        *,
        pixel_values: Tensor | None = None,
        tiles: Sequence[Tiles] | None = None,
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
        checked = self._check_pixels(pixel_values, tiles)
        marked = tuple(map(self.num_image_tokens, checked))
        return [self._marked(marked)], lambda: [self._encode(pixel_values, checked)]

    def _marked(self, marked: tuple[int, ...]) -> Media:
        return Media("image", self.config.image_token_id, marked)

    def _check_pixels(self, pixel_values: Tensor, tiles: Sequence[Tiles] | None) -> tuple[Tiles, ...]:
        """Returns the tiles of each image."""
        self.vision.check(pixel_values)
        count = int(pixel_values.shape[0])
        if count > MOST_TILES:
            raise ValueError(f"pixel_values must have at most {MOST_TILES} tiles in all, got {count}")
        if tiles is None:
            if count % 2:
                must = "two for each image where tiles is None: the whole, and one tile"
                raise ValueError(f"pixel_values must have {must}, got {count}")
            return ((1, 1),) * (count // 2)
        if not isinstance(tiles, list | tuple) or not all(map(is_tiles, tiles)):
            must = "pairs (columns, rows) of positive integers, one for each image"
            raise ValueError(f"tiles must be {must}, got {repr(tiles)[:200]}")
        if (needed := sum(1 + columns * rows for columns, rows in tiles)) != count:
            must = f"pairs of which 1 + columns * rows add up to the {count} tiles of pixel_values"
            raise ValueError(f"tiles must be {must}, got {repr(tiles)[:200]}, of {needed}")
        return tuple((columns, rows) for columns, rows in tiles)


_MARKERS = {102400: 100003, 129280: 128815}  # size of the vocabulary of the released models -> <image>
