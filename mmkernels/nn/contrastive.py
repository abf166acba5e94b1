"""`ClipLoss` and `SigLipLoss`: open_clip's contrastive losses, over the ops that never build the logits."""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.nn.gather import divided_gradient, gather
from mmkernels.ops.contrastive.info_nce import info_nce
from mmkernels.ops.contrastive.inputs import check_scalar
from mmkernels.ops.contrastive.sigmoid_contrastive import local_share, sigmoid_contrastive

_EXCHANGES = ("bidir", "shift", "reduce", "gather")
"""The ways in which open_clip passes text features from rank to rank."""


class _OpenClipLoss(nn.Module):
    """The arguments and attributes that both losses share."""

    def __init__(self, cache_labels: bool, rank: int, world_size: int) -> None:
        super().__init__()
        if not _is_integer(world_size) or world_size < 1:
            raise ValueError(f"world_size must be a positive integer, got {world_size!r}")
        if not _is_integer(rank) or not 0 <= rank < world_size:
            raise ValueError(f"rank must be 0 to {world_size - 1}, as world_size is {world_size}; got {rank!r}")
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.prev_num_logits = 0  # where a subclass may cache labels; nothing here does
        self.labels: dict[torch.device, Tensor] = {}

    def _group(self) -> dist.ProcessGroup:
        """Returns the process group of all ranks; raises unless it is as this loss was told."""
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                f"torch.distributed must be initialised where world_size is {self.world_size}: call init_process_group"
            )
        for name, given, actual in (
            ("world_size", self.world_size, dist.get_world_size()),
            ("rank", self.rank, dist.get_rank()),
        ):
            if given != actual:
                raise ValueError(f"{name} must be that of the default process group, {actual}, got {given}")
        assert dist.group.WORLD is not None
        return dist.group.WORLD

    def _replaces(self, base: type[_OpenClipLoss], *methods: str) -> bool:
        """Whether a subclass of `base`, or an assignment to this object, replaces one of these methods of `base`."""
        # Of bound methods torch.compile takes each for another one than itself.
        own = type(self)
        return any(name in self.__dict__ or getattr(own, name) is not getattr(base, name) for name in methods)


class ClipLoss(_OpenClipLoss):
    """CLIP's loss, called as ``open_clip.ClipLoss``: the mean of both directions' cross-entropy.

    With several ranks, each calls it with its own pairs; text features pass from rank to rank (`info_nce` with a
    group), and none holds all features, or logits. Value and gradients on each rank are open_clip's; L is the loss of
    all pairs, W the number of ranks, and every rank calls ``loss.backward()``:

    ========== ================ ========= ================================================ ============================
    local_loss gather_with_grad returns   gradient of this rank's features                  of logit_scale
    ========== ================ ========= ================================================ ============================
    False      True             L         W dL/dx: after DDP's average that of one process  dL/ds
    True       True             own share W dL/dx, the same                                 dL/ds (open_clip: its share)
    False      False            L         dL/dx: after DDP's average 1/W of it              dL/ds
    True       False            own share of the own rows' losses by the own rows alone     dL/ds (open_clip: its share)
    ========== ================ ========= ================================================ ============================

    The own share is the mean of the losses of this rank's images and texts. A rank's share of the gradient of
    logit_scale differs from dL/ds only until DDP averages. Ranks may hold different numbers of pairs, or none, where
    open_clip fails: L is the mean over all pairs, and the own share is such that its mean over the ranks is L.

    A subclass may use or replace `get_logits` and `get_ground_truth`, as of open_clip's class. `forward` calls them
    only if one is replaced; it then builds the logits, and its memory and time are open_clip's.

    Args:
        local_loss, gather_with_grad: what ranks return and differentiate, see above; no effect on one rank.
        cache_labels: accepted without effect: there are no labels to cache.
        rank: the rank of this process.
        world_size: the number of ranks: those of the default process group, which is looked up in each call.
        use_horovod: must be False where `world_size` is above 1.

    Raises:
        ValueError: `world_size` is not a positive integer, `rank` is not one of its ranks, both are not those of the
            default process group, or Horovod is to be used.
        RuntimeError: `world_size` is above 1, and `torch.distributed` is not initialised.

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021, figure 3.

    Example:
        >>> import torch
        >>> from mmkernels.nn import ClipLoss  # instead of: from open_clip import ClipLoss
        >>> image, text = (torch.nn.functional.normalize(torch.randn(8, 64), dim=-1) for _ in range(2))
        >>> logit_scale = torch.tensor(14.3, requires_grad=True)
        >>> ClipLoss()(image, text, logit_scale).backward()
        >>> ClipLoss()(image, text, logit_scale, output_dict=True).keys()
        dict_keys(['contrastive_loss'])
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__(cache_labels, rank, world_size)
        if use_horovod and world_size > 1:
            raise ValueError(
                f"use_horovod must be False where world_size is above 1, got {use_horovod!r}: the exchange is that of "
                "torch.distributed"
            )
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.use_horovod = use_horovod

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Returns the loss, or ``{"contrastive_loss": loss}`` with `output_dict`.

        Args:
            image_features, text_features: ``[N, d]`` of one dtype, normalised; text i belongs to image i.
            logit_scale: the multiplier itself, already exponentiated: a number or a tensor of one element.
            logit_bias: a number or a tensor of one element. It shifts all logits equally, which changes neither the
                loss nor any other gradient; the gradient of `logit_bias` is 0.

        Returns:
            A scalar, fp64 for fp64 features and fp32 for all others. (open_clip's loss has the dtype of the logits; so
            has this one where a subclass replaces a method.)

        Raises:
            TypeError, ValueError: as `mmkernels.info_nce`.
        """
        if self._replaces(ClipLoss, "get_logits", "get_ground_truth"):
            bias = () if logit_bias is None else (logit_bias,)  # older versions' get_logits takes none
            logits = self.get_logits(image_features, text_features, logit_scale, *bias)
            labels = self.get_ground_truth(image_features.device, logits[0].shape[0])
            loss = (F.cross_entropy(logits[0], labels) + F.cross_entropy(logits[1], labels)) / 2
        else:
            loss = self._fused(image_features, text_features, logit_scale)
            if logit_bias is not None:
                # Kept in the graph, so that a parameter gets a gradient of 0: DDP waits for every gradient.
                loss = loss + 0.0 * check_scalar("logit_bias", logit_bias, image_features).reshape(())
        return {"contrastive_loss": loss} if output_dict else loss

    def _fused(self, image: Tensor, text: Tensor, logit_scale: Tensor | float) -> Tensor:
        if self.world_size == 1:
            loss: Tensor = info_nce(image, text, logit_scale)
            return loss
        group = self._group()
        if not self.local_loss:
            if not self.gather_with_grad:
                image, text = (divided_gradient(x, self.world_size) for x in (image, text))
            loss = info_nce(image, text, logit_scale, group=group)
            return loss
        rows = partial(info_nce, logit_scale=logit_scale, reduction="none", group=group)
        if self.gather_with_grad:
            of_images, of_texts = rows(image, text)
        else:  # to each direction the other side's features are constants
            of_images, of_texts = rows(image, text.detach())[0], rows(image.detach(), text)[1]
        pairs = torch.tensor([image.shape[0]], device=image.device)
        dist.all_reduce(pairs, group=group)
        return (of_images.sum() + of_texts.sum()) * self.world_size / (2 * pairs[0])

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Returns the logits of each image with each text ``[N, M]``, and of each text with each image ``[M, N]``.

        They take the memory that `forward` saves. With several ranks the features of all are gathered: logits are those
        of all images with all texts or, with `local_loss`, of this rank's rows with all ranks'. The arguments are those
        of `forward`; ranks must hold as many pairs.
        """
        if self.world_size == 1:
            logits = _logits(image_features, text_features, logit_scale, logit_bias)
            return logits, logits.T
        group = self._group()
        images, texts = (self._gathered(x, group) for x in (image_features, text_features))
        if not self.local_loss:
            logits = _logits(images, texts, logit_scale, logit_bias)
            return logits, logits.T
        return (
            _logits(image_features, texts, logit_scale, logit_bias),
            _logits(text_features, images, logit_scale, logit_bias),
        )

    def _gathered(self, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Returns all ranks' rows, differentiable as `local_loss` and `gather_with_grad` have it."""
        if self.gather_with_grad:
            return torch.cat(gather(x, group))
        parts = list(gather(x.detach(), group))
        if not self.local_loss:
            parts[self.rank] = x
        return torch.cat(parts)

    def get_ground_truth(self, device: torch.device | str, num_logits: int) -> Tensor:
        """Returns the column of each row's positive, int64 ``[num_logits]``: text i belongs to image i of one rank.

        Args:
            num_logits: rows of the logits.
        """
        first = num_logits * self.rank if self.world_size > 1 and self.local_loss else 0
        return torch.arange(first, first + num_logits, device=device)


class SigLipLoss(_OpenClipLoss):
    """SigLIP's loss, called as ``open_clip.SigLipLoss``: the sum over all pairs, divided by the number of images.

    With several ranks, each calls it with its own pairs, as `sigmoid_contrastive` with a group. Value and gradients on
    each rank are open_clip's: it returns the share of this rank's images with all texts, divided by the mean number of
    images of a rank, so that the mean over the W ranks is the loss L of all pairs. Where every rank calls
    ``loss.backward()``, features get W dL/dx, and logit_scale and logit_bias the gradient of this rank's share: after
    DDP's average all are those of one process. Ranks may hold different numbers of pairs, or none, where open_clip
    fails.

    A subclass may use or replace `get_logits` and `get_ground_truth`, as of open_clip's class. `forward` calls them
    only if one is replaced; it then builds the logits, and its memory and time are open_clip's.

    Args:
        cache_labels: accepted without effect: there are no labels to cache.
        rank: the rank of this process.
        world_size: the number of ranks: those of the default process group, which is looked up in each call.
        dist_impl: "bidir", "shift", "reduce", "gather" or None; accepted without effect: open_clip's four ways of
            passing features on have one result, and here features go round a ring.
        chunk_size: accepted without effect: memory is always linear in the features.

    Raises:
        ValueError: `world_size` is not a positive integer, `rank` is not one of its ranks, both are not those of the
            default process group, `dist_impl` is unknown, or `chunk_size` is negative.
        RuntimeError: `world_size` is above 1, and `torch.distributed` is not initialised.

    Source: Zhai et al., "Sigmoid Loss for Language Image Pre-Training", 2023, algorithm 1.

    Example:
        >>> import torch
        >>> from mmkernels.nn import SigLipLoss  # instead of: from open_clip import SigLipLoss
        >>> image, text = (torch.nn.functional.normalize(torch.randn(8, 64), dim=-1) for _ in range(2))
        >>> logit_scale, logit_bias = torch.tensor(10.0), torch.tensor(-10.0)
        >>> SigLipLoss()(image, text, logit_scale, logit_bias).shape
        torch.Size([])
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
    ) -> None:
        super().__init__(cache_labels, rank, world_size)
        self.dist_impl = _EXCHANGES[0] if dist_impl is None else dist_impl
        if self.dist_impl not in _EXCHANGES:
            raise ValueError(f"dist_impl must be one of {', '.join(_EXCHANGES)}, or None; got {dist_impl!r}")
        if not _is_integer(chunk_size) or chunk_size < 0:
            raise ValueError(f"chunk_size must be an integer >= 0, got {chunk_size!r}")
        self.chunk_size = chunk_size

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Returns the loss, or ``{"contrastive_loss": loss}`` with `output_dict`.

        Args:
            image_features, text_features: ``[N, d]`` of one dtype, normalised; text i belongs to image i.
            logit_scale: the multiplier itself, already exponentiated: a number or a tensor of one element.
            logit_bias: added to each logit; a number or a tensor of one element; None: 0.

        Returns:
            A scalar, fp64 for fp64 features and fp32 for all others. (open_clip's loss has the dtype of the logits; so
            has this one where a subclass replaces a method.)

        Raises:
            TypeError, ValueError: as `mmkernels.sigmoid_contrastive`.
        """
        inputs = (image_features, text_features, logit_scale, logit_bias)
        loss = self._loss(*inputs) if self.world_size == 1 else self._over_ranks(*inputs)
        return {"contrastive_loss": loss} if output_dict else loss

    def _over_ranks(
        self, image: Tensor, text: Tensor, logit_scale: Tensor | float, logit_bias: Tensor | float | None
    ) -> Tensor:
        """Returns this rank's share of the loss."""
        group = self._group()
        if not self._replaces(SigLipLoss, "get_logits", "get_ground_truth", "_loss"):
            return local_share(image, text, logit_scale, 0.0 if logit_bias is None else logit_bias, group=group)
        loss = self._loss(image, text, logit_scale, logit_bias)
        for rank, others in enumerate(gather(text, group)):
            if rank != self.rank:
                loss = loss + self._loss(image, others, logit_scale, logit_bias, negative_only=True)
        return loss

    def _loss(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        negative_only: bool = False,
    ) -> Tensor:
        """Returns the loss, by open_clip's name and arguments, as its subclasses call it.

        Args:
            negative_only: no text belongs to an image; then the logits are built.
        """
        if not negative_only and not self._replaces(SigLipLoss, "get_logits", "get_ground_truth"):
            bias = 0.0 if logit_bias is None else logit_bias
            return sigmoid_contrastive(image_features, text_features, logit_scale, bias)
        logits = self.get_logits(image_features, text_features, logit_scale, logit_bias)
        count, kind = image_features.shape[0], {"negative_only": True} if negative_only else {}
        signs = self.get_ground_truth(image_features.device, image_features.dtype, count, **kind)
        return -F.logsigmoid(signs * logits).sum() / count

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
    ) -> Tensor:
        """Returns the logits of each image with each text ``[N, M]``; they take the memory that `forward` saves.

        The arguments are those of `forward`.
        """
        return _logits(image_features, text_features, logit_scale, logit_bias)

    def get_ground_truth(
        self, device: torch.device | str, dtype: torch.dtype, num_logits: int, negative_only: bool = False
    ) -> Tensor:
        """Returns 1 for each pair that belongs together and -1 for all others, ``[num_logits, num_logits]``.

        Args:
            device, dtype: of the result.
            num_logits: the number of images, and of texts.
            negative_only: no pair belongs together.
        """
        signs = -torch.ones(num_logits, num_logits, device=device, dtype=dtype)
        return signs if negative_only else signs.fill_diagonal_(1)


def _logits(image: Tensor, text: Tensor, logit_scale: Tensor | float, logit_bias: Tensor | float | None) -> Tensor:
    """Returns ``logit_scale * image text' + logit_bias``, ``[N, M]``."""
    logits = logit_scale * image @ text.T
    return logits if logit_bias is None else logits + logit_bias


def _is_integer(x: object) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)
