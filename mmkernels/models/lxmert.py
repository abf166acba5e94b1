"""LXMERT: a text and the objects of an image, each read alone, then in layers where each attends to the other.

Source: Tan and Bansal, "LXMERT: Learning Cross-Modality Encoder Representations from Transformers", 2019, figure 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from mmkernels.models import lxmert_weights
from mmkernels.models.blocks.bert import BertHead
from mmkernels.models.blocks.checkpoint import Names
from mmkernels.models.blocks.model import Model
from mmkernels.models.blocks.two_streams import (
    EPS,
    Masks,
    StreamBlock,
    StreamSizes,
    TextEmbeddings,
    check_inputs,
    classifier,
    transform,
)
from mmkernels.models.lxmert_config import SIZES, LXMERTConfig
from mmkernels.models.lxmert_losses import Labels, LXMERTLosses, check_classes, check_region_labels, region_losses
from mmkernels.nn import CoAttention
from mmkernels.objectives import image_text_matching_loss, masked_language_modelling_loss
from mmkernels.ops.linear.linear_cross_entropy import linear_cross_entropy


class CrossBlock(nn.Module):
    """Each modality attends to the other one with the same weights, then to itself, with a feed-forward.

    Source: Tan and Bansal, "LXMERT", 2019, section 2.2, "Cross-Modality Encoder".
    """

    def __init__(self, sizes: StreamSizes) -> None:
        super().__init__()
        s = sizes
        self.cross = CoAttention(s.width, num_heads=s.heads, shared=True, dropout=s.dropout)
        self.norm = nn.LayerNorm(s.width, eps=EPS)
        self.dropout = nn.Dropout(s.residual_dropout)
        self.text = StreamBlock(s)
        self.vision = StreamBlock(s)

    def forward(self, text: Tensor, vision: Tensor, masks: Masks) -> tuple[Tensor, Tensor]:
        """Returns the features of both, ``[B, L, width]`` and ``[B, R, width]``, after the block."""
        of_text, of_vision = self.cross(text, vision, mask=masks.both)
        text, vision = self.norm(text + self.dropout(of_text)), self.norm(vision + self.dropout(of_vision))
        return self.text(text, masks.text), self.vision(vision, masks.vision)


@dataclass
class LXMERTOutput:
    """The result of `LXMERT.forward`; None: the model has no such head, or it was not asked for.

    Attributes:
        text, vision: features of the tokens ``[B, L, width]`` and of the regions ``[B, R, width]``.
        pooled: what stands for both, ``[B, width]``, made of the first token.
        word_logits: ``[B, L, vocab_size]``; None with `labels`, where they were not asked for.
        matching_logits: ``[B, 2]``, class 1: they belong together.
        answer_logits: ``[B, num_answers]``.
        losses: None without labels.
        text_states, vision_states: the features after each layer, those of the text alone or the regions alone first.
    """

    text: Tensor
    vision: Tensor
    pooled: Tensor
    word_logits: Tensor | None
    matching_logits: Tensor | None
    answer_logits: Tensor | None
    losses: LXMERTLosses | None
    text_states: tuple[Tensor, ...]
    vision_states: tuple[Tensor, ...]

    @property
    def loss(self) -> Tensor | None:
        """The sum of the losses; None without labels."""
        return None if self.losses is None else self.losses.total


class LXMERT(Model):
    """Reads a text and the objects that a detector found in an image together.

    The text and the regions have transformers of their own; then come layers in which each attends to the other, both
    directions in one call of the attention's kernel, with one product for query, key and value of both.

    `from_pretrained` reads the folder of a Hugging Face ``LxmertModel``, ``LxmertForPreTraining`` or
    ``LxmertForQuestionAnswering``, which have the heads that their names say.

    Positions count from the first token of a row, and the first token stands for the whole: pad on the right. Token 0,
    position 0 and token type 0 get no gradient where they are looked up, as in the authors' code.

    Args:
        config: the sizes. Models are usually made by `from_size` or `from_pretrained`.

    Example:
        >>> import torch
        >>> from mmkernels.models import LXMERT
        >>> model = LXMERT.from_size("tiny").eval()
        >>> words, regions, boxes = torch.randint(1, 128, (2, 6)), torch.rand(2, 5, 24), torch.rand(2, 5, 4)
        >>> out = model(words, regions, boxes)
        >>> out.vision.shape, out.answer_logits.shape
        (torch.Size([2, 5, 32]), torch.Size([2, 13]))
        >>> model(words, regions, boxes, labels=words, ans=torch.tensor([3, 12])).loss.shape
        torch.Size([])
    """

    sizes = SIZES
    config: LXMERTConfig

    def __init__(self, config: LXMERTConfig) -> None:
        super().__init__(config)
        c, width = config, config.width
        self.text = TextEmbeddings(
            width,
            vocab=c.vocab_size,
            length=c.text_length,
            types=c.token_types,
            dropout=c.residual_dropout,
            untrained_first=True,
        )
        self.features, self.boxes = nn.Linear(c.feature_width, width), nn.Linear(c.box_width, width)
        self.features_norm, self.boxes_norm = (nn.LayerNorm(width, eps=EPS) for _ in range(2))
        self.dropout = nn.Dropout(c.residual_dropout)
        self.text_blocks = nn.ModuleList(StreamBlock(c.stream) for _ in range(c.text_layers))
        self.vision_blocks = nn.ModuleList(StreamBlock(c.stream) for _ in range(c.vision_layers))
        self.cross_blocks = nn.ModuleList(CrossBlock(c.stream) for _ in range(c.cross_layers))
        self.pooler = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        self.head = BertHead(self.text.embed, c.activation, EPS) if c.pretraining else None
        self.matching_head = nn.Linear(width, 2) if c.pretraining else None
        regions = c.region_heads
        self.region_transform = transform(width, c.activation) if regions else None
        self.region_heads = nn.ModuleDict({name: nn.Linear(width, size) for name, size in regions.items()})
        self.answer_head = classifier(width, 2 * width, c.num_answers) if c.num_answers else None

    @classmethod
    def _read_config(cls, values: dict[str, Any], path: Path) -> LXMERTConfig:
        return LXMERTConfig.from_hf(values, str(path))

    @classmethod
    def _names(cls, config: LXMERTConfig) -> Names:
        return lxmert_weights.names(alone=not config.pretraining and config.num_answers is None)

    # The stages.

    def embed_regions(self, visual_feats: Tensor, visual_pos: Tensor) -> Tensor:
        """Returns ``[B, R, width]`` of regions' features ``[B, R, feature_width]`` and boxes ``[B, R, box_width]``."""
        dtype = self.features.weight.dtype
        features, boxes = self.features(visual_feats.to(dtype)), self.boxes(visual_pos.to(dtype))
        return self.dropout((self.features_norm(features) + self.boxes_norm(boxes)) / 2)

    def encode(
        self, input_ids: Tensor, visual_feats: Tensor, visual_pos: Tensor, token_type_ids: Tensor | None, masks: Masks
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the features of the text, ``[B, L, width]``, and of the regions, ``[B, R, width]``, of each layer."""
        text, vision = self.text(input_ids, token_type_ids), self.embed_regions(visual_feats, visual_pos)
        texts, visions = [], []
        for block in self.text_blocks:
            texts.append(text := block(text, masks.text))
        for block in self.vision_blocks:
            visions.append(vision := block(vision, masks.vision))
        for block in self.cross_blocks:
            text, vision = block(text, vision, masks)
            texts.append(text)
            visions.append(vision)
        return texts, visions

    def predict_regions(self, vision: Tensor) -> dict[str, Tensor]:
        """Returns what is predicted of regions: classes "obj" and "attr", features "feat"; ``[B, R, outputs]`` each.

        Args:
            vision: the features ``[B, R, width]`` that `forward` returned.
        """
        hidden = _head(self.region_transform, _REGIONS)(vision)
        return {name: head(hidden) for name, head in self.region_heads.items()}

    def forward(
        self,
        input_ids: Tensor,
        visual_feats: Tensor,
        visual_pos: Tensor,
        *,
        attention_mask: Tensor | None = None,
        visual_attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        matched_label: Tensor | None = None,
        obj_labels: Mapping[str, tuple[Tensor, Tensor]] | None = None,
        ans: Tensor | None = None,
        return_logits: bool | None = None,
    ) -> LXMERTOutput:
        """Returns features, logits of the model's heads, and the losses of the labels that are given.

        What is padding, or in a text or image that is padding altogether, is seen by nothing; where there is nothing to
        see, attention gives 0. (Hugging Face's class then attends to all of it alike.) There may be no regions.

        Args:
            input_ids: integers ``[B, L]``.
            visual_feats: floating ``[B, R, feature_width]``, of the regions.
            visual_pos: floating ``[B, R, box_width]``: their boxes, from 0 to 1.
            attention_mask: bool or integers ``[B, L]``, 0: padding.
            visual_attention_mask: ``[B, R]``, likewise.
            token_type_ids: integers ``[B, L]``; None: 0.
            labels: of the masked words, ``[B, L]``, -100: not predicted. Their loss builds no logits, and multiplies
                only the rows that have a label: see `mmkernels.linear_cross_entropy`.
            matched_label: int64 ``[B]``, 1: text and image belong together, 0: they don't, -100: ignored.
            obj_labels: for each of the heads "obj", "attr" and "feat" that the model has its targets, int64 ``[B, R]``
                or for "feat" ``[B, R, feature_width]``, and their weights ``[B, R]``: 0: not predicted.
            ans: the answers, int64 ``[B]``, -100: ignored; for ``LxmertForQuestionAnswering``, which calls them
                `labels`, too.
            return_logits: whether to compute the words' logits; None: unless there are `labels`.

        Raises:
            TypeError, ValueError: an input has a wrong type or shape, or another batch than the others; a text is empty
                or longer than `text_length`; labels are given for a head that the model does not have.
        """
        c = self.config
        regions = ("visual_feats", visual_feats, c.feature_width), ("visual_pos", visual_pos, c.box_width)
        seen = ("visual_attention_mask", visual_attention_mask)
        given = check_inputs(
            input_ids, token_type_ids, attention_mask, *regions, seen, embeddings=self.text, labels=labels
        )
        wanted = Labels(labels, matched_label, obj_labels, ans)
        self._check(wanted, (visual_feats.shape[0], visual_feats.shape[1]))
        masks = Masks.of(input_ids, visual_feats, *given, text_first=True)
        texts, visions = self.encode(input_ids, visual_feats, visual_pos, token_type_ids, masks)
        text, vision = texts[-1], visions[-1]
        pooled = self.pooler(text[:, 0])
        logits = labels is None if return_logits is None else return_logits
        return LXMERTOutput(
            text,
            vision,
            pooled,
            word_logits=self.head(text) if logits and self.head is not None else None,
            matching_logits=None if self.matching_head is None else self.matching_head(pooled),
            answer_logits=None if self.answer_head is None else self.answer_head(pooled),
            losses=self._losses(text, vision, pooled, wanted),
            text_states=tuple(texts),
            vision_states=tuple(visions),
        )

    def _check(self, labels: Labels, shape: tuple[int, int]) -> None:
        """Raises unless the labels fit the model's heads and (B, R), the inputs' rows and regions."""
        c, batch = self.config, shape[:1]
        if labels.words is not None:
            _head(self.head, "pretraining=True")
        if labels.matching is not None:
            _head(self.matching_head, "pretraining=True")
            check_classes("matched_label", labels.matching, batch, 2)
        if labels.regions is not None:
            _head(self.region_transform, _REGIONS)
            check_region_labels(labels.regions, c.region_heads, shape)
        if labels.answers is not None:
            _head(self.answer_head, "num_answers")
            check_classes("ans", labels.answers, batch, c.num_answers or 0)

    def _losses(self, text: Tensor, vision: Tensor, pooled: Tensor, labels: Labels) -> LXMERTLosses | None:
        """Returns the losses of the labels that are given; None: there are none."""
        words = matching = regions = answers = None
        if labels.words is not None:
            head: Any = self.head
            hidden = head.transform(text)
            words = masked_language_modelling_loss(hidden, head.last.weight, labels.words, bias=head.last.bias)
        if labels.matching is not None:
            head = self.matching_head
            matching = image_text_matching_loss(pooled, head.weight, labels.matching, bias=head.bias)
        if labels.regions is not None:
            hidden = cast(nn.Module, self.region_transform)(vision)
            regions = region_losses(hidden, self.region_heads, labels.regions, self.config.vision_loss_weight)
        if labels.answers is not None:
            *first, last = cast(Any, self.answer_head)
            hidden = nn.Sequential(*first)(pooled)
            answers = linear_cross_entropy(hidden, last.weight, labels.answers.long(), linear_bias=last.bias)
        found = LXMERTLosses(words, matching, regions, answers)
        return None if all(loss is None for loss in found) else found


_REGIONS = "num_objects, num_attributes or predict_features"


def _head(part: Any, what: str) -> Any:
    """Returns a part of the model; raises unless the model has it."""
    if part is None:
        raise ValueError(f"the model must have been made with {what} for these labels, got none: it has no such head")
    return part
