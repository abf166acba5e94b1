"""BLIP-2 and InstructBLIP: a Q-Former turns what a frozen encoder sees into tokens that a frozen language model reads.

Source: Li et al., "BLIP-2: Bootstrapping Language-Image Pre-training with Frozen Image Encoders and Large Language
Models", 2023, figure 3; Dai et al., "InstructBLIP", 2023, figure 3.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmkernels.models import blip2_weights
from mmkernels.models.blip2_config import SIZES, BLIP2Config
from mmkernels.models.blocks.bridge import Bridge
from mmkernels.models.blocks.checkpoint import Names
from mmkernels.models.blocks.config import with_generation
from mmkernels.models.blocks.context import ContextCache
from mmkernels.models.blocks.vision_language import Encode, VisionLanguageGeneration, VisionLanguageModel
from mmkernels.models.blocks.visual import Media, Visual
from mmkernels.runtime.checks import broadcasts, can_look


class _Images(NamedTuple):
    """New images of a call, as `BLIP2.encode` takes them."""

    pixel_values: Tensor | None
    image_features: Tensor | None
    qformer_input_ids: Tensor | None
    qformer_attention_mask: Tensor | None


class BLIP2(Bridge, VisionLanguageModel):
    """Predicts the next token from images and text.

    Inputs are those of transformers' processor: ``model(**processor(images=..., text=..., return_tensors="pt"))``,
    whose prompts mark each image with ``config.num_queries`` tokens. The stages can be called one by one:
    `encode_vision`, `encode`, then `forward` with ``images=``, any number of times.

    The image encoder and the language model are frozen, unless the configuration says otherwise: training changes the
    Q-Former and the projection behind it. What the frozen encoder makes of an image can be cached: see
    `cached_features`. The language model's loss, of the tokens that `labels` has, is that of the second stage; the
    first stage is `BLIP2Retrieval`.

    In an InstructBLIP the Q-Former reads an instruction with each image: `qformer_input_ids`. One image with several
    instructions is encoded once.

    `from_pretrained` reads the folder of a Hugging Face ``Blip2ForConditionalGeneration`` or
    ``InstructBlipForConditionalGeneration`` whose language model is OPT or Llama (Vicuna), not T5.

    Args:
        config: the sizes. Models are usually made by `from_size` or `from_pretrained`.

    Example:
        >>> import torch
        >>> from mmkernels.models import BLIP2
        >>> model = BLIP2.from_size("tiny").eval()
        >>> image, marker = torch.rand(1, 3, 32, 32), model.config.image_token_id
        >>> prompt = torch.tensor([[*[marker] * model.config.num_queries, 2, 5, 6]])
        >>> first = model.generate(prompt, image, max_new_tokens=3)
        >>> model.generate(torch.tensor([[8, 9]]), kv_cache=first.kv_cache, max_new_tokens=2).tokens.shape
        torch.Size([1, 2])
    """

    sizes = SIZES
    config: BLIP2Config

    def __init__(self, config: BLIP2Config) -> None:
        super().__init__(config)
        c = config
        self._make_bridge()
        self.projection = nn.Linear(c.qformer_width, c.text_width)
        self._make_decoder(c.make_decoder(), c.tie_embeddings)
        self.reducer = None
        self._freeze()

    @classmethod
    def _read_config(cls, values: dict[str, Any], path: Path) -> BLIP2Config:
        return with_generation(BLIP2Config.from_hf(values, str(path)), path.with_name("generation_config.json"))

    @classmethod
    def _names(cls, config: BLIP2Config) -> Names:
        return blip2_weights.names(config.instruct, config.text_model)

    @property
    def _frozen(self) -> list[nn.Module]:
        return super()._frozen + ([self.decoder, self.head] if self.config.freeze_text else [])

    def set_reducer(self, text: str | None) -> None:
        """Raises: `num_queries` of the configuration says how many visual tokens an image has."""
        if text is not None:
            raise ValueError(f"reduce must be None in BLIP-2, whose num_queries are its visual tokens; got {text!r}")

    def encode(
        self,
        pixel_values: Tensor | None = None,
        *,
        image_features: Tensor | None = None,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
    ) -> Visual:
        """Returns images as tokens: what `forward` takes as `images`.

        Args:
            pixel_values: floating ``[N, channels, S, S]``; or
            image_features: ``[N, P, vision_width]``, as `encode_vision` returns them.
            qformer_input_ids, qformer_attention_mask: in an InstructBLIP the instruction about each image, integers
                ``[N, L]``, and 0 where it is padding. One image may have several instructions, which then make so many
                images of it: it is encoded, and its keys and values are computed, once.
        """
        given = _Images(pixel_values, image_features, qformer_input_ids, qformer_attention_mask)
        self._count(given)
        return self._encode(given)

    def _encode(self, given: _Images) -> Visual:
        features = self._features(given.pixel_values, given.image_features)
        queries = self.qformer(features, given.qformer_input_ids, given.qformer_attention_mask).queries
        tokens = self.projection(queries)  # [N, Q, text_width]
        each = (self.config.num_queries,) * int(tokens.shape[0])
        return Visual(tokens.flatten(0, 1), each, each)

    def _count(self, given: _Images) -> int:
        """Raises unless images and instructions are right; returns how many images the prompts must mark."""
        images, asked = self._check_images(given.pixel_values, given.image_features), given.qformer_input_ids
        if self.config.instruct and asked is None:
            raise ValueError("qformer_input_ids must be the instruction about each image in an InstructBLIP, got None")
        self.qformer.check_text(asked, given.qformer_attention_mask, prefix="qformer_")
        if asked is None:
            return images
        if not broadcasts(images, asked.shape[0]):
            raise ValueError(f"qformer_input_ids must be for {images} images, got shape {tuple(asked.shape)}")
        return asked.shape[0]

    # Inputs of `forward` and `generate`.

    def _media(  # type: ignore[override]
        self,
        input_ids: Tensor,
        *,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
        images: Visual | None = None,
    ) -> tuple[list[Media], Encode]:
        """Checks the visual inputs of `forward`.

        Args:
            pixel_values, image_features, qformer_input_ids, qformer_attention_mask: new images, as in `encode`; or
            images: what `encode` returned for them.
        """
        given = _Images(pixel_values, image_features, qformer_input_ids, qformer_attention_mask)
        if pixel_values is None and image_features is None:
            for name, x in given._asdict().items():
                if x is not None:
                    raise ValueError(f"{name} must be None without pixel_values and image_features, got a tensor")
            visual = self._nothing() if images is None else images
            self._check_encoded("images", visual)
            return [self._marked(visual.marked)], lambda: [visual]
        if images is not None:
            raise ValueError("pixel_values and image_features must be None with images, got both")
        marked = (self.config.num_queries,) * self._count(given)
        return [self._marked(marked)], lambda: [self._encode(given)]

    def _marked(self, marked: tuple[int, ...]) -> Media:
        return Media("image", self.config.image_token_id, marked)

    def _check_length(self, new: int, cache: ContextCache) -> None:
        super()._check_length(new, cache)
        at = cache.next_position
        if self.config.text_model == "opt" and at is not None and at.is_cpu and can_look(at):
            reached, most = int(at.amax()) + new, self.config.text_length
            if reached > most:  # images were dropped, whose positions stay taken
                must = f"input_ids must end at one of the {most} positions (text_length) that OPT has"
                raise ValueError(f"{must}, got {new} tokens behind position {reached - new}")

    def generate(
        self, input_ids: Tensor | None = None, pixel_values: Tensor | None = None, **options: Any
    ) -> VisionLanguageGeneration:
        """Continues a text, or describes images. See `VisionLanguageModel.generate`.

        Args:
            input_ids: as there. None: each image starts a text of its own, of its markers and `bos_token_id`.
            pixel_values, options: as there.
        """
        if input_ids is None:
            input_ids = self._start(pixel_values, options)
        return super().generate(input_ids, pixel_values, **options)

    def _start(self, pixel_values: Tensor | None, options: dict[str, Any]) -> Tensor:
        """Returns the tokens ``[N, Q + 1]`` with which texts about new images start."""
        if options.get("kv_cache") is not None:
            raise ValueError("input_ids must be given with kv_cache, got None")
        if options.get("attention_mask") is not None:
            raise ValueError("attention_mask must be None without input_ids, got both")
        self._check_names({name: x for name, x in options.items() if name not in _GENERATE})
        visual = {name: options.get(name) for name in self._inputs if name != "pixel_values"}
        device = self.head.weight.device
        media, _ = self._media(torch.zeros(1, 0, device=device), pixel_values=pixel_values, **visual)
        marked = media[0].marked
        if not marked:
            raise ValueError("input_ids must have at least one token where there are no images, got None")
        start = torch.full((len(marked), marked[0] + 1), self.config.image_token_id, device=device)
        start[:, -1] = self.config.bos_token_id
        return start


_GENERATE = inspect.signature(VisionLanguageModel.generate).parameters
