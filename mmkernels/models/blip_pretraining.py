"""`BLIPPretraining`: BLIP's three losses, with a momentum model and queues of its features."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Generator, Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mmkernels.models.blip import BLIP
from mmkernels.models.blip_losses import BLIPLosses, MomentumFeatures
from mmkernels.nn.feature_queue import FeatureQueue
from mmkernels.nn.gather import gather
from mmkernels.runtime.checks import check_number


class BLIPPretraining(nn.Module):
    """The three losses of a `BLIP`: the module that is trained, and that DDP wraps.

    Images are compared to the texts of the batch and of earlier batches as a momentum model sees them, and texts to
    images likewise. The momentum model is a moving average of the model (PyTorch's `AveragedModel`); its features of
    earlier batches lie in two queues. After each step of the optimiser call `update`, which moves the average and fills
    the queues. ``state_dict`` holds all of it.

    Args:
        model: with the heads of retrieval, and that of generation or not.
        queue_size: pairs of earlier batches, 57,600 in the authors' configuration; None: there is no momentum
            model, and the pairs of a batch are compared to each other.
        decay: of the moving average.
        ids: whether pairs of different batches may be about the same: then each batch comes with `ids`.
        group: ranks that compute the contrastive loss together, as in `mmkernels.info_nce`; the queues then hold the
            pairs of all ranks, which must have equally many.

    Raises:
        TypeError: `model` is no `BLIP`, or `decay` no number. ValueError: `queue_size` is not a positive integer,
            `decay` is not between 0 and 1, the model has no heads of retrieval, or has weights of 16 bits, whose moving
            average would stand still.

    Source: Li et al., "BLIP", 2022, section 3.2; the momentum model as in Li et al., "Align before Fuse" (ALBEF), 2021,
    section 3.2, but for its soft targets: see `contrastive_loss`.

    Example:
        >>> import torch
        >>> from mmkernels.models import BLIP, BLIPPretraining
        >>> pretraining = BLIPPretraining(BLIP.from_size("tiny"), queue_size=8)
        >>> optimizer = torch.optim.AdamW(pretraining.model.parameters(), lr=1e-4)
        >>> texts, images = torch.randint(4, 128, (2, 6)), torch.rand(2, 3, 32, 32)
        >>> pretraining(texts, images).total.backward()
        >>> optimizer.step()
        >>> pretraining.update()
        >>> pretraining.texts.features.shape
        torch.Size([2, 24])
    """

    def __init__(
        self,
        model: BLIP,
        *,
        queue_size: int | None = 57_600,
        decay: float = 0.995,
        ids: bool = False,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, BLIP):
            raise TypeError(f"model must be a BLIP, got {type(model).__name__}")
        if not model.config.retrieval:
            raise ValueError("model must have been made with retrieval=True, got False: there is nothing to compare")
        decay = check_number("decay", decay, "between 0 and 1", 0.0, 1.0)
        self.model = model
        self.group = group
        self.momentum: AveragedModel | None = None
        self._waiting: list[tuple[Tensor, Tensor, Tensor | None]] = []  # images, texts, ids since the last update
        if queue_size is None:
            return
        weight = model.text.embed.weight
        if weight.dtype not in (torch.float32, torch.float64):
            must = (
                "model must have float32 or float64 weights where there is a momentum model; use autocast for 16 bits"
            )
            raise ValueError(f"{must}, which round away the steps of a moving average; got {weight.dtype}")
        make = partial(FeatureQueue, queue_size, model.config.embed_dim, ids=ids)
        self.images, self.texts = (make(dtype=weight.dtype, device=weight.device) for _ in range(2))
        self.momentum = AveragedModel(model, multi_avg_fn=partial(_move, decay)).requires_grad_(False)
        self.momentum.update_parameters(model)  # the first call copies: the average begins here

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        ids: Tensor | None = None,
        generator: Generator | None = None,
    ) -> BLIPLosses:
        """Returns the losses; the arguments are those of `BLIP.losses`. In training mode `update` must follow."""
        momentum = None
        if self.momentum is not None:
            momentum = self._momentum_features(input_ids, pixel_values, attention_mask, ids)
            if self.training:
                self._waiting.append((momentum.images, momentum.texts, ids))
        return self.model.losses(
            input_ids,
            pixel_values,
            attention_mask,
            labels=labels,
            ids=ids,
            momentum=momentum,
            group=self.group,
            generator=generator,
        )

    @torch.no_grad()
    def _momentum_features(
        self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor | None, ids: Tensor | None
    ) -> MomentumFeatures:
        if (ids is None) != (self.images.ids is None):
            must, got = ("given", "None") if ids is None else ("None", "a tensor")
            raise ValueError(f"ids must be {must} where ids={ids is None}, got {got}")
        assert self.momentum is not None
        model = cast(BLIP, self.momentum.module)
        return MomentumFeatures(
            model.encode_image(pixel_values),
            model.encode_text(input_ids, attention_mask),
            self.images.features,
            self.texts.features,
            self.images.ids,
        )

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average, and puts the features of the batches since the last call into the queues.

        To be called after the optimiser's step. (PyTorch's `AveragedModel` waits for the device here if it is on one.)
        """
        if self.momentum is None:
            return
        for images, texts, ids in self._waiting:
            ids = None if ids is None else self._of_all_ranks(ids)
            self.images.push(self._of_all_ranks(images), ids)
            self.texts.push(self._of_all_ranks(texts), ids)
        self._waiting.clear()
        self.momentum.update_parameters(self.model)

    def _of_all_ranks(self, x: Tensor) -> Tensor:
        return x if self.group is None else torch.cat(gather(x, self.group))


def _move(decay: float, average: Any, current: Any, steps: Any) -> None:
    """Moves the average by PyTorch's function, which itself can't be pickled."""
    get_ema_multi_avg_fn(decay)(average, current, steps)
