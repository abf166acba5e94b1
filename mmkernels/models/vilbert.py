"""ViLBERT: two transformers, one of a text and one of an image's regions, which attend to each other in some layers.

Source: Lu et al., "ViLBERT: Pretraining Task-Agnostic Visiolinguistic Representations for Vision-and-Language Tasks",
2019, figure 1; its heads for many tasks: Lu et al., "12-in-1: Multi-Task Vision and Language Representation Learning",
2020.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmkernels.models import vilbert_weights
from mmkernels.models.blocks.bert import BertHead
from mmkernels.models.blocks.checkpoint import Names
from mmkernels.models.blocks.model import Model
from mmkernels.models.blocks.two_streams import (
    EPS,
    Masks,
    StreamBlock,
    TextEmbeddings,
    check_inputs,
    stream_mlp,
    transform,
)
from mmkernels.models.vilbert_config import SIZES, ViLBERTConfig
from mmkernels.models.vilbert_heads import (
    TaskHeads,
    ViLBERTLosses,
    ViLBERTTasks,
    check_labels,
    matching_loss,
    region_loss,
)
from mmkernels.nn import CoAttention
from mmkernels.objectives import masked_language_modelling_loss
from mmkernels.runtime.checks import check_range, check_tensor, is_known

BOX_WIDTH = 5
"""What says where a region is: the corners x1, y1, x2, y2 and the area, all from 0 to 1."""


class CrossBlock(nn.Module):
    """Each modality attends to the other one, with weights of its own, and has a feed-forward.

    Source: Lu et al., "ViLBERT", 2019, section 2.1, figure 2b.
    """

    def __init__(self, config: ViLBERTConfig) -> None:
        super().__init__()
        c, vision, text = config, config.stream("vision"), config.stream("text")
        self.cross = CoAttention(
            vision.width, text.width, c.shared_heads, head_dim=c.shared_width // c.shared_heads, dropout=text.dropout
        )
        self.vision_norm, self.text_norm = (nn.LayerNorm(s.width, eps=EPS) for s in (vision, text))
        self.vision_dropout, self.text_dropout = (nn.Dropout(s.residual_dropout) for s in (vision, text))
        self.vision_mlp, self.text_mlp = stream_mlp(vision), stream_mlp(text)

    def forward(self, vision: Tensor, text: Tensor, masks: Masks) -> tuple[Tensor, Tensor]:
        """Returns the features of both, ``[B, R, vision_width]`` and ``[B, L, text_width]``, after the block."""
        of_vision, of_text = self.cross(vision, text, mask=masks.both)
        vision = self.vision_norm(vision + self.vision_dropout(of_vision))
        text = self.text_norm(text + self.text_dropout(of_text))
        return self.vision_mlp(vision), self.text_mlp(text)


class States(NamedTuple):
    """What the transformers make of a text and an image.

    Attributes:
        text, vision: after each layer, in the order in which they run: ``[B, L, text_width]`` each, and
            ``[B, R, vision_width]``.
    """

    text: tuple[Tensor, ...]
    vision: tuple[Tensor, ...]


@dataclass
class ViLBERTOutput:
    """The result of `ViLBERT.forward`; None: it was not asked for, or the model has no such head.

    Attributes:
        text, vision: features of the tokens ``[B, L, text_width]`` (L + 1 with a task's token) and of the regions
            ``[B, R, vision_width]``.
        text_pooled, vision_pooled: what stands for each, ``[B, shared_width]``, made of the first token or region.
        word_logits: ``[B, L, vocab_size]``; None with `labels`, where they were not asked for.
        region_logits: ``[B, R, target_width]``; None as these.
        matching_logits: ``[B, 2]``, class 0: they belong together.
        tasks: what the heads of downstream tasks say.
        losses: None without labels.
        states: the features after each layer.
    """

    text: Tensor
    vision: Tensor
    text_pooled: Tensor
    vision_pooled: Tensor
    word_logits: Tensor | None
    region_logits: Tensor | None
    matching_logits: Tensor
    tasks: ViLBERTTasks | None
    losses: ViLBERTLosses | None
    states: States

    @property
    def loss(self) -> Tensor | None:
        """The sum of the losses; None without labels."""
        return None if self.losses is None else self.losses.total


class ViLBERT(Model):
    """Reads a text and the regions that a detector found in an image, in two transformers.

    In some layers each attends to the other, both directions in one call of the attention's kernel.

    `from_pretrained` reads a folder with the weights of the authors' code, ``BertForMultiModalPreTraining`` or
    ``VILBertForVLTasks``, as ``model.safetensors``, and the code's JSON file as ``config.json``, see
    `ViLBERTConfig.from_release`. Released are pickles, which must be converted once, with
    ``safetensors.torch.save_file({k: x.clone() for k, x in torch.load(path, weights_only=True).items()}, ...)``.

    Positions count from the first token of a row: pad on the right. The first token stands for the text. The first
    region stands for the image: the mean of all regions' features, with the box (0, 0, 1, 1, 1).

    Args:
        config: the sizes. Models are usually made by `from_size` or `from_pretrained`.

    Example:
        >>> import torch
        >>> from mmkernels.models import ViLBERT
        >>> model = ViLBERT.from_size("tiny").eval()
        >>> words, regions, boxes = torch.randint(1, 128, (2, 6)), torch.rand(2, 5, 20), torch.rand(2, 5, 5)
        >>> out = model(words, regions, boxes)
        >>> out.vision.shape, out.tasks.answers.shape
        (torch.Size([2, 5, 24]), torch.Size([2, 13]))
        >>> model(words[:1], regions, boxes).tasks.score.shape  # one caption, several images
        torch.Size([2])
        >>> model(words, regions, boxes, labels=words).loss.shape
        torch.Size([])
    """

    sizes = SIZES
    config: ViLBERTConfig

    def __init__(self, config: ViLBERTConfig) -> None:
        super().__init__(config)
        c = config
        text, vision = c.stream("text"), c.stream("vision")
        self.text = TextEmbeddings(
            text.width,
            vocab=c.vocab_size,
            length=c.text_length,
            types=c.token_types,
            dropout=text.residual_dropout,
            untrained_first=False,
        )
        self.tasks = nn.Embedding(c.task_tokens, text.width) if c.task_tokens else None
        self.features, self.boxes = nn.Linear(c.feature_width, vision.width), nn.Linear(BOX_WIDTH, vision.width)
        self.vision_norm, self.dropout = nn.LayerNorm(vision.width, eps=EPS), nn.Dropout(text.residual_dropout)
        self.text_blocks = nn.ModuleList(StreamBlock(text) for _ in range(c.text_layers))
        self.vision_blocks = nn.ModuleList(StreamBlock(vision) for _ in range(c.vision_layers))
        self.cross_blocks = nn.ModuleList(CrossBlock(c) for _ in c.cross_text)
        self.text_pooler, self.vision_pooler = (
            nn.Sequential(nn.Linear(s.width, c.shared_width), nn.ReLU()) for s in (text, vision)
        )
        self.fusion_dropout = nn.Dropout(c.fusion_dropout)
        self.head = BertHead(self.text.embed, c.text_activation, EPS)
        self.matching_head = nn.Linear(c.shared_width, 2)
        self.region_head = transform(vision.width, c.text_activation)  # by the text's activation, as in the code
        self.region_head.append(nn.Linear(vision.width, c.target_width))
        self.task_heads = TaskHeads(c) if c.tasks else None

    @classmethod
    def _read_config(cls, values: dict[str, Any], path: Path) -> ViLBERTConfig:
        return ViLBERTConfig.from_release(values, str(path))

    @classmethod
    def _names(cls, config: ViLBERTConfig) -> Names:
        return vilbert_weights.NAMES

    # The stages.

    def embed_text(self, input_ids: Tensor, token_type_ids: Tensor | None, task_ids: Tensor | None) -> Tensor:
        """Returns ``[B, L, text_width]``; ``[B, L + 1, text_width]`` with a task's token behind the first one."""
        x = self.text.sum(input_ids, token_type_ids)
        if self.tasks is not None:
            assert task_ids is not None
            task = self.tasks(task_ids).expand(x.shape[0], -1)[:, None]
            x = torch.cat([x[:, :1], task, x[:, 1:]], dim=1)
        return self.text.dropout(self.text.norm(x))

    def embed_regions(self, visual_feats: Tensor, visual_pos: Tensor) -> Tensor:
        """Returns ``[B, R, vision_width]`` of regions' features ``[B, R, feature_width]`` and boxes ``[B, R, 5]``."""
        dtype = self.features.weight.dtype
        return self.dropout(self.vision_norm(self.features(visual_feats.to(dtype)) + self.boxes(visual_pos.to(dtype))))

    def encode(self, text: Tensor, vision: Tensor, masks: Masks, batch: int) -> States:
        """Returns the features after each layer.

        A batch of 1 of one side is read alone once, and spread where it first meets the other one.

        Args:
            text, vision: embeddings ``[B or 1, L, text_width]`` and ``[B or 1, R, vision_width]``.
            masks: of both.
            batch: B.
        """
        c, texts, visions = self.config, [text], [vision]
        ends = (*zip(c.cross_text, c.cross_vision, strict=True), (c.text_layers, c.vision_layers))
        done_text = done_vision = 0
        for index, (end_text, end_vision) in enumerate(ends):
            for block in self.text_blocks[done_text:end_text]:
                texts.append(block(texts[-1], masks.text))
            for block in self.vision_blocks[done_vision:end_vision]:
                visions.append(block(visions[-1], masks.vision))
            done_text, done_vision = end_text, end_vision
            if index < len(self.cross_blocks):
                both = visions[-1].expand(batch, -1, -1), texts[-1].expand(batch, -1, -1)
                vision, text = self.cross_blocks[index](*both, masks)
                texts.append(text)
                visions.append(vision)
        return States(tuple(texts[1:]), tuple(visions[1:]))

    def forward(
        self,
        input_ids: Tensor,
        visual_feats: Tensor,
        visual_pos: Tensor,
        *,
        attention_mask: Tensor | None = None,
        visual_attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        task_ids: Tensor | None = None,
        labels: Tensor | None = None,
        matched_label: Tensor | None = None,
        region_label: Tensor | None = None,
        region_target: Tensor | None = None,
        paired: bool = False,
        return_logits: bool | None = None,
    ) -> ViLBERTOutput:
        """Returns features, logits of the model's heads, and the losses of the labels that are given.

        What is padding is seen by nothing; where there is nothing to see, attention gives 0.

        Args:
            input_ids: integers ``[B, L]``; of batch 1: one text for all images.
            visual_feats: floating ``[B, R, feature_width]``, of the regions; of batch 1: one image for all texts.
            visual_pos: floating ``[B, R, 5]``: x1, y1, x2, y2 and the area of their boxes, all from 0 to 1.
            attention_mask: bool or integers ``[B, L]``, 0: padding.
            visual_attention_mask: ``[B, R]``, likewise.
            token_type_ids: integers ``[B, L]``; None: 0.
            task_ids: integers ``[B]``, whose token each text gets; for a model with `task_tokens`, which needs them.
            labels: of the masked words, ``[B, L]``, -100: not predicted. Their loss builds no logits, and multiplies
                only the rows that have a label: see `mmkernels.linear_cross_entropy`.
            matched_label: int64 ``[B]``, 0: text and image belong together, 1: they don't, -100: ignored.
            region_label: bool or integers ``[B, R - 1]``, 1: what this region shows is predicted. The first region,
                which stands for the image, has none.
            region_target: floating ``[B, R - 1, target_width]``: class probabilities, or features.
            paired: whether rows 2 i and 2 i + 1 are a statement and two images that it is about: B is even, and the
                model has the heads of tasks.
            return_logits: whether to compute the logits of words and regions; None: unless there are `labels`.

        Raises:
            TypeError, ValueError: an input has a wrong type or shape, or another batch than the others; a text is empty
                or longer than `text_length`; there is no region; an input is of no use to this model.
        """
        c = self.config
        regions = ("visual_feats", visual_feats, c.feature_width), ("visual_pos", visual_pos, BOX_WIDTH)
        given = check_inputs(
            input_ids, token_type_ids, attention_mask, *regions, ("visual_attention_mask", visual_attention_mask),
            embeddings=self.text, labels=labels, one_for_all=True,
        )  # fmt: skip
        if visual_feats.shape[1] == 0:
            raise ValueError("visual_feats must have a region at least, the first of which stands for the image, got 0")
        batch = visual_feats.shape[0] if is_known(input_ids.shape[0] == 1) else input_ids.shape[0]
        self._check_tasks(task_ids, input_ids.shape[0], batch if paired else None)
        predicted = (visual_feats.shape[0], visual_feats.shape[1] - 1, c.target_width)
        check_labels(matched_label, region_label, region_target, batch, predicted, c.region_target)
        text = self.embed_text(input_ids, token_type_ids, task_ids)
        valid = given.valid
        if valid is not None and self.tasks is not None:
            valid = torch.cat([torch.ones_like(valid[:, :1]), valid], dim=1)
        masks = Masks.of(text, visual_feats, valid, given.seen, text_first=False)
        states = self.encode(text, self.embed_regions(visual_feats, visual_pos), masks, batch)
        text, vision = states.text[-1], states.vision[-1]
        text_pooled, vision_pooled = self.text_pooler(text[:, 0]), self.vision_pooler(vision[:, 0])
        fused = text_pooled * vision_pooled if c.fusion == "mul" else text_pooled + vision_pooled
        matching = self.matching_head(self.fusion_dropout(fused))
        losses = ViLBERTLosses(
            None if labels is None else self._word_loss(text, labels),
            None if matched_label is None else matching_loss(matching, matched_label),
            None if region_label is None else self._region_loss(vision, region_label, region_target),
        )
        wanted = labels is None if return_logits is None else return_logits
        return ViLBERTOutput(
            text,
            vision,
            text_pooled,
            vision_pooled,
            word_logits=self.head(text) if wanted else None,
            region_logits=self.region_head(vision) if wanted else None,
            matching_logits=matching,
            tasks=None if self.task_heads is None else self.task_heads(fused, text, vision, given.seen, paired=paired),
            losses=None if all(loss is None for loss in losses) else losses,
            states=states,
        )

    def _check_tasks(self, task_ids: Tensor | None, batch: int, paired: int | None) -> None:
        """Raises unless tasks fit texts and model; `paired`: the number of rows that are pairs, None: they are none."""
        if paired is not None and (self.task_heads is None or paired % 2 or not paired):
            must = "False where the batch is odd or empty, or the model was made with tasks=False"
            raise ValueError(f"paired must be {must}, got True")
        if (task_ids is None) != (self.tasks is None):
            must, got = ("None", "a tensor") if self.tasks is None else ("given", "None")
            raise ValueError(f"task_ids must be {must} where task_tokens is {self.config.task_tokens}, got {got}")
        if task_ids is None or self.tasks is None:
            return
        check_tensor("task_ids", task_ids)
        if task_ids.dtype not in (torch.int32, torch.int64) or tuple(task_ids.shape) != (batch,):
            raise ValueError(f"task_ids must be integers [{batch}], got {task_ids.dtype} {tuple(task_ids.shape)}")
        check_range("task_ids", task_ids, 0, self.tasks.num_embeddings - 1)

    def _word_loss(self, text: Tensor, labels: Tensor) -> Tensor:
        if self.tasks is not None:  # the task's token is not predicted
            labels = torch.cat([labels[:, :1], torch.full_like(labels[:, :1], -100), labels[:, 1:]], dim=1)
        hidden, labels = self.head.transform(text), labels.expand(text.shape[0], -1)  # one text may be for all images
        return masked_language_modelling_loss(hidden, self.head.last.weight, labels, bias=self.head.last.bias)

    def _region_loss(self, vision: Tensor, label: Tensor, target: Tensor | None) -> Tensor:
        assert target is not None
        return region_loss(self.region_head(vision[:, 1:]), label, target, self.config.region_target)
