"""BLIP-2's first stage: the Q-Former learns to see what a text says, through three losses at once.

Source: Li et al., "BLIP-2", 2023, section 3.2, figure 2.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from mmkernels.models import blip2_weights
from mmkernels.models.blip2_config import RETRIEVAL_SIZES, BLIP2RetrievalConfig
from mmkernels.models.blip_losses import BLIPLosses, paired
from mmkernels.models.blocks.bert import BertHead
from mmkernels.models.blocks.bridge import Bridge
from mmkernels.models.blocks.checkpoint import Names
from mmkernels.models.blocks.generation import next_token_loss
from mmkernels.models.blocks.salesforce import FIRST_LOGIT_SCALE
from mmkernels.nn.cross_attention import KeyValue
from mmkernels.objectives import image_text_matching_loss, matching_pairs
from mmkernels.ops.contrastive.info_nce import info_nce
from mmkernels.runtime.checks import broadcasts, can_look

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class BLIP2Retrieval(Bridge):
    """Compares texts with images, and matches them.

    Texts are those of BERT's tokenizer: the first token that is no padding stands for the whole text. Where
    `config.marker_token_id` is set, as in checkpoints for newer processors, each text begins with `config.num_queries`
    of these markers, which the model leaves out.

    Training calls the model, as does a wrapper such as DDP, and gets the three losses. The image encoder is frozen,
    unless the configuration says otherwise; what it makes of an image can be cached: see `cached_features`.

    `from_pretrained` reads the folder of a Hugging Face ``Blip2ForImageTextRetrieval``, which has no head for
    generation.

    Args:
        config: the sizes. Models are usually made by `from_size` or `from_pretrained`.

    Example:
        >>> import torch
        >>> from mmkernels.models import BLIP2Retrieval
        >>> model = BLIP2Retrieval.from_size("tiny")
        >>> images, texts = torch.rand(3, 3, 32, 32), torch.randint(2, 96, (3, 7))
        >>> sum(model(texts, images)).backward()  # the first stage's three losses
        >>> image, text = model.encode_image(images), model.encode_text(texts)
        >>> image.shape, text.shape, (image @ text.T).amax(1).shape  # the score of a pair: its best query's
        (torch.Size([3, 4, 24]), torch.Size([3, 24]), torch.Size([3, 3]))
        >>> model.match(texts, images[:1]).shape  # one image, three texts
        torch.Size([3, 2])
    """

    sizes = RETRIEVAL_SIZES
    config: BLIP2RetrievalConfig

    def __init__(self, config: BLIP2RetrievalConfig) -> None:
        super().__init__(config)
        c = config
        self._make_bridge()
        self.image_projection = nn.Linear(c.qformer_width, c.embed_dim)
        self.text_projection = nn.Linear(c.qformer_width, c.embed_dim)
        self.matching_head = nn.Linear(c.qformer_width, 2)
        self.logit_scale = nn.Parameter(torch.empty(()))  # the logarithm of the multiplier
        assert self.qformer.embed is not None
        self.head = BertHead(self.qformer.embed, c.qformer_activation, c.qformer_eps) if c.generation else None
        self._set_constants()
        self._freeze()

    def _set_constants(self) -> None:
        """Sets the multiplier of the contrastive logits to where training starts."""
        nn.init.constant_(self.logit_scale, FIRST_LOGIT_SCALE)

    @classmethod
    def _read_config(cls, values: dict[str, Any], path: Path) -> BLIP2RetrievalConfig:
        return BLIP2RetrievalConfig.from_hf(values, str(path))

    @classmethod
    def _names(cls, config: BLIP2RetrievalConfig) -> Names:
        return blip2_weights.RETRIEVAL_NAMES

    def encode_image(self, pixel_values: Tensor | None = None, *, image_features: Tensor | None = None) -> Tensor:
        """Returns contrastive features ``[N, Q, embed_dim]`` of images, one for each query, of length 1.

        Args:
            pixel_values: floating ``[N, channels, S, S]``; or
            image_features: ``[N, P, vision_width]``, as `encode_vision` returns them.
        """
        self._check_images(pixel_values, image_features)
        return self._image(self.qformer(self._features(pixel_values, image_features)).queries)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Returns contrastive features ``[N, embed_dim]`` of texts, of length 1.

        Args:
            input_ids: integers ``[N, L]``.
            attention_mask: bool or integers ``[N, L]``, 0: padding, on either side.
        """
        return self._text(*self._unmarked(input_ids, attention_mask))

    def match(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        image_features: Tensor | None = None,
    ) -> Tensor:
        """Returns logits ``[N, 2]`` of each text and its image: class 1 is "they belong together".

        Args:
            input_ids, attention_mask: as in `encode_text`.
            pixel_values, image_features: as in `encode_image`, of N images, or of one for all texts.
        """
        images = self._check_images(pixel_values, image_features)
        ids, mask = self._unmarked(input_ids, attention_mask)
        _check_batch(ids, images)
        key_values = self.qformer.project(self._features(pixel_values, image_features))
        return self.matching_head(self._matched(ids, mask, key_values))

    def forward(self, *inputs: Any, **options: Any) -> BLIPLosses:
        """Returns what `losses` returns, so that a wrapper such as DDP, which calls the model, can train it."""
        return self.losses(*inputs, **options)

    def losses(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        image_features: Tensor | None = None,
        ids: Tensor | None = None,
        generator: Generator | None = None,
        group: ProcessGroup | None = None,
    ) -> BLIPLosses:
        """Returns the losses of the first stage: contrastive, matching with hard negatives, generation.

        The Q-Former runs over images and texts with the mask of generation, in which queries see only each other, so
        that they serve the contrastive loss too; over texts alone; and over three times N pairs: those of the batch,
        each image with a hard text, each text with a hard image. Keys and values of the images are computed once.

        Args:
            input_ids, attention_mask: N texts, as in `encode_text`. They end with a separator, which is learned as the
                end; the first token is replaced by `config.bos_token_id` where they are generated.
            pixel_values, image_features: N images, as in `encode_image`; text i belongs to image i.
            ids: integers ``[N]``: what each pair is about. Pairs of one id are positives of the contrastive loss, and
                no negatives in matching (several captions of an image).
            generator: of the draw of hard negatives, as in `mmkernels.objectives.matching_pairs`.
            group: ranks that compute the contrastive loss together, as in `mmkernels.info_nce`; hard negatives are
                drawn from this rank's pairs.

        Raises:
            TypeError, ValueError: as in `encode_image` and `encode_text`; the numbers of texts and images differ.

        Source: Li et al., "BLIP-2", 2023, section 3.2; one query's score counts, the largest, in both directions.
        """
        images = self._check_images(pixel_values, image_features)
        tokens, mask = self._unmarked(input_ids, attention_mask)
        if images != tokens.shape[0]:
            raise ValueError(f"input_ids must be one text for each of {images} images, got {tokens.shape[0]}")
        key_values = self.qformer.project(self._features(pixel_values, image_features))
        if self.head is None:
            queries, generation = self.qformer(key_values=key_values).queries, None
        else:
            out = self.qformer(None, self._begun(tokens), mask, key_values=key_values, causal=True)
            queries, generation = out.queries, self._generation_loss(self.head, out.text, tokens, mask)
        image, text, scale = self._image(queries), self._text(tokens, mask), self._scale()
        contrastive = info_nce(
            image,
            text,
            scale,
            image_ids=ids,
            label_smoothing=self.config.label_smoothing,
            group=group,
        )
        pairs = matching_pairs(image, text, scale, ids=ids, generator=generator)
        rows = lambda chosen: (tokens[chosen], None if mask is None else mask[chosen])
        parts = paired((tokens, mask), rows, pairs, key_values)
        hidden = torch.cat([self._matched(*texts, key_values) for texts, key_values in parts])
        head = self.matching_head
        matching = image_text_matching_loss(hidden, head.weight, pairs.labels, bias=head.bias)
        return BLIPLosses(contrastive, matching, generation)

    def _unmarked(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Returns checked texts and their mask, without the markers in front, padded on the right."""
        marker, count = self.config.marker_token_id, self.config.num_queries
        if marker is None or not isinstance(input_ids, Tensor) or input_ids.dim() != 2:
            self.qformer.check_text(input_ids, attention_mask)
            return _padded_behind(input_ids, attention_mask)
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            got = tuple(attention_mask.shape)
            raise ValueError(f"attention_mask must be {list(input_ids.shape)} as input_ids, got shape {got}")
        front = input_ids[:, :count]
        short = input_ids.shape[1] <= count
        if short or (front.is_cpu and can_look(front) and not bool((front == marker).all())):
            found = f"shape {tuple(input_ids.shape)}" if short else "others"
            raise ValueError(f"input_ids must begin with {count} tokens {marker} (marker_token_id), got {found}")
        ids, mask = input_ids[:, count:], None if attention_mask is None else attention_mask[:, count:]
        self.qformer.check_text(ids, mask)
        return _padded_behind(ids, mask)

    def _scale(self) -> Tensor:
        """Returns the multiplier of the contrastive logits, in float32 beside 16-bit features."""
        return self.logit_scale.to(torch.promote_types(self.logit_scale.dtype, torch.float32)).exp()

    def _image(self, queries: Tensor) -> Tensor:
        return F.normalize(self.image_projection(queries), dim=-1)

    def _text(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        text = self.qformer(None, input_ids, attention_mask).text
        return F.normalize(self.text_projection(text[:, 0]), dim=-1)

    def _matched(self, input_ids: Tensor, attention_mask: Tensor | None, key_values: list[KeyValue]) -> Tensor:
        """Returns features ``[N, qformer_width]`` of pairs.

        They are the queries' mean: its logits are the mean of the queries' logits.
        """
        return self.qformer(None, input_ids, attention_mask, key_values=key_values).queries.mean(1)

    def _begun(self, input_ids: Tensor) -> Tensor:
        """Returns texts with the token in front that asks for them to be generated."""
        begin = self.config.bos_token_id
        if begin is None:
            return input_ids
        return torch.cat([torch.full_like(input_ids[:, :1], begin), input_ids[:, 1:]], dim=1)

    def _generation_loss(self, head: BertHead, hidden: Tensor, input_ids: Tensor, mask: Tensor | None) -> Tensor:
        labels = input_ids if mask is None else input_ids.masked_fill(~mask.bool(), -100)
        smoothing = self.config.label_smoothing
        return next_token_loss(head.last, head.transform(hidden), labels, label_smoothing=smoothing)


def _padded_behind(input_ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Returns texts and their mask with the padding behind the text, where the Q-Former's positions count from 0."""
    if mask is None:
        return input_ids, None
    order = mask.bool().logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    return input_ids.gather(1, order), mask.gather(1, order)


def _check_batch(input_ids: Tensor, images: int) -> None:
    if not broadcasts(images, input_ids.shape[0]):
        raise ValueError(f"input_ids must be {images} texts, one for each image, got {input_ids.shape[0]}")
