"""DeepSeek-VL: images become tokens of the text that a language model continues; the larger one sees them twice.

Source: Lu et al., "DeepSeek-VL: Towards Real-World Vision-Language Understanding", 2024, section 3.1 and figure 3.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.models import deepseek_vl_weights
from mmkernels.models.blocks.checkpoint import Names
from mmkernels.models.blocks.config import with_generation
from mmkernels.models.blocks.decoder import Decoder, decoder_sizes
from mmkernels.models.blocks.patch_tokens import PatchTokenModel
from mmkernels.models.blocks.sam_encoder import SamEncoder, make_neck
from mmkernels.models.blocks.vision_language import Encode
from mmkernels.models.blocks.visual import Media, Visual
from mmkernels.models.deepseek_vl_config import SIZES, DeepSeekVLConfig


class DeepSeekVL(PatchTokenModel):
    """Predicts the next token from images and text.

    Inputs are those of transformers' processor: ``model(**processor(text=..., images=..., return_tensors="pt"))``. The
    stages can be called one by one: `encode`, then `forward` with ``images=``, any number of times.

    `from_pretrained` reads the folder of a Hugging Face ``DeepseekVLForConditionalGeneration`` (1.3B, one encoder) or
    ``DeepseekVLHybridForConditionalGeneration`` (7B, with SAM as a second encoder).

    Args:
        config: the sizes. Models are usually made by `from_size` or `from_pretrained`.

    Example:
        >>> import torch
        >>> from mmkernels.models import DeepSeekVL
        >>> model = DeepSeekVL.from_size("tiny_hybrid").eval()
        >>> marker, small, large = model.config.image_token_id, torch.rand(1, 3, 32, 32), torch.rand(1, 3, 64, 64)
        >>> prompt = torch.tensor([[5, *[marker] * 16, 7]])  # an image of 4 x 4 patches, at both resolutions
        >>> first = model.generate(prompt, small, high_res_pixel_values=large, max_new_tokens=3)
        >>> more = torch.tensor([[8, 9]])  # a second question: nothing is encoded again
        >>> model.generate(more, kv_cache=first.kv_cache, max_new_tokens=2).tokens.shape
        torch.Size([1, 2])
    """

    sizes = SIZES
    config: DeepSeekVLConfig

    def __init__(self, config: DeepSeekVLConfig) -> None:
        super().__init__(config)
        c = config
        self._make_vision(c)
        if c.sam_layers:
            self.sam = SamEncoder(c.sam_sizes)
            self.global_neck = make_neck(c.sam_width, c.sam_channels)
            self.sam_down = nn.Sequential(
                nn.Conv2d(c.sam_channels, 2 * c.sam_channels, 3, stride=2, padding=1, bias=False),
                nn.Conv2d(2 * c.sam_channels, 4 * c.sam_channels, 3, stride=2, padding=1, bias=False),
            )
            self.global_scale = nn.Parameter(torch.ones(1))
            self.aligner: nn.Module = HybridAligner(c.vision_width, 4 * c.sam_channels, c.text_width)
        else:
            first, last = nn.Linear(c.vision_width, c.text_width), nn.Linear(c.text_width, c.text_width)
            self.aligner = nn.Sequential(first, nn.GELU(), last)
        sizes = decoder_sizes(
            c, vocab=c.vocab_size, eps=c.rms_norm_eps, rope_theta=c.rope_theta, bias=False, dropout=c.dropout
        )
        self._make_decoder(Decoder(sizes), c.tie_embeddings)
        self.set_reducer(c.reduce)

    def _set_constants(self) -> None:
        """Opens the gate of the features behind the first global layer."""
        if self.config.sam_layers:
            nn.init.ones_(self.global_scale)

    @classmethod
    def _read_config(cls, values: dict[str, Any], path: Path) -> DeepSeekVLConfig:
        config = DeepSeekVLConfig.from_hf(values, str(path))
        return with_generation(config, path.with_name("generation_config.json"))

    @classmethod
    def _names(cls, config: DeepSeekVLConfig) -> Names:
        return deepseek_vl_weights.names(hybrid=config.sam_layers > 0)

    # The stages.

    def encode(self, pixel_values: Tensor, high_res_pixel_values: Tensor | None = None) -> Visual:
        """Returns images as tokens: what `forward` takes as `images`.

        Args:
            pixel_values: images ``[N, channels, image_size, image_size]``, floating.
            high_res_pixel_values: the same images for SAM, ``[N, channels, sam_image_size, sam_image_size]``; None for
                a model without it.
        """
        self._check_pixels(pixel_values, high_res_pixel_values)
        return self._encode(pixel_values, high_res_pixel_values)

    def _encode(self, pixel_values: Tensor, large: Tensor | None) -> Visual:
        if not pixel_values.shape[0]:
            return self._nothing()
        features, heads = self._features(pixel_values)
        tokens = self.aligner(features) if large is None else self.aligner(features, self._large_features(large))
        return self._visual(tokens, heads)

    def _large_features(self, pixel_values: Tensor) -> Tensor:
        """Returns SAM's features of images on the grid of the other encoder, ``[N, patches, 4 * sam_channels]``."""
        last, between = self.sam(pixel_values, self.config.sam_tapped)
        side = self.vision.grid[1]
        down = lambda x: self.sam_down(
            F.interpolate(x, size=(4 * side, 4 * side), mode="bilinear", align_corners=False)
        )
        features = down(last) + self.global_scale * down(self.global_neck(between.permute(0, 3, 1, 2)))
        return features.flatten(2).transpose(1, 2)

    # Inputs of `forward`.

    def _media(  # type: ignore[override]
        self,
        input_ids: Tensor,
        *,
        pixel_values: Tensor | None = None,
        high_res_pixel_values: Tensor | None = None,
        images: Visual | None = None,
    ) -> tuple[list[Media], Encode]:
        """Checks the visual inputs of `forward`.

        Args:
            pixel_values, high_res_pixel_values: new images, as in `encode`; or
            images: what `encode` returned for them.
        """
        if pixel_values is not None:
            self._check_pixels(pixel_values, high_res_pixel_values)
        elif high_res_pixel_values is not None:
            raise ValueError("high_res_pixel_values must be None without pixel_values, got them")
        return self._new_or_encoded(pixel_values, images, lambda pixels: self._encode(pixels, high_res_pixel_values))

    def _check_pixels(self, pixel_values: Tensor, large: Tensor | None) -> None:
        self.vision.check(pixel_values)
        name = "high_res_pixel_values"
        if not self.config.sam_layers:
            if large is not None:
                raise ValueError(f"{name} must be None for a model without SAM, got them")
            return
        if large is None:
            raise ValueError(f"{name} must be the same images for SAM, got None")
        self.sam.check(name, large)
        if large.shape[0] != pixel_values.shape[0]:
            must = f"as many images as pixel_values, {int(pixel_values.shape[0])}"
            raise ValueError(f"{name} must have {must}, got {int(large.shape[0])}")


class HybridAligner(nn.Module):
    """Maps the features of two encoders to tokens of a text, half of the hidden channels of each.

    Args:
        vision_width, sam_width: of the features.
        out: of the tokens.

    Source: Lu et al., "DeepSeek-VL", 2024, section 3.1, "Vision-Language Adaptor".

    Example:
        >>> import torch
        >>> HybridAligner(32, 16, 64)(torch.randn(2, 9, 32), torch.randn(2, 9, 16)).shape
        torch.Size([2, 9, 64])
    """

    def __init__(self, vision_width: int, sam_width: int, out: int) -> None:
        super().__init__()
        self.vision_proj = nn.Linear(vision_width, out // 2)
        self.sam_proj = nn.Linear(sam_width, out // 2)
        self.activation = nn.GELU()
        self.proj = nn.Linear(out, out)

    def forward(self, vision: Tensor, sam: Tensor) -> Tensor:
        """Returns ``[..., out]`` of features ``[..., vision_width]`` and ``[..., sam_width]``."""
        hidden = torch.cat([self.sam_proj(sam), self.vision_proj(vision)], dim=-1)
        tokens: Tensor = self.proj(self.activation(hidden))
        return tokens
