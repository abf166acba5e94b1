"""CLIP and SigLIP: an image tower and a text tower that are trained with a contrastive loss.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021, figure 3; Zhai et
al., "Sigmoid Loss for Language Image Pre-Training", 2023, algorithm 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.models import clip_weights
from mmkernels.models.blocks.activations import ACTIVATIONS
from mmkernels.models.blocks.checkpoint import Names
from mmkernels.models.blocks.encoder import Sizes, TextEncoder
from mmkernels.models.blocks.model import Model
from mmkernels.models.blocks.vision import VisionTransformer
from mmkernels.models.clip_config import CLIPConfig
from mmkernels.nn import AttentionPool
from mmkernels.ops.contrastive.info_nce import info_nce
from mmkernels.ops.contrastive.sigmoid_contrastive import sigmoid_contrastive
from mmkernels.runtime.checks import can_look

_SIGLIP: dict[str, Any] = {"variant": "siglip", "vision_eps": 1e-6, "text_eps": 1e-6}
_SIGLIP |= {"vision_activation": "gelu_pytorch_tanh", "text_activation": "gelu_pytorch_tanh"}
SIZES = {
    # For tests.
    "tiny": CLIPConfig(
        vision_width=32, vision_layers=2, vision_heads=4, vision_mlp=64, image_size=32, patch_size=8,
        text_width=48, text_layers=2, text_heads=4, text_mlp=96, text_length=16, vocab_size=128,
        embed_dim=24,
    ),
    # ViT-S/16 (Touvron et al., "Training data-efficient image transformers", 2021, table 1), text tower of equal width.
    "small": CLIPConfig(
        vision_width=384, vision_layers=12, vision_heads=6, vision_mlp=1536, image_size=224, patch_size=16,
        text_width=384, text_layers=12, text_heads=6, text_mlp=1536, text_length=77, vocab_size=49408,
        embed_dim=384,
    ),
    # CLIP ViT-B/16 (Radford et al., 2021, appendix F).
    "base": CLIPConfig(
        vision_width=768, vision_layers=12, vision_heads=12, vision_mlp=3072, image_size=224, patch_size=16,
        text_width=512, text_layers=12, text_heads=8, text_mlp=2048, text_length=77, vocab_size=49408,
        embed_dim=512,
    ),
    "siglip_tiny": CLIPConfig(
        vision_width=32, vision_layers=2, vision_heads=4, vision_mlp=64, image_size=32, patch_size=8,
        text_width=48, text_layers=2, text_heads=4, text_mlp=96, text_length=16, vocab_size=128,
        embed_dim=32, **_SIGLIP,
    ),
    # SigLIP B/16 (Zhai et al., 2023, section 4: both towers of ViT-B's size, texts of 64 tokens).
    "siglip_base": CLIPConfig(
        vision_width=768, vision_layers=12, vision_heads=12, vision_mlp=3072, image_size=224, patch_size=16,
        text_width=768, text_layers=12, text_heads=12, text_mlp=3072, text_length=64, vocab_size=32000,
        embed_dim=768, **_SIGLIP,
    ),
}  # fmt: skip
"""The sizes that `CLIP.from_size` accepts."""

# Initial multiplier and bias of the logits: Radford et al., section 2.5; Zhai et al., section 3.2.
_START = {"clip": (1 / 0.07, 0.0), "siglip": (10.0, -10.0)}


@dataclass
class CLIPOutput:
    """The result of `CLIP.forward`.

    Attributes:
        image_features: ``[N, embed_dim]``, of length 1.
        text_features: ``[M, embed_dim]``, of length 1.
        logit_scale: the multiplier of the logits, a scalar.
        logit_bias: is added to the logits, a scalar; None in a "clip".
        loss: a scalar, fp64 for fp64 features, fp32 for all others; None if it was not requested.
    """

    image_features: Tensor
    text_features: Tensor
    logit_scale: Tensor
    logit_bias: Tensor | None
    loss: Tensor | None

    @property
    def logits_per_image(self) -> Tensor:
        """The logit of each image with each text, ``[N, M]``. It is computed here: the loss does not need it."""
        logits = self.logit_scale * (self.image_features @ self.text_features.T)
        return logits if self.logit_bias is None else logits + self.logit_bias

    @property
    def logits_per_text(self) -> Tensor:
        """The transpose of `logits_per_image`, ``[M, N]``."""
        return self.logits_per_image.T


class CLIP(Model):
    """Maps images and texts to features of one space, in which they can be compared.

    `from_pretrained` reads the folder of a Hugging Face ``CLIPModel`` or ``SiglipModel``. A SigLIP 2 of fixed
    resolution is saved as a ``SiglipModel``. Its inputs are made by transformers' processor,
    ``AutoProcessor.from_pretrained(folder)``.

    Args:
        config: the sizes. Models are usually made by `from_size` or `from_pretrained`.

    Example:
        >>> import torch
        >>> from mmkernels.models import CLIP
        >>> model = CLIP.from_size("tiny")
        >>> images, texts = torch.rand(3, 3, 32, 32), torch.randint(1, 128, (3, 16))
        >>> model.encode_image(images).shape
        torch.Size([3, 24])
        >>> out = model(texts, images, return_loss=True)
        >>> out.loss.backward()
        >>> out.logits_per_image.shape
        torch.Size([3, 3])
    """

    sizes = SIZES
    config: CLIPConfig

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__(config)
        c, clip = config, config.variant == "clip"
        vision, text = Sizes.of(c, "vision"), Sizes.of(c, "text")
        self.vision = VisionTransformer.of(c, vision, class_token=clip)
        self.vision_norm = nn.LayerNorm(c.vision_width, eps=c.vision_eps)
        self.image_pool = None if clip else _attention_pool(vision)
        self.image_projection = nn.Linear(c.vision_width, c.embed_dim, bias=False) if clip else None
        self.text = TextEncoder(text, vocab_size=c.vocab_size, length=c.text_length, causal=clip)
        self.text_projection = nn.Linear(c.text_width, c.embed_dim, bias=not clip)
        self.logit_scale = nn.Parameter(torch.empty(()))  # the logarithm of the multiplier
        self.logit_bias = None if clip else nn.Parameter(torch.empty(()))
        self._set_constants()

    def _set_constants(self) -> None:
        """Sets the multiplier and the bias of the logits to where training starts."""
        scale, bias = _START[self.config.variant]
        nn.init.constant_(self.logit_scale, math.log(scale))
        if self.logit_bias is not None:
            nn.init.constant_(self.logit_bias, bias)

    @classmethod
    def _read_config(cls, values: dict[str, Any], path: Path) -> CLIPConfig:
        return CLIPConfig.from_transformers(values, str(path))

    @classmethod
    def _names(cls, config: CLIPConfig) -> Names:
        return clip_weights.NAMES[config.variant]

    # The towers.

    def encode_image(self, pixel_values: Tensor, normalize: bool = True) -> Tensor:
        """Returns the features ``[B, embed_dim]`` of images.

        Args:
            pixel_values: floating ``[B, channels, S, S]``, where S is `config.image_size`.
            normalize: whether to scale each feature to length 1.

        Raises:
            TypeError: `pixel_values` is not a floating tensor.
            ValueError: it has another shape. Images are not resized here.
        """
        x = self.vision(pixel_values)  # [B, patches, vision_width]; in a "clip" the class token comes first
        if self.image_pool is not None:
            features = self.image_pool(self.vision_norm(x))[:, 0]
        else:
            assert self.image_projection is not None
            features = self.image_projection(self.vision_norm(x[:, 0]))
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None, normalize: bool = True) -> Tensor:
        """Returns the features ``[B, embed_dim]`` of texts.

        Args:
            input_ids: integers ``[B, L]``, L at most ``config.text_length``. A "siglip" was trained on texts that are
                padded to this length, and its feature is that of the last token, which may be padding.
            attention_mask: integers or bool ``[B, L]``, 0: padding, which no token sees. None: no padding. (A "siglip"
                was trained without a mask.)
            normalize: whether to scale each feature to length 1.

        Raises:
            TypeError: `input_ids` or `attention_mask` is not a tensor of integers.
            ValueError: a shape does not fit, a token is outside the vocabulary, or a row has no end-of-text token
                although `config.eos_token_id` is not None. (Values are checked on the CPU only: elsewhere this would
                sync with the device. There, the feature of such a row is that of its first token.)
        """
        x = self.text(input_ids, attention_mask)  # [B, L, text_width]
        features = self.text_projection(self._pool_text(x, input_ids))
        return F.normalize(features, dim=-1) if normalize else features

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        *,
        attention_mask: Tensor | None = None,
        return_loss: bool = False,
        image_ids: Tensor | None = None,
        text_ids: Tensor | None = None,
    ) -> CLIPOutput:
        """Returns the features of images and texts, and the loss if it is requested.

        Args:
            input_ids, attention_mask, pixel_values: as in `encode_text` and `encode_image`.
            return_loss: whether to compute the loss: `info_nce`, in a "siglip" `sigmoid_contrastive`. Text i belongs to
                image i.
            image_ids, text_ids: which images and texts belong together, as in these ops; with ids, the numbers of
                images and texts may differ. Only for the loss.
        """
        if not return_loss and (image_ids is not None or text_ids is not None):
            raise ValueError("image_ids and text_ids are for the loss: return_loss must be True, got False")
        image, text = self.encode_image(pixel_values), self.encode_text(input_ids, attention_mask)
        # At least float32: bfloat16 would round the multiplier by up to 0.4 %.
        scale = self.logit_scale.to(torch.promote_types(self.logit_scale.dtype, torch.float32)).exp()
        bias, loss = self.logit_bias, None
        if return_loss and bias is None:
            loss = info_nce(image, text, scale, image_ids=image_ids, text_ids=text_ids)
        elif return_loss and bias is not None:
            loss = sigmoid_contrastive(image, text, scale, bias, image_ids=image_ids, text_ids=text_ids)
        return CLIPOutput(image, text, scale, bias, loss)

    def _pool_text(self, x: Tensor, input_ids: Tensor) -> Tensor:
        """Returns the feature ``[B, C]`` of each text, from the features of its tokens ``[B, L, C]``."""
        eos = self.config.eos_token_id
        if self.config.variant == "siglip":
            return x[:, -1]
        if eos is None:
            end = input_ids.argmax(-1)
        else:
            is_end = input_ids == eos
            if is_end.device.type == "cpu" and can_look(is_end):
                without = (~is_end.any(-1)).nonzero()
                if len(without):
                    row = int(without[0])
                    raise ValueError(f"input_ids must hold eos_token_id = {eos} in every row, got none in row {row}")
            end = is_end.to(torch.uint8).argmax(-1)  # the first one: padding may be the same token
        return x[torch.arange(x.shape[0], device=x.device), end]


def _attention_pool(vision: Sizes) -> AttentionPool:
    """Returns what pools SigLIP's image features: it has one layer and no dropout, whatever the sizes say."""
    activation = ACTIVATIONS[vision.activation]
    return AttentionPool(vision.width, num_heads=vision.heads, mlp=vision.mlp, activation=activation, eps=vision.eps)
