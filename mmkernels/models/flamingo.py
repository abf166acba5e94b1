"""Flamingo: a language model that attends to images through gated cross-attention.

Source: Alayrac et al., "Flamingo: a Visual Language Model for Few-Shot Learning", 2022, figure 3; the open reproduction
IDEFICS (Laurençon et al., "OBELICS", 2023) defines what the paper leaves out, and its checkpoints load here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmkernels.models import idefics
from mmkernels.models.blocks.checkpoint import Names
from mmkernels.models.blocks.encoder import Heads, Sizes
from mmkernels.models.blocks.generation import continue_text, next_token_loss
from mmkernels.models.blocks.kv_cache import KVCache
from mmkernels.models.blocks.media import carry_on, images_seen, join, last_of, visual_mask
from mmkernels.models.blocks.model import Model
from mmkernels.models.blocks.reduction import PatchReducer
from mmkernels.models.blocks.text import SwiGLU, TextBlock, check_ids, check_tokens, rotary_angles
from mmkernels.models.blocks.vision import VisionTransformer
from mmkernels.models.flamingo_config import SIZES, FlamingoConfig
from mmkernels.nn import GatedCrossAttention, PerceiverResampler, VisualCache
from mmkernels.nn.checks import check_positive
from mmkernels.runtime.checks import broadcasts, is_known


class FlamingoCache(KVCache):
    """A `KVCache` that also records which images the text has used, so that a later turn can continue it."""

    def __init__(self, num_layers: int, *, reserve: int = 0) -> None:
        super().__init__(num_layers, reserve=reserve)
        self.num_images = 0  # how many images the text so far has
        self.sees: Tensor | None = None  # what the last token sees: image id, int64 [B], or images, bool [B, images]


@dataclass
class FlamingoOutput:
    """The result of `Flamingo.forward`.

    Attributes:
        logits: ``[B, L, vocab_size]``, or ``[B, 1, vocab_size]`` of the last token of each row; None with labels, where
            they were not asked for.
        loss: the mean cross-entropy of the next token, fp32 (fp64 for fp64 weights); None without labels.
        kv_cache, visual_cache: arguments of the next call.
    """

    logits: Tensor | None
    loss: Tensor | None
    kv_cache: FlamingoCache | None
    visual_cache: VisualCache


@dataclass
class FlamingoGeneration:
    """The result of `Flamingo.generate`.

    Attributes:
        tokens: int64 ``[B, n]``, n at most `max_new_tokens`; padding follows the end-of-text token of a row.
        kv_cache, visual_cache: arguments of the next turn, which gets only its new tokens.
    """

    tokens: Tensor
    kv_cache: FlamingoCache
    visual_cache: VisualCache


class Flamingo(Model):
    """Predicts the next token from images and text.

    The stages can be called one by one: `encode_images` or `encode_with_heads`, `resample`, `cache_images`, `forward`.

    `from_pretrained` reads the folder of a Hugging Face ``IdeficsForVisionText2Text``. The image token is that of
    ``config.json``, or else ``<image>`` of the tokenizer's files.

    Args:
        config: the sizes. Models are usually made by `from_size` or `from_pretrained`.

    Example:
        >>> import torch
        >>> from mmkernels.models import Flamingo
        >>> model = Flamingo.from_size("tiny").eval()
        >>> image, marker = torch.rand(1, 1, 3, 32, 32), model.config.image_token_id
        >>> prompt = torch.tensor([[5, marker, 6, 7]])
        >>> first = model.generate(prompt, image, max_new_tokens=3, eos_token_id=())
        >>> caches = dict(kv_cache=first.kv_cache, visual_cache=first.visual_cache)
        >>> model.generate(torch.tensor([[8, 9]]), max_new_tokens=2, eos_token_id=(), **caches).tokens.shape
        torch.Size([1, 2])
    """

    sizes = SIZES
    config: FlamingoConfig

    def __init__(self, config: FlamingoConfig) -> None:
        super().__init__(config)
        c = config
        self.vision = VisionTransformer.of(c, Sizes.of(c, "vision", eps=c.layer_norm_eps))
        self.resampler: PerceiverResampler | None = None
        if c.num_latents is not None:
            self.resampler = PerceiverResampler(
                c.vision_width,
                depth=c.resampler_depth,
                num_latents=c.num_latents,
                num_heads=c.resampler_heads,
                head_dim=c.resampler_head_dim,
                qk_norm=nn.LayerNorm if c.resampler_qk_norm else None,
            )
        rms_norm = partial(nn.RMSNorm, eps=c.rms_norm_eps)
        self.embed = nn.Embedding(c.vocab_size, c.text_width)
        self.cross_blocks = nn.ModuleList(
            GatedCrossAttention(
                c.text_width,
                c.vision_width,
                c.text_heads,
                qk_norm=rms_norm if c.qk_norm else None,
                norm=rms_norm,
                feed_forward=SwiGLU(c.text_width, c.text_mlp, c.text_activation),
                gate=c.gate,
                dropout=c.dropout,
            )
            for _ in range(c.text_layers // c.cross_every)
        )
        self.text_blocks = nn.ModuleList(
            TextBlock(
                c.text_width,
                heads=c.text_heads,
                mlp=c.text_mlp,
                activation=c.text_activation,
                eps=c.rms_norm_eps,
                dropout=c.dropout,
            )
            for _ in range(c.text_layers)
        )
        self.norm = rms_norm(c.text_width)
        self.head = nn.Linear(c.text_width, c.vocab_size, bias=False)
        if c.tie_embeddings:
            self.head.weight = self.embed.weight
        # Last, so that a seed gives all other weights the same values with any reducer.
        self.reducer = None if c.reduce is None else PatchReducer(c.reduce, self.vision)

    @classmethod
    def _implied(cls, changes: Mapping[str, Any]) -> dict[str, Any]:
        # A reducer stands in the place of the resampler that every size has.
        return {"num_latents": None} if "reduce" in changes and "num_latents" not in changes else {}

    @classmethod
    def _read_config(cls, values: dict[str, Any], path: Path) -> FlamingoConfig:
        config = FlamingoConfig.from_idefics(values, str(path))
        if config.image_token_id is None:
            config = replace(config, image_token_id=idefics.image_token_id(path.parent, config.vocab_size))
        return config

    @classmethod
    def _names(cls, config: FlamingoConfig) -> Names:
        return idefics.NAMES

    # The stages.

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Returns features ``[B, N, patches + 1, vision_width]`` of images ``[B, N, channels, S, S]``."""
        self._check_pixels(pixel_values, pixel_values.shape[0])
        return self.vision(pixel_values.flatten(0, 1)).unflatten(0, pixel_values.shape[:2])

    def encode_with_heads(self, pixel_values: Tensor) -> tuple[Tensor, Heads | None]:
        """Returns what `resample` takes: the features, and query and key of the last layer if the reducer needs them.

        Those are ``[B N, H, patches + 1, D]``.
        """
        if self.reducer is None or not self.reducer.needs_heads:
            return self.encode_images(pixel_values), None
        self._check_pixels(pixel_values, pixel_values.shape[0])
        features, heads = self.vision.with_heads(pixel_values.flatten(0, 1))
        return features.unflatten(0, pixel_values.shape[:2]), heads

    def resample(self, features: Tensor, heads: Heads | None = None) -> Tensor:
        """Returns visual tokens ``[B, N, T, vision_width]`` of features ``[B, N, P, vision_width]``.

        Without a resampler or a reducer, the features are the visual tokens.

        Args:
            features, heads: what `encode_with_heads` returned; only some reducers need `heads`.
        """
        if self.reducer is not None:
            return self.reducer(features.flatten(0, 1), heads).x.unflatten(0, features.shape[:2])
        return features if self.resampler is None else self.resampler(features)

    def cache_images(self, visual: Tensor, cache: VisualCache | None = None) -> VisualCache:
        """Returns a cache with the keys and values of visual tokens for every cross-attention block.

        Args:
            visual: ``[B or 1, N, T, vision_width]``.
            cache: the cache to which they are appended; None: a new one. For a cache with a budget, give
                ``VisualCache(len(model.cross_blocks), max_tokens=...)``.
        """
        if visual.dim() != 4 or visual.shape[-1] != self.config.vision_width:
            raise ValueError(f"visual must be [B, N, T, {self.config.vision_width}], got shape {tuple(visual.shape)}")
        cache = VisualCache(len(self.cross_blocks)) if cache is None else cache
        tokens = visual.flatten(1, 2)  # [B, N T, C]
        blocks = cast(Iterable[GatedCrossAttention], self.cross_blocks)
        cache.append([block.project(tokens) for block in blocks], [visual.shape[2]] * visual.shape[1])
        return cache

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        *,
        media_index: Tensor | None = None,
        image_attention_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        visual_cache: VisualCache | None = None,
        kv_cache: FlamingoCache | None = None,
        labels: Tensor | None = None,
        last_logits_only: bool = False,
        return_logits: bool | None = None,
    ) -> FlamingoOutput:
        """Returns the logits of the next token, for a text or, with caches, for its continuation; or the loss.

        Args:
            input_ids: the new tokens, ``[B, L]``; an `image_token_id` marks an image.
            pixel_values: the new images, floating ``[B or 1, N, channels, S, S]``.
            media_index: the image that each token sees, integers ``[B, L]``: an id in the visual cache (images are
                numbered 0, 1, ... as they were added), -1: none. None: each token sees the last image that is marked at
                or before it; then each row must mark every new image.
            image_attention_mask: ``[B, L, images]``, non-zero if the token sees the image; may replace `media_index`.
            attention_mask: ``[B, L]``, 0: padding, on either side.
            visual_cache, kv_cache: from earlier calls; they are updated. With a `visual_cache` of batch 1, B questions
                share its images.
            labels: ``[B, L]``, -100: ignored. Token i is predicted from the tokens before i. If all are ignored, the
                loss is NaN, as in ``F.cross_entropy``. The loss builds no logits, and rows that predict an ignored
                token are not multiplied: see `mmkernels.linear_cross_entropy`.
            last_logits_only: whether to compute the logits of the last token of each row only.
            return_logits: whether to compute logits at all; None: unless labels are given.

        Returns:
            `FlamingoOutput`. Its `kv_cache` is None if labels and no cache were given.
        """
        if labels is not None and last_logits_only:
            raise ValueError("labels need the logits of every token: last_logits_only must be False")
        visual_cache = VisualCache(len(self.cross_blocks)) if visual_cache is None else visual_cache
        cache = FlamingoCache(len(self.text_blocks)) if kv_cache is None else kv_cache
        valid, padded = check_tokens(input_ids, attention_mask, labels, self.config.vocab_size, cache)
        sees = self._images_seen(input_ids, valid, pixel_values, media_index, image_attention_mask, cache, visual_cache)
        ids = input_ids
        if cache.pending is not None:  # the last turn ended with a token that was not processed yet
            token, alive = cache.pending
            ids, valid = torch.cat([token, ids], dim=1), torch.cat([alive, valid], dim=1)
            padded = padded or ids.shape[0] > 1  # a row may have ended before the others
        if ids.shape[1] == 0:
            raise ValueError("input_ids must have at least one token, got none")

        if pixel_values is not None:
            self.cache_images(self.resample(*self.encode_with_heads(pixel_values)), visual_cache)
        has_images = not is_known(visual_cache.batch_size == 0)
        mask = visual_mask(sees, visual_cache) if has_images else None

        positions, causal = cache.extend(valid, padded)
        x = self.embed(ids)  # [B, L, C]
        angles = rotary_angles(positions, x.shape[-1] // self.config.text_heads, self.config.rope_theta, x.dtype)
        store = cache if kv_cache is not None or labels is None else None
        for i, block in enumerate(self.text_blocks):
            if i % self.config.cross_every == 0:
                j = i // self.config.cross_every
                x = self.cross_blocks[j](x, key_value=visual_cache[j] if has_images else None, mask=mask)
            x = block(x, angles, causal, store, i)

        cache.sees, cache.num_images, cache.pending = last_of(sees, valid), visual_cache.next_id, None
        x = last_of(x, valid)[:, None] if last_logits_only else x[:, ids.shape[1] - input_ids.shape[1] :]
        x = self.norm(x)
        loss = None if labels is None else next_token_loss(self.head, x, labels)
        wanted = labels is None if return_logits is None else return_logits
        return FlamingoOutput(self.head(x) if wanted else None, loss, store, visual_cache)

    def _images_seen(
        self,
        input_ids: Tensor,
        valid: Tensor,
        pixel_values: Tensor | None,
        media_index: Tensor | None,
        image_attention_mask: Tensor | None,
        cache: FlamingoCache,
        visual_cache: VisualCache,
    ) -> Tensor:
        """Checks that images and text fit; returns which images each token sees, the pending one first."""
        if len(visual_cache) != len(self.cross_blocks):
            raise ValueError(f"visual_cache must have {len(self.cross_blocks)} layers, got {len(visual_cache)}")
        images = visual_cache.next_id
        if images < cache.num_images:
            raise ValueError(f"visual_cache must have the {cache.num_images} images of kv_cache's text, got {images}")
        batch = input_ids.shape[0]
        if not is_known(visual_cache.batch_size == 0) and not broadcasts(visual_cache.batch_size, batch):
            raise ValueError(f"visual_cache must have batch 1 or {batch}, got {visual_cache.batch_size}")
        if pixel_values is not None:
            self._check_pixels(pixel_values, batch)
            images += pixel_values.shape[1]
        sees = images_seen(
            input_ids,
            valid,
            image_token_id=self.config.image_token_id,
            media_index=media_index,
            image_attention_mask=image_attention_mask,
            images=images,
            first_id=cache.num_images,
            before=cache.sees,
        )
        if cache.pending is None or cache.sees is None:
            return sees
        return join(carry_on(cache.sees, 1, images), sees, images)

    def _check_pixels(self, pixel_values: Tensor, batch: int) -> None:
        c = self.config
        square = (c.channels, c.image_size, c.image_size)
        if pixel_values.dim() != 5 or tuple(pixel_values.shape[2:]) != square or not pixel_values.is_floating_point():
            got = f"{pixel_values.dtype} {tuple(pixel_values.shape)}"
            raise ValueError(f"pixel_values must be floating [B, N, {', '.join(map(str, square))}], got {got}")
        if not broadcasts(pixel_values.shape[0], batch):
            raise ValueError(f"pixel_values must have batch 1 or input_ids' {batch}, got {pixel_values.shape[0]}")

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        *,
        media_index: Tensor | None = None,
        image_attention_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        visual_cache: VisualCache | None = None,
        kv_cache: FlamingoCache | None = None,
        max_new_tokens: int = 32,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
    ) -> FlamingoGeneration:
        """Continues a text. Images are encoded once: a later turn passes its new tokens and images, and the caches.

        Args:
            input_ids, pixel_values, media_index, image_attention_mask, attention_mask, visual_cache, kv_cache: as in
                `forward`. Each generated token sees the same images as the last token of its row.
            max_new_tokens: the largest number of tokens to generate.
            temperature, top_p: as in `blocks.sampling.sample`; temperature 0 takes the most likely token.
            seed: for a reproducible draw; None: PyTorch's global generator.
            eos_token_id: the tokens that end a row; None: those of the configuration; (): none.
        """
        check_positive("max_new_tokens", max_new_tokens)
        check_ids(input_ids)
        if kv_cache is None:
            kv_cache = FlamingoCache(len(self.text_blocks), reserve=input_ids.shape[1] + max_new_tokens)
        visual = VisualCache(len(self.cross_blocks)) if visual_cache is None else visual_cache

        def step(ids: Tensor, **inputs: Any) -> Tensor:
            out = self(ids, visual_cache=visual, kv_cache=kv_cache, last_logits_only=True, **inputs)
            return out.logits[:, 0]

        tokens = continue_text(
            step,
            input_ids,
            kv_cache,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            eos_token_id=self.config.eos_token_ids if eos_token_id is None else eos_token_id,
            pad_token_id=self.config.pad_token_id,
            pixel_values=pixel_values,
            media_index=media_index,
            image_attention_mask=image_attention_mask,
            attention_mask=attention_mask,
        )
        return FlamingoGeneration(tokens, kv_cache, visual)
