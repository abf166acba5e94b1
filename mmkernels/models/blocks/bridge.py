"""`Bridge`: what BLIP-2's two stages share, an image encoder and the Q-Former that looks at what it sees."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmkernels.models.blocks.model import Model
from mmkernels.models.blocks.vision import VisionTransformer
from mmkernels.models.embeddings import EmbeddingCache, fingerprint
from mmkernels.nn import QFormer
from mmkernels.runtime.checks import check_floating

if TYPE_CHECKING:
    from typing_extensions import Self


class Bridge(Model):
    """Base class: encodes images, by an encoder that is usually frozen, for a Q-Former that is trained.

    A frozen part gets no gradient, and stays in evaluation mode whatever `train` says. What a frozen encoder makes of
    an image is the same in every epoch, so that it can be cached: see `feature_cache`.

    Attributes:
        vision, vision_norm: the encoder, and the norm behind it.
        qformer: the Q-Former.
    """

    vision: VisionTransformer
    vision_norm: nn.LayerNorm
    qformer: QFormer

    def _make_bridge(self) -> None:
        self.vision, self.vision_norm = self.config.make_vision()
        self.qformer = self.config.make_qformer()

    @property
    def _frozen(self) -> list[nn.Module]:
        """The parts that training leaves as they are."""
        return [self.vision, self.vision_norm] if self.config.freeze_vision else []

    def _freeze(self) -> None:
        for part in self._frozen:
            part.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Sets the training mode; frozen parts stay in evaluation mode, in which nothing is dropped."""
        super().train(mode)
        for part in self._frozen:
            part.eval()
        return self

    def encode_vision(self, pixel_values: Tensor) -> Tensor:
        """Returns the features ``[N, P, vision_width]`` of images ``[N, channels, S, S]``: class token and patches.

        A frozen encoder keeps nothing for a backward pass, unless parameters of it were made trainable (LoRA).
        """
        trained = not self.config.freeze_vision or any(
            parameter.requires_grad for part in (self.vision, self.vision_norm) for parameter in part.parameters()
        )
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            return self.vision_norm(self.vision(pixel_values))

    def _check_images(self, pixel_values: Tensor | None, image_features: Tensor | None) -> int:
        """Raises unless one of the two is given and right; returns the number of images."""
        if image_features is None:
            if pixel_values is None:
                raise ValueError("pixel_values or image_features must be given, got neither")
            self.vision.check(pixel_values)
            return pixel_values.shape[0]
        if pixel_values is not None:
            raise ValueError("pixel_values must be None with image_features, got both")
        check_floating("image_features", image_features)
        if image_features.dim() != 3 or image_features.shape[2] != self.config.vision_width:
            must = f"[N, P, {self.config.vision_width}], as encode_vision returns them"
            raise ValueError(f"image_features must be {must}, got shape {tuple(image_features.shape)}")
        return image_features.shape[0]

    def _features(self, pixel_values: Tensor | None, image_features: Tensor | None) -> Tensor:
        """Returns the features of images, which `_check_images` has checked."""
        if image_features is None:
            assert pixel_values is not None
            return self.encode_vision(pixel_values)
        return image_features.to(self.qformer.queries)

    # Features that are encoded once.

    def feature_cache(
        self, folder: str | Path, *, dtype: torch.dtype = torch.bfloat16, **options: Any
    ) -> EmbeddingCache:
        """Returns a cache of what the frozen encoder makes of images, for `cached_features`.

        It belongs to these weights of the encoder: opened with others, it raises. A row is an image: P x vision_width
        numbers, 724 KB for ViT-g's 257 x 1,408 in bfloat16.

        Args:
            folder: a folder, or the URI of an object store.
            dtype: in which features are stored. bfloat16 rounds them by up to 1/256; float32 keeps them as they are.
            options: further arguments of `EmbeddingCache`.
        """
        self._check_frozen()
        encoder = nn.ModuleList([self.vision, self.vision_norm])
        return EmbeddingCache(folder, f"vision {fingerprint(encoder)}", dtype=dtype, normalize=False, **options)

    def cached_features(
        self,
        cache: EmbeddingCache,
        items: Iterable[Any],
        pixels_of: Callable[[list[Any]], Tensor],
        *,
        keys: Iterable[str] | None = None,
        batch_size: int = 64,
    ) -> Tensor:
        """Returns the features ``[N, P, vision_width]`` of images, of which those are encoded that the cache lacks.

        They are the argument `image_features` of the model, on its device and in its dtype; call it for each batch. The
        cache does not know whether features were encoded under autocast: call it always with, or always without.

        Args:
            cache: what `feature_cache` returned.
            items: N images, as anything that `content_key` takes, such as paths or tensors, or that `keys` are given
                for.
            pixels_of: takes a list of at most `batch_size` items; returns their pixels ``[n, channels, S, S]``.
            keys, batch_size: as of `EmbeddingCache.encode`.

        Raises:
            TypeError, ValueError: the cache is none, or would scale features; the encoder is trained; as
                `EmbeddingCache.encode`.

        Example:
            >>> import tempfile, torch
            >>> from mmkernels.models import BLIP2
            >>> model, photos = BLIP2.from_size("tiny"), list(torch.rand(3, 3, 32, 32))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     cache = model.feature_cache(folder)
            ...     features = model.cached_features(cache, photos, torch.stack)
            ...     again = model.cached_features(cache, photos[:2], torch.stack)  # encodes nothing
            >>> features.shape, torch.equal(again, features[:2])
            (torch.Size([3, 17, 32]), True)
        """
        self._check_frozen()
        if not isinstance(cache, EmbeddingCache):
            raise TypeError(f"cache must be an EmbeddingCache, got {type(cache).__name__}")
        if cache.normalize:
            raise ValueError("cache must have normalize=False, as feature_cache makes it, got True")
        like = self.vision.positions  # [P, vision_width]

        def encode(batch: list[Any]) -> Tensor:
            return self.encode_vision(pixels_of(batch).to(like.device)).flatten(1)

        rows = cache.encode(items, encode, keys=keys, batch_size=batch_size)
        return cache.read(rows).view(-1, *like.shape).to(self.qformer.queries)

    def _check_frozen(self) -> None:
        if not self.config.freeze_vision:
            raise ValueError("freeze_vision must be True where features are cached, got False: training changes them")
