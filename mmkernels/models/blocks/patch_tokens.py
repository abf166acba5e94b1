"""`PatchTokenModel`: what models share in which each patch of an image of one size is a token (DeepSeek-VL, Janus)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from mmkernels.models.blocks.encoder import Heads, Sizes
from mmkernels.models.blocks.reduction import class_attention
from mmkernels.models.blocks.vision import VisionTransformer
from mmkernels.models.blocks.vision_language import Encode, VisionLanguageModel
from mmkernels.models.blocks.visual import Media, Visual


class PatchTokenModel(VisionLanguageModel):
    """Base class: has an image encoder without a class token, whose features a subclass makes tokens of.

    The configuration has `image_tokens` and `image_token_id` beside what `VisionLanguageModel` needs.

    Attributes:
        vision, vision_norm: the encoder and the norm behind it.
    """

    vision: VisionTransformer
    vision_norm: nn.LayerNorm

    def _make_vision(self, config: Any) -> None:
        self.vision = VisionTransformer.of(config, Sizes.of(config, "vision"), class_token=False)
        self.vision_norm = nn.LayerNorm(config.vision_width, eps=config.vision_eps)

    def _features(self, pixel_values: Tensor) -> tuple[Tensor, Heads | None]:
        """Returns features ``[N, patches, vision_width]``, and the heads that `_visual` needs of them."""
        heads = None
        if self.reducer is not None and self.reducer.needs_scores:
            features, heads = self.vision.with_heads(pixel_values)
        else:
            features = self.vision(pixel_values)
        return self.vision_norm(features), heads

    def _visual(self, tokens: Tensor, heads: Heads | None) -> Visual:
        """Returns images of tokens ``[N, patches, text_width]``, fewer with a reducer.

        Its scores are the attention that a patch receives in the encoder's last layer.
        """
        lengths = (self.config.image_tokens,) * int(tokens.shape[0])
        visual = Visual(tokens.flatten(0, 1), lengths, lengths)
        if self.reducer is None:
            return visual
        scores = None if heads is None else class_attention(heads, class_token=False).flatten()
        return self.reducer.reduce(visual, [self.vision.grid] * len(lengths), scores)

    def _new_or_encoded(
        self, pixel_values: Tensor | None, images: Visual | None, encode: Callable[[Tensor], Visual]
    ) -> tuple[list[Media], Encode]:
        """Returns what `_media` does of new images, or of what `encode` returned for them.

        Args:
            pixel_values: the new images, which have been checked; None: there are none.
            images: what `encode` returned.
            encode: encodes the new images.
        """
        if pixel_values is not None:
            if images is not None:
                raise ValueError("pixel_values must be None with images, got both")
            marked = (self.config.image_tokens,) * int(pixel_values.shape[0])
            return [self._marked(marked)], lambda: [encode(pixel_values)]
        visual = self._nothing() if images is None else images
        self._check_encoded("images", visual)
        return [self._marked(visual.marked)], lambda: [visual]

    def _marked(self, marked: tuple[int, ...]) -> Media:
        return Media("image", self.config.image_token_id, marked)
