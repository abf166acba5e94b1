"""BLIP: one text model with three heads, which compares texts with images, matches them, and writes them.

Source: Li et al., "BLIP: Bootstrapping Language-Image Pre-training for Unified Vision-Language Understanding and
Generation", 2022, figure 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.distributed import ProcessGroup

from mmkernels.models import blip_weights
from mmkernels.models.blip_config import SIZES, BLIPConfig
from mmkernels.models.blip_losses import BLIPLosses, MomentumFeatures, contrastive_loss, paired
from mmkernels.models.blip_text import BLIPCache, BLIPGeneration, BLIPOutput, Texts, alone, check_length
from mmkernels.models.blocks.bert import Bert, BertHead
from mmkernels.models.blocks.checkpoint import Names
from mmkernels.models.blocks.encoder import Sizes
from mmkernels.models.blocks.generation import continue_text, next_token_loss
from mmkernels.models.blocks.kv_cache import KVCache
from mmkernels.models.blocks.media import last_of
from mmkernels.models.blocks.model import Model
from mmkernels.models.blocks.salesforce import FIRST_LOGIT_SCALE
from mmkernels.models.blocks.text import check_tokens
from mmkernels.models.blocks.vision import VisionTransformer
from mmkernels.nn.checks import check_positive
from mmkernels.nn.cross_attention import KeyValue
from mmkernels.objectives import image_text_matching_loss, matching_pairs
from mmkernels.runtime.checks import broadcasts, check_floating


class BLIP(Model):
    """Compares texts with images, matches them, and writes them: one text model with three heads.

    `encode_image` and `encode_text` give contrastive features (ITC), `match` looks at an image and a text together
    (ITM), `forward` and `generate` write a text about an image (LM), and `losses` gives the losses of all three;
    `BLIPPretraining` trains them with a momentum model and queues of its features, as the paper does.

    The heads share the text model. To be compared, a text is read alone; to be matched, it attends to the image; to be
    written, its self-attention is causal too, with weights of its own if the configuration has `decoder_attention`. Its
    first token says what is done: `enc_token_id` or `bos_token_id`.

    `from_pretrained` reads the folder of a Hugging Face ``BlipForConditionalGeneration`` or
    ``BlipForImageTextRetrieval``, which have the one kind of heads or the other.

    Args:
        config: the sizes. Models are usually made by `from_size` or `from_pretrained`.

    Example:
        >>> import torch
        >>> from mmkernels.models import BLIP
        >>> model = BLIP.from_size("tiny").eval()
        >>> images, texts = torch.rand(2, 3, 32, 32), torch.randint(4, 128, (2, 6))
        >>> (model.encode_image(images) @ model.encode_text(texts).T).shape
        torch.Size([2, 2])
        >>> model.match(texts, images).shape
        torch.Size([2, 2])
        >>> model.generate(pixel_values=images, max_new_tokens=5, eos_token_id=()).tokens.shape
        torch.Size([2, 5])
        >>> model.losses(texts, images).total.shape
        torch.Size([])
    """

    sizes = SIZES
    config: BLIPConfig

    def __init__(self, config: BLIPConfig) -> None:
        super().__init__(config)
        c = config
        self.vision = VisionTransformer.of(c, Sizes.of(c, "vision"), first_norm=False, patch_bias=True)
        self.vision_norm = nn.LayerNorm(c.vision_width, eps=c.vision_eps)
        self.text = Bert(c.bert, decoder_attention=c.separate_attention)
        self.image_projection = nn.Linear(c.vision_width, c.embed_dim) if c.retrieval else None
        self.text_projection = nn.Linear(c.text_width, c.embed_dim) if c.retrieval else None
        self.matching_head = nn.Linear(c.text_width, 2) if c.retrieval else None
        self.logit_scale = nn.Parameter(torch.empty(())) if c.retrieval else None  # the logarithm of the multiplier
        self.head = BertHead(self.text.embed, c.text_activation, c.text_eps) if c.generation else None
        self._set_constants()

    def _set_constants(self) -> None:
        """Sets the multiplier of the contrastive logits to where training starts."""
        if self.logit_scale is not None:
            nn.init.constant_(self.logit_scale, FIRST_LOGIT_SCALE)

    @classmethod
    def _read_config(cls, values: dict[str, Any], path: Path) -> BLIPConfig:
        return BLIPConfig.from_hf(values, str(path))

    @classmethod
    def _names(cls, config: BLIPConfig) -> Names:
        return blip_weights.names(config.generation)

    # The stages.

    def encode_vision(self, pixel_values: Tensor) -> Tensor:
        """Returns the features ``[B, P, vision_width]`` of images ``[B, channels, S, S]``: class token and patches."""
        return self.vision_norm(self.vision(pixel_values))

    def project(self, vision: Tensor) -> list[KeyValue]:
        """Returns keys and values of images' features ``[B, P, vision_width]`` for each layer of the text model.

        Computed once, they serve all texts.
        """
        return self.text.project(vision)

    def encode_image(self, pixel_values: Tensor | None = None, *, vision: Tensor | None = None) -> Tensor:
        """Returns contrastive features ``[B, embed_dim]`` of images, of length 1.

        Args:
            pixel_values: the images ``[B, channels, S, S]``; or
            vision: what `encode_vision` returned for them, which serves all heads.
        """
        projection = _head(self.image_projection, "retrieval")
        return F.normalize(projection(self._vision(pixel_values, vision)[:, 0]), dim=-1)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Returns contrastive features ``[B, embed_dim]`` of texts, of length 1.

        Args:
            input_ids: integers ``[B, L]``; the first token of a text stands for all of it.
            attention_mask: bool or integers ``[B, L]``, 0: padding, on either side.
        """
        return self._text_features(self._texts(input_ids, attention_mask))

    def match(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        vision: Tensor | None = None,
    ) -> Tensor:
        """Returns logits ``[B, 2]`` of each text and its image: class 1 is "they belong together".

        The first token of a text becomes `enc_token_id` if the configuration has one (in the paper it does; a
        configuration of Hugging Face's class never does, and that class leaves the text as it is).

        Args:
            input_ids, attention_mask: as in `encode_text`.
            pixel_values, vision: as in `encode_image`, of batch B or 1.
        """
        head, texts = _head(self.matching_head, "retrieval"), self._texts(input_ids, attention_mask)
        key_values = self.project(self._vision(pixel_values, vision, texts))
        return head(self._together(texts.begun(self.config.enc_token_id), key_values))

    def _text_features(self, texts: Texts) -> Tensor:
        projection = _head(self.text_projection, "retrieval")
        return F.normalize(projection(texts.of_first(self.text(*texts))), dim=-1)

    def _together(self, texts: Texts, key_values: list[KeyValue]) -> Tensor:
        """Returns the features ``[B, text_width]`` of texts that see their images."""
        return texts.of_first(self.text(*texts, key_values=key_values))

    def _vision(self, pixel_values: Tensor | None, vision: Tensor | None, texts: Texts | None = None) -> Tensor:
        """Returns images' features; raises unless there is an image for each text, or one for all."""
        if (pixel_values is None) == (vision is None):
            got = "neither" if vision is None else "both"
            raise ValueError(f"pixel_values or vision must be given, got {got}")
        name, x = ("pixel_values", pixel_values) if vision is None else ("vision", vision)
        check_floating(name, x)
        assert x is not None
        if texts is not None and not broadcasts(x.shape[0], texts.ids.shape[0]):
            raise ValueError(f"{name} must have batch 1 or input_ids' {texts.ids.shape[0]}, got {x.shape[0]}")
        if vision is None:
            return self.encode_vision(x)
        if vision.dim() != 3 or vision.shape[-1] != self.config.vision_width:
            raise ValueError(f"vision must be [B, P, {self.config.vision_width}], got shape {tuple(vision.shape)}")
        return vision

    def _texts(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Texts:
        """Returns checked texts, behind the token that is pending in the cache."""
        cache = KVCache(0) if cache is None else cache
        valid, padded = check_tokens(input_ids, attention_mask, labels, self.config.vocab_size, cache)
        texts, pending = Texts(input_ids, valid, padded), cache.pending
        if pending is not None:  # the last turn ended with a token that was not processed yet
            ids, valid = torch.cat([pending[0], input_ids], dim=1), torch.cat([pending[1], valid], dim=1)
            texts = Texts(ids, valid, padded or ids.shape[0] > 1)  # a row may have ended before the others
        check_length(input_ids.shape[1], cache, self.config.text_length)
        return texts

    # The heads.

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        vision: Tensor | None = None,
        kv_cache: BLIPCache | None = None,
        labels: Tensor | None = None,
        last_logits_only: bool = False,
        return_logits: bool | None = None,
    ) -> BLIPOutput:
        """Returns the logits of the next token of texts about images, or of their continuation; or the loss.

        The texts stay as they are: the caller writes `bos_token_id` in front, as `generate` does for prompts.

        Args:
            input_ids: the new tokens, integers ``[B, L]``.
            pixel_values: the images, floating ``[B or 1, channels, S, S]``; or
            vision: what `encode_vision` returned for them. Neither with a cache, which has the images.
            attention_mask: bool or integers ``[B, L]``, 0: padding, on either side.
            kv_cache: from earlier calls; it is updated.
            labels: ``[B, L]``, -100: ignored. Token i is predicted from the tokens before i. If all are ignored, the
                loss is NaN, as in ``F.cross_entropy``. The loss builds no logits, and rows that predict an ignored
                token are not multiplied: see `mmkernels.linear_cross_entropy`.
            last_logits_only: whether to compute the logits of the last token of each row only.
            return_logits: whether to compute logits at all; None: unless labels are given.

        Raises:
            TypeError, ValueError: an input has a wrong type or shape, or another batch than the others; a text is
                empty or longer than `text_length`; there is no image, or one that a cache has already.
        """
        head = _head(self.head, "generation")
        if labels is not None and last_logits_only:
            raise ValueError("labels need the logits of every token: last_logits_only must be False")
        cache = self._checked_cache(kv_cache)
        texts = self._texts(input_ids, attention_mask, labels, cache)
        if cache.images is None:
            cache.images = self.project(self._vision(pixel_values, vision, texts))
        elif pixel_values is not None or vision is not None:
            name = "vision" if pixel_values is None else "pixel_values"
            raise ValueError(f"{name} must be None with a kv_cache that has the images, got a tensor")
        store = cache if kv_cache is not None or labels is None else None
        x = self.text(*texts, key_values=cache.images, causal=True, cache=store)
        cache.pending = None
        x = last_of(x, texts.valid)[:, None] if last_logits_only else x[:, x.shape[1] - input_ids.shape[1] :]
        x = head.transform(x)
        loss = None if labels is None else self._generation_loss(x, labels)
        wanted = labels is None if return_logits is None else return_logits
        return BLIPOutput(head.last(x) if wanted else None, loss, store)

    def _checked_cache(self, kv_cache: BLIPCache | None) -> BLIPCache:
        layers = len(self.text.blocks)
        if kv_cache is None:
            return BLIPCache(layers)
        if not isinstance(kv_cache, BLIPCache):
            raise TypeError(f"kv_cache must be a BLIPCache or None, got {type(kv_cache).__name__}")
        if kv_cache.num_layers != layers:
            raise ValueError(f"kv_cache must have {layers} layers, got {kv_cache.num_layers}")
        return kv_cache

    def _generation_loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """Returns the loss of ``x [B, L, text_width]``, what the last layer gets."""
        last = _head(self.head, "generation").last
        return next_token_loss(last, x, labels, label_smoothing=self.config.label_smoothing)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        vision: Tensor | None = None,
        kv_cache: BLIPCache | None = None,
        max_new_tokens: int = 32,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
    ) -> BLIPGeneration:
        """Writes texts about images, or goes on with texts. The images are encoded and projected once.

        Args:
            input_ids: prompts ``[B, L]`` as a tokenizer writes them: their first token becomes `bos_token_id`, and a
                `sep_token_id` at the end is left out. (Hugging Face's class leaves out the last token, whatever it is,
                and in a batch with padding the padding.) None: `bos_token_id` alone, for each image. With a cache that
                has tokens they are taken as they are.
            pixel_values, vision, attention_mask, kv_cache: as in `forward`.
            max_new_tokens: the largest number of tokens to generate; a text ends too where it has `text_length` tokens.
            temperature, top_p: as in `blocks.sampling.sample`; temperature 0 takes the most likely token.
            seed: for a reproducible draw; None: PyTorch's global generator.
            eos_token_id: the tokens that end a row; None: `sep_token_id`; (): none.

        Raises:
            TypeError, ValueError: as `forward`; a prompt is empty, or `max_new_tokens` is not positive.
        """
        c = self.config
        _head(self.head, "generation")
        check_positive("max_new_tokens", max_new_tokens)
        texts = self._prompts(input_ids, attention_mask, pixel_values if vision is None else vision, kv_cache)
        if kv_cache is None:
            most = min(texts.ids.shape[1] + max_new_tokens, c.text_length)
            kv_cache = BLIPCache(len(self.text.blocks), reserve=most)

        def step(ids: Tensor, **inputs: Any) -> Tensor:
            out = self(ids, kv_cache=kv_cache, last_logits_only=True, **inputs)
            return out.logits[:, 0]

        tokens = continue_text(
            step,
            texts.ids,
            kv_cache,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            eos_token_id=c.sep_token_id if eos_token_id is None else eos_token_id,
            pad_token_id=c.pad_token_id,
            most=c.text_length,
            pixel_values=pixel_values,
            vision=vision,
            attention_mask=texts.valid if texts.padded else None,
        )
        return BLIPGeneration(tokens, kv_cache)

    def _prompts(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, images: Tensor | None, kv_cache: BLIPCache | None
    ) -> Texts:
        """Returns checked prompts, as the text model takes them; `images`: pixels or features."""
        c, cache = self.config, self._checked_cache(kv_cache)
        if cache.num_tokens or cache.pending is not None:
            if input_ids is None:
                raise ValueError("input_ids must be given with a kv_cache that has tokens, got None")
            self._texts(input_ids, attention_mask, None, cache)
            valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
            return Texts(input_ids, valid, attention_mask is not None)
        if input_ids is not None:
            return self._texts(input_ids, attention_mask).opening(c.bos_token_id, c.sep_token_id)
        if attention_mask is not None:
            raise ValueError("attention_mask must be None without input_ids, got a mask")
        if images is None:
            raise ValueError("pixel_values or vision must be given, got neither")
        check_floating("pixel_values or vision", images)
        return alone(images, c.bos_token_id)

    # Training.

    def losses(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        vision: Tensor | None = None,
        labels: Tensor | None = None,
        ids: Tensor | None = None,
        momentum: MomentumFeatures | None = None,
        group: ProcessGroup | None = None,
        generator: Generator | None = None,
    ) -> BLIPLosses:
        """Returns the losses of pre-training, for N images and the text of each.

        Wrappers such as DDP see only `forward`: wrap `BLIPPretraining`, whose `forward` calls this.

        Args:
            input_ids, attention_mask: texts, as in `encode_text`: as the tokenizer writes them. To be matched their
                first token becomes `enc_token_id` (if there is one), to be written `bos_token_id`.
            pixel_values, vision: as in `encode_image`, of batch N.
            labels: of the language model, ``[N, L]``, -100: ignored; None: all tokens but the first and padding.
            ids: what each pair is about, integers ``[N]``: pairs of one id belong together (several captions of one
                image); None: each pair is about something else.
            momentum: features to which images and texts are compared, see `contrastive_loss`; None: each other.
            group: ranks that compute the contrastive loss together, as in `mmkernels.info_nce`. Negatives to be
                matched are drawn from this rank's pairs.
            generator: of those negatives; None: PyTorch's global generator.

        Source: Li et al., "BLIP", 2022, section 3.2; hard negatives as in `mmkernels.objectives.matching_pairs`.
        """
        head, texts = _head(self.matching_head, "retrieval"), self._texts(input_ids, attention_mask, labels)
        vision = self._vision(pixel_values, vision, texts)
        if vision.shape[0] != input_ids.shape[0]:
            raise ValueError(f"images must be as many as texts, {input_ids.shape[0]}, got {vision.shape[0]}")
        image, text, scale = self.encode_image(vision=vision), self._text_features(texts), self._scale()
        contrastive = contrastive_loss(image, text, scale, ids=ids, momentum=momentum, group=group)

        pairs = matching_pairs(image, text, scale, ids=ids, generator=generator)
        key_values, matched = self.project(vision), texts.begun(self.config.enc_token_id)
        parts = paired(matched, matched.rows, pairs, key_values)
        hidden = torch.cat([self._together(*part) for part in parts])  # [3 N, text_width]
        matching = image_text_matching_loss(hidden, head.weight, pairs.labels, bias=head.bias)

        generation = None
        if self.head is not None:
            x = self.text(*texts.begun(self.config.bos_token_id), key_values=key_values, causal=True)
            generation = self._generation_loss(self.head.transform(x), texts.labels if labels is None else labels)
        return BLIPLosses(contrastive, matching, generation)

    def _scale(self) -> Tensor:
        """Returns the multiplier of the contrastive logits."""
        logarithm: Tensor = _head(self.logit_scale, "retrieval")
        return logarithm.to(torch.promote_types(logarithm.dtype, torch.float32)).exp()


def _head(part: Any, kind: str) -> Any:
    """Returns a part of the model; raises unless the model has it."""
    if part is None:
        raise ValueError(f"the model must have been made with {kind}=True, got False: its checkpoint has no such head")
    return part
