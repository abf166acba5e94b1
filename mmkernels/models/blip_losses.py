"""BLIP's losses, and its contrast against features of a momentum model and a queue of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

from torch import Tensor
from torch.distributed import ProcessGroup

from mmkernels.nn.cross_attention import KeyValue
from mmkernels.objectives import MatchingPairs
from mmkernels.ops.contrastive.info_nce import info_nce

T = TypeVar("T")


class BLIPLosses(NamedTuple):
    """The three losses of pre-training, scalars; float64 for float64 weights, else float32.

    Attributes:
        contrastive: of images and texts (ITC).
        matching: of pairs, with hard negatives (ITM).
        generation: of the texts' tokens (LM); None: the model does not write texts.
    """

    contrastive: Tensor
    matching: Tensor
    generation: Tensor | None

    @property
    def total(self) -> Tensor:
        """Their sum, the loss of the paper's section 3.2."""
        both = self.contrastive + self.matching
        return both if self.generation is None else both + self.generation


class MomentumFeatures(NamedTuple):
    """Contrastive features of a momentum model, which have no gradient.

    Attributes:
        images, texts: of the batch, ``[N, d]``.
        more_images, more_texts: of earlier batches, ``[K, d]``.
        more_ids: what each of the earlier pairs is about, integers ``[K]``; None: no earlier pair is about the same as
            one of the batch.
    """

    images: Tensor
    texts: Tensor
    more_images: Tensor
    more_texts: Tensor
    more_ids: Tensor | None = None


def contrastive_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    *,
    ids: Tensor | None = None,
    momentum: MomentumFeatures | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Returns the mean of both directions' contrastive losses, a scalar.

    Without `momentum` it is that of the batch. With it, images are compared to texts as the momentum model sees them,
    those of the batch and of earlier ones, and texts to images likewise. The targets are the pairs that belong
    together: ALBEF and BLIP blend them with the momentum model's own softmax (ALBEF's equation 6), which
    `mmkernels.info_nce` does not do, as its targets are never of the logits' size.

    Args:
        image, text: contrastive features ``[N, d]``.
        logit_scale: the multiplier itself.
        ids: what each pair is about, integers ``[N]``; pairs of one id are positives of each other.
        momentum: of the same pairs, and of earlier ones.
        group: ranks that compute the loss together, as in `mmkernels.info_nce`; earlier pairs stay local.

    Source: Li et al., "Align before Fuse" (ALBEF), 2021, section 3.2, equations 1 and 2; so in BLIP (2022).
    """
    if momentum is None:
        loss: Tensor = info_nce(image, text, logit_scale, image_ids=ids, group=group)
        return loss
    m = momentum
    directions = ((image, m.texts, m.more_texts), (text, m.images, m.more_images))
    of_images, of_texts = (
        info_nce(
            x, y, logit_scale, image_ids=ids, hard_texts=more, hard_text_ids=m.more_ids, image_weight=1.0, group=group
        )
        for x, y, more in directions
    )
    return (of_images + of_texts) / 2


def paired(
    texts: T, rows: Callable[[Tensor], T], pairs: MatchingPairs, key_values: list[KeyValue]
) -> Iterator[tuple[T, list[KeyValue]]]:
    """Yields the 3 N pairs of `matching_pairs` in three parts of N: texts, and each layer's keys and values of images.

    The images of the first two parts are those of the batch in their order: nothing is copied.

    Args:
        texts: of the batch, in any form.
        rows: takes indices, int64 ``[n]``, and returns these texts in the same form.
        pairs: of images and texts.
        key_values: of the batch's images.
    """
    count = pairs.labels.shape[0] // 3
    yield texts, key_values
    yield rows(pairs.texts[count : 2 * count]), key_values
    images = pairs.images[2 * count :]
    yield texts, [(key[images], value[images]) for key, value in key_values]
