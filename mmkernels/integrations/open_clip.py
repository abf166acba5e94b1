"""open_clip's losses by their names: one import in a training script of open_clip 2.x, 3.x or 4.x replaces them.

open_clip need not be installed, but for `create_task` and for the losses that stay its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.nn.contrastive import ClipLoss, SigLipLoss

__all__ = ["ClipLoss", "CoCaLoss", "SigLipLoss", "create_loss", "create_task", "replace_loss"]


class CoCaLoss(ClipLoss):
    """CoCa's two losses, constructed and called as ``open_clip.CoCaLoss``: contrastive, and of the captions' words.

    The contrastive one is `ClipLoss`, on one rank or several. The captions' is the mean cross-entropy of the words that
    are not padding, of logits that the model has computed.

    Args:
        caption_loss_weight, clip_loss_weight: what the two are multiplied by. With a `clip_loss_weight` of 0 the
            contrastive loss is not computed, and is an integer 0.
        pad_id: the label that does not count.
        local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod: see `ClipLoss`.

    Raises:
        ValueError, RuntimeError: as `ClipLoss`.

    Source: Yu et al., "CoCa: Contrastive Captioners are Image-Text Foundation Models", 2022, section 3.2.

    Example:
        >>> import torch
        >>> from mmkernels.integrations.open_clip import CoCaLoss  # instead of: from open_clip import CoCaLoss
        >>> image, text = (torch.nn.functional.normalize(torch.randn(8, 64), dim=-1) for _ in range(2))
        >>> logits, labels = torch.randn(8, 5, 100), torch.randint(1, 100, (8, 5))
        >>> losses = CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)(
        ...     image, text, logits, labels, torch.tensor(14.3), output_dict=True)
        >>> list(losses)
        ['contrastive_loss', 'caption_loss']
    """

    def __init__(
        self,
        caption_loss_weight: float,
        clip_loss_weight: float,
        pad_id: int = 0,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__(local_loss, gather_with_grad, cache_labels, rank, world_size, use_horovod)
        self.clip_loss_weight = clip_loss_weight
        self.caption_loss_weight = caption_loss_weight
        self.caption_loss = nn.CrossEntropyLoss(ignore_index=pad_id)

    def forward(  # type: ignore[override]  # open_clip's has other arguments than its ClipLoss's, too
        self,
        image_features: Tensor,
        text_features: Tensor,
        logits: Tensor,
        labels: Tensor,
        logit_scale: Tensor | float,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """Returns the weighted contrastive and caption loss, with `output_dict` by name.

        Args:
            image_features, text_features: ``[N, d]``, see `ClipLoss`.
            logits: ``[N, L, V]`` of the words.
            labels: int64 ``[N, L]``, the words; `pad_id` where there is none.
            logit_scale: the multiplier itself, already exponentiated.
        """
        contrastive = torch.tensor(0, device=logits.device)
        if self.clip_loss_weight:
            loss = super().forward(image_features, text_features, logit_scale)
            assert isinstance(loss, Tensor)
            contrastive = self.clip_loss_weight * loss
        # Rows of [N L, V] lie in memory as they are; open_clip's [N, V, L] has the words' logits far apart.
        caption = self.caption_loss(logits.flatten(0, 1), labels.flatten()) * self.caption_loss_weight
        if output_dict:
            return {"contrastive_loss": contrastive, "caption_loss": caption}
        return contrastive, caption


_SHARED = ("cache_labels", "rank", "world_size")
_OPTIONS: dict[str, tuple[Callable[..., nn.Module], tuple[str, ...]]] = {
    "ClipLoss": (ClipLoss, ("local_loss", "gather_with_grad", *_SHARED)),
    "SigLipLoss": (SigLipLoss, ("dist_impl", *_SHARED)),
    "CoCaLoss": (
        CoCaLoss,
        ("caption_loss_weight", "clip_loss_weight", "local_loss", "gather_with_grad", *_SHARED),
    ),
}
"""Of each of open_clip's classes, ours and the options that both keep as attributes."""


def replace_loss(loss: nn.Module) -> nn.Module:
    """Returns our loss with the options of one of open_clip's, or the loss itself if we have none for it.

    Args:
        loss: a module. ``ClipLoss``, ``SigLipLoss`` and ``CoCaLoss`` of open_clip are replaced; a class derived from
            one of them is not, nor is a loss for distillation, which needs the logits.

    Raises:
        ValueError: the loss uses Horovod on several ranks.

    Example:
        >>> import torch
        >>> from mmkernels.integrations.open_clip import replace_loss
        >>> replace_loss(torch.nn.MSELoss())  # not open_clip's
        MSELoss()
    """
    theirs = type(loss)
    if not theirs.__module__.startswith("open_clip") or theirs.__name__ not in _OPTIONS:
        return loss
    ours, names = _OPTIONS[theirs.__name__]
    options = {name: getattr(loss, name) for name in names}
    if getattr(loss, "use_horovod", False):
        options["use_horovod"] = True
    if ours is CoCaLoss:
        caption: Any = loss.caption_loss
        options["pad_id"] = caption.ignore_index
    return ours(**options).train(loss.training)


def create_loss(args: Any) -> nn.Module:
    """Returns the loss that the options of a training run ask for, as ``open_clip.create_loss``.

    Args:
        args: open_clip's parsed options: ``model``, ``distill``, ``siglip``, ``local_loss``, ``gather_with_grad``,
            ``rank``, ``world_size``, ``loss_dist_impl`` and, for CoCa, ``coca_caption_loss_weight`` and
            ``coca_contrastive_loss_weight``. With ``distill``, and for GenLIP, the loss is open_clip's own.

    Raises:
        ImportError: the loss is open_clip's own, and open_clip can't be imported.

    Example:
        >>> from types import SimpleNamespace
        >>> from mmkernels.integrations.open_clip import create_loss  # instead of: from open_clip import create_loss
        >>> args = SimpleNamespace(model="ViT-B-32", distill=False, siglip=False, local_loss=True,
        ...     gather_with_grad=True, rank=0, world_size=1)
        >>> create_loss(args)
        ClipLoss()
    """
    name = args.model.lower()
    coca = "coca" in name
    if args.distill or (not coca and ("genlip" in name or "genlap" in name)):
        import open_clip

        theirs: nn.Module = open_clip.create_loss(args)
        return theirs
    ranks = {"rank": args.rank, "world_size": args.world_size}
    if args.siglip and not coca:
        return SigLipLoss(dist_impl=args.loss_dist_impl, **ranks)
    sharing = {"local_loss": args.local_loss, "gather_with_grad": args.gather_with_grad}
    horovod = {"use_horovod": getattr(args, "horovod", False)}  # which 4.x does not have
    if coca:
        return CoCaLoss(
            args.coca_caption_loss_weight, args.coca_contrastive_loss_weight,
            cache_labels=True, **{**sharing, **ranks, **horovod},
        )  # fmt: skip
    return ClipLoss(cache_labels=True, **sharing, **ranks, **horovod)


def create_task(args: Any, model: nn.Module, *others: Any, **options: Any) -> Any:
    """Returns ``open_clip.create_task(args, model, ...)`` of open_clip 4.x, whose loss is replaced: see `replace_loss`.

    Raises:
        ImportError: open_clip can't be imported, or is older than 4.

    Example:
        >>> import sys, types, torch
        >>> task = torch.nn.Module()  # stands for a task of open_clip
        >>> sys.modules["open_clip"] = types.SimpleNamespace(create_task=lambda args, model: task)
        >>> from mmkernels.integrations.open_clip import create_task
        >>> create_task(None, torch.nn.Identity()) is task
        True
        >>> del sys.modules["open_clip"]
    """
    import open_clip

    if not hasattr(open_clip, "create_task"):
        raise ImportError(
            f"create_task needs open_clip 4, got {getattr(open_clip, '__version__', 'an older one')}: it is a part of "
            "4.x; with 3.x call create_loss"
        )
    task = open_clip.create_task(args, model, *others, **options)
    if isinstance(getattr(task, "loss", None), nn.Module):
        task.loss = replace_loss(task.loss)
    return task
